"""statistics.py against plain loops, exhaustive enumeration and numbers worked out by hand."""

from itertools import combinations, product

import numpy as np
import pytest
from scipy.stats import rankdata

from classlens.analysis import statistics
from classlens.analysis.statistics import ClassContextTest


def make_tokens(images=4, blocks=3, tokens=6, seed=0, classes=10):
    """Identifiabilities with many ties, and labels; one image has no class token at all."""
    rng = np.random.default_rng(seed)
    values = 1 - rng.integers(0, classes, (images, blocks, tokens)) / classes
    is_class = rng.random((images, tokens)) < 0.4
    is_class[0], is_class[1, 0] = False, True
    return values, is_class


def run(values, is_class, *, pooled, permutations, seed=0, batches=1):
    test = ClassContextTest(
        is_class.sum(1), values.shape[2], pooled=pooled, permutations=permutations, seed=seed
    )
    for part in np.array_split(np.arange(len(values)), batches):
        test.add(values[part], is_class[part])
    return test


def plain_delta(values, is_class):
    """Δ by boolean indexing over the tokens of all images."""
    deltas = []
    for block in range(values.shape[1]):
        of_block = values[:, block]
        deltas.append(of_block[is_class].mean() - of_block[~is_class].mean())
    return np.array(deltas)


def test_delta_is_the_difference_of_means_over_all_tokens():
    values, is_class = make_tokens(images=20)
    test = run(values, is_class, pooled=False, permutations=1, batches=3)
    np.testing.assert_allclose(test.delta(), plain_delta(values, is_class), rtol=1e-12)


def test_within_image_p_values_equal_a_plain_loop_with_the_same_shuffles():
    values, is_class = make_tokens(images=9, seed=1)
    permutations, seed = 60, 5
    shuffled = np.empty((permutations, *is_class.shape), dtype=bool)
    for image in range(len(values)):
        rng = np.random.default_rng([seed, image])
        sorted_labels = np.sort(is_class[image])[::-1].astype(float)
        for p in range(permutations):
            shuffled[p, image] = rng.permuted(sorted_labels)
    observed = plain_delta(values, is_class)
    expected = [
        (1 + sum(plain_delta(values, s)[b] >= observed[b] - 1e-12 for s in shuffled))
        / (1 + permutations)
        for b in range(values.shape[1])
    ]
    test = run(values, is_class, pooled=False, permutations=permutations, seed=seed)
    np.testing.assert_array_equal(test.p_values(), expected)
    assert 0 < min(expected) < max(expected) < 1  # the case can tell right from wrong


def test_within_image_p_values_approach_full_enumeration():
    values, is_class = make_tokens(images=3, blocks=2, tokens=5, seed=3)
    per_image = [list(combinations(range(5), int(k))) for k in is_class.sum(1)]
    observed, ties_or_more, count = plain_delta(values, is_class), np.zeros(2), 0
    for choice in product(*per_image):
        labels = np.zeros_like(is_class)
        for image, tokens in enumerate(choice):
            labels[image, list(tokens)] = True
        ties_or_more += plain_delta(values, labels) >= observed - 1e-12
        count += 1
    exact = ties_or_more / count
    test = run(values, is_class, pooled=False, permutations=20_000)
    # five standard errors of a share of 20,000 draws, and the +1
    np.testing.assert_allclose(test.p_values(), exact, atol=5 * 0.5 / np.sqrt(20_000) + 1e-4)


def test_pooled_p_values_approach_full_enumeration():
    values, is_class = make_tokens(images=2, blocks=2, tokens=5, seed=4)
    observed, more, count = plain_delta(values, is_class), np.zeros(2), 0
    for tokens in combinations(range(10), int(is_class.sum())):
        labels = np.zeros(10, dtype=bool)
        labels[list(tokens)] = True
        more += plain_delta(values, labels.reshape(2, 5)) > observed + 1e-12
        count += 1
    test = run(values, is_class, pooled=True, permutations=20_000)
    np.testing.assert_allclose(test.p_values(), more / count, atol=5 * 0.5 / np.sqrt(20_000))


def test_pooled_and_within_image_tests_answer_different_questions():
    # All of Δ comes from differences between images: labels sit in the image that scores high.
    values = np.array([[[0.9, 0.9, 0.9, 0.9]], [[0.1, 0.1, 0.1, 0.1]]])
    is_class = np.array([[True, True, True, False], [True, False, False, False]])
    within = run(values, is_class, pooled=False, permutations=300)
    pooled = run(values, is_class, pooled=True, permutations=300)
    assert within.p_values().item() == 1.0
    np.testing.assert_allclose(within.delta_when_shuffled(), within.delta())
    np.testing.assert_allclose(pooled.delta_when_shuffled(), 0, atol=1e-15)
    assert pooled.p_values().item() < 0.5


