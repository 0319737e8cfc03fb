"""Heat-maps and masks of key neurons on one image (definitions §7; the report, §3.1 and §3.2).

The activation of a neuron at the patches is set on the patch grid and resized to the picture,
bilinearly. Its mask is where the heat-map is above its 80th percentile. The running mean of block b
is the mean of the heat-maps of the top neurons of blocks 0 … b. What is resized is the activation
as it is, before any colour.

Shape letters: H, W pixels, K neurons of a block, L blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from classlens.analysis.report.pictures import covered

if TYPE_CHECKING:
    from classlens.extractor.models import Subject

PERCENTILE = 80.0


@dataclass(frozen=True, eq=False)
class HeatMaps:
    """Heat-maps of some neurons on one picture; :meth:`save` writes the fields as arrays.

    pixels: uint8 [H, W, 3], the part of the model's input that the patches cover. blocks: int16
    [L]. neurons: int32 [L, K], those of the largest alignment first, where a class chose them.
    activation: float32 [L, K, rows, columns], ``key_mlp`` at the patches. heat: float32 [L, K, H,
    W]. mask: bool [L, K, H, W], heat above its percentile. mean_heat: float32 [L, H, W], the
    running mean of ``heat[:, 0]``. mean_mask: bool [L, H, W].
    """

    pixels: np.ndarray
    blocks: np.ndarray
    neurons: np.ndarray
    activation: np.ndarray
    heat: np.ndarray
    mask: np.ndarray
    mean_heat: np.ndarray
    mean_mask: np.ndarray

    def save(self, path: Path) -> None:
        """Writes a compressed .npz file with an array for each field, named as the field."""
        np.savez_compressed(path, **vars(self))


def heat_maps(
    subject: Subject, pixels: np.ndarray, blocks: Sequence[int], neurons_LK: np.ndarray
) -> HeatMaps:
    """The heat-maps of K neurons in each of some blocks.

    Args:
        pixels: the model's input before normalisation, uint8 [H, W, 3]; may reach beyond the
            patches.
        neurons_LK: the neurons of each of ``blocks``.
    """
    import torch

    from classlens.analysis.neurons.activations import key_activations
    from classlens.extractor.scorer import Scorer

    scorer = Scorer(subject, [], dtype=torch.float32, device="cpu", convention="corrected")
    every_LK = np.zeros((subject.blocks, neurons_LK.shape[1]), np.int64)
    every_LK[list(blocks)] = neurons_LK
    batch = torch.tensor(pixels)[None]
    found = key_activations(scorer, batch, torch.from_numpy(every_LK)[None])[0, list(blocks)]
    activation = found.numpy().reshape(*neurons_LK.shape, *subject.grid)
    whole = covered(pixels, subject.grid)
    heat = resize_bilinear(activation, (whole.shape[0], whole.shape[1]))
    mean_heat = running_mean(heat[:, 0])
    return HeatMaps(
        pixels=whole,
        blocks=np.array(blocks, np.int16),
        neurons=neurons_LK.astype(np.int32),
        activation=activation,
        heat=heat.astype(np.float32),
        mask=above_percentile(heat),
        mean_heat=mean_heat.astype(np.float32),
        mean_mask=above_percentile(mean_heat),
    )


def resize_bilinear(maps: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Maps [..., rows, columns] at (H, W) pixels, float64 [..., H, W].

    Pixel i of H lies at (i + ½) · rows / H − ½, held to the first and last row: bilinear
    interpolation as torch's with ``align_corners=False``. A constant map stays constant.
    """
    maps = np.asarray(maps, np.float64)
    for axis, length in ((-2, size[0]), (-1, size[1])):
        last = maps.shape[axis] - 1
        place = ((np.arange(length) + 0.5) * (last + 1) / length - 0.5).clip(0, last)
        below = np.floor(place).astype(int)
        share = (place - below).reshape(-1, *(1,) * (-axis - 1))
        first, second = (maps.take(i, axis) for i in (below, np.minimum(below + 1, last)))
        maps = first + share * (second - first)
    return maps


def running_mean(maps: np.ndarray) -> np.ndarray:
    """The mean of the maps [L, …] of blocks 0 … b, for each b."""
    counts = np.arange(1, len(maps) + 1).reshape(-1, *(1,) * (maps.ndim - 1))
    return np.cumsum(maps, axis=0) / counts


def above_percentile(maps: np.ndarray, percentile: float = PERCENTILE) -> np.ndarray:
    """Where maps [..., H, W] are above their own percentile, bool of the same shape.

    The q-th percentile of n values is that at place (n − 1) · q / 100 of the sorted values, between
    two of them interpolated linearly (numpy's default). Values equal to it are not above.
    """
    return maps > np.percentile(maps, percentile, axis=(-2, -1), keepdims=True)
