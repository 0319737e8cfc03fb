"""Class scoring by chunked matrix products, for CPU and as a rival to the fused kernel on a GPU.

The logits of the whole input are never held: rows go through in chunks whose logits stay in the
cache between the passes over them.

Shape letters: N images, T tokens, D width, C classes, K top classes, M rows of a chunk.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from classlens.kernels.class_space import ClassSpace
from classlens.kernels.reference import ClassScores, compute_dtype, row_variance

# 1024 × 1000 float32 logits are 4 MB; on a GPU a chunk must fill the machine.
ROWS_PER_CHUNK = 1024
ROWS_PER_CHUNK_CUDA = 8192


def class_scores_torch(
    x: Float[Tensor, "N T D"],
    space: ClassSpace,
    labels: Int[Tensor, " N"],
    *,
    topk: int,
    logsumexp: bool,
) -> ClassScores:
    """`classlens.kernels.class_scores.class_scores`, its arguments already checked."""
    out = empty_scores(x, topk, logsumexp)
    dtype = out.label_logit.dtype
    weight_CD = space.weight_CD if x.is_cuda else space.weight_CD.to(dtype)
    bias_C = space.bias_C.to(dtype)
    in_range_N = (labels >= 0) & (labels < space.num_classes)
    labels_N = labels.long().where(in_range_N, 0)
    scratch = Scratch(space.num_classes, dtype, x.device)
    for images, tokens in _chunks(x):
        x_MD = x[images, tokens].flatten(0, 1)
        repeats = tokens.stop - tokens.start
        labels_M1 = labels_N[images].repeat_interleave(repeats)[:, None]
        rstd_M1, valid_M = row_rstd(x_MD.to(dtype), space.eps)
        valid_M &= in_range_N[images].repeat_interleave(repeats)

        logits_MC = _project(x_MD, weight_CD, scratch.values(len(x_MD)))
        torch.addcmul(bias_C, logits_MC, rstd_M1, out=logits_MC)
        label_logit_M1 = logits_MC.gather(1, labels_M1)
        peak_M1 = logits_MC.amax(dim=1, keepdim=True)
        store_scores(
            out,
            images,
            tokens,
            valid_M,
            space.num_classes,
            rank=scratch.rank(logits_MC, label_logit_M1, labels_M1),
            label_logit=label_logit_M1[:, 0],
            logsumexp=scratch.logsumexp(logits_MC, peak_M1) if logsumexp else None,
            topk=scratch.topk_(logits_MC, peak_M1, topk),  # last: it overwrites the logits
        )
    return out


def empty_scores(x: Float[Tensor, "N T D"], topk: int, logsumexp: bool) -> ClassScores:
    """Uninitialised results of the right shapes and dtypes."""
    shape, dtype, device = x.shape[:2], compute_dtype(x.dtype), x.device
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
    *,
    rank: Int[Tensor, " M"],
    label_logit: Float[Tensor, " M"],
    logsumexp: Float[Tensor, " M"] | None,
    topk: Int[Tensor, "M K"],
) -> None:
    """Write the rows of ``[images, tokens]`` into ``out``, the invalid ones marked as such."""
    where = images, tokens
    shape = out.rank[where].shape
    invalid_M = ~valid_M
    nan = float("nan")
    out.rank[where] = rank.masked_fill(invalid_M, num_classes).view(shape)
    out.label_logit[where] = label_logit.masked_fill(invalid_M, nan).view(shape)
    if out.logsumexp is not None and logsumexp is not None:
        out.logsumexp[where] = logsumexp.masked_fill(invalid_M, nan).view(shape)
    out.topk[where] = topk.masked_fill(invalid_M[:, None], num_classes).unflatten(0, shape)


def row_rstd(
    x_MD: Float[Tensor, "M D"], eps: float
) -> tuple[Float[Tensor, "M 1"], Bool[Tensor, " M"]]:
    """``1 / sqrt(var + eps)`` of each row, and whether its variance is finite."""
    var_M1 = row_variance(x_MD)
    return torch.rsqrt(var_M1 + eps), torch.isfinite(var_M1[:, 0])


class Scratch:
    """Two [M, C] buffers, reused from chunk to chunk, and the reductions that need them."""

    def __init__(self, num_classes: int, dtype: torch.dtype, device: torch.device) -> None:
        self.num_classes = num_classes
        self._values = torch.empty(0, num_classes, dtype=dtype, device=device)
        self._other = torch.empty_like(self._values)
        self._classes = torch.arange(num_classes, device=device)
        # C for the first class down to 1 for the last: the largest of equals is the first.
        self._places = (num_classes - self._classes).to(dtype)

    def values(self, rows: int) -> Float[Tensor, "M C"]:
        """The buffer for the logits of ``rows`` rows; its content is undefined."""
        if rows > len(self._values):
            self._values = self._values.new_empty(rows, self.num_classes)
            self._other = torch.empty_like(self._values)
        return self._values[:rows]

    def rank(
        self,
        values_MC: Float[Tensor, "M C"],
        threshold_M1: Float[Tensor, "M 1"],
        labels_M1: Int[Tensor, "M 1"],
    ) -> Int[Tensor, " M"]:
        """How many classes lie above the threshold, or on it with a number below the label."""
        if values_MC.is_cuda:  # branching on ties would wait for the GPU
            on_MC = (values_MC == threshold_M1) & (self._classes < labels_M1)
            return (on_MC | (values_MC > threshold_M1)).sum(dim=1, dtype=torch.int32)
        # Comparisons into a float buffer are vectorised and those into bool are not.
        flags_MC = self._other[: len(values_MC)]
        above_M = torch.gt(values_MC, threshold_M1, out=flags_MC).sum(dim=1)
        tied_M = torch.ge(values_MC, threshold_M1, out=flags_MC).sum(dim=1) > above_M + 1
        if tied_M.any():
            on_RC = values_MC[tied_M] == threshold_M1[tied_M]
            above_M[tied_M] += (on_RC & (self._classes < labels_M1[tied_M])).sum(dim=1)
        return above_M.int()

    def logsumexp(
        self, values_MC: Float[Tensor, "M C"], peak_M1: Float[Tensor, "M 1"]
    ) -> Float[Tensor, " M"]:
        """log Σ_c exp(values), ``peak`` being each row's maximum."""
        exp_MC = torch.sub(values_MC, peak_M1, out=self._other[: len(values_MC)]).exp_()
        return peak_M1[:, 0] + exp_MC.sum(dim=1).log_()

    def topk_(
        self, values_MC: Float[Tensor, "M C"], peak_M1: Float[Tensor, "M 1"], k: int
    ) -> Int[Tensor, "M K"]:
        """The ``k`` first classes in order, ties to the lower; overwrites ``values`` if k > 1.

        ``peak`` is each row's maximum. A row of NaN gives C.
        """
        best_MK = torch.empty(len(values_MC), k, dtype=torch.int32, device=values_MC.device)
        flags_MC = self._other[: len(values_MC)]
        for i in range(k):
            if i > 0:
                taken_M1 = best_MK[:, i - 1 : i].long().clamp(max=self.num_classes - 1)
                values_MC.scatter_(1, taken_M1, float("-inf"))
                peak_M1 = values_MC.amax(dim=1, keepdim=True)
            # Several times faster than argmax, which promises no order among equals besides.
            place_MC = torch.eq(values_MC, peak_M1, out=flags_MC).mul_(self._places)
            best_MK[:, i] = self.num_classes - place_MC.amax(dim=1).int()
        return best_MK


