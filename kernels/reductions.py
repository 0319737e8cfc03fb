"""What a chunk of products is reduced to, eagerly or compiled into one pass.

Shape letters: M rows of a chunk, C classes, K top classes.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from classlens.kernels import cpp

# Exponentials of ±64 are far from the ends of float32, as are sums over any number of classes, and
# terms below exp(-64 - 17) are lost beside the largest anyway.
UNSHIFTED = 64.0
# Logits that a CPU reduces at once: 2 MB of them and 2 MB of flags stay in the second caches of two
# cores between one operation and the next.
VALUES_IN_CACHE = 1 << 19


class Reduced(NamedTuple):
    """Results of some rows, as `classlens.kernels.reference.ClassScores` has them."""

    rank: Int[Tensor, " M"]
    label_logit: Float[Tensor, " M"]
    logsumexp: Float[Tensor, " M"] | None
    topk: Int[Tensor, "M K"]


class Reductions(Protocol):
    """``products · rstd + bias``, reduced."""

    def __call__(
        self,
        products_MC: Float[Tensor, "M C"],
        rstd_M1: Float[Tensor, "M 1"],
        bias_C: Float[Tensor, " C"],
        labels_M1: Int[Tensor, "M 1"],
        *,
        topk: int,
        logsumexp: bool,
    ) -> Reduced:
        """May overwrite ``products``."""
        ...


class EagerReductions:
    """One torch operation after another, in place and in one buffer that is reused.

    On a CPU over so few rows at once that both stay in the cache. Slower than a compiled pass and
    needs no compiler.
    """

    def __init__(self, num_classes: int, dtype: torch.dtype, device: torch.device) -> None:
        self.num_classes = num_classes
        self._other = torch.empty(0, num_classes, dtype=dtype, device=device)
        self._classes = torch.arange(num_classes, device=device)
        # C for the first class down to 1 for the last: the largest of equals is the first.
        self._places = (num_classes - self._classes).to(dtype)

    def __call__(
        self,
        products_MC: Float[Tensor, "M C"],
        rstd_M1: Float[Tensor, "M 1"],
        bias_C: Float[Tensor, " C"],
        labels_M1: Int[Tensor, "M 1"],
        *,
        topk: int,
        logsumexp: bool,
    ) -> Reduced:
        rows = len(products_MC)
        at_once = rows if products_MC.is_cuda else max(1, VALUES_IN_CACHE // self.num_classes)
        # The results as floats, for the operations have results of their operands' dtype.
        rank_M, label_M1 = products_MC.new_empty(rows), products_MC.new_empty(rows, 1)
        lse_M = products_MC.new_empty(rows) if logsumexp else None
        place_MK = products_MC.new_empty(rows, topk)
        if len(self._other) < min(rows, at_once):
            self._other = self._other.new_empty(min(rows, at_once), self.num_classes)
        for part in parts(rows, at_once):
            values_MC = products_MC[part]
            torch.addcmul(bias_C, values_MC, rstd_M1[part], out=values_MC)
            torch.gather(values_MC, 1, labels_M1[part], out=label_M1[part])
            self._rank(values_MC, label_M1[part], labels_M1[part], rank_M[part])
            peak_M1 = values_MC.amax(dim=1, keepdim=True)
            if lse_M is not None:
                self._logsumexp(values_MC, peak_M1, lse_M[part])
            self._topk_(values_MC, peak_M1, place_MK[part])  # last: it overwrites the values
        return Reduced(rank_M.int(), label_M1[:, 0], lse_M, (self.num_classes - place_MK).int())

    def _rank(
        self,
        values_MC: Float[Tensor, "M C"],
        label_M1: Float[Tensor, "M 1"],
        labels_M1: Int[Tensor, "M 1"],
        out_M: Float[Tensor, " M"],
    ) -> None:
        if values_MC.is_cuda:  # branching on ties would wait for the GPU
            on_MC = (values_MC == label_M1) & (self._classes < labels_M1)
            out_M.copy_((on_MC | (values_MC > label_M1)).sum(dim=1))
            return
        # Comparisons into a float buffer are vectorised and those into bool are not.
        flags_MC = self._other[: len(values_MC)]
        torch.sum(torch.gt(values_MC, label_M1, out=flags_MC), dim=1, out=out_M)
        on_M = torch.ge(values_MC, label_M1, out=flags_MC).sum(dim=1).sub_(out_M)
        if on_M.amax() > 1:  # the label itself is one
            tied_M = on_M > 1
            on_RC = values_MC[tied_M] == label_M1[tied_M]
            out_M[tied_M] += (on_RC & (self._classes < labels_M1[tied_M])).sum(dim=1)

    def _logsumexp(
        self,
        values_MC: Float[Tensor, "M C"],
        peak_M1: Float[Tensor, "M 1"],
        out_M: Float[Tensor, " M"],
    ) -> None:
        exp_MC = self._other[: len(values_MC)]
        # The peak is subtracted only where exponentials or their sum leave the range of float32;
        # to look would wait for a GPU.
        if not values_MC.is_cuda and peak_M1.abs().amax() < UNSHIFTED:
            torch.sum(torch.exp(values_MC, out=exp_MC), dim=1, out=out_M).log_()
            return
        torch.sub(values_MC, peak_M1, out=exp_MC).exp_()
        torch.sum(exp_MC, dim=1, out=out_M).log_().add_(peak_M1[:, 0])

    def _topk_(
        self,
        values_MC: Float[Tensor, "M C"],
        peak_M1: Float[Tensor, "M 1"],
        places_MK: Float[Tensor, "M K"],
    ) -> None:
        """C less each of the K first classes in order, ties to the lower, into ``places``.

        Overwrites ``values`` if K > 1. ``peak`` is each row's maximum. A row of NaN gives 0.
        """
        flags_MC = self._other[: len(values_MC)]
        for i in range(places_MK.shape[1]):
            if i > 0:
                taken_M1 = self.num_classes - places_MK[:, i - 1 : i].long()
                values_MC.scatter_(1, taken_M1.clamp_(max=self.num_classes - 1), float("-inf"))
                peak_M1 = values_MC.amax(dim=1, keepdim=True)
            # Several times faster than argmax, which promises no order among equals besides.
            place_MC = torch.eq(values_MC, peak_M1, out=flags_MC).mul_(self._places)
            places_MK[:, i] = place_MC.amax(dim=1)


class CompiledReductions:
    """The same in one or two passes, compiled by torch.compile when first called."""

    def __call__(
        self,
        products_MC: Float[Tensor, "M C"],
        rstd_M1: Float[Tensor, "M 1"],
        bias_C: Float[Tensor, " C"],
        labels_M1: Int[Tensor, "M 1"],
        *,
        topk: int,
        logsumexp: bool,
    ) -> Reduced:
        reduce = compiled(reduce_products)
        return reduce(products_MC, rstd_M1, bias_C, labels_M1, topk, logsumexp)


def parts(count: int, at_once: int) -> Iterator[slice]:
    """Cut ``count`` rows into parts of ``at_once``, the last of what is left."""
    for start in range(0, count, at_once):
        yield slice(start, min(count, start + at_once))


def reduce_products(
    products_MC: Tensor,
    rstd_M1: Tensor,
    bias_C: Tensor,
    labels_M1: Tensor,
    topk: int,
    logsumexp: bool,
) -> Reduced:
    """The reductions as plain tensor algebra, for a compiler to fuse."""
    num_classes = bias_C.shape[0]
    classes_C = torch.arange(num_classes, dtype=torch.int32, device=bias_C.device)
    values_MC = products_MC * rstd_M1 + bias_C
    label_M1 = values_MC.gather(1, labels_M1)
    on_MC = (values_MC == label_M1) & (classes_C < labels_M1)
    rank_M = ((values_MC > label_M1) | on_MC).sum(dim=1, dtype=torch.int32)
    lse_M = None
    if logsumexp:
        peak_M1 = values_MC.amax(dim=1, keepdim=True)
        lse_M = peak_M1[:, 0] + (values_MC - peak_M1).exp().sum(dim=1).log()
    best, left_MC = [], values_MC
    for _ in range(topk):
        largest_M1 = left_MC.amax(dim=1, keepdim=True)
        best.append(classes_C.where(left_MC == largest_M1, num_classes).amin(dim=1))
        left_MC = left_MC.masked_fill(classes_C == best[-1][:, None], float("-inf"))
    topk_MK = torch.stack(best, dim=1) if best else rank_M.new_empty(len(rank_M), 0)
    return Reduced(rank_M, label_M1[:, 0], lse_M, topk_MK)


@functools.cache
def compiled(function: Callable) -> Callable:
    """``torch.compile(function)``, once a process.

    Floating-point contraction is left as the compiler has it: a fused multiply-add rounds less
    and stays in the derived bracket.
    """
    return torch.compile(function)


def compiler_found(device: torch.device) -> bool:
    """Whether torch.compile can build code for this device: a GPU needs Triton, a CPU the system's
    C++ compiler."""
    return device.type == "cuda" or cpp.system_compiler() is not None
