import numpy as np
import pytest
import torch
from scoring_cases import brute_force, exact_labels, exact_space, exact_x, spoil_rows

from classlens.kernels.class_space import ClassSpace
from classlens.kernels.reference import class_scores_reference, logits_reference


@pytest.mark.parametrize("num_classes", [1, 10, 997])
def test_against_brute_force_with_ties(num_classes: int) -> None:
    x = exact_x(3, 5, 65, torch.float32)
    space = exact_space(num_classes, 65, torch.float32, bias=True)
    labels, topk = exact_labels(num_classes), min(5, num_classes)
    logits = logits_reference(x, space).numpy()
    if num_classes > 1:
        assert any(len(np.unique(row)) < num_classes for row in logits.reshape(-1, num_classes))

    scores = class_scores_reference(x, space, labels, topk=topk)
    for n in range(3):
        for t in range(5):
            row, label = logits[n, t], int(labels[n])
            rank, best = brute_force(row, label, topk)
            assert scores.rank[n, t] == rank
            assert scores.topk[n, t].tolist() == best
            assert scores.label_logit[n, t] == row[label]
            lse = np.log(np.exp(row.astype(np.float64)).sum())
            assert abs(scores.logsumexp[n, t] - lse) <= 1e-5 * abs(lse)


def test_the_logits_are_layer_norm_then_head() -> None:
    x = torch.tensor([[[1.0, 2.0, 6.0]]])  # mean 3, variance 14/3
    space = ClassSpace(torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([0.5]), eps=1 / 3)
    expected = (1 - 6) / 5**0.5 + 0.5
    assert abs(logits_reference(x, space).item() - expected) < 1e-6


@pytest.mark.parametrize(
    ("x_dtype", "dtype", "expected"),
    [
        (torch.float16, None, torch.float32),
        (torch.float32, None, torch.float32),
        (torch.float64, None, torch.float64),
        (torch.float16, torch.float64, torch.float64),
    ],
)
def test_dtypes(x_dtype: torch.dtype, dtype: torch.dtype | None, expected: torch.dtype) -> None:
    space = exact_space(4, 6, torch.float32, bias=True)
    scores = class_scores_reference(
        exact_x(1, 2, 6, x_dtype), space, torch.tensor([1]), dtype=dtype
    )
    assert scores.label_logit.dtype == scores.logsumexp.dtype == expected
    assert scores.rank.dtype == scores.topk.dtype == torch.int32


def test_invalid_rows_are_marked_and_leave_the_others_alone() -> None:
    space, labels = exact_space(10, 6, torch.float32, bias=True), torch.tensor([1, 2])
    x = exact_x(2, 5, 6, torch.float32)
    before = class_scores_reference(x, space, labels, topk=3)
    places = spoil_rows(x)
    after = class_scores_reference(x, space, labels, topk=3)
    bad = torch.zeros(2, 5, dtype=torch.bool)
    bad[places[:, 0], places[:, 1]] = True
    assert (after.rank[bad] == 10).all()
    assert (after.topk[bad] == 10).all()
    assert after.label_logit[bad].isnan().all()
    assert after.logsumexp[bad].isnan().all()
    for kept, was in zip(after, before, strict=True):
        if kept is not None and was is not None:  # nothing is recomputed without a certifier
            assert torch.equal(kept[~bad], was[~bad])


def test_without_logsumexp_and_topk() -> None:
    space = exact_space(4, 6, torch.float32, bias=True)
    scores = class_scores_reference(
        exact_x(1, 2, 6, torch.float32), space, torch.tensor([1]), topk=0, logsumexp=False
    )
    assert scores.logsumexp is None
    assert scores.topk.shape == (1, 2, 0)
