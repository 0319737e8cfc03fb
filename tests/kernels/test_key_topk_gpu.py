"""Top-k of key coefficients on a GPU: skipped where there is none."""

import pytest
import torch
from topk_cases import hostile_rows, naive_topk

from classlens.kernels import key_topk as module
from classlens.kernels.key_topk import key_topk

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("poisoned_empty"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("width", "k"), [(1, 1), (5, 5), (768, 5), (3072, 5), (5120, 5)])
def test_equals_a_plain_sort(impl: str, dtype: torch.dtype, width: int, k: int) -> None:
    x = hostile_rows(width, dtype)
    actual = key_topk(x.cuda(), k, impl=impl)
    assert actual.is_cuda
    assert actual.tolist() == naive_topk(x, k)


def test_all_rows_of_a_batch() -> None:
    x = torch.randint(-50, 50, (64, 197, 3072), device="cuda").half()
    assert torch.equal(key_topk(x, 5, impl="triton"), key_topk(x, 5, impl="reference"))


def test_auto_takes_triton_but_for_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise AssertionError("took torch")

    monkeypatch.setattr(module, "_passes", refused)
    x = torch.zeros(2, 8, device="cuda")
    assert key_topk(x, 2).tolist() == [[0, 1], [0, 1]]
    with pytest.raises(AssertionError, match="took torch"):
        key_topk(x.double(), 2)
