"""Probes from streamed sums against scikit-learn's Ridge; and the plan of the passes."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from classlens.extractor.errors import ModelError, UsageError
from classlens.extractor.probe import SitePart, Statistics, plan_probes, probe_bytes
from classlens.extractor.schema import Layout

U = 2.0**-24  # unit roundoff of float32


def one_hot(labels: np.ndarray, classes: int) -> np.ndarray:
    """±1 targets, [N, C]."""
    return np.where(labels[:, None] == np.arange(classes), 1.0, -1.0)


def weight_tolerance(x: np.ndarray, labels: np.ndarray, ridge: Ridge, shift: np.ndarray):
    """Bound of ‖W_c − exact‖₂ for each class, [C].

    S_c is a float32 sum of the class's n_c rows, each rounded once: its error is at most
    (n_c + 1) u Σ|x − shift|. It enters W doubled and through a matrix whose eigenvalues are at
    least α. W itself is rounded once; float64 adds less than 1e-9 of it here.
    """
    error = np.zeros_like(ridge.coef_)
    for c in range(len(error)):
        rows = np.abs(x[labels == c] - shift)
        error[c] = 2 * (len(rows) + 1) * U * rows.sum(0)
    norm = np.linalg.norm
    return norm(error, axis=1) / ridge.alpha + (U + 1e-9) * norm(ridge.coef_, axis=1) + 1e-12


def score_tolerance(
    x: np.ndarray, mean: np.ndarray, ridge: Ridge, weight_error: np.ndarray, common: float
):
    """Bound of |score − exact| for each row and class, [N, C], before the common part is added: the
    weight's error, the mean's rounding, a float32 product of D terms, the rounding of the sum."""
    centred, weight = np.abs(x - mean), np.abs(ridge.coef_)
    product = (x.shape[1] + 4) * U * centred @ weight.T
    return (
        np.linalg.norm(x - mean, axis=1)[:, None] * weight_error
        + product
        + 2 * U * (np.abs(mean) + np.abs(x)) @ weight.T
        + 3 * U * np.abs(ridge.predict(x).reshape(len(x), -1) - common)
    )


def added(tolerance: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """The tolerance once the common part, at most 1, is added."""
    return tolerance + U * (np.abs(exact) + 2)


def rank_bracket(scores: np.ndarray, labels: np.ndarray, tolerance: np.ndarray):
    """Least and largest rank of the label, [N], when each score may be off by its tolerance."""
    rows = np.arange(len(labels))
    own, own_tolerance = scores[rows, labels, None], tolerance[rows, labels, None]
    slack = tolerance + own_tolerance
    slack[rows, labels] = 0
    above = (scores > own + slack).sum(1)
    return above, (scores >= own - slack).sum(1) - 1


def fitted(x_NTD, labels, classes, alpha=1.0, batch=7):
    """The probes of all tokens, from batches of a few images."""
    part = SitePart(0, "resid", slice(0, x_NTD.shape[1]))
    statistics = Statistics([part], x_NTD.shape[2], classes, torch.device("cpu"))
    for x, y in zip(x_NTD.split(batch), labels.split(batch), strict=True):
        statistics.count(y)
        statistics.add(0, {"resid": x}, y)
    return statistics.solve(alpha)


# Images, tokens, width, classes.
SHAPES = {
    "more images than dimensions": (90, 3, 12, 5),
    "fewer images than dimensions": (20, 11, 48, 5),
    "more classes than images": (6, 2, 8, 30),
    "one image": (1, 2, 8, 4),
    "one class": (9, 2, 8, 1),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("alpha", [1.0, 30.0])
def test_probes_equal_scikit_learns_ridge(name, offset, alpha):
    images, tokens, width, classes = SHAPES[name]
    torch.manual_seed(0)
    x_NTD = torch.randn(images, tokens, width)
    x_NTD[..., 0] = 3.0  # a constant feature
    x_NTD[..., 1] = x_NTD[..., 2]  # a doubled one
    x_NTD[..., 3] += offset  # a large activation that all tokens share
    labels = torch.randint(classes, (images,))
    probes = fitted(x_NTD, labels, classes, alpha)
    [site] = probes.by_block[0]
    new_NTD = x_NTD[torch.randperm(images)] + 0.5 * torch.randn(images, tokens, width)
    new_labels = torch.randint(classes, (images,))
    scores = site.scores(new_NTD, probes.mean, new_labels, topk=1)
    y = one_hot(labels.numpy(), classes)
    for token in range(tokens):
        x, new = x_NTD[:, token].double().numpy(), new_NTD[:, token].double().numpy()
        ridge = Ridge(alpha=alpha).fit(x, y)
        ridge.coef_ = ridge.coef_.reshape(classes, width)
        shift = x[:7].mean(0)
        weight_error = weight_tolerance(x, labels.numpy(), ridge, shift)
        weight = site.weight_tCD[token].double().numpy()
        assert (np.linalg.norm(weight - ridge.coef_, axis=1) <= weight_error).all()
        np.testing.assert_allclose(site.mean_tD[token], x.mean(0), rtol=2 * U, atol=1e-10)
        exact = ridge.predict(new).reshape(images, classes)
        tolerance = score_tolerance(new, x.mean(0), ridge, weight_error, probes.mean.common)
        rows, own = np.arange(images), new_labels.numpy()
        error = np.abs(scores.label_logit[:, token].numpy() - exact[rows, own])
        assert (error <= added(tolerance, exact)[rows, own]).all()
        low, high = rank_bracket(exact, own, tolerance)
        rank = scores.rank[:, token].numpy()
        assert ((low <= rank) & (rank <= high)).all()
        best = exact[rows, scores.topk[:, token, 0].numpy()]
        assert (exact.max(1) - best <= 2 * tolerance.max(1)).all()
        lse = np.log(np.exp(exact).sum(1))
        # The log-sum's own float32 rounding, an exponential and C additions, is relative to C.
        slack = added(tolerance, exact).max(1) + (classes + 8) * U * (1 + np.abs(lse))
        assert (np.abs(scores.logsumexp[:, token].numpy() - lse) <= slack).all()


def test_tied_classes_rank_by_index_and_untrained_ones_score_minus_one():
    torch.manual_seed(1)
    x_NTD = torch.randn(8, 1, 4)
    probes = fitted(x_NTD, torch.tensor([1, 3] * 4), classes=6)
    [site] = probes.by_block[0]
    assert site.weight_tCD[0, [0, 2, 4, 5]].count_nonzero() == 0
    scores = site.scores(x_NTD, probes.mean, torch.tensor([0, 2, 4, 5] * 2), topk=6)
    np.testing.assert_array_equal(scores.label_logit, -np.ones((8, 1)))
    plain = torch.empty(8, 6)
    plain[:] = -1
    plain[:, [1, 3]] = (x_NTD[:, 0] - site.mean_tD) @ site.weight_tCD[0, [1, 3]].T  # their ȳ is 0
    order = plain.sort(dim=1, descending=True, stable=True).indices
    np.testing.assert_array_equal(scores.topk[:, 0], order)
    ranks = (order == torch.tensor([0, 2, 4, 5] * 2)[:, None]).int().argmax(dim=1)
    np.testing.assert_array_equal(scores.rank[:, 0], ranks)


@pytest.mark.parametrize("per_class", [10, 100])
def test_rounding_is_that_of_the_activations_where_float32_products_would_ruin_it(per_class):
    """The spectrum falls over nine decades of variance, from a few large directions to ones where α
    decides, as those of a residual stream do. Activations from a float32 forward pass carry a
    relative error of about 1e-6: what that does to predictions is the scale for ours."""
    width, classes = 64, 100
    torch.manual_seed(2)
    turn_DD = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64)).Q
    scale_D = torch.logspace(2.5, -2, width, dtype=torch.float64)
    centre_CD = torch.randn(classes, width, dtype=torch.float64)

    def drawn(count):
        labels = torch.randint(classes, (count,))
        x_ND = centre_CD[labels] + torch.randn(count, width, dtype=torch.float64)
        return (x_ND * scale_D @ turn_DD).float(), labels

    (x_ND, labels), (new_ND, _) = drawn(per_class * classes), drawn(500)
    y = one_hot(labels.numpy(), classes)

    def predictions(train_ND):
        return Ridge(alpha=1.0).fit(train_ND.double().numpy(), y).predict(new_ND.double().numpy())

    exact = predictions(x_ND)

    def error(found) -> float:
        return float(np.sqrt(np.mean((np.asarray(found) - exact) ** 2)))

    probes = fitted(x_ND[:, None], labels, classes, batch=32)
    [site] = probes.by_block[0]
    mean_C = probes.mean.relative_C + probes.mean.common
    ours = error(mean_C + (new_ND - site.mean_tD) @ site.weight_tCD[0].T)
    of_activations = error(predictions(x_ND * (1 + 1e-6 * torch.randn_like(x_ND))))
    assert ours < 1.5 * of_activations < 1e-3 * exact.std()

    centred_ND = x_ND - x_ND.mean(0)
    squares_DD = torch.zeros(width, width)
    for batch in centred_ND.split(32):
        squares_DD += batch.T @ batch
    targets_NC = torch.from_numpy(y - y.mean(0))
    right_DC = centred_ND.double().T @ targets_NC
    weight_DC = torch.linalg.solve((squares_DD + torch.eye(width)).double(), right_DC)
    in_float32 = (new_ND - x_ND.mean(0)).double() @ weight_DC + torch.from_numpy(y.mean(0))
    assert error(in_float32) > 0.3 * exact.std()


def test_ranks_of_small_activations_are_not_rounded_away():
    """As LayerScale leaves them: beside ȳ = −0.8 the scores of float32 would tie."""
    torch.manual_seed(3)
    x_NTD = 1e-5 * torch.randn(40, 2, 12)
    labels = torch.arange(40) % 10
    probes = fitted(x_NTD, labels, 10)
    [site] = probes.by_block[0]
    scores = site.scores(x_NTD, probes.mean, labels, topk=1)
    for token in range(2):
        x = x_NTD[:, token].double().numpy()
        ridge = Ridge(alpha=1.0).fit(x, one_hot(labels.numpy(), 10))
        exact = ridge.predict(x) + 0.8
        assert np.abs(exact).max() < U
        own = exact[np.arange(40), labels.numpy()]
        np.testing.assert_array_equal(scores.rank[:, token], (exact > own[:, None]).sum(1))


def test_activations_that_are_not_finite():
    x_NTD = torch.randn(8, 2, 4)
    labels = torch.arange(8) % 3
    probes = fitted(x_NTD, labels, 3)
    [site] = probes.by_block[0]
    new_NTD = x_NTD.clone()
    new_NTD[2, 1, 3] = float("inf")
    scores = site.scores(new_NTD, probes.mean, labels, topk=1)
    assert (scores.rank[2, 1], scores.topk[2, 1, 0]) == (3, 3)
    assert torch.isnan(scores.label_logit[2, 1])
    untouched = site.scores(x_NTD, probes.mean, labels, topk=1)
    assert (scores.rank != untouched.rank).sum() == 1
    with pytest.raises(ModelError, match="block 0 are not finite"):
        fitted(new_NTD, labels, 3)


def test_an_alpha_below_rounding_is_refused():
    with pytest.raises(UsageError, match="--alpha 1e-30 is too small"):
        fitted(torch.ones(8, 1, 4) * torch.arange(8.0).view(8, 1, 1), torch.arange(8) % 3, 3, 1e-30)


LAYOUT = Layout(
    images=4, unit_images=4, blocks=3, streams=("resid", "attn"), prefix_kinds=("cls",),
    grid=(2, 3), classes=10, topk=1, masks=False,
)  # fmt: skip


@pytest.mark.parametrize("at_once", [1, 4, 7, 10, 21, 41, 42, 1000])
def test_passes_hold_every_probe_once_and_no_more_than_fits(at_once):
    each = probe_bytes(16, LAYOUT.classes)
    plan = plan_probes(LAYOUT, 16, at_once * each + each // 2)
    cells = [
        (part.block, part.stream, token)
        for parts in plan.passes
        for part in parts
        for token in range(LAYOUT.tokens)[part.tokens]
    ]
    assert cells == [(b, s, t) for b in range(3) for s in LAYOUT.streams for t in range(7)]
    sizes = [sum(part.count for part in parts) for parts in plan.passes]
    assert max(sizes) <= at_once
    assert max(sizes) - min(sizes) <= 1
    assert len(sizes) == -(-42 // at_once)
    assert (plan.probes, plan.bytes_held) == (42, max(sizes) * each)


def test_a_budget_below_one_probe_is_refused():
    with pytest.raises(UsageError, match="--memory allows"):
        plan_probes(LAYOUT, 16, probe_bytes(16, LAYOUT.classes) - 1)


def test_the_planned_bytes_are_those_of_the_tensors():
    part = SitePart(0, "resid", slice(2, 7))
    probes = Statistics([part], 16, 10, torch.device("cpu"))
    probes.add(0, {"resid": torch.randn(3, 7, 16)}, torch.arange(3))
    [site] = probes._sites[0]
    held = [v for v in vars(site).values() if isinstance(v, torch.Tensor)]
    mean = 4 * 16 * part.count
    assert sum(v.nbytes for v in held) + mean == part.count * probe_bytes(16, 10)
