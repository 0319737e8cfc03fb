"""Class scoring in bfloat16 on a CPU with AMX: launcher of ``class_scores_amx.cpp``.

Shape letters: N images, T tokens, D width, C classes.
"""

import ctypes
import functools
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor

from classlens.kernels import cpp
from classlens.kernels.class_scores_torch import empty_scores
from classlens.kernels.class_space import ClassSpace
from classlens.kernels.reference import ClassScores

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-mamx-tile", "-mamx-bf16")
PANEL = 32  # classes, and values of the width, of a group of tiles

_packed: WeakKeyDictionary[ClassSpace, Tensor] = WeakKeyDictionary()


def amx_found() -> bool:
    """Whether this CPU has AMX for bfloat16 and a C++ compiler is at hand."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16")) and cpp.compiler() is not None


def class_scores_amx(
    x: Float[Tensor, "N T D"],
    space: ClassSpace,
    labels: Int[Tensor, " N"],
    *,
    topk: int,
    logsumexp: bool,
) -> ClassScores:
    """`classlens.kernels.class_scores.class_scores`, its arguments already checked.

    Raises:
        ValueError: something is not bfloat16 on a CPU.
        RuntimeError: no compiler, or it fails; or the system grants no tile registers.
    """
    if x.device.type != "cpu" or x.dtype != space.weight_CD.dtype or x.dtype != torch.bfloat16:
        raise ValueError(
            f"impl='amx' takes bfloat16 on a CPU, not x in {x.dtype} and a class space in "
            f"{space.weight_CD.dtype} on {x.device}; pass impl='torch'"
        )
    library = _library()
    if space not in _packed:
        _packed[space] = _pack(library, space)
    x, labels = x.contiguous(), labels.int().contiguous()
    out = empty_scores(x, topk, logsumexp)
    library.class_scores(
        x.data_ptr(),
        x.shape[0] * x.shape[1],
        x.shape[2],
        _packed[space].data_ptr(),
        space.bias_C.contiguous().data_ptr(),
        space.num_classes,
        space.eps,
        labels.data_ptr(),
        x.shape[1],
        topk,
        torch.get_num_threads(),
        out.rank.data_ptr(),
        out.label_logit.data_ptr(),
        None if out.logsumexp is None else out.logsumexp.data_ptr(),
        out.topk.data_ptr(),
    )
    return out


def _pack(library: ctypes.CDLL, space: ClassSpace) -> Tensor:
    classes, width = space.weight_CD.shape
    padded, depth = (-(-n // PANEL) * PANEL for n in (classes, width))
    packed = torch.zeros(padded * depth, dtype=torch.bfloat16)
    library.pack_weight(space.weight_CD.contiguous().data_ptr(), classes, width, packed.data_ptr())
    return packed


@functools.cache
def _library() -> ctypes.CDLL:
    library = cpp.load(SOURCE, FLAGS)
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    library.pack_weight.argtypes = [pointer, integer, integer, pointer]
    library.pack_weight.restype = None
    library.class_scores.argtypes = [
        *(pointer, integer, integer, pointer, pointer, integer, ctypes.c_float),
        *(pointer, integer, integer, integer, pointer, pointer, pointer, pointer),
    ]
    library.class_scores.restype = None
    library.request_tiles.restype = ctypes.c_long
    if library.request_tiles() != 0:
        raise RuntimeError("the system grants no AMX tile registers; pass impl='torch'")
    return library
