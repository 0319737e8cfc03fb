"""Colour scales for pictures, as stops from the lowest to the highest value."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Blue below chance, white at chance (0.5), red above: told apart by the colour-blind too.
DIVERGING = (
    "#2166AC", "#4393C3", "#92C5DE", "#D1E5F0",
    "#F7F7F7",
    "#FDDBC7", "#F4A582", "#D6604D", "#B2182B",
)  # fmt: skip
# Ten stops of matplotlib's inferno: lightness rises evenly, for the colour-blind too.
SEQUENTIAL = (
    "#000004", "#1B0C42", "#4B0C6B", "#781C6D", "#A52C60",
    "#CF4446", "#ED6925", "#FB9A06", "#F7D03C", "#FCFFA4",
)  # fmt: skip


def in_colors(values: np.ndarray, stops: Sequence[str]) -> np.ndarray:
    """Values in [0, 1] as RGB between evenly spaced stops, uint8 [..., 3]."""
    colors = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in stops], dtype=float)
    places = np.linspace(0, 1, len(stops))
    channels = [np.interp(values, places, channel) for channel in colors.T]
    return np.stack(channels, axis=-1).round().astype(np.uint8)
