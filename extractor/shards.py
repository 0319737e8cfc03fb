"""Tar shards -> decoded images. A bad image is a row with a status, never a gap."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import polars as pl
from PIL import Image

from classlens.extractor.errors import ShardError
from classlens.extractor.geometry import Geometry, class_pixels
from classlens.extractor.interventions import TokenRemoval
from classlens.extractor.jpeg import to_rgb
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

    name: a key of ``jpeg.DECODERS``. classes: C, the bound of a valid label. masks: whether masks
    are read at all. removal: which image tokens stay; None for all.
    """

    name: str

    geometry: Geometry
    grid: tuple[int, int]
    classes: int
    max_pixels: int
    masks: bool
    removal: TokenRemoval | None = None


@dataclass
class Decoded:
    """What became of one planned image.

    position: place within the unit. label: −1 when there is none. mask_fraction: uint8 [G], the
    share of each patch that shows the class, or None. kept: bool [G], the image tokens that token
    removal leaves, or None.
    """

    position: int
    label: int
    status: Status
    mask_fraction: np.ndarray | None = None
    kept: np.ndarray | None = None


@dataclass(frozen=True)
class Planned:
    """One planned image, read but not decoded: its row of the manifest and its members' bytes."""

    position: int
    row: dict
    members: dict
    masked: bool


def read_samples(unit: Unit) -> Iterator[dict]:
    """The webdataset samples of a unit: ``__key__`` and the bytes of each member by extension."""
    with unit.path.open("rb") as file:
        file.seek(unit.start)
        source = {"url": str(unit.path), "stream": _Slice(file, unit.stop - unit.start)}
        members = wds.tariterators.tar_file_expander([source])
        yield from wds.tariterators.group_by_keys(members)


def planned_images(unit: Unit, rows: pl.DataFrame) -> Iterator[Planned]:
    """All planned images of a unit, in order.

    Args:
        rows: the unit's part of the manifest.

    Raises:
        ShardError: the tar no longer holds what was planned.
    """
    # webdataset ends in silence on a damaged tar, so the sequence of keys is held to the plan.
    samples = read_samples(unit)
    for position, row in enumerate(rows.iter_rows(named=True)):
        sample = next(samples, None)
        if sample is None or sample["__key__"] != row["key"]:
            found = "the end of the shard" if sample is None else sample["__key__"]
            raise ShardError(
                f"{unit.path} changed since it was planned: expected image {row['key']} at byte "
                f"{row['offset']}, found {found}; restore the file or extract to a new store."
            )
        yield Planned(position, row, sample, unit.masks)


def decode(image: Planned, decoder: Decoder, pixels: np.ndarray) -> Decoded:
    """Decodes, resizes and crops one image and its mask.

    Args:
        pixels: uint8 [H, W, 3]; holds the image afterwards when its status is OK.
    """
    position, row = image.position, image.row
    label = -1 if row["label"] is None else row["label"]
    if not 0 <= label < decoder.classes:
        return Decoded(position, label, Status.LABEL_INVALID)
    data = next(image.members[e] for e in IMAGE_EXTENSIONS if e in image.members)
    picture = _open(data, decoder)
    if isinstance(picture, Status):
        return Decoded(position, label, picture)
    pixels[...] = np.asarray(decoder.geometry.crop(picture))
    if not (decoder.masks and image.masked):
        return Decoded(position, label, Status.OK)
    if MASK_EXTENSION not in image.members:
        return Decoded(position, label, Status.MASK_MISSING)
    mask = _open(image.members[MASK_EXTENSION], decoder)
    if isinstance(mask, Status) or mask.size != picture.size:
        return Decoded(position, label, Status.MASK_UNDECODABLE)
    covered = decoder.geometry.mask_coverage(class_pixels(mask, row["mask_id"]), decoder.grid)
    if decoder.removal is None:
        return Decoded(position, label, Status.OK, covered)
    kept = decoder.removal.kept(covered)
    emptied = not kept.any() and not decoder.removal.may_empty
    return Decoded(position, label, Status.NO_TOKENS if emptied else Status.OK, covered, kept)


def kept_tokens(images: Sequence[Decoded]) -> np.ndarray | None:
    """bool [N, G], the image tokens of some images that stay; None where none is removed."""
    kept = [image.kept for image in images if image.kept is not None]
    assert len(kept) in (0, len(images))
    return np.stack(kept) if kept else None


def _open(data: bytes, decoder: Decoder) -> Image.Image | Status:
    try:
        image = Image.open(io.BytesIO(data))
        # Both sizes: a picture of 1 × 90,000 pixels is small until its short side is resized.
        pixels = max(image.width * image.height, decoder.geometry.resized_pixels(image.size))
        if pixels > decoder.max_pixels:
            return Status.TOO_LARGE
        return to_rgb(data, image, decoder.name)
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
