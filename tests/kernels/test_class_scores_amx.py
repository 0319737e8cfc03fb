"""The fused kernel of CPUs with AMX, held to the specification."""

import inspect

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
    spoil_rows,
)

from classlens.kernels import cpp
from classlens.kernels.amx import amx_found
from classlens.kernels.class_scores import class_scores
from classlens.kernels.class_space import ClassSpace
from classlens.kernels.reference import logits_reference

needs_amx = pytest.mark.skipif(not amx_found(), reason="needs AMX and a C++ compiler")
BFLOAT16 = torch.bfloat16
each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])


@needs_amx
@pytest.mark.parametrize("width", [6, 65, 96])  # a tile's depth is 32
@pytest.mark.parametrize("num_classes", [1, 10, 997, 1000])  # a panel has 32
@pytest.mark.parametrize("topk", [0, 1, 5])
@each_dtype
def test_exact_on_small_integers(
    width: int,
    num_classes: int,
    topk: int,
    dtype: torch.dtype,
    poisoned_empty: list[torch.Tensor],
) -> None:
    x, labels = exact_x(3, 43, width, dtype), exact_labels(num_classes)  # blocks of 64 rows
    spoil_rows(x)
    space, topk = exact_space(num_classes, width, dtype, bias=True), min(topk, num_classes)
    actual = class_scores(x, space, labels, topk=topk, impl="amx")
    assert any(tensor.data_ptr() == actual.rank.data_ptr() for tensor in poisoned_empty)
    assert_equal_scores(actual, specification(x, space, labels, topk))
    without = class_scores(x, space, labels, topk=topk, impl="amx", logsumexp=False)
    assert without.logsumexp is None
    assert torch.equal(without.rank, actual.rank)


@needs_amx
def test_more_classes_than_16_bits_count() -> None:
    x, labels = exact_x(3, 3, 6, BFLOAT16), exact_labels(70_000)
    space = exact_space(70_000, 6, BFLOAT16, bias=True)
    actual = class_scores(x, space, labels, topk=2, impl="amx", logsumexp=False)
    expected = specification(x, space, labels, 2, logsumexp=False)
    assert (expected.rank > 65_535).any()
    assert_equal_scores(actual, expected)


@needs_amx
@each_dtype
def test_random_inputs_stay_in_the_bracket(dtype: torch.dtype) -> None:
    x, space64, labels = random_case(3, 197, 192, 1000, dtype)
    space = space64.to(dtype=dtype)
    actual = class_scores(x, space, labels, topk=3, impl="amx")
    rounded = space.to(dtype=torch.float64)  # the narrower bracket, about the rounded weight
    assert_in_bracket(actual, x, rounded, labels, dtype, split=True)
    logits = logits_reference(x.double(), space)
    torch.testing.assert_close(
        actual.logsumexp.double(), logits.logsumexp(dim=-1), rtol=1e-5, atol=1e-5
    )


@needs_amx
def test_float32_is_as_exact_as_a_product_in_float32() -> None:
    """Against float64, beside torch: values with all 24 bits, of many sizes."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 50, 768, generator=generator) * torch.logspace(-10, 10, 50)[:, None]
    weight = torch.randn(100, 768, generator=generator) * torch.logspace(-3, 3, 768)
    space = ClassSpace(weight, torch.zeros(100), 0.0)
    labels = torch.tensor([3, 97])
    exact = class_scores(x.double(), space.to(dtype=torch.float64), labels, impl="reference")
    errors = {}
    for impl in ("amx", "torch"):
        logit = class_scores(x, space, labels, impl=impl).label_logit
        errors[impl] = (logit - exact.label_logit).square().mean().sqrt()
    assert 0 < errors["amx"] < errors["torch"]


@needs_amx
@pytest.mark.parametrize("gap", [86.0, 88.0, 100.0, 1000.0])  # e^-87 is the last normal float32
def test_logsumexp_far_above_and_below_the_label(gap: float) -> None:
    x, labels = exact_x(3, 4, 6, BFLOAT16), torch.tensor([0, 1, 2])
    bias = torch.tensor([-gap, gap, 0.0, 0.5, -1.0])
    space = ClassSpace(exact_space(5, 6, BFLOAT16, bias=False).weight_CD, bias, 0.0)
    actual = class_scores(x, space, labels, impl="amx")
    assert_equal_scores(actual, specification(x, space, labels, 1))


@needs_amx
def test_views_and_no_images() -> None:
    whole, labels = exact_x(3, 18, 6, BFLOAT16), exact_labels(10).int()
    space, x = exact_space(10, 6, BFLOAT16, bias=True), whole[:, 1:]
    actual = class_scores(x, space, labels, impl="amx")
    assert_equal_scores(actual, specification(x.contiguous(), space, labels, 1))
    none = class_scores(whole[:0], space, labels[:0], topk=2, impl="amx")
    assert none.topk.shape == (0, 18, 2)


@needs_amx
def test_other_products_in_tiles_are_left_alone() -> None:
    """oneDNN keeps a tile configuration of its own on the same threads."""
    a = torch.randint(-4, 5, (256, 192)).to(BFLOAT16)
    x, labels = exact_x(3, 100, 65, BFLOAT16), exact_labels(50)
    space = exact_space(50, 65, BFLOAT16, bias=True)
    expected = (a.double() @ a.double().T).to(BFLOAT16)
    for _ in range(20):
        assert torch.equal(a @ a.T, expected)
        actual = class_scores(x, space, labels, impl="amx")
        assert_equal_scores(actual, specification(x, space, labels, 1))


def test_errors_name_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    space, labels = exact_space(10, 6, torch.float32, bias=True), torch.tensor([0])
    unchecked = inspect.unwrap(class_scores)
    with pytest.raises(ValueError, match="takes bfloat16 or float32 on a CPU"):
        unchecked(torch.zeros(1, 2, 6, dtype=BFLOAT16), space, labels, impl="amx")
    monkeypatch.setattr(cpp, "compiler", lambda: None)
    assert not amx_found()
