"""Gradients of the attribution in closed form: no autograd, no attention matrix (paper §5).

Shape letters: N images, C classes, D width, H heads, G patches, d width of a head.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from classlens.kernels.class_space import ClassSpace
from classlens.kernels.reference import compute_dtype, row_variance

# The largest relevance of a block and image is stored in [2^14, 2^15): below float16's limit, and
# as far as can be above the numbers that it keeps with fewer than eleven bits.
HALF_EXPONENT = 15
# 2^-LEAST_EXPONENT is still a float32.
LEAST_EXPONENT = -100


def class_loss_gradient(
    x_ND: Float[Tensor, "N D"],
    space: ClassSpace,
    labels_N: Int[Tensor, " N"],
    *,
    second_softmax: bool = False,
) -> Float[Tensor, "N D"]:
    """∂ℓ/∂x of the cross-entropy ℓ of softmax(E · LN(x) + b) against the labels.

    Args:
        x_ND: before the final LayerNorm.
        second_softmax: ℓ takes the softmax of the probabilities instead, as the paper's code does.

    Returns:
        float32, or float64 where x is float64. Each entry's relative error stays that of its sums:
        where the probability of a class is near 1, its distance from 1 is added up from the others.
    """
    dtype = compute_dtype(x_ND.dtype)
    weight_CD = space.weight_CD.to(dtype)
    x_ND = x_ND.to(dtype)
    y_ND = _normalised(x_ND, space.eps)[0]
    probability_NC = (y_ND @ weight_CD.T + space.bias_C.to(dtype)).softmax(dim=1)
    if second_softmax:
        outer_NC = _minus_one_hot(probability_NC.softmax(dim=1), labels_N)
        top_N1 = probability_NC.argmax(dim=1, keepdim=True)
        # Only differences count; against those of the top class nothing cancels.
        outer_NC = outer_NC - outer_NC.gather(1, top_N1)
        mean_N1 = (probability_NC * outer_NC).sum(dim=1, keepdim=True)
        logits_NC = probability_NC * (outer_NC - mean_N1)
    else:
        logits_NC = _minus_one_hot(probability_NC, labels_N)
    return layer_norm_backward(x_ND, logits_NC @ weight_CD, None, space.eps)


def layer_norm_backward(
    x_ND: Float[Tensor, "N D"],
    gradient_ND: Float[Tensor, "N D"],
    weight_D: Float[Tensor, " D"] | None,
    eps: float,
) -> Float[Tensor, "N D"]:
    """The gradient before a LayerNorm from the gradient behind it, in the dtype of the latter.

    Args:
        x_ND: what entered the LayerNorm.
        weight_D: its γ; None for ones.
    """
    if weight_D is not None:
        gradient_ND = gradient_ND * weight_D.to(gradient_ND.dtype)
    y_ND, rstd_N1 = _normalised(x_ND.to(gradient_ND.dtype), eps)
    along_N1 = (gradient_ND * y_ND).mean(dim=1, keepdim=True)
    return rstd_N1 * (gradient_ND - gradient_ND.mean(dim=1, keepdim=True) - y_ND * along_N1)


def head_relevance(
    gradient_NHd: Float[Tensor, "N H d"], value_NHGd: Float[Tensor, "N H G d"]
) -> Float[Tensor, "N H G"]:
    """−∂ℓ/∂A[h, CLS, j] = −⟨∂ℓ/∂o[h], V[h, j]⟩, o = A·V the heads' output for the CLS token."""
    value_NHGd = value_NHGd.to(gradient_NHd.dtype)
    return -(value_NHGd @ gradient_NHd.unsqueeze(-1)).squeeze(-1)


def half_exponent(largest_N: Float[Tensor, " N"]) -> Int[Tensor, " N"]:
    """e such that largest · 2^-e lies in [2^14, 2^15): what float16 holds best. int32."""
    exponent_N = torch.frexp(largest_N).exponent
    return exponent_N.clamp(min=LEAST_EXPONENT) - HALF_EXPONENT


def _normalised(x_ND: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The rows less their mean, over their deviation; and one over the latter, [N, 1]."""
    rstd_N1 = torch.rsqrt(row_variance(x_ND) + eps)
    return (x_ND - x_ND.mean(dim=1, keepdim=True)) * rstd_N1, rstd_N1


def _minus_one_hot(probability_NC: Tensor, labels_N: Tensor) -> Tensor:
    """p − onehot(label), the label's entry as minus the sum of the others."""
    labels_N1 = labels_N.long()[:, None]
    others_NC = probability_NC.scatter(1, labels_N1, 0.0)
    return others_NC.scatter(1, labels_N1, -others_NC.sum(dim=1, keepdim=True))
