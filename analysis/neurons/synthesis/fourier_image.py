"""Images as spectra with decorrelated colours (Olah, Mordvintsev & Schubert, Feature Visualization,
Distill 2017, doi 10.23915/distill.00007).

An image is sigmoid(C · irfft2(spectrum / f)): each frequency is scaled by 1 / f, as the amplitudes
of natural images are, and C mixes three independent colours into red, green and blue as correlated
as those of photographs. Steps of equal size in the spectrum then change all frequencies and all
colours alike, so that gradient ascent does not pile up high frequencies.

Shape letters: N images, H rows, W columns, V = W // 2 + 1 columns of a real image's spectrum.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

START_DEVIATION = 0.01
CONTRAST = 1 / 4
"""Lucid's factor, which keeps the sigmoid from saturating."""

# A square root of the covariance of ImageNet's colours, as in Lucid: brightness, blue against red,
# green against both. Columns are those three, rows red, green, blue.
COLOR_SQUARE_ROOT = np.array([[0.26, 0.09, 0.02], [0.27, 0.00, -0.05], [0.27, -0.09, 0.03]])


def color_mixing() -> np.ndarray:
    """C, float64 [3, 3]: decorrelated colours -> RGB; its longest column has length 1."""
    return COLOR_SQUARE_ROOT / np.linalg.norm(COLOR_SQUARE_ROOT, axis=0).max()


def frequency_scale(size: tuple[int, int]) -> np.ndarray:
    """1 / f of each component of the spectrum, float64 [H, V].

    f is in cycles a pixel; the constant component counts as one cycle over the longer side.
    """
    rows, columns = size
    fy, fx = np.fft.fftfreq(rows)[:, None], np.fft.rfftfreq(columns)[None]
    return 1 / np.maximum(np.hypot(fx, fy), 1 / max(size))


def first_spectrum(size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Where the ascent of one image starts: normal with `START_DEVIATION`, float32 [3, H, V, 2]."""
    shape = (3, size[0], size[1] // 2 + 1, 2)
    return (START_DEVIATION * rng.standard_normal(shape)).astype(np.float32)


def to_rgb(spectrum_N3HV2: Tensor, size: tuple[int, int]) -> Tensor:
    """Images in (0, 1), float32 [N, 3, H, W], of spectra (real and imaginary part last)."""
    scale_HV = torch.as_tensor(
        frequency_scale(size), dtype=torch.float32, device=spectrum_N3HV2.device
    )
    mixing = torch.as_tensor(color_mixing(), dtype=torch.float32, device=spectrum_N3HV2.device)
    scaled = torch.view_as_complex(spectrum_N3HV2) * (CONTRAST * scale_HV)
    colors_N3HW = torch.fft.irfft2(scaled, s=size, norm="ortho")
    return torch.einsum("rc,nchw->nrhw", mixing, colors_N3HW).sigmoid()
