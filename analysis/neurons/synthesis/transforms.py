"""The random geometry that an image must survive in every step (definitions §7).

In this order: pad with grey, jitter, scale, rotate, jitter again; then resize to the model's input.
All but the last are one affine map of the plane and the image is sampled once, bilinearly, grey
wherever it does not reach. Scaling and rotation are about the centre, and the frame stays that of
the padded image: an image that is scaled up runs over its edge.

Lengths are those of the report's 128-pixel images, in proportion to the longer side of others, so
that the same shapes survive at any size. A jitter of d moves by up to ± d / 2 in each direction.

Shape letters: N images, S steps, H and W of the image, h and w of the padded one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

REFERENCE_SIDE = 128
GREY = 0.5
DRAWS = 6
"""Uniform numbers that one transform takes."""


@dataclass(frozen=True)
class Recipe:
    """How much is padded and moved at most; the report's by default.

    pad, jitter, last_jitter: in pixels of an image whose longer side has 128. scaling: the share
    that the size changes. rotation: degrees.
    """

    pad: float = 12
    jitter: float = 8
    scaling: float = 0.1
    rotation: float = 10
    last_jitter: float = 4

    def times(self, strength: float) -> Recipe:
        """The recipe with all of it ``strength`` times as large; 0 leaves images as they are."""
        return Recipe(**{name: strength * value for name, value in vars(self).items()})

    def padding(self, size: tuple[int, int]) -> int:
        """Pixels of grey on each side of an image of this size (H, W)."""
        return round(self.pad * max(size) / REFERENCE_SIDE)


REPORT = Recipe()


def affine_maps(recipe: Recipe, uniform_N6: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Where in the image each place of the padded and transformed one comes from.

    Args:
        uniform_N6: in [0, 1): jitter right and down, scale, rotation, last jitter right and down.
        size: (H, W).

    Returns:
        float64 [N, 2, 3], on pixel coordinates (right, down) from the centres of both.
    """
    centred = 2 * np.asarray(uniform_N6, np.float64) - 1
    unit = max(size) / REFERENCE_SIDE
    first_N2 = centred[:, :2] * (recipe.jitter / 2 * unit)
    factor_N = 1 + recipe.scaling * centred[:, 2]
    angle_N = np.deg2rad(recipe.rotation) * centred[:, 3]
    last_N2 = centred[:, 4:] * (recipe.last_jitter / 2 * unit)
    # Forward: o = R·s·(x + first) + last. Here: x = R⁻¹·(o − last) / s − first.
    cos, sin = np.cos(angle_N) / factor_N, np.sin(angle_N) / factor_N
    back_N22 = np.stack([np.stack([cos, sin], -1), np.stack([-sin, cos], -1)], 1)
    shift_N2 = -np.einsum("nij,nj->ni", back_N22, last_N2) - first_N2
    return np.concatenate([back_N22, shift_N2[:, :, None]], axis=2)


def transform(
    images_N3HW: Tensor, recipe: Recipe, uniform_N6: np.ndarray, input_size: tuple[int, int]
) -> Tensor:
    """Images as the model sees them in one step, [N, 3, *input_size]; differentiable.

    Args:
        images_N3HW: in 0 to 1. uniform_N6: see `affine_maps`. input_size: rows, columns.
    """
    count, channels, rows, columns = images_N3HW.shape
    pad = recipe.padding((rows, columns))
    padded = (rows + 2 * pad, columns + 2 * pad)
    maps_N23 = affine_maps(recipe, uniform_N6, (rows, columns))
    # grid_sample counts from −1 to 1 over the whole of either image.
    maps_N23 = maps_N23 * (2 / np.array([columns, rows]))[:, None]
    maps_N23[:, :, :2] *= np.array([padded[1], padded[0]]) / 2
    theta = torch.as_tensor(maps_N23, dtype=images_N3HW.dtype, device=images_N3HW.device)
    grid = F.affine_grid(theta, [count, channels, *padded], align_corners=False)
    moved = F.grid_sample(images_N3HW - GREY, grid, align_corners=False) + GREY
    return resize(moved, input_size)


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, with a wider kernel where it shrinks, so that no pixel goes unseen."""
    if images.shape[-2:] == size:
        return images
    return F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