@pytest.mark.parametrize("pooled", [False, True])
def test_delta_when_shuffled_is_the_mean_over_shuffles(pooled):
    values, is_class = make_tokens(images=5, seed=2)
    test = run(values, is_class, pooled=pooled, permutations=20_000)
    mean = test._difference(test._permuted_BP, values.sum((0, 2))[:, None]).mean(1)
    np.testing.assert_allclose(test.delta_when_shuffled(), mean, atol=5 * 0.3 / np.sqrt(20_000))


@pytest.mark.parametrize("pooled", [False, True])
def test_batches_do_not_change_the_result_and_the_seed_does(pooled):
    values, is_class = make_tokens(images=12, blocks=8)
    whole = run(values, is_class, pooled=pooled, permutations=99)
    parts = run(values, is_class, pooled=pooled, permutations=99, batches=5)
    other = run(values, is_class, pooled=pooled, permutations=99, seed=1)
    np.testing.assert_array_equal(whole.p_values(), parts.p_values())
    np.testing.assert_array_equal(whole.interval(), parts.interval())
    assert (whole.p_values() != other.p_values()).any()


def test_interval_of_delta_equals_a_plain_loop():
    values, is_class = make_tokens(images=15)
    rng = np.random.default_rng(3)
    deltas = []
    for _ in range(1000):
        drawn = rng.integers(15, size=15)
        deltas.append(plain_delta(values[drawn], is_class[drawn]))
    test = run(values, is_class, pooled=False, permutations=1, seed=3)
    np.testing.assert_allclose(test.interval(), np.quantile(deltas, [0.025, 0.975], axis=0))


def test_one_kind_of_token_alone_is_refused():
    with pytest.raises(ValueError, match="both kinds"):
        ClassContextTest(np.zeros(3), 4, pooled=False, permutations=9, seed=0)


def test_bootstrap_interval_equals_a_plain_loop_and_covers_the_mean():
    values = np.random.default_rng(0).exponential(size=(40, 2))
    rng = np.random.default_rng(7)
    means = [values[rng.integers(40, size=40)].mean(0) for _ in range(200)]
    low, high = statistics.bootstrap_interval(values, level=0.9, resamples=200, seed=7)
    np.testing.assert_allclose([low, high], np.quantile(means, [0.05, 0.95], axis=0))
    assert (low < values.mean(0)).all()
    assert (values.mean(0) < high).all()


def plain_signed_rank_p(difference):
    """Exact one-sided p-value over all 2^n signs; no ties, no zeros."""
    ranks = rankdata(np.abs(difference))
    observed = ranks[difference > 0].sum()
    signs = product([0, 1], repeat=len(ranks))
    return np.mean([np.dot(s, ranks) >= observed for s in signs])


def test_wilcoxon_equals_full_enumeration_of_signs():
    rng = np.random.default_rng(0)
    x, y = rng.normal(0.5, 1, 10), rng.normal(0, 1, 10)
    assert statistics.wilcoxon_greater(x, y) == pytest.approx(plain_signed_rank_p(x - y))
    assert statistics.wilcoxon_greater(x, y) + statistics.wilcoxon_greater(y, x) > 1


def test_wilcoxon_without_any_difference_is_one():
    same = np.ones(60)
    assert statistics.wilcoxon_greater(same, same) == 1.0


def test_benjamini_hochberg_by_hand():
    # sorted 0.01 0.02 0.03 0.5, times m/rank: 0.04 0.04 0.04 0.5, then running minimum from above
    q_values = statistics.benjamini_hochberg(np.array([0.02, 0.5, 0.01, 0.03]))
    np.testing.assert_allclose(q_values, [0.04, 0.5, 0.04, 0.04])
    np.testing.assert_allclose(
        statistics.benjamini_hochberg(np.array([0.001, 0.04, 0.9])), [0.003, 0.06, 0.9]
    )


def make_images(images=7, blocks=3, correct=3, seed=0):
    """Few different values, so that permutations tie."""
    rng = np.random.default_rng(seed)
    is_correct = np.zeros(images, dtype=bool)
    is_correct[rng.permutation(images)[:correct]] = True
    return rng.integers(0, 3, (images, blocks)) / 2 + 0.1, is_correct


def plain_difference(values, is_correct):
    return values[is_correct].mean(0) - values[~is_correct].mean(0)


