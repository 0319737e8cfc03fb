"""Ranks of the label among the outputs of linear probes, in the arrays of the ranks reducer."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from classlens.extractor.probe import Probes
from classlens.extractor.reducers.protocol import Reduce, Targets
from classlens.extractor.schema import ArraySpec, Layout, score_arrays


@dataclass(frozen=True)
class ProbeReducer:
    """Scores tokens by the probes of one pass.

    streams, tokens, topk: of the store. earlier: by array path what earlier passes left,
    [images, L, S, T]; empty when one pass has all probes.
    """

    probes: Probes
    streams: tuple[str, ...]
    tokens: int
    topk: int
    earlier: Mapping[str, np.ndarray] = field(default_factory=dict)

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
        [N, S, T]: ranks (C where activations are not finite) and top classes int32, scores and
        their log-softmax at the label float32. Tokens of other passes hold what these left.
        """
        labels = targets.labels

        def reduce(block: int, sites: Mapping[str, Tensor]) -> dict[str, Tensor]:
            reduced = self._begun(block, targets.images.cpu().numpy(), labels.device)
            for probe in self.probes.by_block.get(block, ()):
                stream, tokens = self.streams.index(probe.part.stream), probe.part.tokens
                x, mean = sites[probe.part.stream], self.probes.mean
                scores = probe.scores(x, mean, labels, self.topk)
                assert scores.logsumexp is not None
                reduced["scores/rank"][:, stream, tokens] = scores.rank
                reduced["scores/label_logit"][:, stream, tokens] = scores.label_logit
                logprob = scores.label_logit - scores.logsumexp
                reduced["scores/label_logprob"][:, stream, tokens] = logprob
                for i in range(self.topk):
                    reduced[f"scores/top{i + 1}"][:, stream, tokens] = scores.topk[..., i]
            return reduced

        return reduce

    def _begun(self, block: int, images: np.ndarray, device: torch.device) -> dict[str, Tensor]:
        if self.earlier:
            return {
                path: torch.from_numpy(values[images, block]).to(device)
                for path, values in self.earlier.items()
            }
        shape = (len(images), len(self.streams), self.tokens)
        return {
            path: torch.empty(shape, dtype=dtype, device=device)
            for path, dtype in result_dtypes(self.topk).items()
        }


def result_dtypes(topk: int) -> dict[str, torch.dtype]:
    """The arrays that a `ProbeReducer` returns, by path."""
    return {
        "scores/rank": torch.int32,
        "scores/label_logit": torch.float32,
        "scores/label_logprob": torch.float32,
        **{f"scores/top{i + 1}": torch.int32 for i in range(topk)},
    }
