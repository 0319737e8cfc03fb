"""More classes than 16 bits count; compiled in `test_reductions`, Triton's in its own suite."""

import pytest
import torch
from scoring_cases import (
    assert_equal_scores,
    assert_in_bracket,
    exact_labels,
    exact_space,
    exact_x,
    random_case,
    specification,
)

from classlens.bench.certify import hostile_case, judged_ranks
from classlens.kernels import class_scores_torch
from classlens.kernels.certify import Certifier
from classlens.kernels.class_scores import class_scores

WIDE = 70_000


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_exact_on_small_integers(impl: str) -> None:
    x, labels = exact_x(3, 3, 6, torch.float32), exact_labels(WIDE)
    space = exact_space(WIDE, 6, torch.float32, bias=True)
    actual = class_scores(x, space, labels, topk=2, impl=impl, logsumexp=False)
    expected = specification(x, space, labels, 2, logsumexp=False)
    assert (expected.rank > 65_535).any()
    assert_equal_scores(actual, expected)


def test_random_inputs_stay_in_the_bracket() -> None:
    x, space64, labels = random_case(2, 5, 24, WIDE, torch.float32)
    actual = class_scores(x, space64.to(dtype=torch.float32), labels)
    assert_in_bracket(actual, x, space64, labels, torch.float32)


def test_certified_ranks_are_exact() -> None:
    x, exact, labels = hostile_case(2, 24, WIDE, torch.float32)
    space = exact.to(dtype=torch.float32)
    certifier = Certifier(exact, space, torch.float32, compile=False)
    actual = class_scores(x, space, labels, certifier=certifier)
    assert actual.recomputed.any()
    assert torch.equal(actual.rank, judged_ranks(x, exact, labels))


# What is reduced at once stays in the cache up to 1,024 classes; up to 65,536 a chunk has the rows
# of a quick product; beyond, its buffers stop growing until it would only read the weight.
@pytest.mark.parametrize(
    ("classes", "rows"),
    [(1, 2048), (500, 1024), (1024, 512), (65_536, 512), (65_537, 511), (10**6, 128)],
)
def test_very_many_classes_take_fewer_rows_at_a_time(classes: int, rows: int) -> None:
    assert class_scores_torch.rows_per_chunk(classes, torch.device("cpu")) == rows
