"""``score(pixels, targets)``: one pure function from a batch of pictures to compact arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from typing import Literal

import torch
from torch import Tensor

from classlens.extractor.blocks import Sites, block_sites, renorms, walk
from classlens.extractor.fused_blocks import FusedBlocks, scored_by_blocks
from classlens.extractor.interventions import Intervention
from classlens.extractor.models import Subject, predict
from classlens.extractor.reducers.protocol import FOUND_PREFIX, Accumulator, Reducer, Targets
from classlens.kernels.reductions import compiled
from classlens.kernels.tiles import UNITS, Units

Forward = Literal["eager", "compiled", Units]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Scorer:
    """A model, its reducers and perhaps an accumulator, on one device, in one dtype.

    Moves and casts ``subject.model`` in place. ``forward``: how its blocks are run, "eager";
    "compiled", what stands between the products of a block fused by torch.compile; or "amx" or
    "avx512", see `FusedBlocks`. ``intervention`` takes the place of the model's own attention.
    """

    def __init__(
        self,
        subject: Subject,
        reducers: Sequence[Reducer],
        *,
        dtype: torch.dtype,
        device: str,
        convention: str,
        forward: Forward = "eager",
        intervention: Intervention | None = None,
        accumulator: Accumulator | None = None,
    ) -> None:
        self.model = subject.model.to(device=device, dtype=dtype)
        self.reducers = tuple(reducers)
        self.accumulator = accumulator
        self.convention = convention
        self.intervention = intervention
        self._block_sites: Callable[..., Sites] = block_sites
        self._scoring: Callable[[Tensor], Callable[..., Sites]] | None = None
        scored = None
        if forward == "compiled":
            self._block_sites = compiled(block_sites)
        elif forward in UNITS:
            scored = scored_by_blocks(reducers, forward, renormed=renorms(self.model, convention))
            self._block_sites = fused = FusedBlocks(self.model, forward, scored)
            self._scoring = None if scored is None else fused.scoring
        takers = (*reducers, accumulator) if accumulator else self.reducers
        self.sites = _sites_of(takers)
        self._sites_to_reduce = _sites_of(taker for taker in takers if taker is not scored)
        self.device, self.dtype = torch.device(device), dtype
        channel = (1, 3, 1, 1)
        mean = torch.tensor(subject.geometry.mean, device=device).view(channel)
        std = torch.tensor(subject.geometry.std, device=device).view(channel)
        self.embeddings = None
        if subject.classes is not None:
            self.embeddings = subject.classes.embeddings.to(device, torch.float32)
        self._scale = 1 / (255 * std)
        self._shift = -mean / std

    def images(self, pixels: Tensor) -> Tensor:
        """Normalised images [N, 3, H, W] in the scoring dtype, from uint8 pixels [N, H, W, 3]."""
        planes = pixels.to(self.device).permute(0, 3, 1, 2).float()
        return (planes * self._scale + self._shift).to(self.dtype)

    def walk(
        self, pixels: Tensor, kept: Tensor | None = None, wanted: Set[str] | None = None
    ) -> Iterator[tuple[int, Sites]]:
        """`classlens.extractor.blocks.walk` over a batch as `score` takes it; ``wanted``: sites,
        those of the reducers if None."""
        sites = self.sites if wanted is None else wanted
        return self._walk(pixels, kept, sites, self._block_sites)

    def _walk(
        self, pixels: Tensor, kept: Tensor | None, wanted: Set[str], sites_of: Callable[..., Sites]
    ) -> Iterator[tuple[int, Sites]]:
        attends = self.intervention and self.intervention.attends(kept)
        return walk(self.model, self.images(pixels), self.convention, wanted, sites_of, attends)

    @torch.inference_mode()
    def score(self, pixels: Tensor, targets: Targets) -> dict[str, Tensor]:
        """Scores a batch.

        Args:
            pixels: uint8 [N, H, W, 3], after resize and crop.
            targets: of its images; on any device.

        Returns:
            by array path, on the device, where they may still be under way: every reducer's arrays
            [N, L, …], and ``images/prediction`` int64 [N], the top class of `predict`. Values of
            tokens that are not among ``targets.kept`` mean nothing. What an accumulator found in
            each block is named as `split_results` expects it.
        """
        targets = targets.to(self.device)
        per_block: dict[str, list[Tensor]] = {}
        reducers = [reducer.for_batch(targets) for reducer in self.reducers]
        accumulate = None if self.accumulator is None else self.accumulator.for_batch(targets)
        x, result = None, dict[str, Tensor]()
        sites_of = self._scoring(targets.labels) if self._scoring else self._block_sites
        for block, sites in self._walk(pixels, targets.kept, self._sites_to_reduce, sites_of):
            x = sites["resid"]
            found: dict[str, Tensor] = {}
            for reduce in reducers:
                found |= reduce(block, sites | found)
            for path, value in found.items():
                per_block.setdefault(path, []).append(value)
            if accumulate is not None:
                for name, value in accumulate(block, sites).items():
                    result[f"{FOUND_PREFIX}{name}/{block}"] = value
        assert x is not None
        result |= {path: torch.stack(values, dim=1) for path, values in per_block.items()}
        logits = predict(self.model, x, targets.kept, self.embeddings).float()
        result["images/prediction"] = logits.argmax(dim=-1)
        return result


def _sites_of(takers: Iterable[Reducer | Accumulator]) -> Set[str]:
    return frozenset[str]().union(*(taker.sites for taker in takers))
