import numpy as np
import pytest
import torch
from PIL import Image
from samples import picture
from timm.data import create_transform

from classlens.extractor.geometry import Geometry, class_pixels

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
CONFIGS = [
    ("center", 0.9, (32, 32)),
    ("center", 0.875, (32, 48)),  # not square: timm resizes by another rule
    ("squash", 1.0, (32, 32)),
    ("border", 0.9, (32, 32)),
]


def geometry(mode: str, crop_pct: float, size: tuple[int, int]) -> Geometry:
    return Geometry(size, crop_pct, mode, "bicubic", MEAN, STD)


@pytest.mark.parametrize(("mode", "crop_pct", "size"), CONFIGS)
@pytest.mark.parametrize("picture_size", [(48, 40), (31, 97), (32, 32), (200, 33)])
def test_pixels_are_those_of_timms_transform(mode, crop_pct, size, picture_size):
    image = picture(1, picture_size)
    expected = create_transform(
        (3, *size), interpolation="bicubic", mean=MEAN, std=STD, crop_pct=crop_pct, crop_mode=mode
    )(image)
    pixels = torch.from_numpy(np.array(geometry(mode, crop_pct, size).crop(image)))
    ours = (pixels.permute(2, 0, 1) / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(
        STD
    ).view(3, 1, 1)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("mode", "crop_pct", "size"), CONFIGS)
def test_mask_and_image_undergo_the_same_crop(mode, crop_pct, size):
    # A picture that is white exactly where the mask is; brightness of a patch is then its coverage.
    ids = np.zeros((97, 61), np.uint8)
    ids[30:80, 10:40] = 255
    mask = Image.fromarray(ids)
    shape = Geometry(size, crop_pct, mode, "bilinear", (0.0, 0.0, 0.0), STD)
    grid = (size[0] // 8, size[1] // 8)
    pixels = np.asarray(shape.crop(mask.convert("RGB")), dtype=float)[..., 0]
    bright = pixels.reshape(grid[0], 8, grid[1], 8).mean(axis=(1, 3)).reshape(-1)
    covered = shape.mask_coverage(mask, grid)
    assert covered.dtype == np.uint8
    assert 0 < covered.max() <= 255
    assert np.abs(covered - bright).max() <= 0.5


def test_squash_is_the_papers_input():
    shape = Geometry.squash((32, 32))
    assert (shape.mean, shape.std) == ((0.5,) * 3, (0.5,) * 3)
    image = picture(2, (70, 41))
    expected = image.resize((32, 32), Image.Resampling.BILINEAR)
    assert np.array_equal(np.asarray(shape.crop(image)), np.asarray(expected))


@pytest.mark.parametrize(("mode", "crop_pct", "size"), CONFIGS)
def test_resized_pixels_is_an_upper_estimate_of_the_resized_picture(mode, crop_pct, size):
    shape = geometry(mode, crop_pct, size)
    assert shape.resized_pixels((1, 90_000)) > (1e6 if mode == "center" else 0)
    assert shape.resized_pixels((48, 40)) < 5_000


def test_class_pixels_reads_red_plus_256_green():
    rgb = np.zeros((1, 5, 3), np.uint8)
    rgb[0, 1] = (44, 1, 0)  # 300
    rgb[0, 2] = (1000 % 256, 1000 // 256, 0)
    rgb[0, 3] = (45, 1, 0)  # 301
    mask = Image.fromarray(rgb)
    assert np.asarray(class_pixels(mask, 300)).tolist() == [[0, 255, 0, 0, 0]]
    assert np.asarray(class_pixels(mask, None)).tolist() == [[0, 255, 0, 255, 0]]


def test_geometry_survives_json():
    shape = geometry("center", 0.9, (32, 48))
    assert Geometry.from_json(shape.to_json()) == shape
