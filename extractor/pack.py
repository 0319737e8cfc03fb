"""Image folders -> webdataset tar shards. Images are copied byte for byte unless resized.

A sample has the members ``KEY.jpg`` (or png, webp), ``KEY.cls`` (the label in ASCII), ``KEY.json``
and, where there is a segmentation mask, ``KEY.mask.png``. Samples stand in the order of class
folders and file names, and the same input gives the same bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from classlens.extractor.errors import UsageError
from classlens.extractor.pack_resize import ResizeLoss, Resizer

CLASSES_FILE = "classes.txt"

Progress = Callable[[int, int], None]

_IMAGES = {".jpg": "jpg", ".jpeg": "jpg", ".png": "png", ".webp": "webp"}


@dataclass(frozen=True)
class PackSummary:
    """What was packed, and what was left out.

    images, masks: number of samples and of those with a mask. classes: number of class folders
    they come from. too_few: classes left out for having fewer than ``per_class`` images.
    merged: ImageNet-S classes left out because they mix two ImageNet-1k labels. resize: the loss
    by resizing, None where all bytes are copies.
    """

    out: Path
    shards: int
    images: int
    masks: int
    classes: int
    too_few: tuple[str, ...] = ()
    merged: tuple[str, ...] = ()
    resize: ResizeLoss | None = None


def pack_imagefolder(
    root: str | Path,
    out: str | Path,
    *,
    shard_images: int = 512,
    class_names: str | Path | None = None,
    resize: int | None = None,
    progress: Progress | None = None,
) -> PackSummary:
    """Pack ``ROOT/<class>/**/*.jpg|jpeg|png|webp`` (upper or lower case).

    Labels are 0, 1, … over the sorted class folders. The key is the image's path in ROOT without
    its extension, with ``_`` for each dot in the file name, since a webdataset key ends at the
    first one; a key that this makes twice gets ``-2``, ``-3``, … The json is
    ``{"class", "source"}``. Hidden folders are passed over.

    Args:
        class_names: lines ``<class folder> <name>`` in label order, e.g. LOC_synset_mapping.txt;
            a tab instead of the blank where a folder's name has blanks itself; the name may be
            missing. It may list more classes than ROOT has.
        resize: short side in pixels of larger pictures; see ``pack_resize.Resizer``.
        progress: called with (images packed, images in all).

    Raises:
        UsageError: no class folder, one without images or not in the list, or OUT is not empty.
    """
    root = Path(root)
    folders = class_folders(root)
    if class_names is None:
        labels, names = {folder: label for label, folder in enumerate(folders)}, folders
    else:
        labels, names = read_mapping(Path(class_names))
        check_known(folders, labels, str(class_names))
    images = {folder: picture_files(root / folder, deep=True) for folder in folders}
    for folder, found in images.items():
        if not found:
            raise UsageError(
                f"{root / folder} holds no image ({', '.join(_IMAGES)}); move it out of {root}, "
                "or it would take a label."
            )
    taken: set[str] = set()

    def samples() -> Iterator[dict[str, Any]]:
        for folder, found in images.items():
            for image in found:
                source = image.relative_to(root)
                key = unique_key((source.parent / source.stem).as_posix(), taken)
                record = {"class": folder, "source": source.as_posix()}
                yield make_sample(key, image, labels[folder], record, None)

    total = sum(map(len, images.values()))
    packed, loss = resized(samples(), total, resize)
    shards, masks = write_shards(Path(out), packed, total, shard_images, names, progress)
    return PackSummary(Path(out), shards, total, masks, len(folders), resize=loss())


def class_folders(root: Path) -> list[str]:
    """Sorted names of the folders in a folder; symbolic links count."""
    if not root.is_dir():
        raise UsageError(f"{root} is no folder; give the folder that holds one folder per class.")
    names = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not names:
        raise UsageError(f"{root} holds no class folders; give the folder above them.")
    for name in names:
        if name.startswith("__") and name.endswith("__"):
            raise UsageError(f"webdataset passes over names like {name}; rename {root / name}.")
        _check_name(root, name)
    return names


def picture_files(folder: Path, *, deep: bool = False) -> list[Path]:
    """Images of a folder in the order of their names, and with ``deep`` those of its folders."""
    found: list[Path] = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if deep and not name.startswith(".")]
        for name in files:
            image = Path(parent, name)
            if image.suffix.lower() in _IMAGES and not name.startswith("."):
                _check_name(folder, image.relative_to(folder).as_posix())
                found.append(image)
    return sorted(found)


def _check_name(folder: Path, name: str) -> None:
    if name.splitlines() != [name] or name.encode(errors="ignore").decode() != name:
        raise UsageError(
            f"The name {name!r} in {folder} has a line break or is not UTF-8; rename the file."
        )


def read_mapping(path: Path) -> tuple[dict[str, int], list[str]]:
    """Lines ``<folder> <name>``: the label (line number) of each folder, and the names."""
    labels: dict[str, int] = {}
    names: list[str] = []
    for line in read_lines(path):
        folder, _, name = line.partition("\t" if "\t" in line else " ")
        if folder in labels:
            raise UsageError(f"{path} lists {folder!r} twice; give each class one line.")
        labels[folder] = len(names)
        names.append(name.strip() or folder)
    return labels, names


def read_lines(path: Path) -> list[str]:
    """The lines of a text file without blanks around them; none may be empty."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read ({error}); give a UTF-8 text file.") from error
    lines = [line.strip() for line in lines]
    while lines and not lines[-1]:
        lines.pop()
    if not all(lines):
        raise UsageError(f"{path} is empty or has empty lines; give one class a line.")
    return lines


