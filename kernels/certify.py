"""Certified ranks: proven equal to those of exact arithmetic on the same hidden states.

The bound is a worst case, unlike the probable one of `classlens.kernels.bounds`, which serves to
test implementations: here it must hold for every row of every data set.

For one row x and class c let s_c = Σ_d x_d W'_cd, r = 1/√(var + eps), l_c = r s_c + b'_c be exact.
Products are computed from a rounded weight Ŵ in an accumulator of unit roundoff v (2⁻²⁴ in
float32; 2⁻²³ on a GPU, whose tensor cores truncate), in any order, so by Cauchy–Schwarz

    |ŝ_c − s_c| ≤ E_c = ‖x‖ (γ ‖Ŵ_c‖ + ‖Ŵ_c − W'_c‖) + D·2⁻¹²⁶,   γ = D v / (1 − D v),

the last term for what underflows. The computed r̂ = r (1 + ρ') has |ρ'| ≤ ρ, as derived in
`classlens.kernels.bounds`, with mean|x| ≤ ‖x‖/√D. Numbers r̂ s_c + (1 + ρ') b'_c are in the order
of the l_c, and a computed logit is off from its one by at most

    δ_c = r̂ ‖x‖ ((γ + 4v) ‖W_c‖ + ‖Ŵ_c − W'_c‖) + r̂ D 2⁻¹²⁶ + (ρ + 5v) |b'_c|,

‖W_c‖ the larger of ‖W'_c‖ and ‖Ŵ_c‖: two roundings of r̂ ŝ_c + b̂_c, one of b̂_c, and those of the
difference of two logits. All of it is taken 3 % larger: ρ is evaluated with r̂ and not r, at most
2 % apart where ρ < 0.01, and δ itself in float32, good to 0.1 % for D ≤ 8192. With δ = max_c δ_c +
δ_y a class whose computed logit is more than δ above the label's is certainly ranked before it,
more than δ below certainly not.

The classes in between are compared again in float64, with the analogous bound, and where even that
does not tell (near-ties of 10⁻¹³, say), in rational arithmetic.

Shape letters: M rows of a chunk, D width, C classes, P (row, class) pairs.
"""

from fractions import Fraction

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from classlens.kernels.class_space import ClassSpace
from classlens.kernels.reductions import compiled
from classlens.kernels.reference import row_variance

SAFETY = 1.03
MAX_WIDTH = 8192
# Above this relative error of r̂ no comparison with it is trusted.
MAX_RHO = 0.01
UNDERFLOW = 2.0**-126
# Two float64 operands of 4096 × 768 are 50 MB.
PAIRS_PER_CHUNK = 4096


