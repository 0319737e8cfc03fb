"""Masks on the patch grid as short text, which the page's script draws over a picture."""

from __future__ import annotations

import base64

import numpy as np


def encode(mask: np.ndarray) -> str:
    """Bits [rows, columns] as base64: row by row, the first patch in the lowest bit of a byte."""
    return base64.b64encode(np.packbits(mask, bitorder="little").tobytes()).decode()


def decode(text: str, grid: tuple[int, int]) -> np.ndarray:
    """The mask, bool [rows, columns], that :func:`encode` wrote.

    Raises:
        ValueError: the text does not hold as many bits.
    """
    rows, columns = grid
    bits = np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8), bitorder="little")
    if len(bits) != -(-rows * columns // 8) * 8:
        raise ValueError(f"{len(bits)} bits are no mask of {rows}×{columns}.")
    return bits[: rows * columns].astype(bool).reshape(grid)
