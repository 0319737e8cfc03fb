"""Peaks, means and histograms of neurons in bfloat16 on a CPU: launcher of
``neuron_sums_avx512.cpp``.

Shape letters: N images, T tokens, S tokens counted of an image, F neurons, C = 256 codes.
"""

import ctypes
import functools
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from classlens.kernels import cpp
from classlens.kernels.activation_codes import CODES

SOURCE = Path(__file__).with_suffix(".cpp")


def neuron_sums_avx512(
    x_NTF: Float[Tensor, "N T F"], prefix: int, counted_NS: Int[Tensor, "N S"]
) -> tuple[Float[Tensor, "N F"], Float[Tensor, "N F"], Int[Tensor, "F C"]]:
    """`classlens.kernels.neuron_sums.neuron_sums`, its arguments already checked.

    Raises:
        ValueError: not bfloat16 on a CPU.
        RuntimeError: no compiler, or it fails.
    """
    if x_NTF.device.type != "cpu" or x_NTF.dtype != torch.bfloat16:
        raise ValueError(
            f"impl='avx512' takes bfloat16 on a CPU, not {x_NTF.dtype} on {x_NTF.device}; "
            "pass impl='torch'"
        )
    images, tokens, width = x_NTF.shape
    x_NTF, counted_NS = x_NTF.contiguous(), counted_NS.int().contiguous()
    peak_NF, mean_NF = torch.empty(2, images, width)
    histogram_FC = torch.zeros(width, CODES, dtype=torch.int32)
    _library().neuron_sums(
        x_NTF.data_ptr(),
        images,
        tokens,
        prefix,
        width,
        counted_NS.data_ptr(),
        counted_NS.shape[1],
        torch.get_num_threads(),
        peak_NF.data_ptr(),
        mean_NF.data_ptr(),
        histogram_FC.data_ptr(),
    )
    return peak_NF, mean_NF, histogram_FC


@functools.cache
def _library() -> ctypes.CDLL:
    library = cpp.load(SOURCE)
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    library.neuron_sums.argtypes = [
        *(pointer, integer, integer, integer, integer),
        *(pointer, integer, integer, pointer, pointer, pointer),
    ]
    library.neuron_sums.restype = None
    return library
