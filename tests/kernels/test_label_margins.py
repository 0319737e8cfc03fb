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

from classlens.kernels import class_scores_torch
from classlens.kernels import label_margins as label_margins_module
from classlens.kernels.class_scores import class_scores
from classlens.kernels.class_space import ClassSpace
from classlens.kernels.label_margins import label_margins, margins_pay
from classlens.kernels.reference import logits_reference


@pytest.mark.parametrize("num_classes", [1, 10, 1000])
@pytest.mark.parametrize("topk", [0, 1, 5])
def test_exact_on_small_integers(
    num_classes: int, topk: int, poisoned_empty: list[torch.Tensor]
) -> None:
    """Without a bias: with one, the rounded products of more than 8 bits would shift margins.

    The products reach 400 and lose their last bit; ranks and top classes must not.
    """
    x, labels = exact_x(3, 17, 65, torch.bfloat16), exact_labels(num_classes)
    space = exact_space(num_classes, 65, torch.float32, bias=False)
    topk = min(topk, num_classes)
    margins = label_margins(space, labels)
    actual = class_scores(x, space, labels, topk=topk, margins=margins, logsumexp=False)
    assert any(tensor.data_ptr() == actual.rank.data_ptr() for tensor in poisoned_empty)
    assert_equal_scores(actual, specification(x, space, labels, topk, logsumexp=False))


def test_random_inputs_stay_in_the_bracket() -> None:
    x, space64, labels = random_case(3, 197, 96, 1000, torch.bfloat16)
    space = space64.to(dtype=torch.float32)
    actual = class_scores(x, space, labels, margins=label_margins(space, labels))
    assert_in_bracket(actual, x, space64, labels, torch.bfloat16, margins=True)
    plain = class_scores(x, space, labels)
    assert not torch.equal(actual.rank, plain.rank), "margins were not used"
    torch.testing.assert_close(actual.label_logit, plain.label_logit, rtol=1e-5, atol=1e-5)
    # The rounding of each product, relative to the largest margin, is that of logsumexp at most.
    off = (actual.logsumexp - plain.logsumexp).abs()
    peak = logits_reference(x, space).amax(dim=-1) - plain.label_logit
    assert (off <= 2**-7 * (peak.abs() + 1)).all()


@pytest.mark.parametrize("topk", [1, 3])
def test_top_classes_closer_than_bfloat16_are_told_apart(topk: int) -> None:
    """Logits 64 + 2⁻⁵ c above the label's: in bfloat16 all of them tie."""
    space = ClassSpace(torch.zeros(10, 4), torch.zeros(10), 0.0)
    space.weight_CD[1:, 0] = 64 + torch.arange(9) / 32
    space.weight_CD[1:, 1] = -space.weight_CD[1:, 0]
    x = torch.tensor([[[1.0, -1.0, 1.0, -1.0]]], dtype=torch.bfloat16)
    labels = torch.tensor([0])
    margins = label_margins(space, labels)
    assert (margins.weight_NCD[0, 1:5, 0] == 64).all()
    actual = class_scores(x, space, labels, topk=topk, margins=margins)
    assert actual.topk[0, 0].tolist() == [9, 8, 7][:topk]
    assert actual.rank.item() == 9


def test_candidates_are_scored_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_margins_module, "PAIRS_PER_CHUNK", 7)
    monkeypatch.setattr(class_scores_torch, "ROWS_PER_CHUNK", 5)
    space = ClassSpace(torch.zeros(30, 6), torch.zeros(30), 1e-6)  # all 30 classes tie
    x, labels = torch.randn(3, 17, 6).bfloat16(), torch.tensor([0, 29, 11])
    actual = class_scores(x, space, labels, topk=4, margins=label_margins(space, labels))
    assert_equal_scores(actual, specification(x, space, labels, 4))


def test_invalid_rows_are_marked() -> None:
    space, labels = exact_space(10, 6, torch.float32, bias=False), torch.tensor([1, 2])
    x = exact_x(2, 5, 6, torch.bfloat16)
    spoil_rows(x)
    actual = class_scores(x, space, labels, topk=3, margins=label_margins(space, labels))
    assert_equal_scores(actual, specification(x, space, labels, 3))


def test_equal_rows_have_no_margin() -> None:
    _, space, _ = random_case(1, 1, 33, 50, torch.float32)
    space.weight_CD[40] = space.weight_CD[7]
    space.bias_C[40] = space.bias_C[7]
    margins = label_margins(space, torch.tensor([7]))
    assert (margins.weight_NCD[0, [7, 40]] == 0).all()
    assert (margins.bias_NC[0, [7, 40]] == 0).all()


def test_errors_name_the_remedy() -> None:
    space, labels = exact_space(10, 6, torch.float32, bias=True), torch.tensor([0, 9])
    margins, x = label_margins(space, labels), exact_x(2, 3, 6, torch.bfloat16)
    with pytest.raises(ValueError, match=r"pass space.to\(dtype=torch.float32\)"):
        label_margins(space.to(dtype=torch.bfloat16), labels)
    with pytest.raises(ValueError, match="label 10 of image 0"):
        label_margins(space, torch.tensor([10]))
    with pytest.raises(ValueError, match="made for other labels"):
        class_scores(x, space, labels.flip(0), margins=margins)
    with pytest.raises(ValueError, match="leave them out"):
        class_scores(x.float(), space, labels, margins=margins)
    with pytest.raises(ValueError, match="leave them out"):
        class_scores(x, space, labels, impl="reference", margins=margins)


def test_margins_pay_answers() -> None:
    assert margins_pay() in (True, False)
