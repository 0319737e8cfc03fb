"""The fused kernel for CPUs, held to the specification."""

import inspect

import pytest
import torch
from cpu_units import BFLOAT16, FLOAT32, cases, each_units, each_units_bfloat16
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

from classlens.kernels import cpp, tiles
from classlens.kernels.class_scores import class_scores
from classlens.kernels.class_space import ClassSpace
from classlens.kernels.reference import logits_reference
from classlens.kernels.tiles import UNITS, Units, units_found


@each_units
@pytest.mark.parametrize("width", [6, 65, 96])  # a tile's depth is 32
@pytest.mark.parametrize("num_classes", [1, 10, 997, 1000])  # a panel has 32
@pytest.mark.parametrize("topk", [0, 1, 5])
def test_exact_on_small_integers(
    width: int,
    num_classes: int,
    topk: int,
    units: Units,
    dtype: torch.dtype,
    poisoned_empty: list[torch.Tensor],
) -> None:
    x, labels = exact_x(3, 43, width, dtype), exact_labels(num_classes)  # blocks of 64 rows
    spoil_rows(x)
    space, topk = exact_space(num_classes, width, dtype, bias=True), min(topk, num_classes)
    actual = class_scores(x, space, labels, topk=topk, impl=units)
    assert any(tensor.data_ptr() == actual.rank.data_ptr() for tensor in poisoned_empty)
    assert_equal_scores(actual, specification(x, space, labels, topk))
    without = class_scores(x, space, labels, topk=topk, impl=units, logsumexp=False)
    assert without.logsumexp is None
    assert torch.equal(without.rank, actual.rank)


@each_units
def test_more_classes_than_16_bits_count(units: Units, dtype: torch.dtype) -> None:
    x, labels = exact_x(3, 3, 6, dtype), exact_labels(70_000)
    space = exact_space(70_000, 6, dtype, bias=True)
    actual = class_scores(x, space, labels, topk=2, impl=units, logsumexp=False)
    expected = specification(x, space, labels, 2, logsumexp=False)
    assert (expected.rank > 65_535).any()
    assert_equal_scores(actual, expected)


@each_units
def test_random_inputs_stay_in_the_bracket(units: Units, dtype: torch.dtype) -> None:
    x, space64, labels = random_case(3, 197, 192, 1000, dtype)
    space = space64.to(dtype=dtype)
    actual = class_scores(x, space, labels, topk=3, impl=units)
    rounded = space.to(dtype=torch.float64)  # the narrower bracket, about the rounded weight
    assert_in_bracket(actual, x, rounded, labels, dtype, split=units == "amx")
    logits = logits_reference(x.double(), space)
    torch.testing.assert_close(
        actual.logsumexp.double(), logits.logsumexp(dim=-1), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(("units", "dtype"), cases(FLOAT32))
def test_float32_is_as_exact_as_a_product_in_float32(units: Units, dtype: torch.dtype) -> None:
    """Against float64, beside torch: values with all 24 bits, of many sizes."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 50, 768, generator=generator) * torch.logspace(-10, 10, 50)[:, None]
    weight = torch.randn(100, 768, generator=generator) * torch.logspace(-3, 3, 768)
    space = ClassSpace(weight.to(dtype), torch.zeros(100), 0.0)
    labels = torch.tensor([3, 97])
    exact = class_scores(x.double(), space.to(dtype=torch.float64), labels, impl="reference")
    errors = {}
    for impl in (units, "torch"):
        logit = class_scores(x, space, labels, impl=impl).label_logit
        errors[impl] = (logit - exact.label_logit).square().mean().sqrt()
    # Tile registers add up in parts; vector registers one term after another, as torch may.
    assert 0 < errors[units] < errors["torch"] * (1.0 if units == "amx" else 2.0)


@each_units
@pytest.mark.parametrize("gap", [86.0, 88.0, 100.0, 1000.0])  # e^-87 is the last normal float32
def test_logsumexp_far_above_and_below_the_label(
    gap: float, units: Units, dtype: torch.dtype
) -> None:
    x, labels = exact_x(3, 4, 6, dtype), torch.tensor([0, 1, 2])
    bias = torch.tensor([-gap, gap, 0.0, 0.5, -1.0])
    space = ClassSpace(exact_space(5, 6, dtype, bias=False).weight_CD, bias, 0.0)
    actual = class_scores(x, space, labels, impl=units)
    assert_equal_scores(actual, specification(x, space, labels, 1))


@each_units
def test_views_and_no_images(units: Units, dtype: torch.dtype) -> None:
    whole, labels = exact_x(3, 18, 6, dtype), exact_labels(10).int()
    space, x = exact_space(10, 6, dtype, bias=True), whole[:, 1:]
    actual = class_scores(x, space, labels, impl=units)
    assert_equal_scores(actual, specification(x.contiguous(), space, labels, 1))
    none = class_scores(whole[:0], space, labels[:0], topk=2, impl=units)
    assert none.topk.shape == (0, 18, 2)


@each_units_bfloat16
def test_other_products_in_tiles_are_left_alone(units: Units, dtype: torch.dtype) -> None:
    """oneDNN keeps a tile configuration of its own on the same threads."""
    a = torch.randint(-4, 5, (256, 192)).to(dtype)
    x, labels = exact_x(3, 100, 65, dtype), exact_labels(50)
    space = exact_space(50, 65, dtype, bias=True)
    expected = (a.double() @ a.double().T).to(dtype)
    for _ in range(20):
        assert torch.equal(a @ a.T, expected)
        actual = class_scores(x, space, labels, impl=units)
        assert_equal_scores(actual, specification(x, space, labels, 1))


def test_errors_name_the_remedy() -> None:
    space, labels = exact_space(10, 6, FLOAT32, bias=True), torch.tensor([0])
    unchecked = inspect.unwrap(class_scores)
    x = torch.zeros(1, 2, 6, dtype=BFLOAT16)
    for units in UNITS:
        with pytest.raises(ValueError, match=r"takes all in bfloat16 or all in float32, on a CPU"):
            unchecked(x, space, labels, impl=units)


def test_errors_name_lacking_capabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    space, labels = exact_space(10, 6, FLOAT32, bias=True), torch.tensor([0])
    monkeypatch.setattr("torch.cpu.get_capabilities", dict)
    for units in UNITS:
        with pytest.raises(
            RuntimeError, match=f"this CPU has no {units} for .*; pass impl='torch'"
        ):
            class_scores(torch.zeros(1, 2, 6), space, labels, impl=units)


def test_which_registers_are_taken_by_capabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    avx512 = {"avx512_f": True, "avx512_bw": True, "avx512_vl": True}
    found: dict[str, bool] = {}
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: found)
    monkeypatch.setattr(cpp, "compiler", lambda: ["c++"])
    assert units_found(FLOAT32) is None
    found.update(avx512)
    assert (units_found(FLOAT32), units_found(BFLOAT16)) == ("avx512", None)
    found.update(avx512_bf16=True)
    assert (units_found(FLOAT32), units_found(BFLOAT16)) == ("avx512", "avx512")
    found.update(amx_tile=True, amx_bf16=True)
    granted = False
    monkeypatch.setattr(tiles, "_tiles_granted", lambda: granted)
    assert (units_found(FLOAT32), units_found(BFLOAT16)) == ("avx512", "avx512")
    granted = True
    assert (units_found(FLOAT32), units_found(BFLOAT16)) == ("amx", "amx")
    assert units_found(torch.float16) is None
    monkeypatch.setattr(cpp, "compiler", lambda: None)
    assert units_found(BFLOAT16) is None
