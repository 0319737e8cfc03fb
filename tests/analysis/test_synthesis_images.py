"""Fourier images and transforms, each held to a slow reference of its own."""

import math

import numpy as np
import pytest
import torch

from classlens.analysis.neurons.synthesis.fourier_image import (
    COLOR_SQUARE_ROOT,
    CONTRAST,
    START_DEVIATION,
    color_mixing,
    first_spectrum,
    frequency_scale,
    to_rgb,
)
from classlens.analysis.neurons.synthesis.transforms import GREY, REPORT, resize, transform

HALF = np.full(6, 0.5)


def slow_image(spectrum, size):
    """sigmoid(C · (sum over frequencies)), term by term in float64."""
    rows, columns = size
    colors = np.zeros((3, rows, columns))
    y, x = np.mgrid[:rows, :columns]
    for channel in range(3):
        for u in range(rows):
            for v in range(columns // 2 + 1):
                frequency = math.hypot(min(u, rows - u) / rows, v / columns)
                scale = 1 / max(frequency, 1 / max(rows, columns))
                alone = v == 0 or 2 * v == columns  # others stand for their mirror image too
                real, imaginary = (
                    CONTRAST * scale * float(part) for part in spectrum[channel, u, v]
                )
                turn = 2 * np.pi * (u * y / rows + v * x / columns)
                wave = real * np.cos(turn) - imaginary * np.sin(turn)
                colors[channel] += (1 if alone else 2) * wave / math.sqrt(rows * columns)
    longest = max(math.sqrt(sum(row[k] ** 2 for row in COLOR_SQUARE_ROOT)) for k in range(3))
    mixed = [
        sum(COLOR_SQUARE_ROOT[rgb, k] / longest * colors[k] for k in range(3)) for rgb in range(3)
    ]
    return 1 / (1 + np.exp(-np.stack(mixed)))


@pytest.mark.parametrize("size", [(6, 8), (7, 5), (4, 9)], ids=str)
def test_an_image_is_the_sum_of_its_scaled_waves(size):
    rng = np.random.default_rng(3)
    spectrum = np.stack([100 * first_spectrum(size, rng) for _ in range(2)])
    image = to_rgb(torch.from_numpy(spectrum), size).numpy()
    # Terms of up to CONTRAST · scale · |s| are added in float32; the sigmoid's slope is ≤ 1/4.
    terms = 2 * CONTRAST * (frequency_scale(size)[..., None] * np.abs(spectrum)).sum((1, 2, 3, 4))
    bound = 8 * np.finfo(np.float32).eps * terms.max()
    for n in range(2):
        np.testing.assert_allclose(image[n], slow_image(spectrum[n], size), rtol=0, atol=bound)


def test_colours_have_the_covariance_of_photographs():
    mixing = color_mixing()
    ratio = (mixing @ mixing.T) / (COLOR_SQUARE_ROOT @ COLOR_SQUARE_ROOT.T)
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-12)
    assert np.linalg.norm(mixing, axis=0).max() == pytest.approx(1)
    # What the first colour moves is brightness: red, green and blue alike.
    assert np.ptp(mixing[:, 0]) < 0.05 < mixing[:, 0].min()


