"""Class scoring by chunked matrix products, for CPU and as a rival to the fused kernel on a GPU.

The logits of the whole input are never held: rows go through in chunks whose logits stay in the
cache between the passes over them.

Shape letters: N images, T tokens, D width, C classes, K top classes, M rows of a chunk.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from classlens.kernels.certify import Certifier
from classlens.kernels.class_space import ClassSpace
from classlens.kernels.reductions import CompiledReductions, EagerReductions, Reduced, compiled
from classlens.kernels.reference import ClassScores, compute_dtype, row_variance

# 1024 × 1000 float32 logits are 4 MB; on a GPU a chunk must fill the machine.
ROWS_PER_CHUNK = 1024
ROWS_PER_CHUNK_CUDA = 8192
# With very many classes fewer rows, for two buffers of logits are held, on a CPU of 268 MB at most.
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
    out = empty_scores(x.shape[:2], topk, logsumexp, dtype, x.device)
    weight_CD = space.weight_CD if x.is_cuda else space.weight_CD.to(dtype)
    rounded = not x.is_cuda and x.dtype == space.weight_CD.dtype == torch.bfloat16
    bias_C = space.bias_C.to(dtype)
    in_range_N = (labels >= 0) & (labels < space.num_classes)
    labels_N = labels.long().where(in_range_N, 0)
    recomputed_NT = out.rank.bool().zero_() if certifier is not None else None
    eager = EagerReductions(space.num_classes, dtype, x.device)
    reduce = CompiledReductions() if compile else eager
    statistics = compiled(row_rstd) if compile else row_rstd
    for images, tokens in _chunks(x, rows_per_chunk(space.num_classes, x.device)):
        x_MD = x[images, tokens].flatten(0, 1)
        if not x.is_cuda:  # once, for statistics and product
            x_MD = x_MD.to(dtype)
        repeats = tokens.stop - tokens.start
        labels_M1 = labels_N[images].repeat_interleave(repeats)[:, None]
        rstd_M1, valid_M = statistics(x_MD, space.eps)
        valid_M &= in_range_N[images].repeat_interleave(repeats)
        with bfloat16_products() if rounded else nullcontext():
            products_MC = _project(x_MD, weight_CD, eager.buffer(len(x_MD)))
        exact = None
        if certifier is not None and recomputed_NT is not None:
            exact, open_M = certifier.ranks(x_MD, products_MC, rstd_M1, labels_M1, valid_M)
            recomputed_NT[images, tokens] = open_M.view(-1, repeats)
        reduced = reduce(products_MC, rstd_M1, bias_C, labels_M1, topk=topk, logsumexp=logsumexp)
        if exact is not None:
            reduced = reduced._replace(rank=exact)
        store_scores(out, images, tokens, valid_M, space.num_classes, reduced)
    return out._replace(recomputed=recomputed_NT)


def empty_scores(
    shape: tuple[int, ...], topk: int, logsumexp: bool, dtype: torch.dtype, device: torch.device
) -> ClassScores:
    """Uninitialised results of ``shape``, [N, T]."""
    return ClassScores(
        rank=torch.empty(shape, dtype=torch.int32, device=device),
        label_logit=torch.empty(shape, dtype=dtype, device=device),
        logsumexp=torch.empty(shape, dtype=dtype, device=device) if logsumexp else None,
        topk=torch.empty(*shape, topk, dtype=torch.int32, device=device),
    )


def store_scores(
    out: ClassScores,
    images: slice,
    tokens: slice,
    valid_M: Bool[Tensor, " M"],
    num_classes: int,
    reduced: Reduced,
) -> None:
    """Write the rows of ``[images, tokens]`` into ``out``, the invalid ones marked as such."""
    where = images, tokens
    shape = out.rank[where].shape
    invalid_M = ~valid_M
    nan = float("nan")
    out.rank[where] = reduced.rank.masked_fill(invalid_M, num_classes).view(shape)
    out.label_logit[where] = reduced.label_logit.masked_fill(invalid_M, nan).view(shape)
    if out.logsumexp is not None and reduced.logsumexp is not None:
        out.logsumexp[where] = reduced.logsumexp.masked_fill(invalid_M, nan).view(shape)
    topk_MK = reduced.topk.masked_fill(invalid_M[:, None], num_classes)
    out.topk[where] = topk_MK.unflatten(0, shape)


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
        rows, values = ROWS_PER_CHUNK, VALUES_PER_CHUNK
    return min(rows, max(LEAST_ROWS, values // num_classes))


def _chunks(x: Float[Tensor, "N T D"], rows: int) -> Iterator[tuple[slice, slice]]:
    """(images, tokens) blocks of about ``rows`` rows: whole images, or parts of one."""
    n_images, n_tokens, _ = x.shape
    if not n_images * n_tokens:
        return
    images_per_chunk = max(1, rows // n_tokens)
    for n in range(0, n_images, images_per_chunk):
        for tokens in token_chunks(n_tokens, rows):
            yield slice(n, min(n + images_per_chunk, n_images)), tokens


def token_chunks(n_tokens: int, rows: int) -> Iterator[slice]:
    """Cut ``n_tokens`` into equal parts of at most ``rows``."""
    parts = -(-n_tokens // rows)
    for part in range(parts):
        yield slice(part * n_tokens // parts, (part + 1) * n_tokens // parts)


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
    out: Float[Tensor, "M C"],
) -> Float[Tensor, "M C"]:
    """``x · weightᵀ`` with the accumulator's full precision, in ``out`` or a new tensor."""
    if x_MD.is_cuda and x_MD.dtype != out.dtype:
        return torch.mm(x_MD, weight_CD.T, out_dtype=out.dtype)
    return torch.mm(x_MD, weight_CD.T, out=out)
