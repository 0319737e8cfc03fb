"""What is drawn at random for an image, by a hash alone: alike in every batch, order and run."""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = 0xFFFF_FFFF  # int64 wraps, and its lower half is the 32-bit product


def drawn(numbers: Tensor) -> Tensor:
    """A number in [0, 2^32) for each number, int64 (the finaliser of MurmurHash3)."""
    h = (numbers + 0x9E37_79B9) & _LOW
    h = ((h ^ (h >> 16)) * 0x85EB_CA6B) & _LOW
    h = ((h ^ (h >> 13)) * 0xC2B2_AE35) & _LOW
    return h ^ (h >> 16)


def drawn_patches(keys_N: Tensor, patches: int, count: int) -> Tensor:
    """``count`` of the patches of each image, ascending, int64 [N, count].

    All sets of this size are equally likely.

    Args:
        keys_N: a number for each image, int64.
    """
    places_G = torch.arange(patches, device=keys_N.device)
    # The place in the last digits tells equal draws apart.
    draws_NG = drawn(drawn(keys_N)[:, None] + places_G) * patches + places_G
    chosen = draws_NG.topk(count, dim=1, largest=False).indices
    return chosen.sort(dim=1).values
