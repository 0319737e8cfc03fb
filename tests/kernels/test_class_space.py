import pytest
import torch
from torch import nn

from classlens.kernels.class_space import ClassSpace, fold_class_space
from classlens.kernels.reference import logits_reference


def random_norm_and_head(width: int, num_classes: int) -> tuple[nn.LayerNorm, nn.Linear]:
    torch.manual_seed(0)
    norm, head = nn.LayerNorm(width, eps=1e-3), nn.Linear(width, num_classes)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm, head


def test_folded_logits_are_those_of_norm_and_head() -> None:
    norm, head = random_norm_and_head(33, 7)
    space = fold_class_space(norm.weight, norm.bias, norm.eps, head.weight, head.bias)
    x = torch.randn(4, 5, 33, dtype=torch.float64) * 3 + 2
    expected = head.double()(norm.double()(x))
    torch.testing.assert_close(logits_reference(x, space), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("absent", ["norm_weight", "norm_bias", "head_bias"])
def test_absent_parameters_are_ones_and_zeros(absent: str) -> None:
    norm, head = random_norm_and_head(16, 5)
    given = {"norm_weight": norm.weight, "norm_bias": norm.bias, "head_bias": head.bias}
    neutral = torch.ones_like(given[absent]) if absent == "norm_weight" else 0 * given[absent]
    without = fold_class_space(eps=1e-6, head_weight=head.weight, **(given | {absent: None}))
    neutrally = fold_class_space(eps=1e-6, head_weight=head.weight, **(given | {absent: neutral}))
    assert torch.equal(without.weight_CD, neutrally.weight_CD)
    assert torch.equal(without.bias_C, neutrally.bias_C)


def test_rows_are_centred_and_float64() -> None:
    norm, head = random_norm_and_head(64, 9)
    space = fold_class_space(norm.weight, norm.bias, norm.eps, head.weight, head.bias)
    assert space.weight_CD.dtype == space.bias_C.dtype == torch.float64
    assert not space.weight_CD.requires_grad
    assert space.weight_CD.sum(dim=1).abs().max() < 1e-13
    assert (space.num_classes, space.width) == (9, 64)


def test_equal_head_rows_fold_to_equal_classes() -> None:
    norm, head = random_norm_and_head(257, 1000)
    with torch.no_grad():
        head.weight[[3, 500, 999]] = head.weight[0].clone()
        head.bias[[3, 500, 999]] = head.bias[0].clone()
    space = fold_class_space(norm.weight, norm.bias, norm.eps, head.weight, head.bias)
    for c in (3, 500, 999):
        assert torch.equal(space.weight_CD[c], space.weight_CD[0])
        assert space.bias_C[c] == space.bias_C[0]


def test_projection_is_linear_in_the_residual_stream() -> None:
    """W'·(x + a + m) = W'·x + W'·a + W'·m, to D roundings of float64."""
    norm, head = random_norm_and_head(65, 11)
    space = fold_class_space(norm.weight, norm.bias, norm.eps, head.weight, head.bias)
    streams = torch.randn(3, 4, 65, dtype=torch.float64)
    whole = streams.sum(dim=0) @ space.weight_CD.T
    parts = (streams @ space.weight_CD.T).sum(dim=0)
    bound = (streams.abs() @ space.weight_CD.abs().T).sum(dim=0) * (65 + 3) * 2**-53 * 2
    assert ((whole - parts).abs() <= bound).all()


@pytest.mark.parametrize(
    ("dtype", "bias_dtype"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_to_rounds_the_weight_and_keeps_a_wide_bias(
    dtype: torch.dtype, bias_dtype: torch.dtype
) -> None:
    space = ClassSpace(torch.randn(3, 4).double(), torch.randn(3).double(), 1e-6)
    cast = space.to(dtype=dtype)
    assert cast.weight_CD.dtype == dtype
    assert cast.bias_C.dtype == bias_dtype
    assert cast.eps == 1e-6
    assert torch.equal(cast.weight_CD, space.weight_CD.to(dtype))
    assert torch.equal(cast.to(device="cpu").weight_CD, cast.weight_CD)


@pytest.mark.parametrize(
    ("weight", "dtype"), [(1e5, torch.float16), (1e39, torch.bfloat16), (float("nan"), None)]
)
def test_to_refuses_weights_that_are_not_finite(weight: float, dtype: torch.dtype | None) -> None:
    weights = torch.full((2, 3), weight, dtype=torch.float64)
    space = ClassSpace(weights, torch.zeros(2, dtype=torch.float64), 1e-6)
    with pytest.raises(ValueError, match="not finite in"):
        space.to(dtype=dtype)
