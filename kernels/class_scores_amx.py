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

from classlens.kernels.amx import load, pack_panels
from classlens.kernels.class_scores_torch import empty_scores
from classlens.kernels.class_space import ClassSpace
from classlens.kernels.reference import ClassScores

SOURCE = Path(__file__).with_suffix(".cpp")

_packed: WeakKeyDictionary[ClassSpace, Tensor] = WeakKeyDictionary()


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
        _packed[space] = pack_panels(space.weight_CD)
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


@functools.cache
def _library() -> ctypes.CDLL:
    library = load(SOURCE)
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    library.class_scores.argtypes = [
        *(pointer, integer, integer, pointer, pointer, integer, ctypes.c_float),
        *(pointer, integer, integer, integer, pointer, pointer, pointer, pointer),
    ]
    library.class_scores.restype = None
    return library
