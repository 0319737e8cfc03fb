"""Linear probes: a ridge regression for each token of each site, from streamed sums.

A probe takes the raw activation x of one (block, stream, token) and has one output a class, trained
on ±1 one-hot targets y: it minimises Σ_i ‖y_i − W x_i − b‖² + α ‖W‖², the intercept b free. With
x̄, ȳ the means, n_c the training images of class c and S_c the sum of their x,

    W = 2 (S_c − n_c x̄)_c (Σ_i (x_i − x̄)(x_i − x̄)ᵀ + α I)⁻¹        b = ȳ − W x̄

so that Σ x xᵀ, Σ x and S_c are all that is kept of the training images.

Precision: Σ x xᵀ and Σ x are float64, because α is to decide where the data do not: rounding in
float32 adds about 6e-8 of the largest eigenvalue to the small ones, and with some thousand images
that is more than α = 1. S_c and W are float32: a class has few images, so that rounding S_c does no
more than the float32 rounding of the activations themselves. x is first moved by the mean of the
first batch, which changes no probe and keeps large constant activations out of the sums.

Shape letters: N images, D width, C classes, t tokens of one part of a site.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from classlens.extractor.errors import ModelError, UsageError
from classlens.extractor.schema import Layout
from classlens.kernels.class_scores_torch import (
    empty_scores,
    mark_invalid,
    rows_per_chunk,
    store_scores,
)
from classlens.kernels.reductions import EagerReductions, parts
from classlens.kernels.reference import ClassScores

TOKENS_SOLVED_AT_ONCE = 8


@dataclass(frozen=True)
class SitePart:
    """Tokens of a site that are probed in the same pass."""

    block: int
    stream: str
    tokens: slice

    @property
    def count(self) -> int:
        """Number of tokens t."""
        return self.tokens.stop - self.tokens.start


@dataclass(frozen=True)
class ProbePlan:
    """Which probes are trained and tested in which pass over the images.

    passes: of each its parts, by block; together every token of every site once. probe_bytes: of
    one probe's sums. memory_bytes: allowed.
    """

    passes: tuple[tuple[SitePart, ...], ...]
    probe_bytes: int
    memory_bytes: int

    @property
    def probes(self) -> int:
        """Number of probes: L · S · T."""
        return sum(part.count for parts in self.passes for part in parts)

    @property
    def bytes_held(self) -> int:
        """Bytes of the sums of the largest pass."""
        return self.probe_bytes * max(sum(p.count for p in parts) for parts in self.passes)


def probe_bytes(width: int, classes: int) -> int:
    """Bytes of one probe's sums, which its weights take over: Σ x xᵀ, S_c, Σ x, mean and shift."""
    return 8 * width**2 + 4 * classes * width + 8 * 2 * width + 4 * width


