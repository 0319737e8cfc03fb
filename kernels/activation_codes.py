"""Codes of activations: one byte each that keeps their order; `classlens.extractor.codes` says how.

The same function there, in NumPy, is the specification; the two agree bit for bit.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

CODES = 256
OFFSET = 0.125
SUB_BITS, BASE, LARGEST = 19, 1984, 127  # 1984 = bits of 0.125 >> 19


def activation_codes(values: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """The code of each value, taken as float32. NaN has no code: what it gives means nothing."""
    values = values.float()
    # 127 − m where negative, else 128 + m: m differs from it in the bits of 127 or of 128.
    flipped = (values < 0).view(torch.uint8).neg_().add_(LARGEST + 1)
    bits = values.abs().add_(OFFSET).view(torch.int32)
    m = bits.bitwise_right_shift_(SUB_BITS).sub_(BASE).clamp_(max=LARGEST)
    return m.to(torch.uint8).bitwise_xor_(flipped)
