"""Tests and intervals: Wilcoxon, permutation of token labels and of images, Benjamini–Hochberg,
bootstrap over images.

Everything random is seeded, and depends on the seed and the order of images alone, not on how the
images were cut into batches.

Shape letters: N images, n images of one batch, B blocks, G image tokens, P permutations, K columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import stats

from classlens.analysis.frames import Convention

Array = np.ndarray

# Two sums of the same numbers in another order differ by rounding; they count as equal.
RELATIVE_TIE = 1e-12

VILAS2023_PERMUTATIONS = 300


def permutations_of(convention: Convention, permutations: int) -> int:
    """Shuffles that a test makes when this many are asked for: ``vilas2023`` always makes 300."""
    return VILAS2023_PERMUTATIONS if convention == "vilas2023" else permutations


def wilcoxon_greater(x: Array, y: Array) -> float:
    """p-value of the one-sided paired Wilcoxon signed-rank test that x exceeds y.

    Args:
        x, y: paired values, [N]. Pairs without a difference are left out; 1.0 if none is left.
    """
    difference = np.asarray(x, dtype=np.float64) - np.asarray(y, dtype=np.float64)
    if not difference.any():
        return 1.0
    return float(np.asarray(stats.wilcoxon(difference, alternative="greater"))[1])


def benjamini_hochberg(p_values: Array) -> Array:
    """q-values of a family of tests, [K]: the false discovery rate at which each is rejected."""
    return stats.false_discovery_control(p_values, method="bh")


def bootstrap_interval(
    values_NK: Array,
    statistic: Callable[[Array], Array] = lambda means: means,
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[Array, Array]:
    """Percentile interval of a function of column means, images drawn with replacement.

    Args:
        values_NK: one row per image, [N, K]; N ≥ 1.
        statistic: maps column means [resamples, K] to the statistics wanted, [resamples, …];
            resamples where it is NaN (undefined) are left out.

    Returns:
        lower and upper end, each of the statistic's shape without its first axis.
    """
    values_NK = np.asarray(values_NK, dtype=np.float64)
    images = len(values_NK)
    rng = np.random.default_rng(seed)
    means = np.empty((resamples, values_NK.shape[1]))
    for i in range(resamples):
        times_drawn = np.bincount(rng.integers(images, size=images), minlength=images)
        means[i] = times_drawn @ values_NK / images
    tail = (1 - level) / 2
    drawn = statistic(means)
    return np.nanquantile(drawn, tail, axis=0), np.nanquantile(drawn, 1 - tail, axis=0)


def class_averages(
    values_NK: Array, labels_N: Array, *, resamples: int = 1000, seed: int = 0
) -> tuple[Array, Array, Array]:
    """Mean over classes of the mean over each class's images, with its 95% bootstrap interval.

    Images are drawn with replacement; a class of which a resample has none is left out of it.

    Args:
        values_NK: one row per image, [N, K]; N ≥ 1. labels_N: the class of each.

    Returns:
        mean, lower and upper end, each [K].
    """
    order_N = np.argsort(labels_N, kind="stable")
    values_NK = np.asarray(values_NK, dtype=np.float64)[order_N]
    starts_C = np.unique(labels_N[order_N], return_index=True)[1]
    images = len(order_N)

    def average(times_N: Array) -> Array:
        sums_CK = np.add.reduceat(times_N[:, None] * values_NK, starts_C)
        counts_C = np.add.reduceat(times_N, starts_C)
        drawn_C = counts_C > 0
        return (sums_CK[drawn_C] / counts_C[drawn_C, None]).mean(0)

    rng = np.random.default_rng(seed)
    drawn = [
        average(np.bincount(rng.integers(images, size=images), minlength=images)[order_N])
        for _ in range(resamples)
    ]
    return average(np.ones(images)), *np.quantile(drawn, (0.025, 0.975), axis=0)


class Difference(NamedTuple):
    """Differences of means, their 95% bootstrap intervals, one-sided p-values; each [B]."""

    delta: Array
    low: Array
    high: Array
    p_values: Array


def correct_minus_wrong(
    values_NB: Array,
    correct_N: Array,
    *,
    permutations: int = 1000,
    convention: Convention = "corrected",
    seed: int = 0,
) -> Difference:
    """Mean over correctly predicted images − mean over wrongly predicted ones, for each block.

    Permutation test: "correct" is shuffled over the images, the same shuffle for all blocks.
    ``corrected``: p = (1 + #{Δ_perm ≥ Δ}) / (1 + permutations). ``vilas2023``: 300 shuffles,
    p = #{Δ_perm > Δ} / 300. Small p says that correct images are ahead.

    Args:
        values_NB: one number an image and block, [N, B], such as whether its CLS token counts.
        correct_N: whether the model predicts the image's label, [N].

    Raises:
        ValueError: there is no correct image, or no wrong one.
    """
    values_NB = np.asarray(values_NB, dtype=np.float64)
    correct_N = np.asarray(correct_N, dtype=bool)
    n_correct = int(correct_N.sum())
    n_wrong = len(correct_N) - n_correct
    if not n_correct or not n_wrong:
        raise ValueError(
            f"Correct minus wrong needs images of both kinds, found {n_correct} correct and "
            f"{n_wrong} wrong ones."
        )
    sums_B = values_NB.sum(0)

    def difference(correct_N: Array) -> Array:
        correct_B = correct_N @ values_NB
        return correct_B / n_correct - (sums_B - correct_B) / n_wrong

    delta_B = difference(correct_N)
    slack_B = RELATIVE_TIE * np.abs(values_NB).sum(0) / min(n_correct, n_wrong)
    permutations = permutations_of(convention, permutations)
    rng = np.random.default_rng(seed)
    ahead_B, tied_B = np.zeros(values_NB.shape[1]), np.zeros(values_NB.shape[1])
    for _ in range(permutations):
        excess_B = difference(rng.permutation(correct_N)) - delta_B
        ahead_B += excess_B > slack_B
        tied_B += np.abs(excess_B) <= slack_B
    if convention == "vilas2023":
        p_values = ahead_B / permutations
    else:
        p_values = (1 + ahead_B + tied_B) / (1 + permutations)
    low, high = _difference_interval(
        values_NB * correct_N[:, None], values_NB, correct_N, tokens=1, seed=seed
    )
    return Difference(delta_B, low, high, p_values)


class ClassContextTest:
    """Permutation test of Δ = mean(class tokens) − mean(context tokens), for each block.

    Means are over the tokens of all images. Images are added in batches, in order; memory is that
    of one batch and of the sums per image. Each permutation places an image's class labels once and
    uses them for all blocks.

    Not pooled (the sound test): labels are shuffled among the tokens of each image, and
    p = (1 + #{Δ_perm ≥ Δ}) / (1 + P). Pooled (the paper's code): labels are shuffled over the
    tokens of all images, and p = #{Δ_perm > Δ} / P.
    """

    def __init__(
        self, class_tokens_N: Array, tokens: int, *, pooled: bool, permutations: int, seed: int
    ) -> None:
        """
        Args:
            class_tokens_N: number of class-labelled tokens of each image, [N].
            tokens: number of image tokens of every image, G.

        Raises:
            ValueError: there is no class token at all, or no context token at all.
        """
        self.class_tokens = np.asarray(class_tokens_N, dtype=np.int64)
        self.tokens = tokens
        self.pooled = pooled
        self._seed = seed
        self._class_total = int(self.class_tokens.sum())
        self._context_total = len(self.class_tokens) * tokens - self._class_total
        if not self._class_total or not self._context_total:
            raise ValueError(
                f"Δ needs tokens of both kinds, found {self._class_total} class and "
                f"{self._context_total} context tokens; choose another class fraction."
            )
        sizes_PN = np.broadcast_to(self.class_tokens, (permutations, len(self.class_tokens)))
        if pooled:
            # How many of the shuffled labels each image receives; their places come in `add`.
            rng = np.random.default_rng([seed, len(self.class_tokens)])
            per_image = np.full(len(self.class_tokens), tokens)
            sizes_PN = rng.multivariate_hypergeometric(
                per_image, self._class_total, size=permutations
            )
        self._sizes_PN = sizes_PN
        self._class_sums: list[Array] = []
        self._sums: list[Array] = []
        self._permuted_BP: Array | float = 0.0

    def add(self, values_nBG: Array, is_class_nG: Array) -> None:
        """The next images' values and class labels."""
        values_nBG = np.asarray(values_nBG, dtype=np.float64)
        self._class_sums.append(np.einsum("nbg,ng->nb", values_nBG, is_class_nG))
        first = sum(map(len, self._sums))
        self._sums.append(values_nBG.sum(axis=2))
        place = np.arange(self.tokens)
        for image, values_BG in enumerate(values_nBG, start=first):
            labels_PG = (place < self._sizes_PN[:, image, None]).astype(np.float64)
            rng = np.random.default_rng([self._seed, image])
            rng.permuted(labels_PG, axis=1, out=labels_PG)
            self._permuted_BP = self._permuted_BP + values_BG @ labels_PG.T

    def delta(self) -> Array:
        """Δ of each block, [B]."""
        return self._difference(self._observed().sum(0), self._total().sum(0))

    def delta_when_shuffled(self) -> Array:
        """Mean Δ over all ways to shuffle the labels, [B]: 0 when pooled; within images it is what
        differences between images alone bring about."""
        share = self.class_tokens / self.tokens
        if self.pooled:
            share = np.full_like(share, share.mean())
        return self._difference(share @ self._total(), self._total().sum(0))

    def p_values(self) -> Array:
        """One-sided p-value of each block, [B]."""
        delta_B = self.delta()
        permuted_BP = self._difference(self._permuted_BP, self._total().sum(0)[:, None])
        slack = RELATIVE_TIE * np.abs(self._total()).sum(0)[:, None] / self._class_total
        permutations = permuted_BP.shape[1]
        if self.pooled:
            return (permuted_BP > delta_B[:, None] + slack).sum(1) / permutations
        return (1 + (permuted_BP >= delta_B[:, None] - slack).sum(1)) / (1 + permutations)

    def interval(self) -> tuple[Array, Array]:
        """95% bootstrap interval of Δ over images, two [B]."""
        return _difference_interval(
            self._observed(), self._total(), self.class_tokens, tokens=self.tokens, seed=self._seed
        )

    def _difference(self, class_sum: Array | float, total: Array) -> Array:
        return class_sum / self._class_total - (total - class_sum) / self._context_total

    def _observed(self) -> Array:
        return np.concatenate(self._class_sums)

    def _total(self) -> Array:
        return np.concatenate(self._sums)


def _difference_interval(
    class_sums_NB: Array, sums_NB: Array, class_tokens_N: Array, *, tokens: int, seed: int
) -> tuple[Array, Array]:
    """95% bootstrap interval over images of mean(class) − mean(others), two [B].

    Args:
        class_sums_NB: sums over the class tokens of an image. sums_NB: over all of its tokens.
    """
    blocks = sums_NB.shape[1]

    def difference(means: Array) -> Array:
        class_sum, total, share = means[:, :blocks], means[:, blocks:-1], means[:, -1:]
        # A resample may hold no token of one kind: its difference is NaN.
        with np.errstate(invalid="ignore", divide="ignore"):
            return class_sum / share - (total - class_sum) / (tokens - share)

    columns = np.column_stack([class_sums_NB, sums_NB, class_tokens_N])
    return bootstrap_interval(columns, difference, seed=seed)
