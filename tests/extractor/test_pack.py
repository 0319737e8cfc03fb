"""ImageNet-S and image folders as shards: bytes, labels, mask ids, what is left out, and errors."""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from classlens.extractor.errors import ClasslensError, UsageError
from classlens.extractor.pack import pack_imagefolder
from classlens.extractor.pack_imagenet_s import pack_imagenet_s
from classlens.extractor.plan import Plan, Unit, expand_shards, make_plan
from classlens.extractor.shards import read_samples

# Real synsets; the second is one of the merged classes, of whose pair only this one has a folder.
SYNSETS = ("n01440764", "n02808440", "n03000247", "n15075141")
LABELS = {"n01440764": 0, "n03000247": 490}
UNSORTED = ("n15075141", "n03000247", "n01440764", "n02808440")
IDS = {synset: place for place, synset in enumerate(sorted(UNSORTED), start=1)}


def picture(seed: int, form: str) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, form)
    return stream.getvalue()


def mask(mask_id: int) -> bytes:
    pixels = np.zeros((9, 12, 3), np.uint8)
    pixels[2:7, 3:8] = (mask_id % 256, mask_id // 256, 0)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def put(path: Path, data: bytes) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return data


@dataclass
class Tree:
    """A small ImageNet-S: 2, 3, 6 and 3 images in the four classes."""

    root: Path
    dataset: Path
    files: dict[str, bytes]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    dataset = tmp_path / "imagenet-s" / "ImageNetS919"
    files = {}
    for synset, count in zip(SYNSETS, (2, 3, 6, 3), strict=True):
        for i in range(count):
            stem = f"ILSVRC2012_val_{SYNSETS.index(synset):04d}{i:04d}"
            for name, data in (
                (f"validation/{synset}/{stem}.JPEG", picture(len(files), "JPEG")),
                (f"validation-segmentation/{synset}/{stem}.png", mask(IDS[synset])),
            ):
                files[name] = put(dataset / name, data)
    (dataset / "ImageNetS_categories_im919.txt").write_text("\n".join(UNSORTED) + "\n")
    return Tree(dataset.parent, dataset, files)


def mapping_file(path: Path) -> Path:
    """Lists the synsets in reverse, so that its labels differ from ImageNet-1k's."""
    path.write_text("".join(f"{synset} name of {synset}, other\n" for synset in SYNSETS[::-1]))
    return path


def planned(out: Path) -> Plan:
    return make_plan(expand_shards([str(out)]))


def samples_in(out: Path) -> list[dict]:
    paths = expand_shards([str(out)])
    units = [Unit(0, path, 0, path.stat().st_size, 0, masks=False) for path in paths]
    return [sample for unit in units for sample in read_samples(unit)]


def contents(folder: Path) -> Mapping[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_imagenet_s(tree: Tree, tmp_path: Path) -> None:
    out, calls = tmp_path / "out", []
    summary = pack_imagenet_s(
        tree.dataset,
        out,
        split="validation",
        shard_images=3,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert (summary.shards, summary.images, summary.masks, summary.classes) == (3, 8, 8, 2)
    assert (summary.too_few, summary.merged) == ((), ("n02808440", "n15075141"))
    assert calls == [(done, 8) for done in range(1, 9)]
    shards = [f"shard-{i:06d}.tar" for i in range(3)]
    assert sorted(contents(out)) == ["classes.txt", *shards]

    names = (out / "classes.txt").read_text().splitlines()
    assert len(names) == 1000
    assert (names[0], names[1]) == ("tench, Tinca tinca", "goldfish, Carassius auratus")
    samples = samples_in(out)
    assert [s["__key__"] for s in samples] == sorted(s["__key__"] for s in samples)
    for sample in samples:
        record = json.loads(sample["json"])
        synset, stem = record["synset"], sample["__key__"]
        assert record == {
            "synset": synset,
            "mask_id": IDS[synset],
            "source": f"validation/{synset}/{stem}.JPEG",
        }
        assert sample["jpg"] == tree.files[record["source"]]
        assert sample["mask.png"] == tree.files[f"validation-segmentation/{synset}/{stem}.png"]
        assert int(sample["cls"]) == LABELS[synset]

    plan = planned(out)
    assert [unit.images for unit in plan.units] == [3, 3, 2]
    assert all(unit.masks for unit in plan.units)
    assert plan.manifest["label"].to_list() == [0] * 2 + [490] * 6
    assert plan.manifest["mask_id"].to_list() == [IDS["n01440764"]] * 2 + [IDS["n03000247"]] * 6


def test_same_bytes_every_time_and_from_the_folder_above(tree: Tree, tmp_path: Path) -> None:
    mapping = mapping_file(tree.dataset / "LOC_synset_mapping.txt")
    for out, root in (("one", tree.dataset), ("two", tree.root)):
        pack_imagenet_s(root, tmp_path / out, split="validation")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    mapping.unlink()


def test_synset_mapping(tree: Tree, tmp_path: Path) -> None:
    """From the folder of the data set, from the one above, or as an argument."""
    mapping = mapping_file(tree.root / "LOC_synset_mapping.txt")
    pack_imagenet_s(tree.dataset, tmp_path / "above", split="validation")
    mapping = mapping.rename(tmp_path / "mapping.txt")
    pack_imagenet_s(tree.dataset, tmp_path / "named", split="validation", synset_mapping=mapping)
    assert contents(tmp_path / "above") == contents(tmp_path / "named")
    assert planned(tmp_path / "named").manifest["label"].to_list() == [3] * 2 + [1] * 6
    names = (tmp_path / "named" / "classes.txt").read_text().splitlines()
    assert names[3] == "name of n01440764, other"


def test_per_class(tree: Tree, tmp_path: Path) -> None:
    mapping = mapping_file(tmp_path / "mapping.txt")
    summary = pack_imagenet_s(
        tree.dataset, tmp_path / "out", split="validation", per_class=5, synset_mapping=mapping
    )
    assert summary.too_few == ("n01440764",)
    assert (summary.images, summary.classes) == (5, 1)
    keys = planned(tmp_path / "out").manifest["key"].to_list()
    assert keys == [f"ILSVRC2012_val_0002{i:04d}" for i in range(5)]


def test_no_merged_class_where_both_have_folders(tree: Tree, tmp_path: Path) -> None:
    """In train-full nothing is merged."""
    partners = ("n04493381", "n03887697")
    for synset in (*SYNSETS, *partners):
        put(tree.dataset / "train-full" / synset / f"{synset}_1.JPEG", picture(0, "JPEG"))
    summary = pack_imagenet_s(tree.dataset, tmp_path / "out", split="train-full")
    assert (summary.images, summary.merged) == (6, ())


def test_without_masks(tree: Tree, tmp_path: Path) -> None:
    (tree.dataset / "validation-segmentation").rename(tree.dataset / "elsewhere")
    (tree.dataset / "ImageNetS_categories_im919.txt").unlink()
    mapping = mapping_file(tmp_path / "mapping.txt")
    summary = pack_imagenet_s(
        tree.dataset, tmp_path / "out", split="validation", synset_mapping=mapping
    )
    assert (summary.images, summary.masks) == (8, 0)
    plan = planned(tmp_path / "out")
    assert not plan.units[0].masks
    assert plan.manifest["mask_id"].null_count() == 8


def test_a_missing_mask_is_left_to_the_run(tree: Tree, tmp_path: Path) -> None:
    (tree.dataset / "validation-segmentation/n03000247/ILSVRC2012_val_00020001.png").unlink()
    put(tree.dataset / "validation-segmentation/n03000247/ILSVRC2012_val_00020002.png", b"no PNG")
    mapping = mapping_file(tmp_path / "mapping.txt")
    summary = pack_imagenet_s(
        tree.dataset, tmp_path / "out", split="validation", synset_mapping=mapping
    )
    assert (summary.images, summary.masks) == (8, 7)


def test_categories(tree: Tree, tmp_path: Path) -> None:
    mapping = mapping_file(tmp_path / "mapping.txt")
    listed = (tree.dataset / "ImageNetS_categories_im919.txt").rename(tmp_path / "list.txt")

    def pack(out: str) -> None:
        pack_imagenet_s(
            tree.dataset,
            tmp_path / out,
            split="validation",
            synset_mapping=mapping,
            categories=listed,
        )

    pack("out")
    assert planned(tmp_path / "out").manifest["mask_id"].unique().to_list() == [1, 3]
    # The list of another data set: the ids are off by one, and no mask shows them.
    listed.write_text("n00000001\n" + listed.read_text())
    with pytest.raises(UsageError, match="Only 0 of 2 masks"):
        pack("wrong")
    assert not (tmp_path / "wrong").exists()
    with pytest.raises(UsageError, match=r"has 0 lists ImageNetS_categories_im919.txt"):
        pack_imagenet_s(tree.dataset, tmp_path / "none", split="validation", synset_mapping=mapping)


def test_ids_from_a_complete_set_of_folders(tmp_path: Path) -> None:
    """No list, but all 50 classes of ImageNet-S-50 have a folder: the list is their names."""
    dataset = tmp_path / "ImageNetS50"
    synsets = [f"n{i:08d}" for i in range(10, 60)]
    for place, synset in enumerate(synsets, start=1):
        put(dataset / "train-semi" / synset / f"{synset}_1.JPEG", b"not decoded")
        put(dataset / "train-semi-segmentation" / synset / f"{synset}_1.png", mask(place))
    mapping = tmp_path / "mapping.txt"
    mapping.write_text("\n".join(synsets))
    pack_imagenet_s(dataset, tmp_path / "out", split="train-semi", synset_mapping=mapping)
    assert planned(tmp_path / "out").manifest["mask_id"].to_list() == [*range(1, 51)]
    assert (tmp_path / "out" / "classes.txt").read_text().splitlines() == synsets


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"split": "test"}, "has no folder 'test'"),
        ({"split": "validation", "per_class": 7}, "no image to pack"),
        ({"split": "validation", "synset_mapping": "missing.txt"}, "cannot be read"),
        ({"split": "validation", "synset_mapping": "short.txt"}, "'n03000247' is not in the syn"),
        ({"split": "validation", "synset_mapping": "twice.txt"}, "lists 'n01440764' twice"),
        ({"split": "validation", "synset_mapping": "gap.txt"}, "empty lines"),
        ({"split": "validation", "categories": "short.txt"}, "'n03000247' is not in the category"),
    ],
)
def test_imagenet_s_errors(
    tree: Tree,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict,
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    mapping_file(tree.root / "LOC_synset_mapping.txt")
    Path("short.txt").write_text("n01440764\nn02808440\n")
    Path("twice.txt").write_text("n01440764\nn01440764\n")
    Path("gap.txt").write_text("n01440764\n\nn02808440\n")
    with pytest.raises(UsageError, match=words):
        pack_imagenet_s(tree.root, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_two_data_sets_in_root(tree: Tree, tmp_path: Path) -> None:
    (tree.root / "ImageNetS50" / "validation").mkdir(parents=True)
    with pytest.raises(UsageError, match="give one of them"):
        pack_imagenet_s(tree.root, tmp_path / "out", split="validation")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "pictures"
    for i, (name, form) in enumerate(
        {
            "dog/a.jpg": "JPEG",
            "dog/a.png": "PNG",
            "dog/a-2.JPEG": "JPEG",
            "dog/v1.0/b.c.WEBP": "WEBP",
            "big cat/a.jpg": "JPEG",
            "big cat/é.png": "PNG",
            "big cat/.hidden.jpg": "JPEG",
            ".cache/x.jpg": "JPEG",
        }.items()
    ):
        put(root / name, picture(i, form))
    put(root / "dog/notes.txt", b"no image")
    put(root / "classes.csv", b"no folder")
    return root


def test_imagefolder(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    summary = pack_imagefolder(folder, out, shard_images=4)
    assert (summary.shards, summary.images, summary.masks, summary.classes) == (2, 6, 0, 2)
    assert (out / "classes.txt").read_text() == "big cat\ndog\n"
    expected = {
        "big cat/a": ("big cat/a.jpg", 0),
        "big cat/é": ("big cat/é.png", 0),
        "dog/a-2": ("dog/a-2.JPEG", 1),
        "dog/a": ("dog/a.jpg", 1),
        "dog/a-3": ("dog/a.png", 1),
        "dog/v1.0/b_c": ("dog/v1.0/b.c.WEBP", 1),
    }
    assert planned(out).manifest["key"].to_list() == list(expected)
    for sample in samples_in(out):
        source, label = expected[sample["__key__"]]
        assert json.loads(sample["json"]) == {"class": source.split("/")[0], "source": source}
        assert int(sample["cls"]) == label
        (image,) = (sample[e] for e in ("jpg", "png", "webp") if e in sample)
        assert image == (folder / source).read_bytes()


def test_imagefolder_with_class_names(folder: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("bird\ndog a dog\nbig cat\ta lion\n")
    pack_imagefolder(folder, tmp_path / "out", class_names=names)
    assert planned(tmp_path / "out").manifest["label"].to_list() == [2, 2, 1, 1, 1, 1]
    assert (tmp_path / "out" / "classes.txt").read_text() == "bird\na dog\na lion\n"
    names.write_text("dog\nbig cat\n")  # without a tab the folder's name ends at the blank
    with pytest.raises(UsageError, match="'big cat' is not in"):
        pack_imagefolder(folder, tmp_path / "other", class_names=names)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("empty/notes.txt", "empty holds no image"),
        ("__x__/a.jpg", "webdataset passes over"),
        ("two\nlines/a.jpg", "line break"),
        ("dog/two\nlines.jpg", "line break"),
        ("dog/\udcff.jpg", "not UTF-8"),
    ],
)
def test_imagefolder_errors(folder: Path, tmp_path: Path, name: str, words: str) -> None:
    put(folder / name, b"")
    with pytest.raises(UsageError, match=words):
        pack_imagefolder(folder, tmp_path / "out")


def test_no_class_folders(tmp_path: Path) -> None:
    put(tmp_path / "flat" / "a.jpg", b"")
    with pytest.raises(UsageError, match="holds no class folders"):
        pack_imagefolder(tmp_path / "flat", tmp_path / "out")
    with pytest.raises(UsageError, match="is no folder"):
        pack_imagefolder(tmp_path / "missing", tmp_path / "out")


def test_out_must_be_empty(folder: Path, tmp_path: Path) -> None:
    put(tmp_path / "out" / "precious.txt", b"kept")
    with pytest.raises(UsageError, match="is not empty"):
        pack_imagefolder(folder, tmp_path / "out")
    assert contents(tmp_path / "out") == {"precious.txt": b"kept"}


def test_a_failed_run_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    (folder / "dog" / "z.jpg").symlink_to("nowhere.jpg")
    seen = []

    def look(done: int, _: int) -> None:
        seen.append(sorted(p.name for p in (tmp_path / "out").iterdir()))

    with pytest.raises(ClasslensError, match=r"z.jpg cannot be read .*mend or remove"):
        pack_imagefolder(folder, tmp_path / "out", shard_images=2, progress=look)
    assert seen[-1] == [f"shard-{i:06d}.tar.part" for i in range(3)]  # no name of a whole shard
    assert contents(tmp_path / "out") == {}
    (folder / "dog" / "z.jpg").unlink()
    pack_imagefolder(folder, tmp_path / "out")
