"""Codes of activations: one byte each, finer near zero, that keep their order.

    m(v) = min(127, ⌊16 · octaves of (|v| + 1/8) / (1/8)⌋),  code(v) = 128 + m, or 127 − m if v < 0

in float32, where *octaves* grow by linear sixteenths: |v| + 1/8 = 2^(e−3) · (1 + f/16 + …) has
m = 16 e + f, which are bits of the float. A code's values lie within (|v| + 1/8) / 16 of each other
(its *width*): 1/128 at zero, 1/16 of the value where it is large. Codes 0 and 255 are open: they
hold all that is beyond ±30.875.

Equal codes add up, merge and compare exactly, in whatever order activations come, and code(v) never
falls as v grows. This module imports no torch; `classlens.kernels.activation_codes` is the same for
tensors.
"""

from __future__ import annotations

from functools import cache

import numpy as np

OFFSET = np.float32(0.125)
SUB_BITS = 19
"""Bits of a float32 below its exponent and the first four of its mantissa."""
LARGEST = 127
FINITE = float(OFFSET) * 247
"""Where the first and last code begin, in absolute value: 30.875."""


def codes_of(values: np.ndarray) -> np.ndarray:
    """The code of each value, uint8, of the same shape. NaN has no code.

    Args:
        values: taken as float32.
    """
    values = np.asarray(values, np.float32)
    bits = (np.abs(values) + OFFSET).view(np.int32)
    m = np.minimum((bits >> SUB_BITS) - (OFFSET.view(np.int32) >> SUB_BITS), LARGEST)
    return np.where(values < 0, LARGEST - m, LARGEST + 1 + m).astype(np.uint8)


@cache
def lower_edges() -> np.ndarray:
    """The smallest float32 of each code, [256], ascending; −∞ for code 0.

    ``code > c`` is the same as ``value >= lower_edges()[c + 1]``, exactly.
    """
    low = np.full(256, _ordered(np.array([-1e30], np.float32))[0])
    high = np.full(256, _ordered(np.array([1e30], np.float32))[0])
    codes = np.arange(256)
    while (low < high).any():  # bisection over all float32 in their order
        middle = (low + high) >> 1
        reached = codes_of(_value(middle)) >= codes
        high, low = np.where(reached, middle, high), np.where(reached, low, middle + 1)
    edges = _value(low)
    edges[0] = -np.inf
    edges.setflags(write=False)
    return edges


def representatives(codes: np.ndarray) -> np.ndarray:
    """The middle of each code, float32, of the same shape; ±30.875 for the open ones."""
    edges = lower_edges()
    middles = np.empty(256, np.float32)
    middles[1:255] = (edges[1:255] + edges[2:]) / 2
    middles[0], middles[255] = -FINITE, FINITE
    return middles[codes]


def _ordered(values: np.ndarray) -> np.ndarray:
    """Integers in the order of the float32, int64."""
    bits = values.view(np.int32).astype(np.int64)
    return np.where(bits < 0, -(bits & 0x7FFF_FFFF), bits)


def _value(ordered: np.ndarray) -> np.ndarray:
    sign = np.where(ordered < 0, np.int64(0x8000_0000), 0)
    return (np.abs(ordered) | sign).astype(np.uint32).view(np.float32)