def enumerated(values, is_correct):
    """Shares of all ways to choose the correct images whose Δ is larger, and equal."""
    images, observed = range(len(values)), plain_difference(values, is_correct)
    larger, equal, count = np.zeros(values.shape[1]), np.zeros(values.shape[1]), 0
    for choice in combinations(images, int(is_correct.sum())):
        excess = plain_difference(values, np.isin(images, choice)) - observed
        larger += excess > 1e-9
        equal += abs(excess) <= 1e-9
        count += 1
    return larger / count, equal / count


@pytest.mark.parametrize("seed", range(4))
def test_correct_minus_wrong_approaches_full_enumeration(seed):
    values, is_correct = make_images(seed=seed)
    larger, equal = enumerated(values, is_correct)
    assert (equal > 1 / 35).any()  # ties other than the observed choice itself
    test = statistics.correct_minus_wrong(values, is_correct, permutations=20_000, seed=seed)
    np.testing.assert_allclose(test.delta, plain_difference(values, is_correct), atol=1e-15)
    # five standard errors of a share of 20,000 draws, and the +1
    tolerance = 5 * 0.5 / np.sqrt(20_000) + 1e-4
    np.testing.assert_allclose(test.p_values, larger + equal, atol=tolerance)


def test_published_correct_minus_wrong_counts_larger_ones_only_of_300():
    values, is_correct = make_images(images=8, correct=4, seed=1)
    larger, equal = enumerated(values, is_correct)
    draws = [
        statistics.correct_minus_wrong(values, is_correct, convention="vilas2023", seed=seed)
        for seed in range(40)
    ]
    p_values = np.array([test.p_values for test in draws])
    assert np.allclose(p_values * 300, np.round(p_values * 300))
    # five standard errors of the mean of 40 shares of 300 draws
    tolerance = 5 * 0.5 / np.sqrt(40 * 300)
    np.testing.assert_allclose(p_values.mean(0), larger, atol=tolerance)
    assert (equal > tolerance).all()  # so that ties would have been noticed


def test_correct_minus_wrong_equals_a_plain_loop_with_the_same_shuffles():
    values, is_correct = make_images(images=30, correct=11, seed=2)
    rng, observed = np.random.default_rng(9), plain_difference(values, is_correct)
    shuffled = [plain_difference(values, rng.permutation(is_correct)) for _ in range(49)]
    expected = (1 + (np.array(shuffled) >= observed - 1e-9).sum(0)) / 50
    test = statistics.correct_minus_wrong(values, is_correct, permutations=49, seed=9)
    np.testing.assert_array_equal(test.p_values, expected)
    other = statistics.correct_minus_wrong(values, is_correct, permutations=49, seed=8)
    assert (other.p_values != test.p_values).any()
    again = statistics.correct_minus_wrong(values, is_correct, permutations=49, seed=9)
    np.testing.assert_array_equal(again, test)


def test_interval_of_correct_minus_wrong_equals_a_plain_loop():
    values, is_correct = make_images(images=20, correct=8, seed=3)
    rng, deltas = np.random.default_rng(4), []
    for _ in range(1000):
        drawn = rng.integers(20, size=20)
        deltas.append(plain_difference(values[drawn], is_correct[drawn]))
    test = statistics.correct_minus_wrong(values, is_correct, permutations=1, seed=4)
    np.testing.assert_allclose(
        [test.low, test.high], np.quantile(deltas, [0.025, 0.975], axis=0), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("correct", [0, 7])
def test_correct_minus_wrong_refuses_one_kind_of_image_alone(correct):
    values, is_correct = make_images(correct=correct)
    with pytest.raises(ValueError, match="both kinds"):
        statistics.correct_minus_wrong(values, is_correct)


def plain_class_average(values, labels):
    return np.mean([values[labels == c].mean(0) for c in np.unique(labels)], axis=0)


def test_class_averages_equal_a_plain_loop():
    rng = np.random.default_rng(0)
    values, labels = rng.random((30, 2)), rng.integers(3, 8, 30)
    mean, low, high = statistics.class_averages(values, labels, resamples=50, seed=5)
    np.testing.assert_allclose(mean, plain_class_average(values, labels))
    rng = np.random.default_rng(5)
    drawn = [rng.integers(30, size=30) for _ in range(50)]
    means = [plain_class_average(values[d], labels[d]) for d in drawn]
    np.testing.assert_allclose([low, high], np.quantile(means, [0.025, 0.975], axis=0))


def test_a_class_of_one_image_weighs_as_much_as_any():
    values = np.array([[1.0], [0.0], [0.0], [0.0]])
    mean, low, high = statistics.class_averages(values, np.array([4, 2, 2, 2]))
    assert mean == 0.5
    assert low <= 0.5 <= high
