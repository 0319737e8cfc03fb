"""What a store accumulated over the images of each unit, read block by block and merged.

Merging adds integers or takes the largest, so that it is exact whatever the order and number of
units. At most one unit's part of one block is held at a time, beside what is merged.

Shape letters: L blocks, F neurons of a block, K classes, S slots of a unit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import zarr

from classlens.analysis.slabs import open_array, read_region, require_shard
from classlens.extractor import schema
from classlens.extractor.errors import UsageError

REMEDIES = {
    "neurons": "extract a store with `--reduce neurons` to have them",
    "dissection": "`classlens neurons dissect STORE --out DISSECTION` makes a store that does",
}


@dataclass(frozen=True)
class Accumulated:
    """The accumulated arrays of a store. layout: of the store. units: the committed ones."""

    store: Path
    layout: schema.Layout
    units: tuple[int, ...]
    specs: dict[str, schema.ArraySpec]
    arrays: dict[str, zarr.Array]

    @staticmethod
    def open(store: str | Path, reducer: str) -> Accumulated:
        """Those of ``neurons`` or ``dissection``.

        Raises:
            StoreError: there is no store. UsageError: it has no such arrays, or no unit yet.
        """
        path, layout = Path(store), schema.read_layout(store)
        if reducer not in layout.reducers:
            raise UsageError(f"{store} accumulates no {reducer}; {REMEDIES[reducer]}.")
        units = schema.committed_units(path)
        if not units:
            raise UsageError(f"{store} has no committed unit yet; `classlens status` says more.")
        specs = {s.path: s for s in schema.all_arrays(layout) if s.path.startswith(f"{reducer}/")}
        arrays = {name: open_array(path, name) for name in specs}
        return Accumulated(path, layout, tuple(units), specs, arrays)

    def parts(self, name: str, *selection: slice | int) -> Iterator[np.ndarray]:
        """A part of an array of each unit, one after another.

        Args:
            selection: of the axes behind ``unit``.

        Raises:
            StoreError: a file is missing or damaged.
        """
        for unit in self.units:
            yield self.part(unit, name, *selection)

    def part(self, unit: int, name: str, *selection: slice | int) -> np.ndarray:
        """A part of an array of one unit; errors as of :meth:`parts`."""
        require_shard(self.store, self.specs[name], unit)
        return read_region(self.arrays[name], (unit, *selection), self.store, name)

    def total(self, name: str, *selection: slice | int) -> np.ndarray:
        """The sum of a part of an array over the units, int64."""
        parts = self.parts(name, *selection)
        total = next(parts).astype(np.int64)
        for part in parts:
            total += part
        return total

    def classes(self, reducer: str) -> tuple[np.ndarray, np.ndarray]:
        """The classes of counted images, ascending, int32 [K]; and how many images, int64 [K].

        Raises:
            UsageError: no image was counted. StoreError: as of :meth:`parts`.
        """
        counts = np.zeros(self.layout.classes, np.int64)
        for unit in self.units:
            classes_S = self.part(unit, f"{reducer}/classes")
            there_S = classes_S >= 0
            images_S = self.part(unit, f"{reducer}/class_images")
            counts[classes_S[there_S]] += images_S[there_S]
        [found_K] = np.nonzero(counts)
        if not len(found_K):
            raise UsageError(
                f"No image of {self.store} could be scored; `classlens status` says why."
            )
        return found_K.astype(np.int32), counts[found_K]

    def by_class(self, name: str, reducer: str, *selection: slice | int) -> np.ndarray:
        """The sums of an array whose first selected axis is ``slot``, by class.

        Args:
            selection: of the axes before ``slot``.

        Returns:
            int64 [K, …], in the order of :meth:`classes`.
        """
        classes_K, _ = self.classes(reducer)
        total = None
        for unit in self.units:
            classes_S = self.part(unit, f"{reducer}/classes")
            images_S = self.part(unit, f"{reducer}/class_images")
            there_S = (classes_S >= 0) & (images_S > 0)
            part = self.part(unit, name, *selection)
            if total is None:
                total = np.zeros((len(classes_K), *part.shape[1:]), np.int64)
            total[np.searchsorted(classes_K, classes_S[there_S])] += part[there_S]
        assert total is not None
        return total
