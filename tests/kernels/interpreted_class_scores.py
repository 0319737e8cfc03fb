"""The Triton kernel on a CPU. `test_triton_interpreter.py` runs this file in a process of its own.

Triton reads TRITON_INTERPRET when it is imported, and what is imported then runs interpreted for
good; so the variable must be set for this process alone, and from its beginning.
"""

import pytest
import torch
import triton
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
from triton.runtime.interpreter import InterpretedFunction

from classlens.kernels import class_scores_triton
from classlens.kernels.class_scores import class_scores
from classlens.kernels.class_space import ClassSpace
from classlens.kernels.reference import ClassScores

# NumPy warns where a GPU does not: at rows of NaN and infinity, and at rows that are masked out.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grid sizes of the launches of the interpreted kernel."""
    kernel, sizes = class_scores_triton._class_scores_kernel, []
    assert isinstance(kernel, InterpretedFunction)

    class Recorder:
        def __getitem__(self, grid: tuple[int]) -> object:
            sizes.append(grid[0])
            return kernel[grid]

    monkeypatch.setattr(class_scores_triton, "_class_scores_kernel", Recorder())
    return sizes


def interpreted(
    x: torch.Tensor, space: ClassSpace, labels: torch.Tensor, topk: int, logsumexp: bool = True
) -> ClassScores:
    return class_scores(x, space, labels, topk=topk, logsumexp=logsumexp, impl="triton")


# C: one class in a tile of many; fewer than a tile; a prime; ImageNet's. Both large ones leave a
# ragged last tile, of 101 and 104 classes of 128 and of 37 and 40 of 64.
# T: 197 and 67 leave a ragged block of rows, 69 of 128 and 5 or 3 of 64; 3 is less than a block.
# D: odd, one beyond a block of 64 or 16; and less than a block.
# topk: each has its own tile.
@pytest.mark.parametrize(
    ("dtype", "num_classes", "n_tokens", "width", "topk"),
    [
        (torch.float16, 1, 3, 65, 0),
        (torch.float16, 1, 3, 65, 1),
        (torch.float16, 10, 3, 6, 5),
        (torch.float16, 10, 67, 65, 1),
        (torch.float16, 997, 197, 65, 0),
        (torch.float16, 997, 3, 65, 5),
        (torch.float16, 1000, 197, 64, 1),
        (torch.float32, 1, 3, 6, 1),
        (torch.float32, 10, 67, 65, 0),
        (torch.float32, 997, 3, 65, 5),
        (torch.float32, 1000, 67, 17, 1),
    ],
)
def test_exact_on_small_integers(
    dtype: torch.dtype,
    num_classes: int,
    n_tokens: int,
    width: int,
    topk: int,
    launches: list[int],
    poisoned_empty: list[torch.Tensor],
) -> None:
    x = exact_x(3, n_tokens, width, dtype)
    space, labels = exact_space(num_classes, width, dtype, bias=True), exact_labels(num_classes)
    actual = interpreted(x, space, labels, topk)
    block_t = class_scores_triton.choose_tile(dtype, topk, 9).block_t
    assert launches == [3 * triton.cdiv(n_tokens, block_t)]
    assert any(tensor is actual.rank for tensor in poisoned_empty)
    assert_equal_scores(actual, specification(x, space, labels, topk))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_random_inputs_stay_in_the_bracket(dtype: torch.dtype, launches: list[int]) -> None:
    x, space64, labels = random_case(2, 50, 96, 1000, dtype)
    actual = interpreted(x, space64.to(dtype=dtype), labels, 1)
    assert len(launches) == 1
    assert_in_bracket(actual, x, space64, labels, dtype)


