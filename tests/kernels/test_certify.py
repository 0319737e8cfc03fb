"""Certified ranks equal those of exact arithmetic, on data made to get them wrong."""

import pytest
import torch

from classlens.bench.certify import hostile_case, judged_ranks
from classlens.kernels import certify
from classlens.kernels.certify import Certifier
from classlens.kernels.class_scores import class_scores
from classlens.kernels.class_space import ClassSpace

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "classes"), [(32, 10), (97, 300)])
def test_no_rank_is_wrong(dtype: torch.dtype, width: int, classes: int) -> None:
    x, exact, labels = hostile_case(12, width, classes, dtype)
    space = exact.to(dtype=torch.float32)
    certifier = Certifier(exact, space, dtype, compile=False)
    actual = class_scores(x, space, labels, certifier=certifier)
    assert torch.equal(actual.rank, judged_ranks(x, exact, labels))
    assert actual.recomputed.any()
    if classes == 300:
        assert not actual.recomputed.all()


def test_a_weight_rounded_to_16_bits_widens_the_window() -> None:
    """What a GPU multiplies with: most rows need float64, and all of them get it."""
    x, exact, labels = hostile_case(6, 64, 100, torch.float16)
    space = exact.to(dtype=torch.float16)
    plain = class_scores(x, space, labels)
    expected = judged_ranks(x, exact, labels)
    assert not torch.equal(plain.rank, expected), "the case is too easy"
    certifier = Certifier(exact, space, torch.float16, compile=False)
    assert torch.equal(class_scores(x, space, labels, certifier=certifier).rank, expected)


def test_float64_is_certified_too() -> None:
    x, exact, labels = hostile_case(6, 64, 100, torch.float64)
    certifier = Certifier(exact, exact, torch.float64, compile=False)
    actual = class_scores(x, exact, labels, certifier=certifier)
    assert torch.equal(actual.rank, judged_ranks(x, exact, labels))


def test_everything_open_is_everything_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """With no trust in float32 at all, every class is compared in float64."""
    monkeypatch.setattr(certify, "MAX_RHO", 0.0)
    monkeypatch.setattr(certify, "PAIRS_PER_CHUNK", 7)
    x, exact, labels = hostile_case(1, 8, 5, torch.float32)
    space = exact.to(dtype=torch.float32)
    certifier = Certifier(exact, space, torch.float32, compile=False)
    actual = class_scores(x, space, labels, certifier=certifier)
    assert actual.recomputed.all()
    assert torch.equal(actual.rank, judged_ranks(x, exact, labels))


def test_the_rest_of_the_scores_stays() -> None:
    x, exact, labels = hostile_case(3, 33, 20, torch.float32)
    space = exact.to(dtype=torch.float32)
    certifier = Certifier(exact, space, torch.float32, compile=False)
    certified = class_scores(x, space, labels, topk=3, certifier=certifier)
    plain = class_scores(x, space, labels, topk=3)
    assert plain.recomputed is None
    for name in ("label_logit", "logsumexp", "topk"):
        assert torch.equal(getattr(certified, name), getattr(plain, name))


def test_invalid_rows_stay_invalid() -> None:
    x, exact, labels = hostile_case(2, 33, 20, torch.float32)
    x[0, 3, 1], x[1, 0, 0] = float("nan"), float("inf")
    space = exact.to(dtype=torch.float32)
    certifier = Certifier(exact, space, torch.float32, compile=False)
    actual = class_scores(x, space, labels, certifier=certifier)
    assert actual.rank[0, 3] == actual.rank[1, 0] == 20
    assert not actual.recomputed[0, 3]


def test_products_that_overflow_are_open() -> None:
    """x · Ŵ is infinite in float32 while the variance is not; float64 knows the order."""
    x = torch.tensor([[[1e19, -1e19, 1e18, -1e18]]])
    weight = torch.tensor([[1e20, 0, 0, 0], [2e20, 0, 0, 0], [0, 0, 1e20, 0]]).double()
    exact = ClassSpace(weight, torch.zeros(3).double(), 1e-6)
    space = exact.to(dtype=torch.float32)
    certifier = Certifier(exact, space, torch.float32, compile=False)
    actual = class_scores(x, space, torch.tensor([0]), certifier=certifier)
    assert actual.rank.item() == 1


@pytest.mark.parametrize("sign", [1, -1])
def test_the_last_bit_decides(sign: int) -> None:
    """The bias outweighs the product by the last bit of a double, or falls short of it."""
    weight = torch.zeros(2, 4, dtype=torch.float64)
    weight[1, 0], weight[1, 1] = 1.0, -1.0
    x = torch.tensor([[[1.0, -1.0, 1.0, -1.0]]])  # variance 1, product 2
    bias = torch.tensor([0.0, -2.0 + sign * 2.0**-52], dtype=torch.float64)
    exact = ClassSpace(weight, bias, 0.0)
    space = exact.to(dtype=torch.float32)
    certifier = Certifier(exact, space, torch.float32, compile=False)
    actual = class_scores(x, space, torch.tensor([0]), certifier=certifier)
    assert actual.rank.item() == (1 if sign > 0 else 0)


@pytest.mark.parametrize(
    ("bias", "sign"), [(-2.0, 0), (-1.9, 1), (-2.1, -1), (0.0, 1), (3.0, 1), (-5.0, -1)]
)
def test_exact_sign_weighs_product_against_bias(bias: float, sign: int) -> None:
    weight = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, -1.0, 0.0, 0.0]]).double()
    space = ClassSpace(weight, torch.tensor([0.0, bias], dtype=torch.float64), 0.0)
    x = torch.tensor([1.0, -1.0, 1.0, -1.0])
    assert certify._exact_sign(x, space, 1, 0) == sign
    assert certify._exact_sign(x, space, 0, 1) == -sign


def test_what_cannot_be_certified_is_refused() -> None:
    x, exact, labels = hostile_case(1, 8, 5, torch.bfloat16)
    space = exact.to(dtype=torch.float32)
    certifier = Certifier(exact, space, torch.bfloat16, compile=False)
    with pytest.raises(ValueError, match="impl='torch' or 'compiled'"):
        class_scores(x, space, labels, certifier=certifier, impl="reference")
    wide = ClassSpace(torch.zeros(2, 8193).double(), torch.zeros(2).double(), 0.0)
    with pytest.raises(ValueError, match="up to width 8192"):
        Certifier(wide, wide, torch.float32, compile=False)
