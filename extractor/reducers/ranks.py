"""Ranks, label logits and top classes of every token (paper §4.1): the first reducer."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass

import torch
from torch import Tensor

from classlens.extractor.reducers.protocol import Reduce, Targets
from classlens.extractor.schema import ArraySpec, Layout, score_arrays
from classlens.kernels.certify import Certifier
from classlens.kernels.class_scores import Impl, class_scores
from classlens.kernels.class_space import ClassSpace


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
            x = [sites[s] for s in self.streams]
            n_tokens = x[0].shape[1]
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

            def joined(name: str) -> Tensor:
                values = torch.cat([getattr(part, name) for part in parts], dim=1)
                return values.unflatten(1, (len(self.streams), n_tokens))

            label_logit = joined("label_logit")
            reduced = {
                "scores/rank": joined("rank"),
                "scores/label_logit": label_logit,
                "scores/label_logprob": label_logit - joined("logsumexp"),
            }
            topk = joined("topk")
            for i in range(self.topk):
                reduced[f"scores/top{i + 1}"] = topk[..., i]
            if self.certifier is not None:
                reduced["scores/recomputed"] = joined("recomputed").sum(dim=(1, 2))
            return reduced

        return reduce
