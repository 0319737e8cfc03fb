"""Ranks, label logits and top classes of every token (paper §4.1): the first reducer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from classlens.extractor.schema import ArraySpec, Layout, score_arrays
from classlens.kernels.class_scores import class_scores
from classlens.kernels.class_space import ClassSpace


@dataclass(frozen=True)
class RanksReducer:
    """Projects the chosen streams onto the class embedding and keeps what a rank query needs.

    space: in the scoring dtype, on the model's device. streams: sites to score, in this order.
    """

    space: ClassSpace
    streams: tuple[str, ...]
    topk: int

    def arrays(self, layout: Layout) -> tuple[ArraySpec, ...]:
        """The arrays it fills, [image, block, stream, token]."""
        return score_arrays(layout)

    def reduce(self, sites: Mapping[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
        """Scores one block.

        Args:
            sites: each [N, T, D].
            labels: [N], all in [0, C).

        Returns:
            by array path, [N, S, T]: ranks (C where activations are not finite) and top classes
            int32, logits and log-probabilities float32.
        """
        x = torch.stack([sites[s] for s in self.streams], dim=1)
        shape = x.shape[:3]
        scores = class_scores(x.flatten(1, 2), self.space, labels, topk=self.topk, logsumexp=True)
        assert scores.logsumexp is not None
        reduced = {
            "scores/rank": scores.rank,
            "scores/label_logit": scores.label_logit,
            "scores/label_logprob": scores.label_logit - scores.logsumexp,
        }
        for i in range(self.topk):
            reduced[f"scores/top{i + 1}"] = scores.topk[..., i]
        return {path: value.view(shape) for path, value in reduced.items()}
