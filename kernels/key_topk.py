"""The key-value pairs that a token activates most: paper §4.3.

    coefficients [..., F] → indices of the k largest, the largest first, equals in index order

`key_topk_reference` is the specification, `key_topk_triton` the kernel for a GPU,
`key_topk_avx512` that for bfloat16 on a CPU.

Shape letters: M rows, F coefficients of a row, K of them kept.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from classlens.kernels.key_topk_avx512 import key_topk_avx512

TopkImpl = Literal["auto", "reference", "torch", "triton", "avx512"]


def key_topk(
    x: Float[Tensor, "*rows F"], k: int, *, impl: TopkImpl = "auto"
) -> Int[Tensor, "*rows K"]:
    """Indices of the ``k`` largest coefficients of each row, in descending order, int32.

    Equal coefficients are in ascending order of their index; −0 equals 0, and infinities are
    ordered as numbers. A row with NaN is invalid and has F in every place.

    Args:
        x: any floating dtype; compared as it is, never rounded.
        k: 0 to F.
        impl: "triton" (GPU; under ``TRITON_INTERPRET=1`` also CPU), "torch" (any device),
            "avx512" (bfloat16 on a CPU with AVX-512 and a C++ compiler; many coefficients tie
            there, which "torch" is slow at), "reference" (a stable sort), or "auto": "triton" for
            float16, bfloat16 and float32 on a GPU, else "torch". There is no fallback: what cannot
            run raises.

    Raises:
        ValueError: an argument does not fit; the message says which and what to pass instead.
    """
    width = x.shape[-1]
    if not 0 <= k <= width:
        raise ValueError(f"k={k} is not in [0, {width}]; there are no more coefficients")
    if impl == "auto":
        impl = "triton" if x.is_cuda and x.dtype != torch.float64 else "torch"
    if impl == "reference":
        return key_topk_reference(x, k)
    x_MF = x.reshape(-1, width)
    if impl == "triton":
        # Triton exists for Linux alone and takes a while to import.
        from classlens.kernels.key_topk_triton import key_topk_triton

        best_MK = key_topk_triton(x_MF, k)
    elif impl == "avx512":
        best_MK = key_topk_avx512(x_MF, k)
    elif impl == "torch":
        best_MK = _passes(x_MF, k) if x.is_cuda else _partial_sort(x_MF, k)
    else:
        raise ValueError(
            f"impl={impl!r} is not auto, reference, torch, triton or avx512; pass one of these"
        )
    return best_MK.view(*x.shape[:-1], k)


def key_topk_reference(x: Float[Tensor, "*rows F"], k: int) -> Int[Tensor, "*rows K"]:
    """The specification: a stable descending sort; same meaning as `key_topk`."""
    order = (x + 0.0).sort(dim=-1, descending=True, stable=True).indices  # −0 + 0 is 0
    invalid = x.isnan().any(dim=-1, keepdim=True)
    return order[..., :k].masked_fill(invalid, x.shape[-1]).int()


def _partial_sort(x_MF: Float[Tensor, "M F"], k: int) -> Int[Tensor, "M K"]:
    """torch.topk, which promises no order among equals: rows with equals are done once more."""
    width = x_MF.shape[1]
    # One more than asked for shows whether the last one kept has an equal outside.
    values_MK, indices_MK = x_MF.topk(min(k + 1, width), dim=1)
    best_MK = indices_MK[:, :k].int()
    tied_M = (values_MK[:, 1:] == values_MK[:, :-1]).any(dim=1)
    if tied_M.any():
        best_MK[tied_M] = _passes(x_MF[tied_M], k)
    # NaN sorts before all numbers.
    return best_MK.masked_fill_(values_MK[:, :1].isnan(), width) if k else best_MK


def _passes(x_MF: Float[Tensor, "M F"], k: int) -> Int[Tensor, "M K"]:
    """One maximum after another; never waits for a GPU."""
    width = x_MF.shape[1]
    places_F = torch.arange(width, dtype=torch.int32, device=x_MF.device)
    best_MK = torch.empty(len(x_MF), k, dtype=torch.int32, device=x_MF.device)
    # A mask of its own: a coefficient may be −inf.
    left_MF = torch.ones_like(x_MF, dtype=torch.bool)
    for i in range(k):
        peak_M1 = x_MF.masked_fill(~left_MF, float("-inf")).amax(dim=1, keepdim=True)
        on_MF = left_MF & (x_MF == peak_M1)
        best_MK[:, i] = places_F.where(on_MF, width).amin(dim=1)  # of NaN there is none
        left_MF.scatter_(1, best_MK[:, i : i + 1].long().clamp(max=width - 1), False)
    return best_MK.masked_fill_(x_MF.isnan().any(dim=1, keepdim=True), width)
