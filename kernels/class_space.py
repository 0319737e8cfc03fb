"""The class space of a model: its final LayerNorm and its head folded into one matrix.

Shape letters: C classes, D width.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ClassSpace:
    """``logits = rstd(x) · (x · weight_CDᵀ) + bias_C`` equals ``head(LayerNorm(x))``.

    ``rstd(x) = 1 / sqrt(var(x) + eps)`` with the population variance over the width. The rows of
    ``weight_CD`` are centred, so that the mean of x drops out of the product.

    Attributes:
        weight_CD: [C, D] ``E ⊙ γ`` with each row centred, in the dtype the scoring multiplies in.
        bias_C: [C] ``b + E β``; float32, or float64 beside a float64 weight.
        eps: the LayerNorm's epsilon.
    """

    weight_CD: Float[Tensor, "C D"]
    bias_C: Float[Tensor, " C"]
    eps: float

    @property
    def num_classes(self) -> int:
        return self.weight_CD.shape[0]

    @property
    def width(self) -> int:
        return self.weight_CD.shape[1]

    @cached_property
    def float32_CD(self) -> Float[Tensor, "C D"]:
        """The weight in float32, made once: a CPU's products have results of their operands'
        dtype."""
        return self.weight_CD.float()

    def require_labels(self, labels: Int[Tensor, " N"]) -> None:
        """Raise ValueError for a label outside [0, C). On a GPU this waits for the queue."""
        bad_N = (labels < 0) | (labels >= self.num_classes)
        if bad_N.any():
            n = int(bad_N.int().argmax())
            raise ValueError(
                f"label {int(labels[n])} of image {n} is not in [0, {self.num_classes}); "
                "map the labels onto the rows of the head first"
            )

    def to(
        self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> "ClassSpace":
        """Round the weight to ``dtype`` and move to ``device``; None keeps what there is.

        The bias becomes float32, or float64 where ``dtype`` is float64.

        Raises:
            ValueError: a weight is not finite in ``dtype`` (beyond 65504 in float16, say).
        """
        dtype = self.weight_CD.dtype if dtype is None else dtype
        weight_CD = self.weight_CD.to(device=device, dtype=dtype)
        if not torch.isfinite(weight_CD).all():
            raise ValueError(
                f"the class space has weights that are not finite in {dtype}; "
                "score in bfloat16 or float32 instead, or mend the checkpoint if it holds NaN"
            )
        bias_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        return replace(
            self, weight_CD=weight_CD, bias_C=self.bias_C.to(device=device, dtype=bias_dtype)
        )


def fold_class_space(
    norm_weight: Float[Tensor, " D"] | None,
    norm_bias: Float[Tensor, " D"] | None,
    eps: float,
    head_weight: Float[Tensor, "C D"],
    head_bias: Float[Tensor, " C"] | None,
) -> ClassSpace:
    """Fold ``head(LayerNorm(x))`` in float64 and keep float64; see `ClassSpace.to` for scoring.

    Args:
        norm_weight: [D] γ of the final LayerNorm; None for all ones.
        norm_bias: [D] β of the final LayerNorm; None for zeros.
        eps: epsilon of the final LayerNorm.
        head_weight: [C, D] class embedding E.
        head_bias: [C] b; None for zeros.

    Equal rows of ``head_weight`` give equal rows of the weight and, with equal ``head_bias``,
    equal entries of the bias, bit for bit: every class is reduced by itself.
    """
    head_CD = head_weight.detach().double()
    weight_CD = head_CD if norm_weight is None else head_CD * norm_weight.detach().double()
    bias_C = head_CD.new_zeros(head_CD.shape[0])
    if norm_bias is not None:
        # Not a matrix-vector product: that one may add up equal rows in different orders.
        bias_C = bias_C + (head_CD * norm_bias.detach().double()).sum(dim=1)
    if head_bias is not None:
        bias_C = bias_C + head_bias.detach().double()
    return ClassSpace(weight_CD - weight_CD.mean(dim=1, keepdim=True), bias_C, eps)
