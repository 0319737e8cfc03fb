"""The kernels on a GPU, at the shapes of ViT-B/16: skipped where there is none."""

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

from classlens.kernels.class_scores import class_scores, resolve_impl
from classlens.kernels.class_space import ClassSpace
from classlens.kernels.reference import ClassScores

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("poisoned_empty"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
IMPLS = ["triton", "torch"]


def on_gpu(
    x: torch.Tensor, space: ClassSpace, labels: torch.Tensor, topk: int, impl: str
) -> ClassScores:
    """Score on the GPU and bring the results back."""
    scores = class_scores(x.cuda(), space.to(device="cuda"), labels.cuda(), topk=topk, impl=impl)
    assert scores.rank.is_cuda
    return ClassScores(*(part.cpu() for part in scores))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_classes", [1, 10, 997, 1000])
@pytest.mark.parametrize("width", [65, 768])
@pytest.mark.parametrize("topk", [0, 1, 5])
def test_exact_on_small_integers(
    impl: str, dtype: torch.dtype, num_classes: int, width: int, topk: int
) -> None:
    x, labels = exact_x(3, 197, width, dtype), exact_labels(num_classes)
    space, topk = exact_space(num_classes, width, dtype, bias=True), min(topk, num_classes)
    spoil_rows(x)
    actual = on_gpu(x, space, labels, topk, impl)
    assert_equal_scores(actual, specification(x, space, labels, topk))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_random_inputs_stay_in_the_bracket(impl: str, dtype: torch.dtype) -> None:
    x, space64, labels = random_case(16, 197, 768, 1000, dtype)
    space = space64.to(dtype=dtype)
    actual = on_gpu(x, space, labels, 1, impl)
    assert_in_bracket(actual, x, space64, labels, dtype)
    # The model whose weights are the rounded ones: a bracket of accumulation alone.
    assert_in_bracket(actual, x, space.to(dtype=torch.float64), labels, dtype)


@pytest.mark.parametrize("impl", IMPLS)
def test_logsumexp_far_above_the_label(impl: str) -> None:
    x, labels = exact_x(3, 197, 64, torch.float16), torch.tensor([0, 100, 199])
    bias = torch.zeros(200)
    bias[50], bias[150] = 1000.0, -1000.0
    space = ClassSpace(exact_space(200, 64, torch.float16, bias=False).weight_CD, bias, 0.0)
    actual = on_gpu(x, space, labels, 1, impl)
    assert actual.logsumexp.isfinite().all()
    assert_equal_scores(actual, specification(x, space, labels, 1))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_label_out_of_range_makes_its_image_invalid(impl: str) -> None:
    x, space = exact_x(3, 5, 6, torch.float16), exact_space(10, 6, torch.float16, bias=True)
    actual = on_gpu(x, space, torch.tensor([3, 10, -1]), 2, impl)
    assert (actual.rank[0] < 10).all()
    assert (actual.rank[1:] == 10).all()
    assert (actual.topk[1:] == 10).all()
    assert actual.label_logit[1:].isnan().all()


def test_auto_takes_triton_for_what_it_can_multiply() -> None:
    for dtype in DTYPES:
        assert resolve_impl(torch.zeros(1, 1, 1, dtype=dtype, device="cuda")) == "triton"
    assert resolve_impl(torch.zeros(1, 1, 1, dtype=torch.float64, device="cuda")) == "torch"


def test_the_weight_must_have_the_dtype_of_x() -> None:
    x, space = torch.zeros(1, 2, 6, device="cuda"), exact_space(10, 6, torch.float16, bias=True)
    with pytest.raises(ValueError, match=r"pass space.to\(dtype=torch.float32\)"):
        class_scores(x, space.to(device="cuda"), torch.tensor([0], device="cuda"))
