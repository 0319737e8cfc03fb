"""The kernel behind `classlens.kernels.key_topk`: one row a program, read once, held in registers.

Five of three thousand are found by five maxima, each followed by the lowest index that has it. That
compares the coefficients themselves, so no index has to share a key with them.

Shape letters: M rows, F coefficients of a row, K of them kept.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor
from triton.runtime.jit import JITFunction

MAX_WIDTH = 16_384
# A thread holds that many coefficients at most, and a flag with each.
VALUES_PER_THREAD = 32


def compile_options(width: int) -> dict[str, int]:
    """Triton's options for the kernel: as many warps as the row needs.

    Fusing is pinned, though nothing is multiplied: without a choice Triton 3.9 warns.
    """
    threads = triton.next_power_of_2(width) // VALUES_PER_THREAD
    num_warps = min(16, max(1, threads // 32))
    return {"num_warps": num_warps, "num_stages": 1, "enable_fp_fusion": False}


def key_topk_triton(x: Float[Tensor, "M F"], k: int) -> Int[Tensor, "M K"]:
    """`classlens.kernels.key_topk.key_topk` of a matrix, its arguments already checked.

    Raises:
        ValueError: float64, a CPU without the interpreter, rows too wide.
    """
    interpreted = not isinstance(_key_topk_kernel, JITFunction)
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"the Triton kernel takes no {x.dtype}; pass impl='torch'")
    if not x.is_cuda and not interpreted:
        raise ValueError(
            "the Triton kernel needs a GPU; pass impl='torch', or set TRITON_INTERPRET=1 "
            "before the first import to try the kernel on a CPU"
        )
    rows, width = x.shape
    if width > MAX_WIDTH:
        raise ValueError(
            f"the Triton kernel takes rows of at most {MAX_WIDTH} coefficients, not {width}; "
            "pass impl='torch'"
        )
    if x.stride(1) != 1:
        x = x.contiguous()
    best_MK = torch.empty(rows, k, dtype=torch.int32, device=x.device)
    if best_MK.numel():
        _key_topk_kernel[(rows,)](
            x,
            best_MK,
            x.stride(0),
            WIDTH=width,
            TOPK=k,
            PLACES=triton.next_power_of_2(width),
            **compile_options(width),
        )
    return best_MK


@triton.jit
@no_type_check
def _key_topk_kernel(
    x_ptr,  # [M, F] with the stride given
    best_ptr,  # [M, K] int32
    stride_m,
    WIDTH: tl.constexpr,
    TOPK: tl.constexpr,
    PLACES: tl.constexpr,  # the power of two that WIDTH fits in
):
    row = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, PLACES)
    left = places < WIDTH
    x = tl.load(x_ptr + row * stride_m + places, mask=left, other=0.0).to(tl.float32)
    invalid = tl.max((x != x).to(tl.int32), 0)
    for i in range(TOPK):
        peak = tl.max(tl.where(left, x, float("-inf")), 0)
        first = tl.min(tl.where(left & (x == peak), places, WIDTH), 0)
        tl.store(best_ptr + row * TOPK + i, tl.where(invalid == 0, first, WIDTH))
        left = left & (places != first)