class Certifier:
    """Proves or mends the ranks of one class space.

    Args:
        exact: the class space as folded, in float64 on the CPU.
        space: the one that products are computed with: ``exact``, rounded and moved.
        dtype: of the hidden states.
        compile: whether to compile what can be.

    Raises:
        ValueError: the space is wider than the derivation covers.
    """

    def __init__(
        self, exact: ClassSpace, space: ClassSpace, dtype: torch.dtype, *, compile: bool
    ) -> None:
        if exact.width > MAX_WIDTH:
            raise ValueError(f"ranks are certified up to width {MAX_WIDTH}, not {exact.width}")
        device = space.weight_CD.device
        self.exact = exact.to(dtype=torch.float64, device=device)
        self.compile = compile
        v = 2.0**-53 if dtype == torch.float64 else 2.0**-24 * (2 if device.type == "cuda" else 1)
        width, weight_CD = exact.width, self.exact.weight_CD
        rounded_CD = space.weight_CD.double()
        norm_C = torch.maximum(weight_CD.norm(dim=1), rounded_CD.norm(dim=1))
        gamma = width * v / (1 - width * v)
        self._roundoff = v
        self._norm_C = weight_CD.norm(dim=1)
        self._slope_C = (gamma + 4 * v) * norm_C + (rounded_CD - weight_CD).norm(dim=1)

    def ranks(
        self,
        x_MD: Float[Tensor, "M D"],
        products_MC: Float[Tensor, "M C"],
        rstd_M1: Float[Tensor, "M 1"],
        labels_M1: Int[Tensor, "M 1"],
        valid_M: Bool[Tensor, " M"],
    ) -> tuple[Int[Tensor, " M"], Bool[Tensor, " M"]]:
        """Exact ranks, and which rows took comparisons in float64.

        Args:
            x_MD: hidden states as the products had them.
            products_MC: ``x · Ŵᵀ``, not yet multiplied by rstd; left as they are.
            valid_M: rows to look at; the rank of others means nothing.
        """
        window_M1 = self._window(x_MD.to(products_MC.dtype), rstd_M1, labels_M1)
        bias_C = self.exact.bias_C.to(products_MC.dtype)
        count = compiled(_certain_and_open) if self.compile else _certain_and_open
        rank_M, open_MC = count(products_MC, rstd_M1, bias_C, labels_M1, window_M1)
        open_MC &= valid_M[:, None]
        rows_P, classes_P = open_MC.nonzero(as_tuple=True)
        ahead_P = self._ahead(x_MD, rows_P, classes_P, labels_M1[:, 0])
        rank_M = rank_M.index_add(0, rows_P, ahead_P.to(rank_M.dtype))
        return rank_M, open_MC.any(dim=1)

    def _window(
        self,
        x_MD: Float[Tensor, "M D"],
        rstd_M1: Float[Tensor, "M 1"],
        labels_M1: Int[Tensor, "M 1"],
    ) -> Float[Tensor, "M 1"]:
        """δ of each row; infinite where float32 cannot be trusted at all."""
        v, width = self._roundoff, self.exact.width
        slope_C, bias_C = self._slope_C, self.exact.bias_C.abs()
        reach_M1 = rstd_M1.double() * x_MD.norm(dim=1, keepdim=True)
        rho_M1 = _rstd_error(reach_M1, width, v)
        window_M1 = (
            reach_M1 * (slope_C.amax() + slope_C[labels_M1])
            + 2 * width * UNDERFLOW * rstd_M1
            + (rho_M1 + 5 * v) * (bias_C.amax() + bias_C[labels_M1])
        )
        window_M1 = window_M1.where(rho_M1 < MAX_RHO, float("inf"))
        return (SAFETY * window_M1).to(x_MD.dtype)

    def _ahead(
        self,
        x_MD: Float[Tensor, "M D"],
        rows_P: Int[Tensor, " P"],
        classes_P: Int[Tensor, " P"],
        labels_M: Int[Tensor, " M"],
    ) -> Bool[Tensor, " P"]:
        """Whether the class is ranked before the label, for each pair."""
        exact = self.exact
        labels_P = labels_M[rows_P]
        label_dots_P = self._label_dots(x_MD, rows_P, labels_M)
        difference_P = self._dots(x_MD, rows_P, classes_P) - label_dots_P
        used_M = torch.zeros_like(labels_M, dtype=torch.bool).index_fill(0, rows_P, True)
        x_RD = x_MD[used_M].double()
        place_M = used_M.cumsum(0) - 1
        rstd_R = torch.rsqrt(row_variance(x_RD)[:, 0] + exact.eps)
        reach_R = rstd_R * x_RD.norm(dim=1)
        rstd_P, reach_P = rstd_R[place_M[rows_P]], reach_R[place_M[rows_P]]
        bias_c_P, bias_y_P = exact.bias_C[classes_P], exact.bias_C[labels_P]
        margin_P = rstd_P * difference_P + (bias_c_P - bias_y_P)

        v, width = 2.0**-53, exact.width
        rho_P = _rstd_error(reach_P, width, v)
        norms_P = self._norm_C[classes_P] + self._norm_C[labels_P]
        error_P = SAFETY * (
            reach_P * (width + 8) * v * norms_P
            + (rho_P + 8 * v) * (bias_c_P.abs() + bias_y_P.abs())
        ).where(rho_P < MAX_RHO, float("inf"))
        ahead_P = margin_P > 0
        undecided = (margin_P.abs() <= error_P) | ~margin_P.isfinite()
        for p in undecided.nonzero()[:, 0].tolist():
            c, y = int(classes_P[p]), int(labels_P[p])
            above = _exact_sign(x_MD[rows_P[p]], exact, c, y)
            ahead_P[p] = above > 0 or (above == 0 and c < y)
        return ahead_P

    def _label_dots(
        self, x_MD: Float[Tensor, "M D"], rows_P: Int[Tensor, " P"], labels_M: Int[Tensor, " M"]
    ) -> Float[Tensor, " P"]:
        rows_R, back_P = rows_P.unique(return_inverse=True)
        return self._dots(x_MD, rows_R, labels_M[rows_R])[back_P]

    def _dots(
        self, x_MD: Float[Tensor, "M D"], rows_P: Int[Tensor, " P"], classes_P: Int[Tensor, " P"]
    ) -> Float[Tensor, " P"]:
        """``x_row · W'_class`` of each pair in float64."""
        weight_CD = self.exact.weight_CD
        if self.compile and len(rows_P):  # no operand is ever gathered into memory
            return compiled(_pair_dots)(x_MD, weight_CD, rows_P, classes_P)
        parts = [
            _pair_dots(x_MD, weight_CD, r, c)
            for r, c in zip(
                rows_P.split(PAIRS_PER_CHUNK), classes_P.split(PAIRS_PER_CHUNK), strict=True
            )
        ]
        return torch.cat(parts)


