import pytest
import torch
from cpu_units import needs_avx512
from topk_cases import hostile_rows, naive_topk

from classlens.kernels import key_topk as module
from classlens.kernels.key_topk import key_topk

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


# F: one coefficient, as many as are kept, one more, and the widths of ViT-B/16.
@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "k"), [(1, 1), (5, 5), (6, 5), (48, 5), (768, 5), (3072, 5)])
def test_equals_a_plain_sort(impl: str, dtype: torch.dtype, width: int, k: int) -> None:
    x = hostile_rows(width, dtype)
    actual = key_topk(x, k, impl=impl)
    assert actual.dtype == torch.int32
    assert actual.tolist() == naive_topk(x, k)


@needs_avx512
@pytest.mark.parametrize("k", [0, 1, 5])
@pytest.mark.parametrize("width", [5, 16, 48, 771, 3072, 65_536])  # a vector has 16
def test_avx512_equals_a_plain_sort(width: int, k: int, poisoned_empty: list[torch.Tensor]) -> None:
    x = hostile_rows(width, torch.bfloat16)
    assert key_topk(x, k, impl="avx512").tolist() == naive_topk(x, k)
    assert poisoned_empty
    turned = x[:10].view(2, 5, width).transpose(0, 1)
    expected = key_topk(x[:10], k).view(2, 5, k).transpose(0, 1)
    assert torch.equal(key_topk(turned, k, impl="avx512"), expected)


def test_passes_alone_equal_a_plain_sort(poisoned_empty: list[torch.Tensor]) -> None:
    """The path of a GPU."""
    x = hostile_rows(48, torch.float16)
    assert module._passes(x, 5).tolist() == naive_topk(x, 5)
    assert poisoned_empty


def test_only_rows_with_equals_are_done_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    done, passes = [], module._passes

    def counted(x: torch.Tensor, k: int) -> torch.Tensor:
        done.append(len(x))
        return passes(x, k)

    monkeypatch.setattr(module, "_passes", counted)
    x = torch.arange(40.0).view(4, 10)
    key_topk(x, 5)
    assert done == []
    x[1, 4] = x[1, 5]  # of the places 5 and 6, so in or out is open
    x[2, 0] = x[2, 1]  # far below
    key_topk(x, 5)
    assert done == [1]


def test_leading_axes_views_and_nothing() -> None:
    x = hostile_rows(48, torch.float32)[:20].view(2, 2, 5, 48)
    assert key_topk(x, 3).shape == (2, 2, 5, 3)
    turned = x.transpose(0, 2)
    assert torch.equal(key_topk(turned, 3), key_topk(x, 3).transpose(0, 2))
    assert key_topk(x[:0], 3).shape == (0, 2, 5, 3)
    assert key_topk(x, 0).shape == (2, 2, 5, 0)


def test_errors_name_the_remedy() -> None:
    x = torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"k=5 is not in \[0, 4\]"):
        key_topk(x, 5)
    with pytest.raises(ValueError, match="takes bfloat16 on a CPU, up to 65,536 coefficients"):
        key_topk(x, 1, impl="avx512")
    with pytest.raises(ValueError, match=r"not 65,537 in torch.bfloat16 on cpu; pass impl='torch'"):
        key_topk(torch.zeros(1, 65_537, dtype=torch.bfloat16), 1, impl="avx512")
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match="needs a GPU; pass impl='torch'"):
        key_topk(x, 1, impl="triton")
    with pytest.raises(ValueError, match=r"takes no torch.float64; pass impl='torch'"):
        key_topk(x.double(), 1, impl="triton")
