"""Tar shards -> decoded images. A bad image is a row with a status, never a gap."""

from __future__ import annotations

import io
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np
import polars as pl
from PIL import Image

from classlens.extractor.errors import ShardError
from classlens.extractor.geometry import Geometry, class_pixels
from classlens.extractor.plan import IMAGE_EXTENSIONS, MASK_EXTENSION, Unit
from classlens.extractor.schema import Status

# Before webdataset is imported: it then runs no shell for `pipe:` and unpickles nothing.
os.environ["WDS_SECURE"] = "1"
import webdataset as wds

# Pillow only warns between one and two times its limit; `Decoder.max_pixels` is exact.
Image.MAX_IMAGE_PIXELS = None


@dataclass(frozen=True)
class Decoder:
    """How a sample becomes pixels.

    classes: C, the bound of a valid label. masks: whether masks are read at all.
    """

    geometry: Geometry
    grid: tuple[int, int]
    classes: int
    max_pixels: int
    masks: bool


@dataclass
class Decoded:
    """One planned image. pixels: uint8 [H, W, 3] when the status is OK.

    position: place within the unit. label: −1 when there is none. mask_fraction: uint8 [G], the
    share of each patch that shows the class, or None.
    """

    position: int
    label: int
    status: Status
    pixels: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint8))
    mask_fraction: np.ndarray | None = None


def decode_unit(
    unit: Unit, rows: pl.DataFrame, decoder: Decoder, pool: ThreadPoolExecutor, ahead: int
) -> Iterator[Decoded]:
    """All planned images of a unit, in order, decoded by the pool's threads.

    Args:
        rows: the unit's part of the manifest.
        ahead: how many images may be decoded before they are asked for; bounds the memory.

    Raises:
        ShardError: the tar no longer holds what was planned.
    """
    pending: deque[Future[Decoded]] = deque()
    for position, (sample, row) in enumerate(_planned_samples(unit, rows)):
        masked = decoder.masks and unit.masks
        pending.append(pool.submit(_decode, sample, row, position, decoder, masked))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def read_samples(unit: Unit) -> Iterator[dict]:
    """The webdataset samples of a unit: ``__key__`` and the bytes of each member by extension."""
    with unit.path.open("rb") as file:
        file.seek(unit.start)
        source = {"url": str(unit.path), "stream": _Slice(file, unit.stop - unit.start)}
        members = wds.tariterators.tar_file_expander([source])
        yield from wds.tariterators.group_by_keys(members)


def _planned_samples(unit: Unit, rows: pl.DataFrame) -> Iterable[tuple[dict, dict]]:
    # webdataset ends in silence on a damaged tar, so the sequence of keys is held to the plan.
    samples = read_samples(unit)
    for row in rows.iter_rows(named=True):
        sample = next(samples, None)
        if sample is None or sample["__key__"] != row["key"]:
            found = "the end of the shard" if sample is None else sample["__key__"]
            raise ShardError(
                f"{unit.path} changed since it was planned: expected image {row['key']} at byte "
                f"{row['offset']}, found {found}; restore the file or extract to a new store."
            )
        yield sample, row


def _decode(sample: dict, row: dict, position: int, decoder: Decoder, masked: bool) -> Decoded:
    label = -1 if row["label"] is None else row["label"]
    if not 0 <= label < decoder.classes:
        return Decoded(position, label, Status.LABEL_INVALID)
    data = next(sample[e] for e in IMAGE_EXTENSIONS if e in sample)
    image = _open(data, decoder)
    if isinstance(image, Status):
        return Decoded(position, label, image)
    pixels = np.asarray(decoder.geometry.crop(image))
    if not masked:
        return Decoded(position, label, Status.OK, pixels)
    if MASK_EXTENSION not in sample:
        return Decoded(position, label, Status.MASK_MISSING)
    mask = _open(sample[MASK_EXTENSION], decoder)
    if isinstance(mask, Status) or mask.size != image.size:
        return Decoded(position, label, Status.MASK_UNDECODABLE)
    covered = decoder.geometry.mask_coverage(class_pixels(mask, row["mask_id"]), decoder.grid)
    return Decoded(position, label, Status.OK, pixels, covered)


def _open(data: bytes, decoder: Decoder) -> Image.Image | Status:
    try:
        image = Image.open(io.BytesIO(data))
        # Both sizes: a picture of 1 × 90,000 pixels is small until its short side is resized.
        pixels = max(image.width * image.height, decoder.geometry.resized_pixels(image.size))
        if pixels > decoder.max_pixels:
            return Status.TOO_LARGE
        return image.convert("RGB")
    except Exception:  # Pillow's decoders raise almost anything on damaged bytes
        return Status.UNDECODABLE


class _Slice:
    """The first ``length`` bytes of a file from its present position, as a stream."""

    def __init__(self, file: BinaryIO, length: int) -> None:
        self._file, self._left = file, length

    def read(self, size: int = -1) -> bytes:
        size = self._left if size < 0 else min(size, self._left)
        data = self._file.read(size)
        self._left -= len(data)
        return data
