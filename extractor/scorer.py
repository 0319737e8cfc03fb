"""``score(pixels, labels)``: one pure function from a batch of pictures to compact arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from classlens.extractor.models import Subject, block_sites, walk
from classlens.extractor.schema import ArraySpec, Layout
from classlens.kernels.reductions import compiled

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Reducer(Protocol):
    """Takes the sites of a block and returns something small for each image."""

    def arrays(self, layout: Layout) -> tuple[ArraySpec, ...]:
        """The arrays it fills; each has the axes ``image, block, …``."""
        ...

    def for_batch(self, labels: Tensor) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
        """For a batch with these labels: a block's sites -> values by array path, each [N, …]."""
        ...


class Scorer:
    """A model and its reducers on one device, in one dtype.

    Moves and casts ``subject.model`` in place. ``compile`` has torch.compile fuse what stands
    between the matrix products of a block.
    """

    def __init__(
        self,
        subject: Subject,
        reducers: Sequence[Reducer],
        *,
        dtype: torch.dtype,
        device: str,
        convention: str,
        compile: bool = False,
    ) -> None:
        self.model = subject.model.to(device=device, dtype=dtype)
        self.reducers = tuple(reducers)
        self.convention = convention
        self._block_sites = compiled(block_sites) if compile else block_sites
        self.device, self.dtype = torch.device(device), dtype
        channel = (1, 3, 1, 1)
        mean = torch.tensor(subject.geometry.mean, device=device).view(channel)
        std = torch.tensor(subject.geometry.std, device=device).view(channel)
        self._scale = 1 / (255 * std)
        self._shift = -mean / std

    def images(self, pixels: Tensor) -> Tensor:
        """Normalised images [N, 3, H, W] in the scoring dtype, from uint8 pixels [N, H, W, 3]."""
        planes = pixels.to(self.device).permute(0, 3, 1, 2).float()
        return (planes * self._scale + self._shift).to(self.dtype)

    @torch.inference_mode()
    def score(self, pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Scores a batch.

        Args:
            pixels: uint8 [N, H, W, 3], after resize and crop.
            labels: int64 [N], all in [0, C).

        Returns:
            by array path, on the device, where they may still be under way: every reducer's arrays
            [N, L, …], and ``images/prediction`` int64 [N], the model's own top class.
        """
        labels = labels.to(self.device)
        per_block: dict[str, list[Tensor]] = {}
        reducers = [reducer.for_batch(labels) for reducer in self.reducers]
        x = None
        images = self.images(pixels)
        for _, sites in walk(self.model, images, self.convention, self._block_sites):
            x = sites["resid"]
            for reduce in reducers:
                for path, value in reduce(sites).items():
                    per_block.setdefault(path, []).append(value)
        assert x is not None
        logits = self.model.forward_head(self.model.norm(x))
        result = {path: torch.stack(values, dim=1) for path, values in per_block.items()}
        result["images/prediction"] = logits.float().argmax(dim=-1)
        return result
