"""The specification of class scoring, in plain torch: read this to know what the kernels compute.

Shape letters: N images, T tokens, D width, C classes, K top classes.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from classlens.kernels.class_space import ClassSpace


class ClassScores(NamedTuple):
    """What is kept of the logits of every token.

    The float arrays are float64 for float64 inputs. An invalid row (its variance is not finite)
    has rank C, NaN label_logit and logsumexp, and C in every place of topk.

    Attributes:
        rank: [N, T] #{c : l_c > l_y} + #{c < y : l_c = l_y}, y the label; 0 is best.
        label_logit: [N, T] l_y.
        logsumexp: [N, T] log Σ_c exp l_c, so that the label's log-probability is
            ``label_logit - logsumexp``; None where it was not asked for.
        topk: [N, T, K] classes in descending order of their logits, ties to the lower class.
        recomputed: [N, T] whether the rank took comparisons in float64, see
            `classlens.kernels.certify`; None where ranks were not to be certified.
    """

    rank: Int[Tensor, "N T"]
    label_logit: Float[Tensor, "N T"]
    logsumexp: Float[Tensor, "N T"] | None
    topk: Int[Tensor, "N T K"]
    recomputed: Bool[Tensor, "N T"] | None = None

    def unflatten(self, shape: tuple[int, ...]) -> "ClassScores":
        """Results of rows, [R] and [R, K], seen as those of ``shape``."""
        return ClassScores(
            self.rank.unflatten(0, shape),
            self.label_logit.unflatten(0, shape),
            None if self.logsumexp is None else self.logsumexp.unflatten(0, shape),
            self.topk.unflatten(0, shape),
            None if self.recomputed is None else self.recomputed.unflatten(0, shape),
        )


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which inputs of ``dtype`` are normalised and accumulated."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_variance(x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows 1"]:
    """Population variance of each row, in two passes and so exact where the values allow it.

    (On a CPU it is also eight times quicker than torch.var, which is one-pass.)
    """
    return (x - x.mean(dim=-1, keepdim=True)).square_().mean(dim=-1, keepdim=True)


def logits_reference(
    x: Float[Tensor, "*rows D"], space: ClassSpace, *, dtype: torch.dtype | None = None
) -> Float[Tensor, "*rows C"]:
    """``rstd(x) · (x · W'ᵀ) + b'``, the logits of each row of ``x``.

    Args:
        x: [..., D] hidden states before the final LayerNorm.
        space: the folded LayerNorm and head; its weight is used as it is, rounded or not.
        dtype: computed and returned in this dtype; None stands for float64 where ``x`` is
            float64 and float32 otherwise.
    """
    dtype = compute_dtype(x.dtype) if dtype is None else dtype
    x = x.to(dtype)
    rstd = torch.rsqrt(row_variance(x) + space.eps)
    return rstd * (x @ space.weight_CD.to(dtype).T) + space.bias_C.to(dtype)


def class_scores_reference(
    x: Float[Tensor, "N T D"],
    space: ClassSpace,
    labels: Int[Tensor, " N"],
    *,
    topk: int = 1,
    logsumexp: bool = True,
    dtype: torch.dtype | None = None,
) -> ClassScores:
    """Rank every token of every image by a stable descending sort of its logits.

    Same meaning as `classlens.kernels.class_scores.class_scores`; ``dtype`` is that of
    `logits_reference`.
    """
    num_classes = space.num_classes
    logits_NTC = logits_reference(x, space, dtype=dtype)
    invalid_NT1 = ~torch.isfinite(row_variance(x.to(logits_NTC.dtype)))

    order_NTC = logits_NTC.sort(dim=-1, descending=True, stable=True).indices
    labels_NT1 = labels.long()[:, None, None].expand(*x.shape[:2], 1)
    rank_NT = (order_NTC == labels_NT1).int().argmax(dim=-1)
    label_logit_NT1 = logits_NTC.gather(-1, labels_NT1)
    lse_NT1 = logits_NTC.logsumexp(dim=-1, keepdim=True)
    nan = float("nan")
    return ClassScores(
        rank=rank_NT.masked_fill(invalid_NT1[..., 0], num_classes).int(),
        label_logit=label_logit_NT1.masked_fill(invalid_NT1, nan)[..., 0],
        logsumexp=lse_NT1.masked_fill(invalid_NT1, nan)[..., 0] if logsumexp else None,
        topk=order_NTC[..., :topk].masked_fill(invalid_NT1, num_classes).int(),
    )