@pytest.mark.parametrize("topk", [1, 2])
def test_more_classes_than_16_bits_count(topk: int) -> None:
    """The label is the last class, in a ragged tile that comes first."""
    x, labels = exact_x(1, 3, 6, torch.float16), torch.tensor([69_999])
    space = exact_space(70_000, 6, torch.float16, bias=True)
    space.bias_C[-1] = -40.0  # below every other
    actual = interpreted(x, space, labels, topk, logsumexp=False)
    assert (actual.rank == 69_999).all()
    assert_equal_scores(actual, specification(x, space, labels, topk, logsumexp=False))


@pytest.mark.parametrize("topk", [0, 3])
def test_invalid_rows_are_marked(topk: int) -> None:
    space, labels = exact_space(150, 6, torch.float16, bias=True), torch.tensor([1, 149])
    x = exact_x(2, 5, 6, torch.float16)
    spoil_rows(x)
    actual = interpreted(x, space, labels, topk)
    assert_equal_scores(actual, specification(x, space, labels, topk))


@pytest.mark.parametrize("gap", [100.0, 1000.0])  # exp(100) overflows float32, exp(1000) float64
def test_logsumexp_far_above_and_below_the_label(gap: float) -> None:
    """The large logit comes in a later tile than the label's and in an earlier one."""
    x, labels = exact_x(3, 4, 6, torch.float32), torch.tensor([0, 100, 199])
    bias = torch.zeros(200)
    bias[50], bias[150] = gap, -gap
    space = ClassSpace(exact_space(200, 6, torch.float32, bias=False).weight_CD, bias, 0.0)
    actual = interpreted(x, space, labels, 0)
    assert actual.logsumexp.isfinite().all()
    assert_equal_scores(actual, specification(x, space, labels, 0))


def test_minus_zero_ties_with_zero() -> None:
    space = ClassSpace(torch.zeros(4, 6), torch.tensor([-0.0, 0.0, -0.0, 0.0]), 0.0)
    x = exact_x(1, 2, 6, torch.float32)
    actual = interpreted(-x, space, torch.tensor([2]), 4)
    assert actual.topk[0, 0].tolist() == [0, 1, 2, 3]
    assert actual.rank[0, 0] == 2


def test_negative_logits_are_ordered() -> None:
    bias = torch.tensor([-3.0, -1.0, -2.0, -1.0, -40.0])
    space = ClassSpace(torch.zeros(5, 6), bias, 0.0)
    actual = interpreted(exact_x(1, 2, 6, torch.float32), space, torch.tensor([3]), 5)
    assert actual.topk[0, 0].tolist() == [1, 3, 2, 0, 4]
    assert actual.rank[0, 0] == 1


def test_views_and_no_images() -> None:
    whole, labels = exact_x(3, 18, 6, torch.float32), exact_labels(10).int()
    space, x = exact_space(10, 6, torch.float32, bias=True), whole[:, 1:]
    expected = specification(x.contiguous(), space, labels, 1)
    assert_equal_scores(interpreted(x, space, labels, 1), expected)
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert_equal_scores(interpreted(turned, space, labels, 1), expected)
    assert interpreted(x[:0], space, labels[:0], 1).rank.shape == (0, 17)


def test_without_logsumexp() -> None:
    x, labels = exact_x(3, 4, 6, torch.float32), exact_labels(10)
    space = exact_space(10, 6, torch.float32, bias=True)
    actual = interpreted(x, space, labels, 1, logsumexp=False)
    assert_equal_scores(actual, specification(x, space, labels, 1, logsumexp=False))


def test_errors_name_the_remedy() -> None:
    x, labels = exact_x(1, 4, 6, torch.float32), torch.tensor([0])
    space = exact_space(100, 6, torch.float32, bias=True)
    with pytest.raises(ValueError, match="interpreter multiplies bfloat16 wrongly"):
        interpreted(x.bfloat16(), space.to(dtype=torch.bfloat16), labels, 1)
    with pytest.raises(ValueError, match=r"pass space.to\(dtype=torch.float16\)"):
        interpreted(x.half(), space, labels, 1)
    with pytest.raises(ValueError, match="at most 64 classes; pass impl='torch'"):
        interpreted(x, space, labels, 65)