def _rstd_error(reach: Tensor, width: int, v: float) -> Tensor:
    """ρ, the relative error of a computed rstd, for rows with ``reach`` = rstd · ‖x‖."""
    return (width / 2 + 8) * v + width * (v * reach).square() / 2


def _certain_and_open(
    products_MC: Tensor, rstd_M1: Tensor, bias_C: Tensor, labels_M1: Tensor, window_M1: Tensor
) -> tuple[Tensor, Tensor]:
    """Number of classes certainly above the label, and [M, C] which classes are in the window."""
    values_MC = products_MC * rstd_M1 + bias_C
    margins_MC = values_MC - values_MC.gather(1, labels_M1)
    above_MC = margins_MC > window_M1
    classes_C = torch.arange(bias_C.shape[0], device=bias_C.device)
    # Not |margin| ≤ window: a margin that overflowed to NaN is open too.
    open_MC = ~(above_MC | (margins_MC < -window_M1)) & (classes_C != labels_M1)
    return above_MC.sum(dim=1, dtype=torch.int32), open_MC


def _pair_dots(x_MD: Tensor, weight_CD: Tensor, rows_P: Tensor, classes_P: Tensor) -> Tensor:
    return (x_MD[rows_P].to(weight_CD.dtype) * weight_CD[classes_P]).sum(dim=1)


def _exact_sign(x_D: Float[Tensor, " D"], space: ClassSpace, c: int, y: int) -> int:
    """Sign of l_c − l_y in rational arithmetic: of r·a + b, or of a + b·√(var + eps)."""
    c_D, y_D = space.weight_CD[c], space.weight_CD[y]
    b = Fraction(space.bias_C[c].item()) - Fraction(space.bias_C[y].item())
    if b == 0 and torch.equal(c_D, y_D):
        return 0
    x = [Fraction(value) for value in x_D.tolist()]
    a = sum(
        (
            d * (Fraction(w) - Fraction(u))
            for d, w, u in zip(x, c_D.tolist(), y_D.tolist(), strict=True)
        ),
        Fraction(0),
    )
    if b == 0 or a == 0 or (a > 0) == (b > 0):
        total = a + b
        return (total > 0) - (total < 0)
    mean = sum(x, Fraction(0)) / len(x)
    variance = sum(((d - mean) ** 2 for d in x), Fraction(0)) / len(x)
    gap = a * a - b * b * (variance + Fraction(space.eps))  # > 0: a outweighs b
    stronger = a if gap > 0 else b
    return 0 if gap == 0 else 1 if stronger > 0 else -1
