"""Parts of a store's Zarr arrays as NumPy arrays, read ahead of their use.

Reading runs in a thread of its own, so nothing here may call Polars: every thread of Polars' pool
may be waiting for what is read.

Letters: C cells (a block and stream each), I images of one unit, T tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np
import zarr

from classlens.extractor import schema
from classlens.extractor.errors import StoreError

MASK_PATH = "images/mask_fraction"

_Request = TypeVar("_Request")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Slabs:
    """What one read fetches. places: ascending positions in the unit, [I]; blocks and streams:
    indices, [C], ascending by block, then stream."""

    unit: int
    places: np.ndarray
    blocks: np.ndarray
    streams: np.ndarray


class SlabReader:
    """Reads arrays of a store, cut to some tokens (ascending, [T]).

    Args:
        paths: ``scores/*`` arrays and ``images/mask_fraction``, as wanted.
    """

    def __init__(
        self, store: Path, layout: schema.Layout, tokens: np.ndarray, paths: Sequence[str]
    ) -> None:
        self.store = store
        self.layout = layout
        self.tokens = tokens
        self.specs = [spec for spec in schema.all_arrays(layout) if spec.path in paths]
        self.arrays = {spec.path: open_array(store, spec.path) for spec in self.specs}

    def read(self, slabs: Slabs) -> dict[str, np.ndarray]:
        """Values by array path: int32 or float32 [C, I, T], the mask fraction float32 [I, T] (NaN
        for prefix tokens).

        Raises:
            StoreError: a file of the unit is missing or damaged.
        """
        return {
            spec.path: self._mask_fraction(spec, slabs)
            if spec.path == MASK_PATH
            else self._scores(spec, slabs)
            for spec in self.specs
        }

    def _scores(self, spec: schema.ArraySpec, slabs: Slabs) -> np.ndarray:
        first = slabs.unit * self.layout.unit_images
        images, tokens = slabs.places, self.tokens
        dtype = np.float32 if spec.dtype == "float16" else np.int32
        out = np.empty((len(slabs.blocks), len(images), len(tokens)), dtype)
        for cells in rectangles(slabs.blocks, slabs.streams):
            blocks, streams = slabs.blocks[cells], slabs.streams[cells]
            region = self._region(
                spec,
                slabs.unit,
                (
                    slice(int(first + images[0]), int(first + images[-1]) + 1),
                    slice(int(blocks[0]), int(blocks[-1]) + 1),
                    slice(int(streams[0]), int(streams[-1]) + 1),
                    slice(int(tokens[0]), int(tokens[-1]) + 1),
                ),
            )
            by_cell = region.transpose(1, 2, 0, 3).reshape(-1, region.shape[0], region.shape[3])
            kept = by_cell[:, as_selector(images - images[0])]
            out[as_selector(cells)] = kept[:, :, as_selector(tokens - tokens[0])]
        return out

    def _mask_fraction(self, spec: schema.ArraySpec, slabs: Slabs) -> np.ndarray:
        first = slabs.unit * self.layout.unit_images
        images = slabs.places
        rows = slice(int(first + images[0]), int(first + images[-1]) + 1)
        covered = self._region(spec, slabs.unit, (rows, slice(None)))
        fraction = covered[images - images[0]].astype(np.float32) / np.float32(255)
        out = np.full((len(images), len(self.tokens)), np.nan, np.float32)
        is_patch = self.tokens >= self.layout.prefix
        out[:, is_patch] = fraction[:, self.tokens[is_patch] - self.layout.prefix]
        return out

    def _region(
        self, spec: schema.ArraySpec, unit: int, selection: tuple[slice | int, ...]
    ) -> np.ndarray:
        require_shard(self.store, spec, unit)
        return read_region(self.arrays[spec.path], selection, self.store, spec.path)


def read_image_array(
    store: Path, layout: schema.Layout, path: str, images: np.ndarray
) -> np.ndarray:
    """Values of ``images/label``, ``prediction`` or ``status`` at ascending places, same dtype.

    Raises:
        StoreError: a file of one of the images' units is missing or damaged.
    """
    spec = next(spec for spec in schema.image_arrays(layout) if spec.path == path)
    array = open_array(store, path)
    units = np.unique(images // layout.unit_images)
    for unit in units:
        require_shard(store, spec, int(unit))
    out = np.empty(len(images), spec.dtype)
    for run in consecutive(units):
        first = int(units[run.start]) * layout.unit_images
        stop = (int(units[run.stop - 1]) + 1) * layout.unit_images
        part = slice(*np.searchsorted(images, [first, stop]))
        values = read_region(array, (slice(first, stop),), store, path)
        out[part] = values[images[part] - first]
    return out


def open_array(store: Path, path: str) -> zarr.Array:
    """An array of the store, for reading."""
    try:
        return zarr.open_array(store / path, mode="r", zarr_format=3)
    except (OSError, ValueError) as error:
        raise StoreError(
            f"{store} has no readable array {path} ({error}); `classlens verify` says what else "
            "is wrong."
        ) from error


def read_region(
    array: zarr.Array, selection: tuple[slice | int, ...], store: Path, path: str
) -> np.ndarray:
    """The selected values; every chunk's checksum is compared as it is decoded."""
    try:
        return np.asarray(array[selection])
    except (OSError, ValueError, RuntimeError) as error:
        raise StoreError(
            f"{path} in {store} is damaged ({error}); `classlens verify` names the unit, and "
            "extracting it again mends it."
        ) from error


def require_shard(store: Path, spec: schema.ArraySpec, unit: int) -> None:
    """Zarr reads a missing file as fill values, so look for it first."""
    file = schema.shard_file(spec, unit)
    if not (store / file).is_file():
        raise StoreError(
            f"{store} lacks {file}, a file of a committed unit; run the same `classlens extract` "
            "command again to restore it."
        )


def consecutive(values: np.ndarray) -> list[slice]:
    """Longest runs of ascending integers without a gap, as slices of positions."""
    breaks = np.flatnonzero(np.diff(values) != 1) + 1
    edges = [0, *breaks.tolist(), len(values)]
    return [slice(a, b) for a, b in pairwise(edges) if b > a]


def rectangles(blocks: np.ndarray, streams: np.ndarray) -> list[np.ndarray]:
    """Positions of the cells, in groups that are all of some consecutive blocks and streams.

    One read for each group: a read costs Zarr a look at the shard's index.
    """
    edges = np.flatnonzero((np.diff(blocks) != 0) | (np.diff(streams) != 1)) + 1
    by_streams: dict[tuple[int, int], list[np.ndarray]] = {}
    for row in np.split(np.arange(len(blocks)), edges):
        by_streams.setdefault((int(streams[row[0]]), int(streams[row[-1]])), []).append(row)
    return [
        np.concatenate(rows[run])
        for rows in by_streams.values()
        for run in consecutive(np.array([blocks[row[0]] for row in rows]))
    ]


def as_selector(positions: np.ndarray) -> slice | np.ndarray:
    """A slice where the positions are consecutive, for NumPy takes views then."""
    runs = consecutive(positions)
    return slice(int(positions[0]), int(positions[-1]) + 1) if len(runs) == 1 else positions


def read_ahead(
    read: Callable[[_Request], _Result], requests: Iterable[_Request], depth: int
) -> Iterator[tuple[_Request, _Result]]:
    """Each request with its result, in order, ``depth`` reads ahead of the consumer."""
    reading: deque[tuple[_Request, Future[_Result]]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="classlens-read") as pool:
        try:
            for request in requests:
                reading.append((request, pool.submit(read, request)))
                if len(reading) > depth:
                    request, result = reading.popleft()
                    yield request, result.result()
            while reading:
                request, result = reading.popleft()
                yield request, result.result()
        finally:
            for _, result in reading:
                result.cancel()