def test_a_first_spectrum_is_small_noise_of_its_generator():
    spectra = [first_spectrum((64, 48), np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert spectra[0].shape == (3, 64, 25, 2)
    np.testing.assert_array_equal(spectra[0], spectra[1])
    assert not np.array_equal(spectra[0], spectra[2])
    assert spectra[0].std() == pytest.approx(START_DEVIATION, rel=0.05)


def slow_transform(image, recipe, uniform):
    """Every pixel of the padded image, each step undone by itself; float64, no resize."""
    _, rows, columns = image.shape
    unit = max(rows, columns) / 128
    pad = round(recipe.pad * unit)
    right1, down1, grow, turn, right2, down2 = 2 * uniform - 1
    result = np.empty((3, rows + 2 * pad, columns + 2 * pad))
    for r in range(result.shape[1]):
        for c in range(result.shape[2]):
            x, y = c - (result.shape[2] - 1) / 2, r - (result.shape[1] - 1) / 2
            x -= right2 * recipe.last_jitter / 2 * unit
            y -= down2 * recipe.last_jitter / 2 * unit
            angle = -math.radians(recipe.rotation * turn)  # back, clockwise on the screen is +
            x, y = (
                x * math.cos(angle) - y * math.sin(angle),
                x * math.sin(angle) + y * math.cos(angle),
            )
            x, y = (z / (1 + recipe.scaling * grow) for z in (x, y))
            x -= right1 * recipe.jitter / 2 * unit
            y -= down1 * recipe.jitter / 2 * unit
            x, y = x + (columns - 1) / 2, y + (rows - 1) / 2
            value = np.zeros(3)
            for near_y in (math.floor(y), math.floor(y) + 1):
                for near_x in (math.floor(x), math.floor(x) + 1):
                    weight = (1 - abs(y - near_y)) * (1 - abs(x - near_x))
                    inside = 0 <= near_y < rows and 0 <= near_x < columns
                    value += weight * (image[:, near_y, near_x] if inside else GREY)
            result[:, r, c] = value
    return result


@pytest.mark.parametrize("size", [(16, 16), (24, 13)], ids=str)
@pytest.mark.parametrize("strength", [1, 3])
def test_transforms_move_every_pixel_as_the_slow_ones(size, strength):
    rng = np.random.default_rng(5)
    images, uniform = rng.random((3, 3, *size)), rng.random((3, 6))
    uniform[2] = 1.0  # every step as far as it goes
    recipe = REPORT.times(strength)
    pad = recipe.padding(size)
    padded = (size[0] + 2 * pad, size[1] + 2 * pad)
    found = transform(torch.from_numpy(images), recipe, uniform, padded).numpy()
    for n in range(3):
        expected = slow_transform(images[n], recipe, uniform[n])
        np.testing.assert_allclose(found[n], expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("place", "dot", "moved"),
    [
        (0, (64, 64), (64, 68)),  # jitter right by 8 / 2
        (1, (64, 64), (68, 64)),  # down
        (2, (64, 104), (64, 108)),  # 1.1 times as far from the centre
        (3, (64, 104), (71, 103)),  # clockwise by 10°
        (4, (64, 64), (64, 66)),
        (5, (64, 64), (66, 64)),
    ],
)
def test_each_step_moves_a_dot_its_way(place, dot, moved):
    image = torch.full((1, 3, 129, 129), GREY, dtype=torch.float64)
    image[0, :, dot[0], dot[1]] = 1
    uniform = HALF.copy()
    uniform[place] = 1.0
    pad = REPORT.padding((129, 129))
    found = transform(image, REPORT, uniform[None], (129 + 2 * pad,) * 2)[0, 0]
    brightest = np.unravel_index(int(found.argmax()), found.shape)
    assert (brightest[0] - pad, brightest[1] - pad) == moved


def test_no_strength_leaves_the_image():
    image = torch.rand(1, 3, 12, 12, dtype=torch.float64)
    found = transform(image, REPORT.times(0), np.random.default_rng(0).random((1, 6)), (12, 12))
    torch.testing.assert_close(found, image, rtol=0, atol=1e-14)


def test_resize_shrinks_with_a_wide_triangle():
    image = torch.rand(1, 3, 12, 10, dtype=torch.float64)

    def kernel(before, after):
        ratio = before / after
        centres = (np.arange(after) + 0.5) * ratio
        distance = np.abs(np.arange(before) + 0.5 - centres[:, None]) / max(ratio, 1)
        weights = np.maximum(1 - distance, 0)
        return torch.from_numpy(weights / weights.sum(1, keepdims=True))

    expected = kernel(12, 5) @ image @ kernel(10, 4).T
    torch.testing.assert_close(resize(image, (5, 4)), expected, rtol=0, atol=1e-12)
    assert resize(image, (12, 10)) is image
