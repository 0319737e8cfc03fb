"""Zarr v3 stores: create one, stage a unit, commit it, verify all of it.

A store is plain Zarr v3 (any Zarr reader opens it) with tables beside it; ``schema`` says what is
in it, ``ledger`` which units of it may be read.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec

from classlens.extractor import ledger
from classlens.extractor.errors import ConfigMismatchError, StoreError
from classlens.extractor.schema import (
    CLASSES_FILE,
    FORMAT_VERSION,
    LEDGER_DIR,
    MANIFEST_FILE,
    UNITS_FILE,
    ArraySpec,
    Layout,
    Status,
    all_arrays,
    committed_units,
    ledger_file,
    read_attributes,
    shard_file,
)

CHECKSUM_FILE = "SHA256SUMS"
FLOAT16_MAX = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Tables:
    """The tables of a store: planned images, units, classes (columns: see the README)."""

    manifest: pl.DataFrame
    units: pl.DataFrame
    classes: pl.DataFrame


class Store:
    """A store on disk, open for extraction.

    layout: its axes. manifest: its planned images.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.attributes = read_attributes(path)
        self.layout = Layout.from_json(self.attributes["layout"])
        self.arrays = all_arrays(self.layout)
        self.manifest = pl.read_parquet(path / MANIFEST_FILE)

    @staticmethod
    def create(path: Path, layout: Layout, tables: Tables, attributes: Mapping[str, Any]) -> Store:
        """Creates an empty store; complete from the moment its folder appears.

        Args:
            attributes: config, fingerprint, versions, … saved beside format and layout.

        A store that another worker creates at the same moment is opened instead.

        Raises:
            StoreError: the folder exists, is not empty and holds no store.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
        try:
            root = zarr.create_group(
                str(draft),
                zarr_format=3,
                attributes={
                    "classlens": {
                        "format": FORMAT_VERSION,
                        "layout": layout.to_json(),
                        **attributes,
                    }
                },
            )
            for spec in all_arrays(layout):
                _create_array(root, spec, layout, spec.shape(layout))
            tables.manifest.write_parquet(draft / MANIFEST_FILE)
            tables.units.write_parquet(draft / UNITS_FILE)
            tables.classes.write_parquet(draft / CLASSES_FILE)
            (draft / LEDGER_DIR).mkdir()
            fixed = sorted(p for p in draft.rglob("*") if p.is_file())
            sums = [f"{ledger.file_facts(p).sha256}  {p.relative_to(draft)}\n" for p in fixed]
            (draft / CHECKSUM_FILE).write_text("".join(sums))
            for file in [*fixed, draft / CHECKSUM_FILE]:
                ledger.sync(file)
            draft.rename(path)
        except OSError as error:
            shutil.rmtree(draft, ignore_errors=True)
            if (path / "zarr.json").exists():  # another worker was first
                return Store(path)
            if path.is_dir() and any(path.iterdir()):
                raise StoreError(
                    f"{path} exists and is no classlens store; choose another --out."
                ) from error
            raise StoreError(
                f"{path} cannot be created ({error}); choose another --out."
            ) from error
        ledger.sync(path.parent)
        return Store(path)

    @staticmethod
    def open_or_create(
        path: Path, layout: Layout, tables: Tables, attributes: Mapping[str, Any]
    ) -> Store:
        """The store at this path, created if it is not there.

        Raises:
            ConfigMismatchError: it has another fingerprint; names the fields that differ.
        """
        exists = (path / "zarr.json").exists()
        store = Store(path) if exists else Store.create(path, layout, tables, attributes)
        check_fingerprint(path, store.attributes, attributes)
        return store

    def unit_rows(self, unit: int) -> pl.DataFrame:
        """The planned images of a unit, in order."""
        return self.manifest.filter(pl.col("unit") == unit)

    @contextmanager
    def stage(self, unit: int) -> Iterator[StagedUnit | None]:
        """A unit to be filled; committed when the block ends without an error.

        None where the unit is committed already or another process has it.
        """
        with ledger.lease(self.path, unit) as staging:
            if staging is None:
                yield None
                return
            staged = StagedUnit(self, unit, staging)
            yield staged
            staged.commit()

    def is_committed(self, unit: int) -> bool:
        """Whether a unit's commit marker exists."""
        return (self.path / ledger_file(unit)).exists()

    def finish(self) -> None:
        """Removes the staging area if nobody uses it."""
        ledger.close_staging(self.path)


