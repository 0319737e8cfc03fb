"""Two-digit-number images: handwritten digits on textured photographs, with segmentation masks.

The material is what scikit-learn ships: 1,797 handwritten digits of 8×8 pixels and two photographs.
The splits share neither digits nor photograph regions, so a test image holds nothing seen in
training.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from scipy.ndimage import uniform_filter
from sklearn.datasets import load_digits, load_sample_images

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
CLASS_NAMES: tuple[str, ...] = tuple(f"{number:02d}" for number in range(100))
IMAGE_SIZE = 64

_PERMUTATION_SEED = 0
_DIGIT_RANGES = {"train": (0, 1400), "validation": (1400, 1550), "test": (1550, 1797)}
_BACKGROUND_SHARES = {"train": (0.0, 0.60), "validation": (0.60, 0.75), "test": (0.75, 1.0)}

_SPRITE_HEIGHT = 80
_DIGIT_GAP = 5
_COLOURS = np.array(
    [
        (255, 255, 255),  # white
        (255, 225, 40),  # yellow
        (90, 235, 255),  # cyan
        (255, 140, 215),  # pink
        (130, 255, 90),  # green
        (255, 165, 50),  # orange
    ],
    dtype=np.float32,
)
_HALO_RADIUS = 2.0
_HALO_STRENGTH = 0.8
_GREY = 0.38 * 255
_BACKGROUND_SD = 0.16 * 255
_MIN_PATCH_SD = 0.035 * 255
_CROP_SIZES = (48, 64, 80, 96)
_CROP_STEP = 4


@dataclass(frozen=True)
class _Material:
    """What one split draws from.

    Sprites by digit (alpha, uint8 [80, width]), photograph regions, and the textured crops of
    these (region, x, y, size), int64 [crops, 4].
    """

    sprites: tuple[tuple[NDArray[np.uint8], ...], ...]
    photographs: tuple[Image.Image, ...]
    crops: NDArray[np.int64]


def digit_indices(split: Split) -> NDArray[np.int64]:
    """Rows of `sklearn.datasets.load_digits` that `split` may use, int64 [number of digits]."""
    first, stop = _DIGIT_RANGES[split]
    _, targets = load_digits(return_X_y=True)
    return np.random.default_rng(_PERMUTATION_SEED).permutation(len(targets))[first:stop]


def background_columns(split: Split, width: int = 640) -> tuple[int, int]:
    """First and one-past-last pixel column that `split` may use of a photograph `width` wide."""
    first, stop = _BACKGROUND_SHARES[split]
    return round(first * width), round(stop * width)


def draw(
    split: Split, label: int, seed: int, difficulty: float = 1.0, clutter: float = 1.0
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Draw one image of the number `label`, fully determined by the arguments.

    Args:
        split: whose digits and photograph regions to use.
        label: the number, 0 to 99; also the index into `CLASS_NAMES`.
        seed: any non-negative integer.
        difficulty: 0 to 1, scales the variation of size, position, rotation and shear.
        clutter: 0 to 1, scales the contrast of the background; 0 is plain grey.

    Returns:
        The image, uint8 RGB [64, 64, 3], and the mask of its digits, bool [64, 64].

    Raises:
        ValueError: for an unknown split or a label outside 0 to 99.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: use one of {', '.join(SPLITS)}")
    if not 0 <= label < len(CLASS_NAMES):
        raise ValueError(f"label {label} is out of range: use 0 to {len(CLASS_NAMES) - 1}")
    material = _material(split)
    rng = np.random.default_rng([SPLITS.index(split), label, seed])
    alpha_image = _place(_number_sprite(material, label, rng), difficulty, rng)
    colour = _COLOURS[rng.integers(len(_COLOURS))]
    canvas = _background(material, clutter, rng)

    alpha = np.asarray(alpha_image, dtype=np.float32)[..., None] / 255
    blurred = alpha_image.filter(ImageFilter.GaussianBlur(_HALO_RADIUS))
    halo = np.minimum(np.asarray(blurred, dtype=np.float32)[..., None] / 100, 1) * _HALO_STRENGTH
    canvas *= 1 - halo
    canvas += alpha * (colour - canvas)
    return np.rint(canvas).astype(np.uint8), alpha[..., 0] >= 0.5


@cache
def _material(split: Split) -> _Material:
    pixels, targets = load_digits(return_X_y=True)
    sprites: list[list[NDArray[np.uint8]]] = [[] for _ in range(10)]
    for index in digit_indices(split):
        sprites[targets[index]].append(_sprite(pixels[index].reshape(8, 8)))
    photographs = []
    for photograph in load_sample_images().images:
        first, stop = background_columns(split, photograph.shape[1])
        photographs.append(np.ascontiguousarray(photograph[:, first:stop]))
    return _Material(
        sprites=tuple(tuple(same) for same in sprites),
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


def _sprite(digit: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Smooth alpha of a digit ([8, 8], 0 to 16), 80 pixels high, cropped to its inked columns."""
    small = Image.fromarray((digit / 16).astype(np.float32))
    big = np.asarray(small.resize((_SPRITE_HEIGHT, _SPRITE_HEIGHT), Image.Resampling.BICUBIC))
    alpha = np.rint(255 * np.clip((big - 0.28) / 0.30, 0, 1)).astype(np.uint8)
    inked = np.flatnonzero((alpha >= 128).any(axis=0))
    return alpha[:, inked[0] : inked[-1] + 1]


def _number_sprite(material: _Material, label: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Two sprites side by side, with an empty frame so that no edge is cut when it is turned."""
    parts = [material.sprites[digit] for digit in divmod(label, 10)]
    left, right = (same[rng.integers(len(same))] for same in parts)
    width = left.shape[1] + right.shape[1] + 3 * _DIGIT_GAP
    sheet = np.zeros((_SPRITE_HEIGHT + 2 * _DIGIT_GAP, width), np.uint8)
    rows = slice(_DIGIT_GAP, -_DIGIT_GAP)
    sheet[rows, _DIGIT_GAP : _DIGIT_GAP + left.shape[1]] = left
    sheet[rows, -_DIGIT_GAP - right.shape[1] : -_DIGIT_GAP] = right
    return sheet


def _place(sheet: NDArray[np.uint8], difficulty: float, rng: np.random.Generator) -> Image.Image:
    """Scale, shear, turn and shift the number onto an image-sized canvas of alpha."""
    size, across, down, turn, slant = difficulty * rng.uniform(-1, 1, size=5)
    sheet_height, sheet_width = sheet.shape
    scale_y = (0.68 + 0.12 * size) * IMAGE_SIZE / _SPRITE_HEIGHT
    scale_x = min(scale_y, 0.96 * IMAGE_SIZE / sheet_width)
    centre_x = IMAGE_SIZE / 2 + across * (IMAGE_SIZE - scale_x * sheet_width) / 2
    centre_y = IMAGE_SIZE / 2 + down * (IMAGE_SIZE - scale_y * _SPRITE_HEIGHT) / 2
    angle = np.deg2rad(8 * turn)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    shear = np.array([[1, 0.15 * slant], [0, 1]])
    inverse = np.linalg.inv(rotation @ shear @ np.diag([scale_x, scale_y]))
    offset = np.array([sheet_width, sheet_height]) / 2 - inverse @ [centre_x, centre_y]
    return Image.fromarray(sheet).transform(
        (IMAGE_SIZE, IMAGE_SIZE),
        Image.Transform.AFFINE,
        (*inverse[0], offset[0], *inverse[1], offset[1]),
        resample=Image.Resampling.BILINEAR,
    )


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
