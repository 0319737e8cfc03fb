"""What will be scored: shard arguments -> tar files -> units and their images, frozen before a run.

Every header of every tar is walked here, so a cut, damaged or interleaved tar is found before the
first image is scored. Samples are grouped as webdataset groups them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import polars as pl
from braceexpand import braceexpand

from classlens.extractor.errors import ShardError, UsageError
from classlens.extractor.tar_walk import Member, open_tar, walk_tar

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
LABEL_EXTENSION = "cls"
MASK_EXTENSION = "mask.png"
JSON_EXTENSION = "json"

MANIFEST_SCHEMA = pl.Schema(
    {
        "image": pl.Int64,
        "key": pl.String,
        "unit": pl.Int32,
        "offset": pl.Int64,
        "size": pl.Int64,
        "label": pl.Int32,
        "mask_id": pl.Int32,
    }
)
UNITS_SCHEMA = pl.Schema(
    {
        "unit": pl.Int32,
        "shard": pl.String,
        "start": pl.Int64,
        "stop": pl.Int64,
        "images": pl.Int32,
        "masks": pl.Boolean,
    }
)

# A label is a handful of digits and the json a handful of fields; more is not read into memory.
_MAX_LABEL_BYTES = 64
_MAX_JSON_BYTES = 1 << 20

# webdataset's rules: the key ends at the first dot behind the last slash (with no name before that
# dot, as in "folder/.name", the folder itself is the key), and __meta__ members are passed over.
_KEY_AND_EXTENSION = re.compile(r"((?:.*/)?[^.]+)\.([^/]*)")
_META = re.compile(r"__[^/]*__(/.*)?")


@dataclass(frozen=True)
class Unit:
    """The samples of one tar, or consecutive ones of a large tar.

    start, stop: bytes of the tar from the first sample's first header to behind the padding of the
    last one's last member. images: number of samples. masks: whether any sample of the whole tar
    has a segmentation mask.
    """

    index: int
    path: Path
    start: int
    stop: int
    images: int
    masks: bool


@dataclass(frozen=True)
class Plan:
    """All units and the manifest, one row per image (columns: ``MANIFEST_SCHEMA``).

    ``image`` is unit * unit_images + position in the unit; ``offset`` and ``size`` are the bytes
    of the image in its tar; ``label`` and ``mask_id`` are null where the tar has none.
    unit_images: images of the largest unit.
    """

    units: tuple[Unit, ...]
    manifest: pl.DataFrame
    unit_images: int

    def units_table(self) -> pl.DataFrame:
        """One row per unit (columns: ``UNITS_SCHEMA``)."""
        rows = [(u.index, str(u.path), u.start, u.stop, u.images, u.masks) for u in self.units]
        return pl.DataFrame(rows, schema=UNITS_SCHEMA, orient="row")

    def fingerprint(self) -> str:
        """SHA-256 of tar names, unit borders, keys, offsets, sizes, labels and mask ids.

        Folders are left out, so that moved data keep their fingerprint; so are the contents of
        the images.
        """
        digest = hashlib.sha256()
        for unit in self.units:
            row = [unit.path.name, unit.start, unit.stop, unit.images, unit.masks]
            digest.update(json.dumps(row).encode())
        for row in self.manifest.drop("image").iter_rows():
            digest.update(json.dumps(row).encode())
        return digest.hexdigest()


def expand_shards(arguments: Sequence[str]) -> list[Path]:
    """Tar files, as absolute paths, in the order of the arguments.

    An argument is a tar file, a folder (its ``*.tar`` at any depth, sorted) or a brace pattern
    such as ``val-{000..012}.tar``. An existing path is taken as it is, whatever braces it holds.

    Raises:
        UsageError: no argument, a URL or ``pipe:``, unbalanced braces, or a tar named twice.
        ShardError: a file is missing, or a folder has no tar.
    """
    if not arguments:
        raise UsageError("No shards given; name tar files, folders or brace patterns.")
    paths = [path for argument in arguments for path in _expand(argument)]
    seen: dict[str, Path] = {}
    for path in paths:
        first = seen.setdefault(os.path.realpath(path), path)
        if first is not path:
            raise UsageError(f"{path} is named twice (first as {first}); name each tar once.")
    return paths


def make_plan(
    paths: Sequence[Path],
    *,
    max_unit_images: int = 1024,
    progress: Callable[[Path, int], None] | None = None,
) -> Plan:
    """Walk all tars and cut them into units.

    A tar with more than ``max_unit_images`` samples becomes the least number of units, of equal
    size within one image. ``progress`` is called after each tar with its path and its number of
    images.

    Raises:
        ShardError: a tar is cut or damaged (see :func:`~classlens.extractor.tar_walk.walk_tar`);
            members of a key are not adjacent, or one of them is there twice; a key has no image
            or two; a tar has no sample.
    """
    units: list[Unit] = []
    tables: list[pl.DataFrame] = []
    for path in paths:
        samples = _read_samples(path)
        masks = any(sample.has_mask for sample in samples)
        for part in _slices(samples, max_unit_images):
            index = len(units)
            units.append(Unit(index, path, part[0].start, part[-1].stop, len(part), masks))
            rows = [(0, s.key, index, s.offset, s.size, s.label, s.mask_id) for s in part]
            tables.append(pl.DataFrame(rows, schema=MANIFEST_SCHEMA, orient="row"))
        if progress is not None:
            progress(path, len(samples))
    if not units:
        raise UsageError("No shards given; name tar files, folders or brace patterns.")
    unit_images = max(unit.images for unit in units)
    position = pl.int_range(pl.len(), dtype=pl.Int64).over("unit")
    manifest = pl.concat(tables).with_columns(
        image=pl.col("unit").cast(pl.Int64) * unit_images + position
    )
    return Plan(tuple(units), manifest, unit_images)


def read_member(path: str | Path, offset: int, size: int) -> bytes:
    """``size`` bytes of a tar from ``offset``, e.g. an image by its row of the manifest.

    Raises:
        ShardError: the file is gone or shorter than that.
    """
    with open_tar(path) as file:
        data = _read_at(file, offset, size)
    if len(data) < size:
        raise ShardError(
            f"{path} has no {size} bytes at byte {offset}; put the shard back as it was planned."
        )
    return data


@dataclass(slots=True)
class _Sample:
    """The members of one key; offset and size are the image's."""

    key: str
    start: int
    stop: int
    offset: int = -1
    size: int = -1
    label: int | None = None
    mask_id: int | None = None
    has_mask: bool = False


