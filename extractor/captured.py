"""The whole of ``score(pixels, targets)`` as one CUDA graph."""

from __future__ import annotations

import torch
from torch import Tensor

from classlens.extractor.reducers.protocol import Targets
from classlens.extractor.scorer import Scorer

WARM_UP_RUNS = 3


class CapturedScorer:
    """A scorer whose launches on the device are recorded once and replayed for every batch.

    The thousand kernels of a batch are launched by one call, so that a slow host does not hold the
    GPU back. Shapes are fixed: a shorter batch is filled up with what the last one left.

    Args:
        scorer: on a CUDA device, with reducers that never wait for it.
        batch_size: N; batches may be shorter.
        input_size: (H, W) of the pixels.
    """

    accumulator = None  # its results have no fixed shape

    def __init__(self, scorer: Scorer, batch_size: int, input_size: tuple[int, int]) -> None:
        device = scorer.device
        shape = (batch_size, *input_size, 3)
        self._pixels = torch.zeros(shape, dtype=torch.uint8, device=device)
        self._targets = Targets(
            labels=torch.zeros(batch_size, dtype=torch.int64, device=device),
            images=torch.zeros(batch_size, dtype=torch.int64, device=device),
        )
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):  # libraries and compilers allocate and choose here
            for _ in range(WARM_UP_RUNS):
                scorer.score(self._pixels, self._targets)
        torch.cuda.current_stream(device).wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._results = scorer.score(self._pixels, self._targets)

    def score(self, pixels: Tensor, targets: Targets) -> dict[str, Tensor]:
        """As `Scorer.score`; the results are copies, for the next batch overwrites the graph's.

        Args:
            pixels: uint8 [N, H, W, 3] with N at most the batch size. targets: of its images.
        """
        count = len(pixels)
        self._pixels[:count].copy_(pixels, non_blocking=True)
        first = self._targets[:count]
        first.labels.copy_(targets.labels, non_blocking=True)
        first.images.copy_(targets.images, non_blocking=True)
        self._graph.replay()
        return {path: values[:count].clone() for path, values in self._results.items()}
