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

from classlens.kernels import class_scores_torch, reductions
from classlens.kernels.class_scores import class_scores, resolve_impl
from classlens.kernels.class_space import ClassSpace


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("num_classes", [1, 10, 997, 1000])  # lone, few, prime, ImageNet's
@pytest.mark.parametrize("topk", [0, 1, 5])
def test_exact_on_small_integers(
    dtype: torch.dtype, num_classes: int, topk: int, poisoned_empty: list[torch.Tensor]
) -> None:
    x = exact_x(3, 17, 65, dtype)
    space = exact_space(num_classes, 65, dtype, bias=True)
    labels, topk = exact_labels(num_classes), min(topk, num_classes)
    actual = class_scores(x, space, labels, topk=topk, impl="torch")
    assert any(tensor.data_ptr() == actual.rank.data_ptr() for tensor in poisoned_empty)
    assert_equal_scores(actual, specification(x, space, labels, topk))
    float_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    assert actual.label_logit.dtype == actual.logsumexp.dtype == float_dtype
    assert actual.rank.dtype == actual.topk.dtype == torch.int32
    assert actual.topk.shape == (3, 17, topk)


@pytest.mark.parametrize("rows_per_chunk", [1, 7, 40, 10_000])  # parts of an image, 2 images, all
@pytest.mark.parametrize("values_in_cache", [1, 30, 1 << 19])  # a row, three rows, all
def test_chunks_do_not_show(
    rows_per_chunk: int, values_in_cache: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(class_scores_torch, "ROWS_PER_STEP", rows_per_chunk)
    monkeypatch.setattr(class_scores_torch, "STEPS_PER_CHUNK", 1)
    monkeypatch.setattr(reductions, "VALUES_IN_CACHE", values_in_cache)
    x, labels = exact_x(3, 17, 6, torch.float32), exact_labels(10)
    space = exact_space(10, 6, torch.float32, bias=True)
    actual = class_scores(x, space, labels, topk=3)
    assert_equal_scores(actual, specification(x, space, labels, 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_random_inputs_stay_in_the_bracket(dtype: torch.dtype) -> None:
    x, space64, labels = random_case(2, 197, 96, 1000, dtype)
    actual = class_scores(x, space64.to(dtype=dtype), labels, impl="torch")
    assert_in_bracket(actual, x, space64, labels, dtype)


def test_half_inputs_may_keep_a_float32_weight() -> None:
    x, space64, labels = random_case(2, 197, 96, 1000, torch.bfloat16)
    actual = class_scores(x, space64.to(dtype=torch.float32), labels)
    assert_in_bracket(actual, x, space64, labels, torch.float32)


def test_float64_inputs_widen_a_float32_weight() -> None:
    x, space64, labels = random_case(2, 197, 96, 1000, torch.float64)
    narrow = space64.to(dtype=torch.float32)
    actual = class_scores(x, narrow, labels)
    assert actual.label_logit.dtype == torch.float64
    assert_equal_scores(actual, class_scores(x, narrow.to(dtype=torch.float64), labels))


def test_bfloat16_products_keep_float32_sums_and_the_setting() -> None:
    """Products of 1 + 2⁻⁷ need 15 bits; a bfloat16 result has 8, a rounded operand none left."""
    a = torch.full((32, 32), 1 + 2**-7)
    before = torch.backends.mkldnn.matmul.fp32_precision
    with class_scores_torch.bfloat16_products():
        assert (a @ a == 32 * (1 + 2**-7) ** 2).all()
        inside = torch.backends.mkldnn.matmul.fp32_precision
    assert inside == "bf16"
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    b = torch.full((32, 32), 1 + 2**-12)
    assert (b @ b > 32 * (1 + 2**-12)).all()


def test_invalid_rows_are_marked() -> None:
    space, labels = exact_space(10, 6, torch.float32, bias=True), torch.tensor([1, 2])
    x = exact_x(2, 5, 6, torch.float32)
    places = spoil_rows(x)
    actual = class_scores(x, space, labels, topk=3, impl="torch")
    assert (actual.rank[places[:, 0], places[:, 1]] == 10).all()
    assert_equal_scores(actual, specification(x, space, labels, 3))


def test_an_overflowing_variance_is_invalid() -> None:
    x = torch.tensor([[[3e38, -3e38, 1e38], [1.0, 2.0, 3.0]]])
    actual = class_scores(x, exact_space(4, 3, torch.float32, bias=True), torch.tensor([1]))
    assert actual.rank[0].tolist()[0] == 4
    assert actual.rank[0].tolist()[1] < 4


def test_all_logits_equal() -> None:
    """A head of zeros: the rank is the label itself."""
    space = ClassSpace(torch.zeros(1000, 6), torch.zeros(1000), 1e-6)
    labels = torch.tensor([0, 999, 517])
    actual = class_scores(torch.randn(3, 4, 6), space, labels, topk=5)
    assert torch.equal(actual.rank, labels.int()[:, None].expand(3, 4))
    assert (actual.topk == torch.arange(5)).all()


@pytest.mark.parametrize("gap", [100.0, 1000.0])  # exp(100) overflows float32, exp(1000) float64
def test_logsumexp_far_above_and_below_the_label(gap: float) -> None:
    x, labels = exact_x(3, 4, 6, torch.float32), torch.tensor([0, 1, 2])
    bias = torch.tensor([-gap, gap, 0.0, 0.5, -1.0])
    space = ClassSpace(exact_space(5, 6, torch.float32, bias=False).weight_CD, bias, 0.0)
    actual = class_scores(x, space, labels, impl="torch")
    assert actual.logsumexp.isfinite().all()
    assert_equal_scores(actual, specification(x, space, labels, 1))


def test_rank_does_not_depend_on_the_order_of_classes_without_ties() -> None:
    x, space, labels = random_case(2, 50, 64, 300, torch.float64)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    shuffled = ClassSpace(space.weight_CD[order], space.bias_C[order], space.eps)
    place = order.argsort()
    before = class_scores(x, space, labels, topk=4)
    after = class_scores(x, shuffled, place[labels], topk=4)
    assert torch.equal(after.rank, before.rank)
    assert torch.equal(order[after.topk.long()].int(), before.topk)


def test_views_and_other_integer_labels() -> None:
    whole, labels = exact_x(3, 18, 6, torch.float32), exact_labels(10).int()
    space, x = exact_space(10, 6, torch.float32, bias=True), whole[:, 1:]
    assert not x.is_contiguous()
    expected = specification(x.contiguous(), space, labels, 1)
    assert_equal_scores(class_scores(x, space, labels), expected)
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert turned.stride(2) != 1
    assert_equal_scores(class_scores(turned, space, labels), expected)


def test_without_images_or_logsumexp() -> None:
    space = exact_space(10, 6, torch.float32, bias=True)
    none = class_scores(torch.empty(0, 5, 6), space, torch.empty(0, dtype=torch.int64), topk=2)
    assert none.rank.shape == (0, 5)
    assert none.topk.shape == (0, 5, 2)
    x, labels = exact_x(1, 5, 6, torch.float32), torch.tensor([3])
    assert class_scores(x, space, labels, logsumexp=False).logsumexp is None


def test_reference_is_an_implementation() -> None:
    x, labels = exact_x(3, 4, 6, torch.float32), exact_labels(10)
    space = exact_space(10, 6, torch.float32, bias=True)
    actual = class_scores(x, space, labels, topk=2, impl="reference")
    assert_equal_scores(actual, specification(x, space, labels, 2))


def test_auto_is_torch_on_a_cpu() -> None:
    assert resolve_impl(torch.zeros(1, 1, 1)) == "torch"
    assert resolve_impl(torch.zeros(1, 1, 1), "triton") == "triton"


def test_an_unknown_impl_is_refused() -> None:
    with pytest.raises(ValueError, match="'cuda' is not one of"):
        inspect.unwrap(resolve_impl)(torch.zeros(1, 1, 1), "cuda")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.tensor([0, 10])}, r"label 10 of image 1 is not in \[0, 10\)"),
        ({"labels": torch.tensor([-1, 0])}, "label -1 of image 0"),
        ({"labels": torch.tensor([0])}, "1 labels for 2 images"),
        ({"topk": 11}, "topk=11"),
        ({"topk": -1}, "topk=-1"),
        ({"x": torch.zeros(2, 3, 7)}, "width 7 and the class space 6"),
        ({"impl": "triton"}, "needs a GPU; pass impl='torch'"),
        ({"impl": "triton", "x": torch.zeros(2, 3, 6).double()}, "takes no torch.float64"),
    ],
)
def test_errors_name_the_remedy(change: dict, message: str) -> None:
    arguments = {
        "x": torch.zeros(2, 3, 6),
        "space": exact_space(10, 6, torch.float32, bias=True),
        "labels": torch.tensor([0, 9]),
    } | change
    unchecked = inspect.unwrap(class_scores)  # jaxtyping's own checks come first under pytest
    with pytest.raises(ValueError, match=message):
        unchecked(**arguments)


def test_reduced_float32_products_are_refused() -> None:
    x, space = torch.zeros(1, 1, 6), exact_space(10, 6, torch.float32, bias=True)
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(ValueError, match="set_float32_matmul_precision"):
            class_scores(x, space, torch.tensor([0]))
    finally:
        torch.set_float32_matmul_precision("highest")
