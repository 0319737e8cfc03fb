"""Class scoring in bfloat16 or float32 on a CPU with AMX or AVX-512: launcher of
``class_scores_cpu.cpp``.

Shape letters: N images, S streams, T tokens, D width, C classes.
"""

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor

from classlens.kernels.class_scores_torch import empty_scores
from classlens.kernels.class_space import ClassSpace
from classlens.kernels.reference import ClassScores
from classlens.kernels.tiles import Units, functions, load, pack_panels, require

SOURCE = Path(__file__).with_suffix(".cpp")

_packed: WeakKeyDictionary[ClassSpace, dict[Units, Tensor]] = WeakKeyDictionary()


class ClassScoring(ctypes.Structure):
    """What the kernels score by, and where they put the scores of a batch's streams.

    Attributes:
        space: bfloat16 or float32 on a CPU.
        units: the registers that multiply.
        scores: [N, S·T], the streams one after another.
    """

    _fields_ = (
        *(("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p)),
        *((name, ctypes.c_int64) for name in ("classes", "width")),
        ("labels", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("streams", "tokens", "kept")),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("rank", "label_logit", "logsumexp", "topk")),
    )

    def __init__(
        self,
        space: ClassSpace,
        labels: Int[Tensor, " N"],
        units: Units,
        *,
        streams: int,
        tokens: int,
        topk: int,
        logsumexp: bool = True,
    ) -> None:
        self.space, self.units = space, units
        packed = _packed.setdefault(space, {})
        if units not in packed:
            packed[units] = pack_panels(space.weight_CD, units)
        self._inputs = packed[units], space.bias_C.contiguous(), labels.int().contiguous()
        weight, bias, labels = self._inputs
        shape = len(labels), streams * tokens
        self.scores = empty_scores(shape, topk, logsumexp, torch.float32, labels.device)
        out = self.scores
        super().__init__(
            *(weight.data_ptr(), bias.data_ptr(), space.num_classes, space.width),
            *(labels.data_ptr(), streams, tokens, topk, space.eps),
            out.rank.data_ptr(),
            out.label_logit.data_ptr(),
            None if out.logsumexp is None else out.logsumexp.data_ptr(),
            out.topk.data_ptr(),
        )


def class_scores_cpu(
    x: Float[Tensor, "N T D"],
    space: ClassSpace,
    labels: Int[Tensor, " N"],
    units: Units,
    *,
    topk: int,
    logsumexp: bool,
) -> ClassScores:
    """`classlens.kernels.class_scores.class_scores`, its arguments already checked.

    Raises:
        ValueError: something is not on a CPU, or not all in bfloat16 or all in float32.
        RuntimeError: no such registers; no compiler, or it fails.
    """
    require(units, x, space.weight_CD)
    x = x.contiguous()
    images, tokens, _ = x.shape
    scoring = ClassScoring(
        space, labels, units, streams=1, tokens=tokens, topk=topk, logsumexp=logsumexp
    )
    score = _functions(units)[x.dtype]
    score(x.data_ptr(), images * tokens, scoring, torch.get_num_threads())
    return scoring.scores


@functools.cache
def _functions(units: Units) -> dict[torch.dtype, Callable[..., None]]:
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    argtypes = pointer, integer, ctypes.POINTER(ClassScoring), integer
    return functions(load(SOURCE, units), "class_scores", argtypes)