def plan_probes(layout: Layout, width: int, memory_bytes: int) -> ProbePlan:
    """The least number of passes for all probes of a model, as equal as may be.

    Raises:
        UsageError: not one probe fits the memory.
    """
    each = probe_bytes(width, layout.classes)
    at_once = memory_bytes // each
    if not at_once:
        raise UsageError(
            f"--memory allows {memory_bytes / 1e9:.3g} GB and one probe takes {each / 1e9:.3g}; "
            "allow more."
        )
    sites = [(block, stream) for block in range(layout.blocks) for stream in layout.streams]
    total = len(sites) * layout.tokens
    count = -(-total // at_once)
    passes = []
    for index in range(count):
        first, stop = (total * place // count for place in (index, index + 1))
        parts = []
        for site in range(first // layout.tokens, -(-stop // layout.tokens)):
            start = site * layout.tokens
            tokens = slice(max(first - start, 0), min(stop - start, layout.tokens))
            parts.append(SitePart(*sites[site], tokens))
        passes.append(tuple(parts))
    return ProbePlan(tuple(passes), each, memory_bytes)


class SiteStatistics:
    """The sums over training images of some tokens of a site.

    Args:
        part: which tokens. width, classes: D, C.
    """

    def __init__(self, part: SitePart, width: int, classes: int, device: torch.device) -> None:
        self.part = part
        double = {"dtype": torch.float64, "device": device}
        self._squares_tDD = torch.zeros(part.count, width, width, **double)
        self._sum_tD = torch.zeros(part.count, width, **double)
        self._class_sums_tCD = torch.zeros(part.count, classes, width, device=device)
        self._shift_t1D: Tensor | None = None

    def add(self, x: Tensor, labels: Tensor) -> None:
        """Adds a batch.

        Args:
            x: [N, T, D] all tokens of the site. labels: int64 [N].
        """
        x_tND = x[:, self.part.tokens].transpose(0, 1).double()
        if self._shift_t1D is None:
            self._shift_t1D = x_tND.mean(dim=1, keepdim=True)
        x_tND = x_tND - self._shift_t1D
        self._squares_tDD.baddbmm_(x_tND.transpose(1, 2), x_tND)
        self._sum_tD += x_tND.sum(dim=1)
        self._class_sums_tCD.index_add_(1, labels, x_tND.float())

    def solve(self, class_images: Tensor, alpha: float) -> SiteProbe:
        """The probes of these tokens; uses the sums up.

        Args:
            class_images: n_c, float64 [C], the training images of each class; at least one in all.

        Raises:
            ModelError: an activation was not finite. UsageError: α is lost in rounding.
        """
        if self._shift_t1D is None or not torch.isfinite(self._sum_tD).all():
            raise ModelError(
                f"The {self.part.stream} activations of block {self.part.block} are not finite for "
                "some training image; probe in --dtype float32 or bfloat16."
            )
        images = class_images.sum()
        for tokens in parts(self.part.count, TOKENS_SOLVED_AT_ONCE):
            sum_tD = self._sum_tD[tokens]
            mean_tD = sum_tD / images
            matrix_tDD = self._squares_tDD[tokens]
            matrix_tDD.baddbmm_(sum_tD[:, :, None], mean_tD[:, None, :], alpha=-1)
            matrix_tDD.diagonal(dim1=1, dim2=2).add_(alpha)
            class_sums_tCD = self._class_sums_tCD[tokens]
            right_tCD = 2 * (class_sums_tCD - class_images[:, None] * mean_tD[:, None, :])
            factor_tDD, failed_t = torch.linalg.cholesky_ex(matrix_tDD)
            if failed_t.any():
                raise UsageError(
                    f"--alpha {alpha:g} is too small beside the activations of block "
                    f"{self.part.block}, {self.part.stream}; give a larger one."
                )
            weight_tDC = torch.cholesky_solve(right_tCD.transpose(1, 2), factor_tDD)
            class_sums_tCD.copy_(weight_tDC.transpose(1, 2))
        mean_tD = self._shift_t1D[:, 0] + self._sum_tD / images
        del self._squares_tDD
        return SiteProbe(self.part, mean_tD.float(), self._class_sums_tCD)


@dataclass(frozen=True)
class MeanTarget:
    """ȳ, what a probe says of an average token: ``relative_C + common``.

    relative_C: float32; 0 for classes of the most frequent size. Ranks are taken before the common
    part is added, beside which the scores of small activations would be rounded away.
    """

    relative_C: Tensor
    common: float


@dataclass(frozen=True)
class SiteProbe:
    """The probes of some tokens of a site: scores = W (x − x̄) + ȳ.

    mean_tD: x̄, float32. weight_tCD: W, float32.
    """

    part: SitePart
    mean_tD: Tensor
    weight_tCD: Tensor

    def scores(self, x: Tensor, mean: MeanTarget, labels: Tensor, topk: int) -> ClassScores:
        """Rank, score and top classes of every token of the part, as `ClassScores` has them.

        Args:
            x: [N, T, D] all tokens of the site. mean: ȳ. labels: int64 [N].

        Returns:
            arrays [N, t, …], float32; a token that is not finite has rank C and NaN.
        """
        x_tND = x[:, self.part.tokens].transpose(0, 1).float() - self.mean_tD[:, None]
        tokens, images, _ = x_tND.shape
        classes = len(mean.relative_C)
        out = empty_scores((tokens * images,), topk, True, torch.float32, x.device)
        reduce = EagerReductions(classes, torch.float32, x.device)
        at_once = rows_per_chunk(classes, x.device)
        for part in parts(tokens, max(1, at_once // images)):
            products_tNC = torch.bmm(x_tND[part], self.weight_tCD[part].transpose(1, 2))
            products_MC = products_tNC.flatten(0, 1)
            reduced = reduce(
                products_MC,
                products_MC.new_ones(len(products_MC), 1),
                mean.relative_C,
                labels.repeat(part.stop - part.start)[:, None],
                topk=topk,
                logsumexp=True,
            )
            store_scores(out, slice(part.start * images, part.stop * images), reduced)
        mark_invalid(out, torch.isfinite(x_tND.sum(dim=2)).flatten(), classes)
        out = out.unflatten((tokens, images))
        assert out.logsumexp is not None
        return ClassScores(
            out.rank.T,
            out.label_logit.T + mean.common,
            out.logsumexp.T + mean.common,
            out.topk.transpose(0, 1),
        )


class Statistics:
    """The sums of one pass, and the probes they give.

    Args:
        parts: of the pass. width, classes: D, C.
    """

    def __init__(
        self, parts: Sequence[SitePart], width: int, classes: int, device: torch.device
    ) -> None:
        self._sites: dict[int, list[SiteStatistics]] = {}
        for part in parts:
            site = SiteStatistics(part, width, classes, device)
            self._sites.setdefault(part.block, []).append(site)
        self._class_images_C = torch.zeros(classes, dtype=torch.float64, device=device)

    @property
    def last_block(self) -> int:
        """The last block that is needed."""
        return max(self._sites)

    @property
    def class_images(self) -> Tensor:
        """n_c, float64 [C]."""
        return self._class_images_C

    def count(self, labels: Tensor) -> None:
        """Counts the images of a batch, labels int64 [N]; their sites come by :meth:`add`."""
        classes = len(self._class_images_C)
        self._class_images_C += torch.bincount(labels, minlength=classes)

    def add(self, block: int, sites: dict[str, Tensor], labels: Tensor) -> None:
        """Adds a block's sites, each [N, T, D]."""
        for site in self._sites.get(block, ()):
            site.add(sites[site.part.stream], labels)

    @torch.inference_mode()
    def solve(self, alpha: float) -> Probes:
        """The probes; uses the sums up.

        Raises:
            ModelError, UsageError: see `SiteStatistics.solve`.
        """
        images_C = self._class_images_C
        probes = {}
        for block in sorted(self._sites):
            sites = self._sites.pop(block)
            probes[block] = [sites.pop(0).solve(images_C, alpha) for _ in range(len(sites))]
        share_C = images_C / images_C.sum()
        common = share_C.mode().values
        return Probes(probes, MeanTarget((2 * (share_C - common)).float(), 2 * common.item() - 1))


@dataclass(frozen=True)
class Probes:
    """The probes of one pass, by block, and ȳ."""

    by_block: dict[int, list[SiteProbe]]
    mean: MeanTarget

    @property
    def last_block(self) -> int:
        """The last block that is needed."""
        return max(self.by_block)
