"""What a reducer is, and what it is told of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from classlens.extractor.schema import ArraySpec, Layout

Reduce = Callable[[int, Mapping[str, Tensor]], dict[str, Tensor]]
"""A block's index and sites -> values by array path, each [N, …].

Beside the sites a reducer finds the values of the reducers before it, by array path, so that no
projection is paid twice.
"""


@dataclass(frozen=True)
class Targets:
    """What is known of the images of a batch besides their pixels.

    labels: int64 [N], all in [0, C). images: int64 [N], place of each on the image axis; what is
    drawn at random for an image depends on it alone. kept: bool [N, G], the image tokens that token
    removal leaves; None where none is removed.
    """

    labels: Tensor
    images: Tensor
    kept: Tensor | None = None

    def __getitem__(self, images: slice) -> Targets:
        """The same of some of the images."""
        return Targets(self.labels[images], self.images[images])

    def to(self, device: torch.device) -> Targets:
        """The same on another device."""
        kept = None if self.kept is None else self.kept.to(device)
        return Targets(self.labels.to(device), self.images.to(device), kept)


class Reducer(Protocol):
    """Takes the sites of a block and returns something small for each image."""

    @property
    def sites(self) -> Set[str]:
        """The sites it reads."""
        ...

    def arrays(self, layout: Layout) -> tuple[ArraySpec, ...]:
        """The arrays it fills; each has the axes ``image, block, …``."""
        ...

    def for_batch(self, targets: Targets) -> Reduce:
        """The function that reduces one block after another of a batch."""
        ...
