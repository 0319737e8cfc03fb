"""What bfloat16 is worth on this CPU."""

import timeit
from collections.abc import Callable

import torch
from torch import Tensor

from classlens.kernels.class_scores_cpu import class_scores_cpu
from classlens.kernels.class_space import ClassSpace
from classlens.kernels.tiles import Units, units_found


def native_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 natively; if not, float32 is several times faster."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16", "sve_bf16"))


def bfloat16_speedup(*, fused: bool, size: int = 1024) -> float:
    """How many times faster than in float32 a square product in bfloat16 is here, right now.

    fused: by the fused kernels where they can be had, not by torch.
    """
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        units = units_found(dtype) if fused else None
        product = _product_fused(size, dtype, units) if units else _product(size, dtype)
        seconds[dtype] = min(timeit.repeat(product, number=1, repeat=5))
    return seconds[torch.float32] / seconds[torch.bfloat16]


def _product(size: int, dtype: torch.dtype) -> Callable[[], Tensor]:
    a = torch.ones(size, size, dtype=dtype)
    return lambda: a @ a


def _product_fused(size: int, dtype: torch.dtype, units: Units) -> Callable[[], object]:
    space = ClassSpace(torch.ones(size, size, dtype=dtype), torch.zeros(size), 1.0)
    x, labels = torch.ones(1, size, size, dtype=dtype), torch.zeros(1, dtype=torch.int64)
    return lambda: class_scores_cpu(x, space, labels, units, topk=0, logsumexp=False)
