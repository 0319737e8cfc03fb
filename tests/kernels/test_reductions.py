"""The compiled reductions: the same results as the eager ones, in the code that runs them."""

import pytest
import torch
from scoring_cases import (
    assert_equal_scores,
    exact_labels,
    exact_space,
    exact_x,
    specification,
    spoil_rows,
)

from classlens.bench.certify import hostile_case, judged_ranks
from classlens.kernels import reductions
from classlens.kernels.certify import Certifier
from classlens.kernels.class_scores import class_scores
from classlens.kernels.reductions import EagerReductions, compiler_found, reduce_products

needs_compiler = pytest.mark.skipif(
    not compiler_found(torch.device("cpu")), reason="needs a C++ compiler"
)


@pytest.fixture(autouse=True)
def compiled_afresh():
    """Each test compiles for its own shapes; torch would otherwise count recompilations."""
    torch.compiler.reset()
    reductions.compiled.cache_clear()


@needs_compiler
@pytest.mark.parametrize("topk", [0, 3])
def test_exact_on_small_integers(topk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(EagerReductions, "__call__")  # proves which one ran
    x, labels = exact_x(3, 17, 65, torch.float32), exact_labels(997)
    space = exact_space(997, 65, torch.float32, bias=True)
    spoil_rows(x)
    actual = class_scores(x, space, labels, topk=topk, impl="compiled")
    assert_equal_scores(actual, specification(x, space, labels, topk))
    without = class_scores(x, space, labels, topk=topk, impl="compiled", logsumexp=False)
    assert without.logsumexp is None
    assert torch.equal(without.rank, actual.rank)


@needs_compiler
def test_more_classes_than_16_bits_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(EagerReductions, "__call__")
    x, labels = exact_x(3, 3, 6, torch.float32), exact_labels(70_000)
    space = exact_space(70_000, 6, torch.float32, bias=True)
    actual = class_scores(x, space, labels, topk=2, impl="compiled", logsumexp=False)
    expected = specification(x, space, labels, 2, logsumexp=False)
    assert (expected.rank > 65_535).any()
    assert_equal_scores(actual, expected)


@needs_compiler
def test_certified_ranks_may_be_compiled() -> None:
    x, exact, labels = hostile_case(6, 64, 100, torch.float32)
    space = exact.to(dtype=torch.float32)
    certifier = Certifier(exact, space, torch.float32, compile=True)
    actual = class_scores(x, space, labels, impl="compiled", certifier=certifier)
    assert torch.equal(actual.rank, judged_ranks(x, exact, labels))


@pytest.mark.parametrize("topk", [1, 4])
def test_both_reduce_alike(topk: int) -> None:
    products = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    rstd, bias, labels = torch.ones(40, 1), torch.zeros(30), torch.full((40, 1), 3)
    eager = EagerReductions(30, torch.float32, torch.device("cpu"))
    expected = eager(products.clone(), rstd, bias, labels, topk=topk, logsumexp=True)
    actual = reduce_products(products, rstd, bias, labels, topk, True)
    for name, value in expected._asdict().items():
        torch.testing.assert_close(getattr(actual, name), value, msg=name)
