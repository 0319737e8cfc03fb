import pytest
import torch
from scoring_cases import exact_labels, exact_space, exact_x, random_case, specification, spoil_rows

from classlens.kernels.bounds import logit_error, rank_bracket
from classlens.kernels.class_scores import class_scores
from classlens.kernels.class_space import ClassSpace, fold_class_space
from classlens.kernels.reference import logits_reference


def normal_case(dtype: torch.dtype) -> tuple[torch.Tensor, ClassSpace, torch.Tensor]:
    """Shapes of ViT-B/16 with the ImageNet head, normal values."""
    torch.manual_seed(0)
    head, bias = torch.randn(1000, 768) / 768**0.5, 0.1 * torch.randn(1000)
    space = fold_class_space(1 + 0.2 * torch.randn(768), None, 1e-6, head, bias)
    return torch.randn(2, 120, 768).to(dtype), space, torch.tensor([3, 999])


def test_tight_for_float32() -> None:
    x, space, labels = normal_case(torch.float32)
    lo, hi = rank_bracket(x, space, labels, torch.float32)
    assert (lo == hi).double().mean() > 0.95


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_holds_for_every_logit(dtype: torch.dtype) -> None:
    """Not only for the ranks: the bound less its share of the bias covers each logit's error."""
    x, space, _ = random_case(1, 197, 768, 500, dtype)
    exact, bound = logit_error(x[0], space, dtype)
    computed = logits_reference(x[0], space.to(dtype=dtype)).double()
    # logit_error leaves the error of rstd out of s·rstd, for it moves no rank; put it back.
    common = 768 * 2**-24 * (exact - space.bias_C).abs()
    assert ((computed - exact).abs() <= bound + common).all()


def test_catches_logits_rounded_to_bfloat16() -> None:
    """What a CPU's bfloat16 product does to the plain form must not pass for correct."""
    x, space, labels = normal_case(torch.bfloat16)
    own = space.to(dtype=torch.bfloat16)
    lo, hi = rank_bracket(x, own.to(dtype=torch.float64), labels, torch.bfloat16)
    rounded = logits_reference(x, own).bfloat16().float()
    label_logit = rounded[torch.arange(2), :, labels][..., None]
    rank_after_ties = (rounded >= label_logit).sum(dim=-1) - 1
    assert ((rank_after_ties > hi) | (rank_after_ties < lo)).any()


def test_catches_a_label_logit_from_another_accumulator() -> None:
    """The label's own column counted, as happens when its logit is computed apart."""
    x, space, labels = normal_case(torch.float32)
    _, hi = rank_bracket(x, space, labels, torch.float32)
    rank = class_scores(x, space.to(dtype=torch.float32), labels).rank
    assert (rank + 1 > hi).double().mean() > 0.9


def test_ties_are_open_and_nothing_else_for_exact_inputs() -> None:
    x, labels = exact_x(3, 9, 65, torch.float32), exact_labels(200)
    space = exact_space(200, 65, torch.float64, bias=True)
    lo, hi = rank_bracket(x, space, labels, torch.float32)
    logits = logits_reference(x, space, dtype=torch.float64)
    label_logit = logits[torch.arange(3), :, labels][..., None]
    assert torch.equal(lo, (logits > label_logit).sum(dim=-1).int())
    assert torch.equal(hi, (logits >= label_logit).sum(dim=-1).int() - 1)


def test_invalid_rows_have_rank_c() -> None:
    space = exact_space(10, 6, torch.float64, bias=True)
    x = exact_x(2, 5, 6, torch.float32)
    places = spoil_rows(x)
    lo, hi = rank_bracket(x, space, torch.tensor([1, 2]), torch.float32)
    assert (lo[places[:, 0], places[:, 1]] == 10).all()
    assert (hi[places[:, 0], places[:, 1]] == 10).all()


def test_a_rounded_space_gives_the_narrower_bracket_of_its_own() -> None:
    x, space, labels = normal_case(torch.float16)
    half = space.to(dtype=torch.float16)
    lo, hi = rank_bracket(x, space, labels, torch.float16)
    own_lo, own_hi = rank_bracket(x, half.to(dtype=torch.float64), labels, torch.float16)
    assert (own_hi - own_lo).sum() < 0.5 * (hi - lo).sum()
    rank = class_scores(x, half, labels).rank
    assert ((own_lo <= rank) & (rank <= own_hi)).all()
    exact = specification(x, space, labels, 1).rank
    assert ((lo <= exact) & (exact <= hi)).all()