def check_fingerprint(path: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Compares the fingerprint in the attributes of the store at ``path`` with another.

    Raises:
        ConfigMismatchError: they differ; names the fields.
    """
    ours = json.loads(json.dumps(now["fingerprint"]))  # tuples become lists
    theirs = then["fingerprint"]
    differing = [k for k in sorted({*ours, *theirs}) if ours.get(k) != theirs.get(k)]
    if differing:
        fields = "; ".join(
            f"{k}: store has {_short(theirs.get(k))}, this run {_short(ours.get(k))}"
            for k in differing
        )
        raise ConfigMismatchError(
            f"{path} was extracted with another configuration and is not resumed ({fields}); "
            "repeat its settings, or choose another --out."
        )


class StagedUnit:
    """The arrays of one unit in memory, filled image by image.

    first_image: its first place on the image axis. classes: those that the axis ``slot`` counts:
    the valid labels of its planned images, each once, ascending.
    """

    def __init__(self, store: Store, unit: int, staging: Path) -> None:
        self._store, self.unit, self._staging = store, unit, staging
        self.first_image = unit * store.layout.unit_images
        self.classes = np.empty(0, np.int32)
        if store.layout.slots:
            self.classes = unit_classes(store.unit_rows(unit), store.layout.classes)
        self._started_s = time.perf_counter()
        self._saturated = 0
        self._specs = {spec.path: spec for spec in store.arrays}
        self._arrays = {
            spec.path: np.full(spec.shard(store.layout), spec.fill, dtype=spec.dtype)
            for spec in store.arrays
        }
        for path, values in self.arrays.items():
            if path.endswith("/classes"):
                values[: len(self.classes)] = self.classes

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays that add up the images of the unit, by path, without the axis ``unit``."""
        return {
            path: self._arrays[path][0]
            for path, spec in self._specs.items()
            if spec.axes[0] == "unit"
        }

    def put(self, path: str, positions: np.ndarray, values: np.ndarray) -> None:
        """Writes rows of one array; floats beyond float16 are clipped to its range and counted.

        Args:
            positions: places within the unit, [n].
            values: [n, …], of any numeric dtype that holds the array's values.
        """
        spec = self._specs[path]
        if spec.dtype == "float16":
            self._saturated += int(np.count_nonzero(np.abs(values) > FLOAT16_MAX))
            values = np.clip(values, -FLOAT16_MAX, FLOAT16_MAX)
        self._arrays[path][positions] = values.astype(spec.dtype)

    def commit(self) -> None:
        """Writes, reads back and hashes the unit, commits it and moves it into place."""
        store, layout = self._store, self._store.layout
        root = zarr.create_group(str(self._staging), zarr_format=3)
        files: dict[str, ledger.FileFacts] = {}
        for spec in store.arrays:
            array = _create_array(root, spec, layout, spec.shard(layout))
            array[...] = self._arrays[spec.path]
            written = self._staging / shard_file(spec, 0)
            back = np.asarray(array[...])
            assert back.tobytes() == self._arrays[spec.path].tobytes(), f"{written} reads otherwise"
            final = self._staging / shard_file(spec, self.unit)
            final.parent.mkdir(parents=True, exist_ok=True)
            os.replace(written, final)
            ledger.sync(final)
            files[shard_file(spec, self.unit)] = ledger.file_facts(final)
        record = ledger.UnitRecord(
            unit=self.unit,
            images=store.unit_rows(self.unit).height,
            status=self.status_counts(),
            saturated=self._saturated,
            files=files,
            time={
                "committed_unix_s": round(time.time(), 3),
                "seconds": round(time.perf_counter() - self._started_s, 3),
            },
        )
        if ledger.commit(store.path, record):
            ledger.promote(store.path, self._staging, record)

    def status_counts(self) -> dict[str, int]:
        """Number of images by status name, padding left out."""
        counts = Counter(self._arrays["images/status"].tolist())
        return {Status(v).name.lower(): n for v, n in sorted(counts.items()) if v != Status.ABSENT}


def unit_classes(rows: pl.DataFrame, classes: int) -> np.ndarray:
    """The labels in [0, classes) of a unit's part of the manifest, each once, ascending."""
    labels = rows["label"].drop_nulls().unique().sort().to_numpy()
    return labels[(labels >= 0) & (labels < classes)]


def status_totals(path: Path) -> Counter[str]:
    """Number of images of the committed units by status name."""
    total: Counter[str] = Counter()
    for unit in committed_units(path):
        total.update(ledger.read_record(path, unit).status)
    return total


@dataclass(frozen=True)
class Damage:
    """One thing wrong with a store. unit: None when it concerns the store as a whole."""

    unit: int | None
    file: str
    problem: str


def verify(
    path: Path, *, repair: bool = False, progress: Callable[[int, int], None] | None = None
) -> list[Damage]:
    """Checks every byte of a store against its hashes, and every planned image for a row.

    Args:
        repair: take back the commit markers of damaged units, so that `extract` redoes them.
        progress: called with (units checked, units).

    Returns:
        everything found; a unit that is not extracted yet counts as a finding.
    """
    found = [
        Damage(None, name, problem)
        for line in _read_lines(path / CHECKSUM_FILE)
        for sha256, name in [line.split("  ", 1)]
        if (problem := _compare(path / name, sha256)) is not None
    ]
    if found:
        return found
    store = Store(path)
    for unit in range(store.layout.units):
        damage = list(_verify_unit(store, unit))
        if repair and damage and store.is_committed(unit):
            ledger.withdraw(path, unit)
        found += damage
        if progress is not None:
            progress(unit + 1, store.layout.units)
    return found


def _verify_unit(store: Store, unit: int) -> Iterator[Damage]:
    marker = ledger_file(unit)
    if not store.is_committed(unit):
        yield Damage(unit, marker, "not extracted yet; run the same `extract` again")
        return
    try:
        record = ledger.read_record(store.path, unit)
    except StoreError as error:
        yield Damage(unit, marker, str(error))
        return
    expected = {shard_file(spec, unit) for spec in store.arrays}
    if set(record.files) != expected:
        yield Damage(unit, marker, "names other files than the store's arrays")
        return
    damaged = [
        Damage(unit, name, problem)
        for name, facts in record.files.items()
        if (problem := _compare(store.path / name, facts.sha256)) is not None
    ]
    if damaged:
        yield from damaged
        return
    rows = store.unit_rows(unit)["image"].to_numpy()
    statuses = zarr.open_array(str(store.path / "images/status"), mode="r")
    first = unit * store.layout.unit_images
    values = np.asarray(statuses[first : first + store.layout.unit_images])
    missing = int((values[rows - first] == Status.ABSENT).sum())
    if missing or record.images != len(rows):
        yield Damage(unit, "images/status", f"{missing} planned images have no row")


def _compare(file: Path, sha256: str) -> str | None:
    if not file.is_file():
        return "is missing"
    if ledger.file_facts(file).sha256 != sha256:
        return "differs from its hash (at least one bit has flipped)"
    return None


def _read_lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(
            f"{file} cannot be read ({error}); give a folder that `classlens extract` wrote."
        ) from error


def _create_array(
    root: zarr.Group, spec: ArraySpec, layout: Layout, shape: tuple[int, ...]
) -> zarr.Array:
    shuffle = "shuffle" if spec.dtype.startswith("float") else "bitshuffle"
    return root.create_array(
        spec.path,
        shape=shape,
        dtype=spec.dtype,
        shards=spec.shard(layout),
        chunks=spec.chunk(layout),
        # Zarr itself checks only the index of a shard; CRC32C guards every chunk.
        compressors=[
            BloscCodec(cname="zstd", clevel=1, shuffle=shuffle),
            Crc32cCodec(),
        ],
        fill_value=spec.fill,
        dimension_names=spec.axes,
        config={"write_empty_chunks": True},
    )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "…"
