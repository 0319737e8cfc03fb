"""What bfloat16 is worth on this CPU."""

import timeit

import torch


def native_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 natively; if not, float32 is several times faster."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16", "sve_bf16"))


def bfloat16_speedup(size: int = 1024) -> float:
    """How many times faster than in float32 a square product in bfloat16 is here, right now."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(size, size, dtype=dtype)
        seconds[dtype] = min(timeit.repeat(lambda a=a: a @ a, number=1, repeat=5))
    return seconds[torch.float32] / seconds[torch.bfloat16]
