"""Peaks, means, counts of codes and codes of pairs, by either implementation, against loops."""

import pytest
import torch
from cpu_units import needs_avx512

from classlens.kernels.activation_codes import CODES, activation_codes
from classlens.kernels.neuron_sums import neuron_sums, pair_codes

IMPLS = ["torch", pytest.param("avx512", marks=needs_avx512)]


def activations(shape: tuple[int, int, int], dtype: torch.dtype) -> torch.Tensor:
    """Of all sizes, with both zeros."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    x *= 2.0 ** torch.randint(-12, 7, shape, generator=generator)
    x.view(-1)[::7], x.view(-1)[::11] = 0.0, -0.0
    return x.to(dtype)


def check(x: torch.Tensor, prefix: int, counted: torch.Tensor, impl) -> None:
    peak, mean, histogram = neuron_sums(x, prefix, counted, impl=impl)
    exact = x[:, prefix:].double()
    assert peak.dtype == mean.dtype == torch.float32
    assert torch.equal(peak.double(), exact.amax(dim=1))
    # G terms, each rounded once on the way, and the division.
    error = (exact.shape[1] + 1) * 2.0**-24 * exact.abs().mean(dim=1)
    assert ((mean.double() - exact.mean(dim=1)).abs() <= error).all()
    assert histogram.dtype == torch.int32
    expected = torch.zeros(x.shape[2], CODES, dtype=torch.int32)
    for image, tokens in zip(x, counted.tolist(), strict=True):
        for token in tokens:
            expected[torch.arange(x.shape[2]), activation_codes(image[token]).long()] += 1
    assert torch.equal(histogram, expected)


# Widths around a vector of 16 and a thread's 256 neurons; tokens around the four of a pass.
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("width", [1, 16, 48, 259, 771])
@pytest.mark.parametrize(("tokens", "prefix"), [(1, 0), (6, 1), (9, 5), (17, 1)])
def test_equals_loops(impl, width: int, tokens: int, prefix: int) -> None:
    x = activations((3, tokens, width), torch.bfloat16)
    counted = torch.randint(tokens, (3, 5), generator=torch.Generator().manual_seed(1))
    check(x, prefix, counted, impl)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    check(activations((3, 9, 48), dtype), 1, torch.tensor([[1, 2], [8, 8], [3, 0]]), "torch")


@pytest.mark.parametrize("impl", IMPLS)
def test_a_view_and_nothing_counted(impl) -> None:
    x = activations((6, 5, 32), torch.bfloat16)
    check(x.transpose(0, 1), 1, torch.tensor([[1, 5]] * 5), impl)
    check(x, 1, torch.empty(6, 0, dtype=torch.int64), impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_what_is_not_finite_shows_in_the_mean(impl) -> None:
    x = torch.zeros(3, 9, 20, dtype=torch.bfloat16)
    x[0, 3, 7], x[1, 8, 19] = float("nan"), float("inf")
    peak, mean, histogram = neuron_sums(x, 1, torch.tensor([[3], [8], [1]]), impl=impl)
    assert mean.isfinite().logical_not().nonzero().tolist() == [[0, 7], [1, 19]]
    assert mean[0, 7].isnan()
    assert peak[1, 19] == mean[1, 19] == float("inf")
    assert histogram.sum() == 3 * 20


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("pairs", [0, 1, 16, 37])  # a group has 16
@pytest.mark.parametrize(("tokens", "prefix"), [(1, 0), (9, 5), (17, 1)])
def test_codes_of_pairs(impl, pairs: int, tokens: int, prefix: int) -> None:
    x = activations((3, tokens, 48), torch.bfloat16)
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(3, (pairs,), generator=generator)
    neurons = torch.randint(48, (pairs,), generator=generator)
    codes = pair_codes(x, prefix, images, neurons, impl=impl)
    assert codes.shape == (pairs, tokens - prefix)
    for image, neuron, found in zip(images, neurons, codes, strict=True):
        assert torch.equal(found, activation_codes(x[image, prefix:, neuron]))


def test_errors_name_the_remedy() -> None:
    x, counted = torch.zeros(2, 4, 8), torch.zeros(2, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="prefix=4 leaves none of 4 tokens; pass fewer"):
        neuron_sums(x, 4, counted)
    with pytest.raises(ValueError, match=r"takes bfloat16 on a CPU, not torch.float32 on cpu"):
        neuron_sums(x, 1, counted, impl="avx512")
    with pytest.raises(ValueError, match=r"takes bfloat16 on a CPU, not torch.float32 on cpu"):
        pair_codes(x, 1, counted[:, 0], counted[:, 0], impl="avx512")