def _expand(argument: str) -> Iterator[Path]:
    if argument.startswith("pipe:") or "://" in argument:
        raise UsageError(
            f"{argument} is a command or an address, and shards are read by offset from local "
            "disks only; copy the tar here and name the file."
        )
    if os.path.exists(argument):
        yield from _existing(Path(argument))
        return
    try:
        for pattern in braceexpand(argument):
            yield from _existing(Path(pattern))
    except ValueError as error:
        raise UsageError(f"{argument} has unbalanced braces; close them or quote it.") from error


def _existing(path: Path) -> list[Path]:
    path = Path(os.path.abspath(path))  # symbolic links keep their names
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ShardError(f"{path} does not exist or is no file; check the path or the pattern.")
    tars = sorted(p for p in path.rglob("*.tar") if p.is_file() and not p.name.startswith("."))
    if not tars:
        raise ShardError(
            f"{path} holds no *.tar; name another folder, or make shards with `classlens pack`."
        )
    return tars


def _read_samples(path: Path) -> list[_Sample]:
    samples: list[_Sample] = []
    keys: set[str] = set()
    extensions: set[str] = set()
    with open_tar(path) as file:
        for member in walk_tar(path):
            parts = _KEY_AND_EXTENSION.fullmatch(member.name)
            if parts is None or _META.fullmatch(member.name):
                continue
            key, extension = parts[1], parts[2].lower()
            where = f"{path}: member {member.name!r} at byte {member.header}"
            if not samples or samples[-1].key != key:
                if key in keys:
                    raise ShardError(
                        f"{where} is apart from the other members of its key {key!r}; pack the "
                        "tar again in the order of names (`tar --sort=name`)."
                    )
                keys.add(key)
                extensions.clear()
                samples.append(_Sample(key, member.header, member.end))
            if extension in extensions:
                raise ShardError(
                    f"{where} is there twice (upper and lower case count as one); pack the tar "
                    "again with one of them."
                )
            extensions.add(extension)
            if extension in IMAGE_EXTENSIONS and samples[-1].size >= 0:
                raise ShardError(
                    f"{where} is the second image of its key {key!r}; pack the tar again with one "
                    "image for each key."
                )
            _add(samples[-1], extension, member, file)
    for sample in samples:
        if sample.size < 0:
            raise ShardError(
                f"{path}: key {sample.key!r} at byte {sample.start} has no image "
                f"({', '.join(IMAGE_EXTENSIONS)}); pack the tar again without it."
            )
    if not samples:
        raise ShardError(f"{path} holds no image; name tars that `classlens pack` could have made.")
    return samples


def _add(sample: _Sample, extension: str, member: Member, file: BinaryIO) -> None:
    sample.stop = member.end
    if extension in IMAGE_EXTENSIONS:
        sample.offset, sample.size = member.data, member.size
    elif extension == MASK_EXTENSION:
        sample.has_mask = True
    elif extension == LABEL_EXTENSION and member.size <= _MAX_LABEL_BYTES:
        sample.label = _parse_label(_read_at(file, member.data, member.size))
    elif extension == JSON_EXTENSION and member.size <= _MAX_JSON_BYTES:
        sample.mask_id = _parse_mask_id(_read_at(file, member.data, member.size))


def _parse_label(data: bytes) -> int | None:
    digits = data.strip()
    return _int32(int(digits)) if re.fullmatch(rb"[+-]?[0-9]+", digits) else None


def _parse_mask_id(data: bytes) -> int | None:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return _int32(value.get("mask_id")) if isinstance(value, dict) else None


def _int32(value: object) -> int | None:
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    return value if -(2**31) <= value < 2**31 else None


def _slices(samples: list[_Sample], most: int) -> Iterator[list[_Sample]]:
    parts = -(-len(samples) // most)
    borders = [len(samples) * part // parts for part in range(parts + 1)]
    for first, last in pairwise(borders):
        yield samples[first:last]


def _read_at(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)
