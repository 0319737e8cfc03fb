"""Top key coefficients in bfloat16 on a CPU: launcher of ``key_topk_avx512.cpp``.

Shape letters: M rows, F coefficients of a row, K of them kept.
"""

import ctypes
import functools
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from classlens.kernels import cpp

SOURCE = Path(__file__).with_suffix(".cpp")
MOST_COEFFICIENTS = 1 << 16


def key_topk_avx512(x_MF: Float[Tensor, "M F"], k: int) -> Int[Tensor, "M K"]:
    """`classlens.kernels.key_topk.key_topk`, its arguments already checked.

    Raises:
        ValueError: not bfloat16 on a CPU, or more than 65,536 coefficients.
        RuntimeError: no compiler, or it fails.
    """
    rows, width = x_MF.shape
    if x_MF.device.type != "cpu" or x_MF.dtype != torch.bfloat16 or width > MOST_COEFFICIENTS:
        raise ValueError(
            f"impl='avx512' takes bfloat16 on a CPU, up to {MOST_COEFFICIENTS:,} coefficients, not "
            f"{width:,} in {x_MF.dtype} on {x_MF.device}; pass impl='torch'"
        )
    x_MF = x_MF.contiguous()
    best_MK = torch.empty(rows, k, dtype=torch.int32)
    threads = torch.get_num_threads()
    _library().key_topk(x_MF.data_ptr(), rows, width, k, threads, best_MK.data_ptr())
    return best_MK


@functools.cache
def _library() -> ctypes.CDLL:
    library = cpp.load(SOURCE)
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    library.key_topk.argtypes = [pointer, integer, integer, integer, integer, pointer]
    library.key_topk.restype = None
    return library
