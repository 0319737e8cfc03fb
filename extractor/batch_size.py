"""The largest batch a device has memory for, by trial."""

from __future__ import annotations

from collections.abc import Callable

import torch

from classlens.extractor.errors import ModelError


def largest_batch(score: Callable[[int], object], start: int) -> int:
    """Halves ``start`` until a batch of that size is scored without running out of memory.

    Args:
        score: scores a batch of so many images.

    Raises:
        ModelError: not even one image fits.
    """
    size = start
    while size:
        try:
            score(size)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            size //= 2
        else:
            return size
    raise ModelError("The device has no memory for a single image; use a smaller model or a CPU.")
