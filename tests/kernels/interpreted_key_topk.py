"""The Triton kernel on a CPU. `test_key_topk_triton.py` runs this file in a process of its own."""

import pytest
import torch
from topk_cases import hostile_rows, naive_topk
from triton.runtime.interpreter import InterpretedFunction

from classlens.kernels import key_topk_triton
from classlens.kernels.key_topk import key_topk

# NumPy warns at NaN where a GPU does not.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grid sizes of the launches of the interpreted kernel."""
    kernel, sizes = key_topk_triton._key_topk_kernel, []
    assert isinstance(kernel, InterpretedFunction)

    class Recorder:
        def __getitem__(self, grid: tuple[int]) -> object:
            sizes.append(grid[0])
            return kernel[grid]

    monkeypatch.setattr(key_topk_triton, "_key_topk_kernel", Recorder())
    return sizes


# F: a single coefficient; powers of two and not; ViT-B's and the widest MLP of ViT-H.
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("width", "k"), [(1, 1), (5, 5), (64, 5), (65, 3), (3072, 5), (5120, 5)])
def test_equals_a_plain_sort(
    dtype: torch.dtype,
    width: int,
    k: int,
    launches: list[int],
    poisoned_empty: list[torch.Tensor],
) -> None:
    x = hostile_rows(width, dtype)
    actual = key_topk(x, k, impl="triton")
    assert launches == [len(x)]
    assert poisoned_empty
    assert actual.tolist() == naive_topk(x, k)


def test_views_and_nothing(launches: list[int]) -> None:
    x = hostile_rows(64, torch.float32)
    assert key_topk(x[:, 1:40], 5, impl="triton").tolist() == naive_topk(x[:, 1:40], 5)
    assert key_topk(x.T, 5, impl="triton").tolist() == naive_topk(x.T, 5)
    assert key_topk(x[:0], 5, impl="triton").shape == (0, 5)
    assert key_topk(x, 0, impl="triton").shape == (len(x), 0)
    assert len(launches) == 2


def test_rows_too_wide_name_the_remedy() -> None:
    with pytest.raises(ValueError, match="at most 16384 coefficients, not 16385"):
        key_topk(torch.zeros(1, 16_385), 5, impl="triton")
