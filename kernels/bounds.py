"""How far a computed rank may lie from the exact one: a bracket derived from rounding errors.

Ranks jump, so no tolerance on them says anything. `rank_bracket` says between which ranks every
correct implementation must land.

Derivation, for one row x and class c. Exact values: s_c = Σ_d x_d W'_cd, r = 1/√(var + eps),
l_c = r s_c + b_c. Computed in an accumulator of unit roundoff v (2⁻²⁴ for float32, 2⁻⁵³ for
float64) from a weight Ŵ rounded to the scoring dtype, of unit roundoff u, they become
ŝ_c = s_c + e_c, r̂ = r(1 + ρ) and l̂_c = ((r̂ ŝ_c)(1 + ε₁) + b_c(1 + ε₂))(1 + ε₃), |εᵢ| ≤ v.

A rank is decided by the order of l̂_c and l̂_y alone. Dividing all of a row by (1 + ρ) keeps that
order, so the common factor r̂ matters through the bias only. What is left gives

    δ_c = r (R_c + A_c) + 3v (|r s_c| + |b_c|) + ρ |b_c|

and l_c − l_y > δ_c + δ_y proves that c is ranked before y, < −(δ_c + δ_y) that it is not. The
ranks in between are open, exact ties among them. The parts:

- R_c, rounding of the weight: |x|·|W'_c − Ŵ_c|, known exactly, plus 2v |x|·|W'_c| for an
  implementation that keeps a float32 weight.
- A_c, accumulation of D terms t_d = x_d W'_cd. For 16-bit inputs it is the worst case,
  D·2v Σ|t_d|: products are exact, and 2v rather than v since tensor cores truncate [Fasi et al.
  2021, "Numerical behavior of NVIDIA tensor cores"].
  For float32 and float64 the worst case is met by no data and would be 30 times too wide, so the
  errors are modelled as in [Higham & Mary 2019, "A new approach to probabilistic rounding error
  analysis"]: independent of each other, with mean zero. An addition errs by v times its result at
  most, a partial sum of m terms; by Hoeffding's inequality all D together exceed
  λ v √(Σ partial sums²) with probability 2 exp(−λ²/2), 3·10⁻⁸ for λ = 6. The order of the terms
  has nothing to do with their values, so a partial sum is a sample without replacement: its mean
  is (m/D) s_c, its variance at most Q m (D − m)/D² with Q = Σ t_d². It strays from its mean by
  less than λ standard deviations. Summed over the additions of a chain, the worst of all orders,
  Σ (m/D)² ≤ (D + 2)/3 and Σ m (D − m)/D² ≤ D/6, which gives
  A_c = λ v √(D + 2) (|s_c| √⅓ + λ √(Q/6)).
  Where a float32 product is six of bfloat16 parts (`classlens.kernels.tiles`), six additions stand
  for each, A_c is √6 times that, and 2v Σ|t_d| comes on top for the three products left out.
- ρ, error of r̂: a sum of squares has relative error (D + 4) v at most, its mean's error enters
  squared, and the root halves it: ρ = (D/2 + 8) v + ½ (D v mean|x|)² / var.

The exact values are themselves computed in float64, so A_c with v = 2⁻⁵³ comes on top.

Shape letters: N images, T tokens, D width, C classes.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from classlens.kernels.class_space import ClassSpace

LAMBDA = 6.0


def logit_error(
    x_TD: Float[Tensor, "T D"],
    space: ClassSpace,
    dtype: torch.dtype,
    *,
    split: bool = False,
) -> tuple[Float[Tensor, "T C"], Float[Tensor, "T C"]]:
    """Exact logits in float64 and the bound δ on the error of each, as the module derives it.

    split: whether products of float32 are those of bfloat16 parts.
    """
    x_TD, weight_CD, bias_C = x_TD.double(), space.weight_CD.double(), space.bias_C.double()
    width = x_TD.shape[1]
    half = dtype in (torch.float16, torch.bfloat16)
    u = torch.finfo(dtype).eps / 2
    v = u if dtype == torch.float64 else torch.finfo(torch.float32).eps / 2

    var_T1 = x_TD.var(dim=1, keepdim=True, correction=0)
    rstd_T1 = torch.rsqrt(var_T1 + space.eps)
    sums_TC = x_TD @ weight_CD.T
    magnitude_TC = x_TD.abs() @ weight_CD.abs().T
    spread_TC = (x_TD.square() @ weight_CD.square().T).sqrt()

    rounded_CD = weight_CD.to(dtype).double()
    rounding_TC = x_TD.abs() @ (weight_CD - rounded_CD).abs().T + 2 * v * magnitude_TC
    partial_TC = sums_TC.abs() / 3**0.5 + LAMBDA / 6**0.5 * spread_TC
    partial_TC *= LAMBDA * (width + 2) ** 0.5
    accumulation_TC = width * 2 * v * magnitude_TC if half else v * partial_TC
    if split and not half:
        accumulation_TC = 6**0.5 * accumulation_TC + 2 * v * magnitude_TC
    accumulation_TC += 2**-53 * partial_TC
    rho_T1 = (width / 2 + 8) * v + (width * v * x_TD.abs().mean(dim=1, keepdim=True)) ** 2 / (
        2 * var_T1 + space.eps
    )

    logits_TC = rstd_T1 * sums_TC + bias_C
    error_TC = (
        rstd_T1 * (rounding_TC + accumulation_TC)
        + 3 * v * ((rstd_T1 * sums_TC).abs() + bias_C.abs())
        + rho_T1 * bias_C.abs()
    )
    return logits_TC, error_TC


def rank_bracket(
    x: Float[Tensor, "N T D"],
    space64: ClassSpace,
    labels: Int[Tensor, " N"],
    dtype: torch.dtype,
    *,
    split: bool = False,
) -> tuple[Int[Tensor, "N T"], Int[Tensor, "N T"]]:
    """The lowest and the highest rank that a correct implementation may give each token.

    Args:
        x: [N, T, D] the values that were scored, exactly; any dtype.
        space64: the float64 space. A space that was rounded and widened again (say
            ``space.to(dtype=torch.float16).to(dtype=torch.float64)``) gives the narrower bracket
            about the rounded model.
        labels: [N] in [0, C).
        dtype: scored in this dtype: that of ``x`` and, or a wider one, of the weight.
        split: whether products of float32 are those of bfloat16 parts (``impl="amx"``).

    Returns:
        (lo, hi), [N, T] int32 each: lo = #{c ≠ y : l_c − l_y > δ_c + δ_y} and
        hi = #{c ≠ y : l_c − l_y ≥ −(δ_c + δ_y)}; both C where the row is invalid.
    """
    num_classes = space64.num_classes
    lo_NT = torch.empty(x.shape[:2], dtype=torch.int32, device=x.device)
    hi_NT = torch.empty_like(lo_NT)
    for n, label in enumerate(labels.tolist()):
        logits_TC, error_TC = logit_error(x[n], space64, dtype, split=split)
        gap_TC = logits_TC - logits_TC[:, label : label + 1]
        slack_TC = error_TC + error_TC[:, label : label + 1]
        invalid_T = ~torch.isfinite(gap_TC[:, label])
        lo_T = (gap_TC > slack_TC).sum(dim=1)
        hi_T = (gap_TC >= -slack_TC).sum(dim=1) - 1  # less the label itself
        lo_NT[n] = lo_T.masked_fill(invalid_T, num_classes)
        hi_NT[n] = hi_T.masked_fill(invalid_T, num_classes)
    return lo_NT, hi_NT
