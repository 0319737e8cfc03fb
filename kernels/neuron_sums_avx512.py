"""Peaks, means, histograms and codes of neurons in bfloat16 on a CPU: launcher of
``neuron_sums_avx512.cpp``.

Shape letters: N images, T tokens, G patches, S tokens counted of an image, F neurons,
C = 256 codes, Q pairs of an image and a neuron.
"""

import ctypes
import functools
from pathlib import Path

import torch
from jaxtyping import Float, Int, UInt8
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
    _check(x_NTF)
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


def pair_codes_avx512(
    x_NTF: Float[Tensor, "N T F"],
    prefix: int,
    image_Q: Int[Tensor, " Q"],
    neuron_Q: Int[Tensor, " Q"],
) -> UInt8[Tensor, "Q G"]:
    """`classlens.kernels.neuron_sums.pair_codes`, its arguments checked; errors as above."""
    _check(x_NTF)
    x_NTF, image_Q, neuron_Q = x_NTF.contiguous(), image_Q.long(), neuron_Q.long()
    tokens, width = x_NTF.shape[1:]
    codes_QG = torch.empty(len(image_Q), tokens - prefix, dtype=torch.uint8)
    _library().pair_codes(
        x_NTF.data_ptr(),
        tokens,
        prefix,
        width,
        image_Q.contiguous().data_ptr(),
        neuron_Q.contiguous().data_ptr(),
        len(image_Q),
        torch.get_num_threads(),
        codes_QG.data_ptr(),
    )
    return codes_QG


def _check(x_NTF: Tensor) -> None:
    if x_NTF.device.type != "cpu" or x_NTF.dtype != torch.bfloat16:
        raise ValueError(
            f"impl='avx512' takes bfloat16 on a CPU, not {x_NTF.dtype} on {x_NTF.device}; "
            "pass impl='torch'"
        )


@functools.cache
def _library() -> ctypes.CDLL:
    library = cpp.load(SOURCE)
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    library.neuron_sums.argtypes = [
        *(pointer, integer, integer, integer, integer),
        *(pointer, integer, integer, pointer, pointer, pointer),
    ]
    library.pair_codes.argtypes = [
        *(pointer, integer, integer, integer, pointer, pointer, integer, integer, pointer),
    ]
    library.neuron_sums.restype = library.pair_codes.restype = None
    return library
