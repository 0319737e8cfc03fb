"""The closed-form gradients against autograd in float64, where rounding is hardest too."""

import pytest
import torch
from torch.nn import functional as F

from classlens.kernels.attribution import (
    class_loss_gradient,
    half_exponent,
    head_relevance,
    layer_norm_backward,
)
from classlens.kernels.class_space import ClassSpace, fold_class_space


def make(seed: int, n: int = 6, width: int = 16, classes: int = 11, sharpness: float = 1.0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    norm = torch.nn.LayerNorm(width, eps=1e-6).double()
    head = torch.nn.Linear(width, classes).double()
    with torch.no_grad():
        norm.weight.copy_(1 + 0.3 * normal(width))
        norm.bias.copy_(0.2 * normal(width))
        head.weight.copy_(sharpness * normal(classes, width))
        head.bias.copy_(normal(classes))
    space = fold_class_space(norm.weight, norm.bias, norm.eps, head.weight, head.bias)
    labels = torch.randint(0, classes, (n,), generator=generator)
    return 3 + 2 * normal(n, width), lambda x: head(norm(x)), space, labels


def by_autograd(x, logits_of, labels, second_softmax):
    x = x.double().requires_grad_()
    scores = logits_of(x)
    loss = F.cross_entropy(scores.softmax(1) if second_softmax else scores, labels, reduction="sum")
    return torch.autograd.grad(loss, x)[0]


@pytest.mark.parametrize("second_softmax", [False, True])
def test_gradient_of_the_loss(second_softmax):
    x, logits_of, space, labels = make(0)
    ours = class_loss_gradient(x, space, labels, second_softmax=second_softmax)
    expected = by_autograd(x, logits_of, labels, second_softmax)
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("second_softmax", [False, True])
@pytest.mark.parametrize("right", [False, True])
def test_float32_keeps_its_relative_precision_where_a_probability_is_nearly_one(
    second_softmax, right
):
    # 1 - p of the top class goes down to e^-24, below float32's spacing at 1.
    x, logits_of, space, _ = make(1, sharpness=8.0)
    top2 = logits_of(x).topk(2, dim=1)
    assert (top2.values[:, 0] - top2.values[:, 1]).max() > 20
    labels = top2.indices[:, 0 if right else 1]
    rounded = space.to(dtype=torch.float32)
    same = ClassSpace(rounded.weight_CD.double(), rounded.bias_C.double(), space.eps)
    x32 = x.float()
    expected = class_loss_gradient(x32.double(), same, labels, second_softmax=second_softmax)
    ours = class_loss_gradient(x32, rounded, labels, second_softmax=second_softmax)
    assert ours.dtype == torch.float32
    size = expected.abs().amax(1, keepdim=True)
    # Logits of size 100 are off by 100 · 2^-24 times a few; so are the probabilities, relatively.
    assert (((ours - expected) / size).abs() < 2e-4).all()


def test_float64_closed_form_is_autograd_at_extreme_probabilities():
    x, logits_of, space, labels = make(2, sharpness=3.0)
    for second_softmax in (False, True):
        ours = class_loss_gradient(x, space, labels, second_softmax=second_softmax)
        expected = by_autograd(x, logits_of, labels, second_softmax)
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-13)


@pytest.mark.parametrize("affine", [False, True])
def test_layer_norm_backward(affine):
    x, *_ = make(3)
    gradient = torch.randn_like(x)
    weight = torch.rand(16, dtype=torch.float64) if affine else None
    leaf = x.clone().requires_grad_()
    [expected] = torch.autograd.grad(F.layer_norm(leaf, (16,), weight, eps=1e-6), leaf, gradient)
    torch.testing.assert_close(
        layer_norm_backward(x, gradient, weight, 1e-6), expected, rtol=1e-11, atol=1e-13
    )


def test_head_relevance_is_minus_the_inner_product():
    gradient, value = torch.randn(2, 3, 4), torch.randn(2, 3, 5, 4).half()
    ours = head_relevance(gradient, value)
    assert (ours.shape, ours.dtype) == ((2, 3, 5), torch.float32)
    expected = -(gradient[:, :, None] * value.float()).sum(-1)
    torch.testing.assert_close(ours, expected)


def test_half_exponent_puts_the_largest_below_the_limit_of_float16():
    largest = torch.tensor([1.0, 0.75, 3e-9, 2.0**20, 1e-38, 0.0, 2.0**-40 * (2 - 2**-22)])
    exponent = half_exponent(largest)
    scaled = torch.ldexp(largest, -exponent)
    assert (scaled[:4] >= 2**14).all()
    assert (scaled <= 2**15).all()
    assert torch.isfinite(scaled).all()
    assert (torch.ldexp(scaled, exponent) == largest).all()  # a power of two rounds nothing
    assert exponent.dtype == torch.int32
