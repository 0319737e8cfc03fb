"""Class scoring by chunked matrix products, for CPU and as a rival to the fused kernel on a GPU.

The logits of the whole input are never held: rows are projected in chunks, on a CPU so few that
what is made of them stays in the cache between one operation and the next.

Shape letters: N images, T tokens, R = N·T rows, D width, C classes, K top classes, M rows of a
chunk.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from classlens.kernels.certify import Certifier
from classlens.kernels.class_space import ClassSpace
from classlens.kernels.reductions import (
    VALUES_IN_CACHE,
    CompiledReductions,
    EagerReductions,
    Reduced,
    compiled,
    parts,
)
from classlens.kernels.reference import ClassScores, compute_dtype, row_variance

# On a CPU a product of a multiple of 512 rows is up to 1.15 times as fast as others. At least so
# many, for packing the weight to count little, and up to four times as many if they stay in the
# cache; on a GPU a product must fill the machine.
ROWS_PER_STEP = 512
STEPS_PER_CHUNK = 4
ROWS_PER_CHUNK_CUDA = 8192
# With very many classes fewer rows, for their logits are held, on a CPU 134 MB at most.
# Not sooner: with 21,841 classes a CPU takes twice as long in chunks of 128 rows as of 1024.
VALUES_PER_CHUNK = 1 << 25
VALUES_PER_CHUNK_CUDA = 1 << 28
LEAST_ROWS = 128


def class_scores_torch(
    x: Float[Tensor, "N T D"],
    space: ClassSpace,
    labels: Int[Tensor, " N"],
    *,
    topk: int,
    logsumexp: bool,
    compile: bool,
    certifier: Certifier | None,
) -> ClassScores:
    """`classlens.kernels.class_scores.class_scores`, its arguments already checked."""
    dtype = compute_dtype(x.dtype)
    x_RD = x.flatten(0, 1)
    out = empty_scores(x_RD.shape[:1], topk, logsumexp, dtype, x.device)
    weight_CD = space.weight_CD
    if not x.is_cuda:
        weight_CD = space.float32_CD if dtype == torch.float32 else weight_CD.to(dtype)
    rounded = not x.is_cuda and x.dtype == space.weight_CD.dtype == torch.bfloat16
    bias_C = space.bias_C.to(dtype)
    in_range_N = (labels >= 0) & (labels < space.num_classes)
    labels_R1 = labels.long().where(in_range_N, 0).repeat_interleave(x.shape[1])[:, None]
    valid_R = in_range_N.repeat_interleave(x.shape[1])
    if certifier is not None:
        out = out._replace(recomputed=torch.empty_like(valid_R))
    reduce = (
        CompiledReductions() if compile else EagerReductions(space.num_classes, dtype, x.device)
    )
    statistics = compiled(row_rstd) if compile else row_rstd
    products_MC = None
    for rows in parts(len(x_RD), rows_per_chunk(space.num_classes, x.device)):
        x_MD = x_RD[rows] if x.is_cuda else x_RD[rows].to(dtype)
        if products_MC is not None:  # the same memory for all chunks, so that it stays in the cache
            products_MC = products_MC[: len(x_MD)]
        with bfloat16_products() if rounded else nullcontext():
            products_MC = _project(x_MD, weight_CD, dtype, out=products_MC)
        rstd_M1, finite_M = statistics(x_MD, space.eps)
        valid_R[rows] &= finite_M
        certified = None
        if certifier is not None:
            certified = certifier.ranks(x_MD, products_MC, rstd_M1, labels_R1[rows], valid_R[rows])
        reduced = reduce(
            products_MC, rstd_M1, bias_C, labels_R1[rows], topk=topk, logsumexp=logsumexp
        )
        store_scores(out, rows, reduced)
        if certified is not None and out.recomputed is not None:
            out.rank[rows], out.recomputed[rows] = certified
    mark_invalid(out, valid_R, space.num_classes)
    return out.unflatten(x.shape[:2])


def empty_scores(
    shape: tuple[int, ...], topk: int, logsumexp: bool, dtype: torch.dtype, device: torch.device
) -> ClassScores:
    """Uninitialised results of ``shape``, [N, T] or rows."""
    return ClassScores(
        rank=torch.empty(shape, dtype=torch.int32, device=device),
        label_logit=torch.empty(shape, dtype=dtype, device=device),
        logsumexp=torch.empty(shape, dtype=dtype, device=device) if logsumexp else None,
        topk=torch.empty(*shape, topk, dtype=torch.int32, device=device),
    )


def store_scores(out: ClassScores, rows: slice, reduced: Reduced) -> None:
    """Put the results of some rows into ``out``, of shape [R]."""
    out.rank[rows] = reduced.rank
    out.label_logit[rows] = reduced.label_logit
    if out.logsumexp is not None and reduced.logsumexp is not None:
        out.logsumexp[rows] = reduced.logsumexp
    out.topk[rows] = reduced.topk


def mark_invalid(out: ClassScores, valid_R: Bool[Tensor, " R"], num_classes: int) -> None:
    """Give rows that are not valid the values which say so, in place; ``out`` is of shape [R]."""
    invalid_R = ~valid_R
    out.rank.masked_fill_(invalid_R, num_classes)
    out.label_logit.masked_fill_(invalid_R, float("nan"))
    if out.logsumexp is not None:
        out.logsumexp.masked_fill_(invalid_R, float("nan"))
    out.topk.masked_fill_(invalid_R[:, None], num_classes)


def row_rstd(
    x_MD: Float[Tensor, "M D"], eps: float
) -> tuple[Float[Tensor, "M 1"], Bool[Tensor, " M"]]:
    """``1 / sqrt(var + eps)`` of each row, at least float32, and whether its variance is finite."""
    var_M1 = row_variance(x_MD.to(compute_dtype(x_MD.dtype)))
    return torch.rsqrt(var_M1 + eps), torch.isfinite(var_M1[:, 0])


def rows_per_chunk(num_classes: int, device: torch.device) -> int:
    """How many rows are projected at a time."""
    if device.type == "cuda":
        rows, values = ROWS_PER_CHUNK_CUDA, VALUES_PER_CHUNK_CUDA
    else:
        steps = VALUES_IN_CACHE // num_classes // ROWS_PER_STEP
        rows, values = ROWS_PER_STEP * min(max(1, steps), STEPS_PER_CHUNK), VALUES_PER_CHUNK
    return min(rows, max(LEAST_ROWS, values // num_classes))


@contextmanager
def bfloat16_products() -> Iterator[None]:
    """Lets a CPU round float32 operands to bfloat16, exact where they are bfloat16 already, and
    multiply them as such; sums and results stay float32.

    A product of bfloat16 tensors would round its result to bfloat16, and rounded logits tie in
    masses. No effect on a GPU, nor on a CPU without such instructions.
    """
    settings = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def _project(
    x_MD: Float[Tensor, "M D"],
    weight_CD: Float[Tensor, "C D"],
    dtype: torch.dtype,
    *,
    out: Float[Tensor, "M C"] | None,
) -> Float[Tensor, "M C"]:
    """``x · weightᵀ`` in ``dtype``, as precise as the accumulator; into ``out`` on a CPU."""
    if x_MD.dtype != dtype:  # on a GPU
        return torch.mm(x_MD, weight_CD.T, out_dtype=dtype)
    return torch.mm(x_MD, weight_CD.T, out=out)
