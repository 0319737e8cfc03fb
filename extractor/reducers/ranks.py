"""Ranks, label logits and top classes of every token (paper §4.1): the first reducer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from classlens.extractor.schema import ArraySpec, Layout, score_arrays
from classlens.kernels.class_scores import class_scores
from classlens.kernels.class_space import ClassSpace
from classlens.kernels.label_margins import label_margins


@dataclass(frozen=True)
class RanksReducer:
    """Projects the chosen streams onto the class embedding and keeps what a rank query needs.

    space: on the model's device. streams: sites to score, in this order. margins: multiply in
    bfloat16 on a CPU, by the margins over the label.
    """

    space: ClassSpace
    streams: tuple[str, ...]
    topk: int
    margins: bool

    def arrays(self, layout: Layout) -> tuple[ArraySpec, ...]:
        """The arrays it fills, [image, block, stream, token]."""
        return score_arrays(layout)

    def for_batch(self, labels: Tensor) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
        """Scores one block after another of a batch with these labels, int64 [N] in [0, C).

        The function returned takes the block's sites, each [N, T, D], and returns by array path,
        [N, S, T]: ranks (C where activations are not finite) and top classes int32, logits and
        log-probabilities float32.
        """
        margins = label_margins(self.space, labels) if self.margins else None

        def reduce(sites: Mapping[str, Tensor]) -> dict[str, Tensor]:
            x = torch.stack([sites[s] for s in self.streams], dim=1)
            scores = class_scores(
                x.flatten(1, 2), self.space, labels, topk=self.topk, margins=margins
            )
            assert scores.logsumexp is not None
            reduced = {
                "scores/rank": scores.rank,
                "scores/label_logit": scores.label_logit,
                "scores/label_logprob": scores.label_logit - scores.logsumexp,
            }
            for i in range(self.topk):
                reduced[f"scores/top{i + 1}"] = scores.topk[..., i]
            return {path: value.view(x.shape[:3]) for path, value in reduced.items()}

        return reduce
