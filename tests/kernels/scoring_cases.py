"""Inputs and checks that the tests of every scoring path share.

Exact inputs: small integers for which every step is exact in float32, so that results must equal
the specification bit for bit, ties included. Each row of x has sum 0 and sum of squares 4·D, so
its variance is 4, and with eps = 0 its rstd is ½: no rounding in the statistics. Products and sums
are integers below 2²⁴, logits multiples of ½. Of C = 1000 logits within ±200 most tie.
"""

import numpy as np
import torch

from classlens.kernels.bounds import rank_bracket
from classlens.kernels.class_space import ClassSpace, fold_class_space
from classlens.kernels.reference import ClassScores, class_scores_reference


def exact_x(n_images: int, n_tokens: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of ±2 in equal numbers; for odd widths five of them become 1, 1, 1, 1, −4."""
    tail = [1, 1, 1, 1, -4] if width % 2 else []
    half = (width - len(tail)) // 2
    row = torch.tensor([2] * half + [-2] * half + tail, dtype=torch.float64)
    assert row.sum() == 0
    assert row.square().sum() == 4 * width
    generator = torch.Generator().manual_seed(width)
    rows = [row[torch.randperm(width, generator=generator)] for _ in range(n_images * n_tokens)]
    return torch.stack(rows).view(n_images, n_tokens, width).to(dtype)


def exact_space(num_classes: int, width: int, dtype: torch.dtype, *, bias: bool) -> ClassSpace:
    """Weights in −3…3 and biases in −4…4, with equal rows; not centred, for x has mean 0."""
    generator = torch.Generator().manual_seed(num_classes)
    weight = torch.randint(-3, 4, (num_classes, width), generator=generator)
    weight[num_classes // 2] = weight[0]
    weight[-1] = weight[0]
    bias_C = torch.randint(-4, 5, (num_classes,), generator=generator) * int(bias)
    return ClassSpace(weight.double(), bias_C.double(), eps=0.0).to(dtype=dtype)


def random_case(
    n_images: int, n_tokens: int, width: int, num_classes: int, dtype: torch.dtype
) -> tuple[torch.Tensor, ClassSpace, torch.Tensor]:
    """(x, float64 space, labels): normal values, a shifted mean, and two outlier dimensions.

    Such dimensions, tens of times larger than the rest, are what hidden states of ViTs have.
    """
    generator = torch.Generator().manual_seed(num_classes + width)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = normal(n_images, n_tokens, width) + 0.3
    x[..., 0] *= 30
    x[..., width // 2] *= 10
    space = fold_class_space(
        1 + 0.2 * normal(width),
        0.1 * normal(width),
        1e-6,
        normal(num_classes, width) / width**0.5,
        0.1 * normal(num_classes),
    )
    labels = torch.randint(0, num_classes, (n_images,), generator=generator)
    return x.to(dtype), space, labels


def brute_force(logits: np.ndarray, label: int, topk: int) -> tuple[int, list[int]]:
    """Rank and top classes of one row by sorting (−logit, class) pairs."""
    order = sorted(range(len(logits)), key=lambda c: (-logits[c], c))
    return order.index(label), order[:topk]


def assert_equal_scores(actual: ClassScores, expected: ClassScores) -> None:
    """Equality but for logsumexp, which is held to the rounding of float32.

    The sum of C exponentials errs by C + 2 units at most, each exponential by as many units as
    its argument has (≤ 400 here) and two more; the logarithm and its result add |lse| units.
    """
    assert torch.equal(actual.rank, expected.rank)
    assert torch.equal(actual.topk, expected.topk)
    torch.testing.assert_close(
        actual.label_logit.double(), expected.label_logit.double(), rtol=0, atol=0, equal_nan=True
    )
    assert (actual.logsumexp is None) == (expected.logsumexp is None)
    if actual.logsumexp is not None and expected.logsumexp is not None:
        lse = expected.logsumexp.double()
        units = 1410 + 2 * lse.abs().nan_to_num()
        off = (actual.logsumexp.double() - lse).abs()
        assert torch.equal(off.isnan(), lse.isnan())
        assert (off.nan_to_num() <= units * 2**-24).all()


def assert_in_bracket(
    actual: ClassScores,
    x: torch.Tensor,
    space64: ClassSpace,
    labels: torch.Tensor,
    dtype: torch.dtype,
    *,
    split: bool = False,
) -> None:
    lo, hi = rank_bracket(x, space64, labels, dtype, split=split)
    outside = (actual.rank < lo) | (actual.rank > hi)
    assert not outside.any(), f"{int(outside.sum())} ranks of {outside.numel()} outside"


def exact_labels(num_classes: int) -> torch.Tensor:
    """First class, last class (in the last, ragged tile), and one of the equal rows between."""
    return torch.tensor([0, num_classes - 1, num_classes // 2])


def spoil_rows(x: torch.Tensor) -> torch.Tensor:
    """NaN, +inf and −inf in one row each, and a list of those rows' places."""
    x[0, 3, 1] = float("nan")
    x[1, 0, 0] = float("inf")
    x[1, -1, -1] = float("-inf")
    return torch.tensor([[0, 3], [1, 0], [1, x.shape[1] - 1]])


def specification(
    x: torch.Tensor, space: ClassSpace, labels: torch.Tensor, topk: int, logsumexp: bool = True
) -> ClassScores:
    return class_scores_reference(
        x, space, labels, topk=topk, logsumexp=logsumexp, dtype=torch.float64
    )