def check_known(folders: Iterable[str], known: Mapping[str, int], what: str) -> None:
    """Refuses a class folder that is not in the list ``what``."""
    for folder in folders:
        if folder not in known:
            raise UsageError(
                f"The class folder {folder!r} is not in {what}; give the list that belongs to "
                "these folders."
            )


def unique_key(name: str, taken: set[str]) -> str:
    """A key not in ``taken``, and there from now on, without dots behind its last slash."""
    folder, slash, stem = name.rpartition("/")
    key = wanted = folder + slash + stem.replace(".", "_")
    count = 1
    while key in taken:
        count += 1
        key = f"{wanted}-{count}"
    taken.add(key)
    return key


def make_sample(
    key: str, image: Path, label: int, record: dict[str, Any], mask: Path | None
) -> dict[str, Any]:
    """``__key__`` and the bytes of each member by its extension.

    Args:
        record: what the json says. mask: None where there is none.

    Raises:
        UsageError: a file cannot be read.
    """
    sample = {
        "__key__": key,
        _IMAGES[image.suffix.lower()]: _read(image),
        "cls": str(label).encode(),
        "json": json.dumps(record).encode(),
    }
    if mask is not None:
        sample["mask.png"] = _read(mask)
    return sample


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read ({error.strerror}); mend or remove it and pack again."
        ) from error


def resized(
    samples: Iterator[dict[str, Any]], total: int, short_side: int | None
) -> tuple[Iterator[dict[str, Any]], Callable[[], ResizeLoss | None]]:
    """The samples with smaller pictures, and a function that tells the loss once they are written.

    Args:
        short_side: in pixels; None leaves the samples as they are.
    """
    if short_side is None:
        return samples, lambda: None
    resizer = Resizer(short_side, total)
    return map(resizer, samples), resizer.loss


def write_shards(
    out: Path,
    samples: Iterator[dict[str, Any]],
    total: int,
    shard_images: int,
    names: Sequence[str],
    progress: Progress | None,
) -> tuple[int, int]:
    """Write all shards, then the class names; the same samples make the same bytes.

    Args:
        samples: ``__key__`` and the bytes of each member by its extension.
        total: number of samples.

    Returns:
        the numbers of shards and of masks.

    Raises:
        UsageError: there is no sample, or OUT is not empty.
    """
    if total == 0:
        raise UsageError("There is no image to pack; check the folder and --per-class.")
    # Before webdataset is imported: it then runs no shell and unpickles nothing.
    os.environ["WDS_SECURE"] = "1"
    from webdataset.writer import TarWriter

    done = masks = 0
    with _complete_or_nothing(out) as parts:
        while done < total:
            part = out / f"shard-{len(parts):06d}.tar.part"
            parts.append(part)
            with (
                part.open("xb") as file,
                TarWriter(file, encoder=False, mtime=0, user="", group="") as tar,
            ):
                for sample in islice(samples, shard_images):
                    tar.write(sample)
                    done += 1
                    masks += "mask.png" in sample
                    if progress is not None:
                        progress(done, total)
        shards = len(parts)
        part = out / f"{CLASSES_FILE}.part"
        parts.append(part)
        part.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    return shards, masks


@contextmanager
def _complete_or_nothing(out: Path) -> Iterator[list[Path]]:
    """A list for the ``*.part`` files written in OUT; all get their names at the end, or go.

    An interrupted run so never leaves some of the shards looking like all of them.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        occupied = any(out.iterdir())
    except OSError as error:
        raise UsageError(f"{out} cannot be made or read ({error.strerror}).") from error
    if occupied:
        raise UsageError(f"{out} is not empty; give a new folder or empty this one.")
    parts: list[Path] = []
    try:
        yield parts
        for part in parts:
            part.rename(part.with_suffix(""))
    except BaseException:
        for part in parts:
            part.unlink(missing_ok=True)
            part.with_suffix("").unlink(missing_ok=True)
        raise
