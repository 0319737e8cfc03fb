"""What a reducer is, and what it is told of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from classlens.extractor.schema import ArraySpec, Layout

if TYPE_CHECKING:
    from classlens.extractor.shards import Decoded

Reduce = Callable[[int, Mapping[str, Tensor]], dict[str, Tensor]]
"""A block's index and sites -> values by array path, each [N, …].

Beside the sites a reducer finds, by array path, what the block's kernel has reduced already and the
values of the reducers before it, so that no projection is paid twice.
"""


@dataclass(frozen=True)
class Targets:
    """What is known of the images of a batch besides their pixels.

    labels: int64 [N], all in [0, C). images: int64 [N], place of each on the image axis; what is
    drawn at random for an image depends on it alone, or on ``keys``. kept: bool [N, G], the image
    tokens that token removal leaves; None where none is removed.

    For accumulators: keys: int64 [N], a number made of the image's key, which does not change when
    shards are cut otherwise. covered: uint8 [N, G], share of each patch that shows the label's
    class. floor: float32 [L, F], what an activation must exceed to be among the unit's exemplars; a
    hint that saves work and changes nothing.
    """

    labels: Tensor
    images: Tensor
    kept: Tensor | None = None
    keys: Tensor | None = None
    covered: Tensor | None = None
    floor: Tensor | None = None

    def __getitem__(self, images: slice) -> Targets:
        """The same of some of the images."""
        return self._changed(lambda name, part: part if name == "floor" else part[images])

    def to(self, device: torch.device) -> Targets:
        """The same on another device."""
        return self._changed(lambda _, part: part.to(device))

    def _changed(self, change: Callable[[str, Tensor], Tensor]) -> Targets:
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        there = {name: part for name, part in parts.items() if part is not None}
        return Targets(**{name: change(name, part) for name, part in there.items()})


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


Found = Mapping[str, np.ndarray]
"""What an accumulator found in a batch, by ``NAME/BLOCK``."""
FOUND_PREFIX = "found/"
"""Of its names among a batch's results, beside array paths."""


def split_results(results: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], Found]:
    """A batch's rows by array path, and what its accumulator found."""
    rows = {name: value for name, value in results.items() if not name.startswith(FOUND_PREFIX)}
    found = {
        name.removeprefix(FOUND_PREFIX): value
        for name, value in results.items()
        if name.startswith(FOUND_PREFIX)
    }
    return rows, found


@dataclass(frozen=True)
class UnitPart:
    """The good images of a batch, and the arrays of their unit.

    arrays: by path, without the axis ``unit``; to be changed. Of each image, [N]: places on the
    image axis, ascending; slots of the labels; masked, whether it has a mask; class_area, what that
    gives to its class, in units of 1/255 of a patch.
    """

    arrays: Mapping[str, np.ndarray]
    places: np.ndarray
    slots: np.ndarray
    masked: np.ndarray
    class_area: np.ndarray


class Accumulator(Protocol):
    """Takes the sites of a block and adds up something over the images of a unit.

    A batch is reduced on the device by a pure function, and what it found is merged on the host
    once it is known which images are good.
    """

    @property
    def sites(self) -> Set[str]:
        """The sites it reads."""
        ...

    def for_batch(self, targets: Targets) -> Reduce:
        """The function that reduces one block after another of a batch: values by name, of any
        shape."""
        ...

    def known(
        self, images: Sequence[Decoded], arrays: Mapping[str, np.ndarray]
    ) -> dict[str, Tensor]:
        """What it wants to be told of a batch of good images in `Targets`, by field.

        Args:
            arrays: of the unit so far, by path, without the axis ``unit``.
        """
        ...

    def finite(self, found: Found, places: np.ndarray) -> np.ndarray:
        """Whether each image of a batch may be counted, bool [N]."""
        ...

    def merge(self, found: Found, part: UnitPart) -> None:
        """Adds what was found in a batch of good images to the unit's arrays."""
        ...