def _chunks(x: Float[Tensor, "N T D"]) -> Iterator[tuple[slice, slice]]:
    """(images, tokens) blocks of about `ROWS_PER_CHUNK` rows: whole images, or parts of one."""
    n_images, n_tokens, _ = x.shape
    if not n_images * n_tokens:
        return
    rows = ROWS_PER_CHUNK_CUDA if x.is_cuda else ROWS_PER_CHUNK
    images_per_chunk = max(1, rows // n_tokens)
    for n in range(0, n_images, images_per_chunk):
        for tokens in token_chunks(n_tokens, rows):
            yield slice(n, min(n + images_per_chunk, n_images)), tokens


def token_chunks(n_tokens: int, rows: int) -> Iterator[slice]:
    """Cut ``n_tokens`` into equal parts of at most ``rows``."""
    parts = -(-n_tokens // rows)
    for part in range(parts):
        yield slice(part * n_tokens // parts, (part + 1) * n_tokens // parts)


def _project(
    x_MD: Float[Tensor, "M D"],
    weight_CD: Float[Tensor, "C D"],
    out: Float[Tensor, "M C"],
) -> Float[Tensor, "M C"]:
    """``x · weightᵀ`` with the accumulator's full precision, in ``out`` or a new tensor."""
    if x_MD.is_cuda and x_MD.dtype != out.dtype:
        return torch.mm(x_MD, weight_CD.T, out_dtype=out.dtype)
    return torch.mm(x_MD.to(out.dtype), weight_CD.T, out=out)
