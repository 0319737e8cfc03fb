"""Pieces of printed cloth on textured photographs, with segmentation masks.

Each of the hundred classes is one print: a pattern of six waves in random colours that repeats
every ten pixels, so that a patch of 8×8 shows much of it and a single pixel nothing. Place, size,
turn, shape, folds, light, tint, noise and transparency of the cloth differ in every image. The
backgrounds are the two photographs that scikit-learn ships, and the splits share no region of them.

Shape letters: H rows and W columns of an image or of a print's tile, 3 channels.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import uniform_filter
from sklearn.datasets import load_sample_images

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
CLASS_NAMES: tuple[str, ...] = tuple(f"print{number:02d}" for number in range(100))
IMAGE_SIZE = 64

_PRINTS_SEED = 77
_WAVES = ((1, 0), (0, 1), (1, 1), (1, -1), (2, 0), (0, 2))  # across and down, in a period
_PERIOD = 10.0
_TILE_SIZE = 40
_BASE_COLOURS = (70, 190)
_PATTERN_SD = 60

_RADIUS = (20.0, 6.0)  # middle, and reach around it
_ASPECT = 0.2
_TURN_DEGREES = 40
_SCALE = 0.22
_CORNERS = (2.0, 8.0)  # exponents of a superellipse: from an ellipse to nearly a rectangle
_FOLD, _FOLD_LENGTH = 1.5, 9.0
_LIGHT, _TINT = 0.25, 0.12  # standard deviations of log brightness, of all and of each channel
_SHADE = 0.3
_NOISE = 28.0
_OPACITY = (0.4, 0.95)

_BACKGROUND_SHARES = {"train": (0.0, 0.60), "validation": (0.60, 0.75), "test": (0.75, 1.0)}
_GREY = 0.38 * 255
_BACKGROUND_SD = 0.16 * 255
_MIN_PATCH_SD = 0.035 * 255
_CROP_SIZES = (48, 64, 80, 96)
_CROP_STEP = 4


@dataclass(frozen=True)
class _Material:
    """Backgrounds of one split.

    Photograph regions, and the textured crops of these (region, x, y, size), int64 [crops, 4].
    """

    photographs: tuple[Image.Image, ...]
    crops: NDArray[np.int64]


def background_columns(split: Split, width: int = 640) -> tuple[int, int]:
    """First and one-past-last pixel column that `split` may use of a photograph `width` wide."""
    first, stop = _BACKGROUND_SHARES[split]
    return round(first * width), round(stop * width)


def draw(
    split: Split, label: int, seed: int, difficulty: float = 1.0, clutter: float = 1.0
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Draw one image of the print `label`, fully determined by the arguments.

    Args:
        split: whose photograph regions to use.
        label: the print, 0 to 99; also the index into `CLASS_NAMES`.
        seed: any non-negative integer.
        difficulty: 0 to 1, scales all variation of the cloth.
        clutter: 0 to 1, scales the contrast of the background; 0 is plain grey.

    Returns:
        The image, uint8 RGB [64, 64, 3], and the mask of its cloth, bool [64, 64].

    Raises:
        ValueError: for an unknown split or a label outside 0 to 99.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: use one of {', '.join(SPLITS)}")
    if not 0 <= label < len(CLASS_NAMES):
        raise ValueError(f"label {label} is out of range: use 0 to {len(CLASS_NAMES) - 1}")
    rng = np.random.default_rng([SPLITS.index(split), label, seed])
    canvas_HW3 = _background(_material(split), clutter, rng)
    u_HW, v_HW, shape_HW = _cloth(difficulty, rng)
    cloth_HW3 = _lit(_tile(label)[_places(v_HW), _places(u_HW)], difficulty, rng)
    opacity = _OPACITY[1] - difficulty * rng.uniform(0, _OPACITY[1] - _OPACITY[0])
    canvas_HW3 += (opacity * shape_HW)[..., None] * (cloth_HW3 - canvas_HW3)
    return np.rint(np.clip(canvas_HW3, 0, 255)).astype(np.uint8), shape_HW >= 0.5


@cache
def _tile(label: int) -> NDArray[np.float32]:
    """One period of a print, float32 [40, 40, 3]: the longer a wave, the stronger."""
    rng = np.random.default_rng([_PRINTS_SEED, label])
    down, across = np.mgrid[:_TILE_SIZE, :_TILE_SIZE] / _TILE_SIZE
    pattern_HW3 = np.zeros((_TILE_SIZE, _TILE_SIZE, 3))
    for a, b in _WAVES:
        colour = rng.normal(size=3) / np.hypot(a, b)
        wave_HW = np.cos(2 * np.pi * (a * across + b * down + rng.uniform()))
        pattern_HW3 += wave_HW[..., None] * colour
    pattern_HW3 *= _PATTERN_SD / pattern_HW3.std()
    base = rng.uniform(*_BASE_COLOURS, size=3)
    return np.clip(base + pattern_HW3, 0, 255).astype(np.float32)


def _places(coordinates_HW: NDArray[np.float64]) -> NDArray[np.int64]:
    """Rows or columns of the tile at coordinates of the cloth, in pixels."""
    return np.floor(coordinates_HW * (_TILE_SIZE / _PERIOD)).astype(np.int64) % _TILE_SIZE


def _cloth(
    difficulty: float, rng: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float32]]:
    """Where each pixel lies on the cloth, across and down it, and how far the cloth covers it."""
    size, right, low, turn, aspect, bend, phase_u, phase_v = rng.uniform(-1, 1, size=8)
    angle = np.deg2rad(_TURN_DEGREES * turn * difficulty)
    radius = _RADIUS[0] + _RADIUS[1] * difficulty * bend
    wide, high = radius * np.exp(np.array([1, -1]) * _ASPECT * difficulty * aspect)
    y, x = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE] + 0.5 - IMAGE_SIZE / 2
    x -= right * difficulty * (IMAGE_SIZE / 2 - wide)
    y -= low * difficulty * (IMAGE_SIZE / 2 - high)
    across = np.cos(angle) * x + np.sin(angle) * y
    down = np.cos(angle) * y - np.sin(angle) * x
    power = _CORNERS[0] + (_CORNERS[1] - _CORNERS[0]) * rng.uniform()
    edge = ((np.abs(across) / wide) ** power + (np.abs(down) / high) ** power) ** (1 / power)
    shape_HW = np.clip((1 - edge) * radius + 0.5, 0, 1).astype(np.float32)
    fold_u, fold_v = difficulty * rng.uniform(0, _FOLD, size=2)
    start_u, start_v = rng.uniform(0, 2 * np.pi, size=2)
    scale = np.exp(difficulty * _SCALE * size)
    u = across / scale + fold_u * np.sin(down / _FOLD_LENGTH + start_u) + phase_u * _PERIOD
    v = down / scale + fold_v * np.sin(across / _FOLD_LENGTH + start_v) + phase_v * _PERIOD
    return u, v, shape_HW


def _lit(
    cloth_HW3: NDArray[np.float32], difficulty: float, rng: np.random.Generator
) -> NDArray[np.float64]:
    """The cloth in coloured light from one side, with noise."""
    light = np.exp(difficulty * (_LIGHT * rng.normal() + _TINT * rng.normal(size=3)))
    slope_x, slope_y = difficulty * rng.uniform(-_SHADE, _SHADE, size=2)
    y, x = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE] / IMAGE_SIZE - 0.5
    shade_HW = 1 + slope_x * x + slope_y * y
    noise_HW3 = rng.normal(0, _NOISE * difficulty, cloth_HW3.shape)
    return cloth_HW3 * light * shade_HW[..., None] + noise_HW3


@cache
def _material(split: Split) -> _Material:
    photographs = []
    for photograph in load_sample_images().images:
        first, stop = background_columns(split, photograph.shape[1])
        photographs.append(np.ascontiguousarray(photograph[:, first:stop]))
    return _Material(
        photographs=tuple(Image.fromarray(photograph) for photograph in photographs),
        crops=np.concatenate(
            [_textured_crops(region, photograph) for region, photograph in enumerate(photographs)]
        ),
    )


def _textured_crops(region: int, photograph: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Crops of which the median patch, of 8×8 patches, is not flat: (region, x, y, size)."""
    grey = photograph.mean(axis=2)
    found = []
    for size in _CROP_SIZES:
        patch = size // 8
        mean, mean_of_squares = (uniform_filter(image, patch) for image in (grey, grey**2))
        patch_sd = np.sqrt(np.maximum(mean_of_squares - mean**2, 0))
        # uniform_filter centres its window; shifted, [y, x] is the patch that starts at (y, x).
        patch_sd = patch_sd[patch // 2 :, patch // 2 :]
        reach = size - patch + 1
        windows = sliding_window_view(patch_sd, (reach, reach))[
            : grey.shape[0] - size + 1 : _CROP_STEP, : grey.shape[1] - size + 1 : _CROP_STEP
        ]
        median_sd = np.median(windows[..., ::patch, ::patch], axis=(2, 3))
        rows, columns = np.nonzero(median_sd >= _MIN_PATCH_SD)
        starts = np.stack([columns, rows], axis=1) * _CROP_STEP
        found.append(np.insert(starts, [0, 2], [region, size], axis=1))
    return np.concatenate(found)


def _background(
    material: _Material, clutter: float, rng: np.random.Generator
) -> NDArray[np.float32]:
    """A textured photograph crop with its contrast normalised around grey, float32 [64, 64, 3]."""
    region, x, y, size = material.crops[rng.integers(len(material.crops))].tolist()
    resized = material.photographs[region].resize(
        (IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR, (x, y, x + size, y + size)
    )
    crop = np.asarray(resized, dtype=np.float32)
    crop = (crop - crop.mean()) * (clutter * _BACKGROUND_SD / crop.std()) + _GREY
    return np.clip(crop, 0, 255, out=crop)
