"""ImageNet-S -> webdataset tar shards, with its masks; see ``pack`` for what a sample is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from classlens.extractor.errors import UsageError
from classlens.extractor.pack import (
    PackSummary,
    Progress,
    check_known,
    class_folders,
    make_sample,
    picture_files,
    read_lines,
    read_mapping,
    resized,
    unique_key,
    write_shards,
)

SYNSET_MAPPING_FILE = "LOC_synset_mapping.txt"

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


def pack_imagenet_s(
    root: str | Path,
    out: str | Path,
    *,
    split: str,
    per_class: int | None = None,
    shard_images: int = 512,
    synset_mapping: str | Path | None = None,
    categories: str | Path | None = None,
    resize: int | None = None,
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
        resize: short side in pixels of larger pictures; see ``pack_resize.Resizer``.
        progress: called with (images packed, images in all).

    Raises:
        UsageError: a folder or list is missing or does not fit, or OUT is not empty.
    """
    dataset = _dataset_folder(Path(root), split)
    synsets = class_folders(dataset / split)
    labels, names = _imagenet_classes(dataset, synset_mapping)
    check_known(synsets, labels, "the synset mapping")
    segmentation = dataset / f"{split}-segmentation"
    mask_ids: dict[str, int] = {}
    if segmentation.is_dir():
        mask_ids = _mask_ids(dataset, synsets, categories)
        check_known(synsets, mask_ids, "the category list")

    merged = [s for merged_in, s in _MERGED.items() if s in synsets and merged_in not in synsets]
    too_few: list[str] = []
    chosen: dict[str, list[Path]] = {}
    for synset in synsets:
        images = picture_files(dataset / split / synset)
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
                yield make_sample(
                    unique_key(image.stem, taken),
                    image,
                    labels[synset],
                    record,
                    mask if mask_ids and mask.is_file() else None,
                )

    total = sum(map(len, chosen.values()))
    packed, loss = resized(samples(), total, resize)
    shards, masks = write_shards(Path(out), packed, total, shard_images, names, progress)
    classes = sum(map(bool, chosen.values()))
    return PackSummary(
        Path(out), shards, total, masks, classes, tuple(too_few), tuple(sorted(merged)), loss()
    )


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


def _imagenet_classes(
    dataset: Path, synset_mapping: str | Path | None
) -> tuple[dict[str, int], list[str]]:
    """Label of each synset, and the names of all classes in label order."""
    if synset_mapping is not None:
        return read_mapping(Path(synset_mapping))
    for folder in (dataset, dataset.parent):
        if (folder / SYNSET_MAPPING_FILE).is_file():
            return read_mapping(folder / SYNSET_MAPPING_FILE)
    from timm.data.imagenet_info import ImageNetInfo  # takes seconds: imports torch

    info = ImageNetInfo("imagenet-1k")
    labels = {synset: label for label, synset in enumerate(info.label_names())}
    return labels, list(info.label_descriptions())


def _mask_ids(
    dataset: Path, synsets: Sequence[str], categories: str | Path | None
) -> dict[str, int]:
    """Mask id of each synset: its 1-based place among the data set's synsets in sorted order."""
    if categories is not None:
        listed = read_lines(Path(categories))
    else:
        pattern = f"ImageNetS_categories_im{_DATASETS.get(dataset.name, '*')}.txt"
        files = [file for folder in (dataset, dataset.parent) for file in folder.glob(pattern)]
        if len(files) == 1:
            listed = read_lines(files[0])
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
