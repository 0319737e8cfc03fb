"""Ranks, label logits and top classes of every token (paper §4.1): the first reducer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from classlens.extractor.reducers.protocol import Reduce, Targets
from classlens.extractor.schema import ArraySpec, Layout, score_arrays
from classlens.kernels.certify import Certifier
from classlens.kernels.class_scores import Impl, class_scores
from classlens.kernels.class_space import ClassSpace
from classlens.kernels.reference import ClassScores

SCORES, RANK = "scores/", "scores/rank"


def joined(parts: Sequence[ClassScores]) -> ClassScores:
    """Scores of several streams, [N, T], one after another, [N, S·T]."""
    fields: dict[str, Any] = {
        name: torch.cat([getattr(part, name) for part in parts], dim=1)
        for name, value in parts[0]._asdict().items()
        if value is not None
    }
    return ClassScores(**{"logsumexp": None, **fields})


@dataclass(frozen=True)
class RanksReducer:
    """Projects the chosen streams onto the class embedding and keeps what a rank query needs.

    space: on the model's device. streams: sites to score, in this order. impl: as in
    `class_scores`. certifier: proves or mends every rank.
    """

    space: ClassSpace
    streams: tuple[str, ...]
    topk: int
    impl: Impl = "auto"
    certifier: Certifier | None = None

    @property
    def sites(self) -> Set[str]:
        """The streams."""
        return frozenset(self.streams)

    def arrays(self, layout: Layout) -> tuple[ArraySpec, ...]:
        """The arrays it fills, [image, block, stream, token]."""
        return score_arrays(layout)

    def for_batch(self, targets: Targets) -> Reduce:
        """Scores one block after another of a batch.

        The function returned takes the block's sites, each [N, T, D], and returns by array path,
        [N, S, T]: ranks (C where activations are not finite) and top classes int32, logits and
        log-probabilities float32; and, where ranks are certified, [N] the number of tokens that
        took comparisons in float64.
        """
        labels = targets.labels

        def reduce(block: int, sites: Mapping[str, Tensor]) -> dict[str, Tensor]:
            if RANK in sites:  # the block's kernel has scored them
                return {path: value for path, value in sites.items() if path.startswith(SCORES)}
            x = [sites[s] for s in self.streams]
            if x[0].is_cuda:  # one launch
                x = [torch.cat(x, dim=1)]
            parts = [
                class_scores(
                    part,
                    self.space,
                    labels,
                    topk=self.topk,
                    impl=self.impl,
                    certifier=self.certifier,
                )
                for part in x
            ]
            return self.named(joined(parts))

        return reduce

    def named(self, scores: ClassScores) -> dict[str, Tensor]:
        """Scores [N, S·T] of all streams, one after another, by array path, [N, S, T]."""

        def by_stream(values: Tensor) -> Tensor:
            return values.unflatten(1, (len(self.streams), -1))

        assert scores.logsumexp is not None
        label_logit = by_stream(scores.label_logit)
        named = {
            RANK: by_stream(scores.rank),
            f"{SCORES}label_logit": label_logit,
            f"{SCORES}label_logprob": label_logit - by_stream(scores.logsumexp),
        }
        topk = by_stream(scores.topk)
        for i in range(self.topk):
            named[f"{SCORES}top{i + 1}"] = topk[..., i]
        if scores.recomputed is not None:
            named[f"{SCORES}recomputed"] = scores.recomputed.sum(dim=1)
        return named
