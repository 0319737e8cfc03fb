"""What bfloat16 is worth on this CPU."""

import timeit
from collections.abc import Callable

import torch
from torch import Tensor

from classlens.kernels.class_scores_amx import class_scores_amx
from classlens.kernels.class_space import ClassSpace


def native_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 natively; if not, float32 is several times faster."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16", "sve_bf16"))


def bfloat16_speedup(*, amx: bool, size: int = 1024) -> float:
    """How many times faster than in float32 a square product in bfloat16 is here, right now.

    amx: by the kernels for CPUs with AMX, not by torch.
    """
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        product = _product_amx(size, dtype) if amx else _product(size, dtype)
        seconds[dtype] = min(timeit.repeat(product, number=1, repeat=5))
    return seconds[torch.float32] / seconds[torch.bfloat16]


def _product(size: int, dtype: torch.dtype) -> Callable[[], Tensor]:
    a = torch.ones(size, size, dtype=dtype)
    return lambda: a @ a


def _product_amx(size: int, dtype: torch.dtype) -> Callable[[], object]:
    space = ClassSpace(torch.ones(size, size, dtype=dtype), torch.zeros(size), 1.0)
    x, labels = torch.ones(1, size, size, dtype=dtype), torch.zeros(1, dtype=torch.int64)
    return lambda: class_scores_amx(x, space, labels, topk=0, logsumexp=False)
