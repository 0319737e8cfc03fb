"""Image folders -> webdataset tar shards. Images are copied byte for byte, never encoded anew.

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

CLASSES_FILE = "classes.txt"
SYNSET_MAPPING_FILE = "LOC_synset_mapping.txt"

Progress = Callable[[int, int], None]

_IMAGES = {".jpg": "jpg", ".jpeg": "jpg", ".png": "png", ".webp": "webp"}
_DATASETS = {"ImageNetS919": 919, "ImageNetS300": 300, "ImageNetS50": 50}

# ImageNet-S files the images of the first class under the second (its README, "How to match the
# class id"). Which of the two ImageNet-1k labels an image there has can no longer be told.
_MERGED = {
    "n04356056": "n04355933",
    "n04493381": "n02808440",
    "n03642806": "n03832673",
    "n04008634": "n03773504",
    "n03887697": "n15075141",
}


@dataclass(frozen=True)
class PackSummary:
    """What was packed, and what was left out.

    images, masks: number of samples and of those with a mask. classes: number of class folders
    they come from. too_few: classes left out for having fewer than ``per_class`` images.
    merged: ImageNet-S classes left out because they mix two ImageNet-1k labels.
    """

    out: Path
    shards: int
    images: int
    masks: int
    classes: int
    too_few: tuple[str, ...] = ()
    merged: tuple[str, ...] = ()


def pack_imagenet_s(
    root: str | Path,
    out: str | Path,
    *,
    split: str,
    per_class: int | None = None,
    shard_images: int = 512,
    synset_mapping: str | Path | None = None,
    categories: str | Path | None = None,
    progress: Progress | None = None,
) -> PackSummary:
    """Pack a split of ImageNet-S as its authors' tools lay it out.

    ROOT is ``ImageNetS919`` (or 300, 50) or the folder that holds it, with
    ``<split>/<synset>/*.JPEG`` and, for the splits that have masks (validation, train-semi),
    ``<split>-segmentation/<synset>/*.png``. The key is the file's stem, the label the ImageNet-1k
    index, the json ``{"synset", "mask_id", "source"}``. Without that segmentation folder the
    shards have neither masks nor mask ids.

    A class that ImageNet-S merged from two ImageNet-1k classes is left out, as in the paper: the
    label of its images is not known. Mask ids are the 1-based places in the *sorted* synset list
    (the published ``ImageNetS_categories_im919.txt`` is not sorted); before packing, one mask of
    each class is opened to see that the ids fit.

    Args:
        per_class: take the first images of each class in the order of names, and leave out
            classes that have fewer. The paper takes 5.
        synset_mapping: lines ``<synset> <name>`` in label order. Default: LOC_synset_mapping.txt
            in ROOT, else timm's list of ImageNet-1k.
        categories: one synset a line. Default: ImageNetS_categories_im*.txt in ROOT, else the
            class folders of the split when there are as many as the data set has classes.
        progress: called with (images packed, images in all).

    Raises:
        UsageError: a folder or list is missing or does not fit, or OUT is not empty.
    """
    dataset = _dataset_folder(Path(root), split)
    synsets = _class_folders(dataset / split)
    labels, names = _imagenet_classes(dataset, synset_mapping)
    _check_known(synsets, labels, "the synset mapping")
    segmentation = dataset / f"{split}-segmentation"
    mask_ids: dict[str, int] = {}
    if segmentation.is_dir():
        mask_ids = _mask_ids(dataset, synsets, categories)
        _check_known(synsets, mask_ids, "the category list")

    merged = [s for merged_in, s in _MERGED.items() if s in synsets and merged_in not in synsets]
    too_few: list[str] = []
    chosen: dict[str, list[Path]] = {}
    for synset in synsets:
        images = _images(dataset / split / synset)
        if synset in merged:
            continue
        if per_class is not None and len(images) < per_class:
            too_few.append(synset)
        else:
            chosen[synset] = images[:per_class]
    if mask_ids:
        _check_mask_ids(segmentation, chosen, mask_ids)

    taken: set[str] = set()

    def samples() -> Iterator[dict[str, Any]]:
        for synset, images in chosen.items():
            for image in images:
                mask = segmentation / synset / f"{image.stem}.png"
                record: dict[str, Any] = {"synset": synset}
                if mask_ids:
                    record["mask_id"] = mask_ids[synset]
                record["source"] = image.relative_to(dataset).as_posix()
                yield _sample(
                    _unique_key(image.stem, taken),
                    image,
                    labels[synset],
                    record,
                    mask if mask_ids and mask.is_file() else None,
                )

    total = sum(map(len, chosen.values()))
    shards, masks = write_shards(Path(out), samples(), total, shard_images, names, progress)
    classes = sum(map(bool, chosen.values()))
    return PackSummary(
        Path(out), shards, total, masks, classes, tuple(too_few), tuple(sorted(merged))
    )


def pack_imagefolder(
    root: str | Path,
    out: str | Path,
    *,
    shard_images: int = 512,
    class_names: str | Path | None = None,
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
        progress: called with (images packed, images in all).

    Raises:
        UsageError: no class folder, one without images or not in the list, or OUT is not empty.
    """
    root = Path(root)
    folders = _class_folders(root)
    if class_names is None:
        labels, names = {folder: label for label, folder in enumerate(folders)}, folders
    else:
        labels, names = _read_mapping(Path(class_names))
        _check_known(folders, labels, str(class_names))
    images = {folder: _images(root / folder, deep=True) for folder in folders}
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
                key = _unique_key((source.parent / source.stem).as_posix(), taken)
                record = {"class": folder, "source": source.as_posix()}
                yield _sample(key, image, labels[folder], record, None)

    total = sum(map(len, images.values()))
    shards, masks = write_shards(Path(out), samples(), total, shard_images, names, progress)
    return PackSummary(Path(out), shards, total, masks, len(folders))


def _dataset_folder(root: Path, split: str) -> Path:
    found = [f for f in (root, *(root / name for name in _DATASETS)) if (f / split).is_dir()]
    if not found:
        raise UsageError(
            f"{root} has no folder {split!r}, nor has an {'/'.join(_DATASETS)} in it; give the "
            "folder of ImageNet-S, and a split such as validation or train-semi."
        )
    if len(found) > 1:
        raise UsageError(
            f"{root} holds several data sets with a split {split!r}; give one of them: "
            f"{', '.join(map(str, found))}."
        )
    return found[0]


def _class_folders(root: Path) -> list[str]:
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


def _images(folder: Path, *, deep: bool = False) -> list[Path]:
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


def _imagenet_classes(
    dataset: Path, synset_mapping: str | Path | None
) -> tuple[dict[str, int], list[str]]:
    """Label of each synset, and the names of all classes in label order."""
    if synset_mapping is not None:
        return _read_mapping(Path(synset_mapping))
    for folder in (dataset, dataset.parent):
        if (folder / SYNSET_MAPPING_FILE).is_file():
            return _read_mapping(folder / SYNSET_MAPPING_FILE)
    from timm.data.imagenet_info import ImageNetInfo  # takes seconds: imports torch

    info = ImageNetInfo("imagenet-1k")
    labels = {synset: label for label, synset in enumerate(info.label_names())}
    return labels, list(info.label_descriptions())


def _read_mapping(path: Path) -> tuple[dict[str, int], list[str]]:
    """Lines ``<folder> <name>``: the label (line number) of each folder, and the names."""
    labels: dict[str, int] = {}
    names: list[str] = []
    for line in _lines(path):
        folder, _, name = line.partition("\t" if "\t" in line else " ")
        if folder in labels:
            raise UsageError(f"{path} lists {folder!r} twice; give each class one line.")
        labels[folder] = len(names)
        names.append(name.strip() or folder)
    return labels, names


def _lines(path: Path) -> list[str]:
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


def _check_known(folders: Iterable[str], known: Mapping[str, int], what: str) -> None:
    for folder in folders:
        if folder not in known:
            raise UsageError(
                f"The class folder {folder!r} is not in {what}; give the list that belongs to "
                "these folders."
            )


def _mask_ids(
    dataset: Path, synsets: Sequence[str], categories: str | Path | None
) -> dict[str, int]:
    """Mask id of each synset: its 1-based place among the data set's synsets in sorted order."""
    if categories is not None:
        listed = _lines(Path(categories))
    else:
        pattern = f"ImageNetS_categories_im{_DATASETS.get(dataset.name, '*')}.txt"
        files = [file for folder in (dataset, dataset.parent) for file in folder.glob(pattern)]
        if len(files) == 1:
            listed = _lines(files[0])
        elif not files and len(synsets) == _DATASETS.get(dataset.name):
            listed = synsets
        else:
            raise UsageError(
                f"{dataset} has {len(files)} lists {pattern}, and mask ids need one; put the list "
                "of the ImageNet-S repository there, or name it with --categories."
            )
    return {synset: place for place, synset in enumerate(sorted(set(listed)), start=1)}


def _check_mask_ids(
    segmentation: Path, chosen: Mapping[str, Sequence[Path]], mask_ids: Mapping[str, int]
) -> None:
    """Refuse ids that are not in the masks: a wrong list would mark the wrong pixels in silence."""
    import numpy as np
    from PIL import Image

    opened = fits = 0
    for synset, images in chosen.items():
        mask = next((segmentation / synset / f"{image.stem}.png" for image in images), None)
        if mask is None or not mask.is_file():
            continue
        try:
            with Image.open(mask) as picture:
                red, green, _ = np.moveaxis(np.asarray(picture.convert("RGB"), np.int32), 2, 0)
        except Exception:  # Pillow raises almost anything; the run reports the image itself
            continue
        opened += 1
        fits += bool(np.any(red + 256 * green == mask_ids[synset]))
    # A mask may miss its class here and there; a wrong list misses nearly all.
    if 2 * fits < opened:
        raise UsageError(
            f"Only {fits} of {opened} masks in {segmentation} show the id of their class; give "
            "with --categories the list that belongs to this data set."
        )


def _unique_key(name: str, taken: set[str]) -> str:
    """A key not in ``taken``, and there from now on, without dots behind its last slash."""
    folder, slash, stem = name.rpartition("/")
    key = wanted = folder + slash + stem.replace(".", "_")
    count = 1
    while key in taken:
        count += 1
        key = f"{wanted}-{count}"
    taken.add(key)
    return key


def _sample(
    key: str, image: Path, label: int, record: dict[str, Any], mask: Path | None
) -> dict[str, Any]:
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
