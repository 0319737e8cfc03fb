"""Shard arguments, grouping as webdataset does it, units, manifest and fingerprint."""

import io
import shutil
import string
import subprocess
import sys
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from classlens.extractor.errors import ClasslensError, ShardError, UsageError
from classlens.extractor.plan import (
    MANIFEST_SCHEMA,
    UNITS_SCHEMA,
    Plan,
    Unit,
    expand_shards,
    make_plan,
    read_member,
)
from classlens.extractor.shards import read_samples


def write_members(path: Path, members: Mapping[str, bytes] | list[tuple[str, bytes]]) -> Path:
    pairs = members.items() if isinstance(members, Mapping) else members
    with tarfile.open(path, "w") as tar:
        for name, data in pairs:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def plan_of(folder: Path, *names: str) -> Plan:
    return make_plan([write_members(folder / "one.tar", [(name, b"?") for name in names])])


Shards = Callable[..., list[Path]]


def test_no_torch() -> None:
    code = "import sys, classlens.extractor.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_tables(make_shards: Shards) -> None:
    paths = make_shards((7, 5))
    calls: list[tuple[Path, int]] = []
    plan = make_plan(paths, progress=lambda path, images: calls.append((path, images)))

    assert calls == [(paths[0], 7), (paths[1], 5)]
    assert plan.unit_images == 7
    units = plan.units_table()
    assert units.schema == UNITS_SCHEMA
    assert units["shard"].to_list() == [str(p) for p in paths]
    assert units["images"].to_list() == [7, 5]
    assert units["masks"].to_list() == [True, True]

    manifest = plan.manifest
    assert manifest.schema == MANIFEST_SCHEMA
    assert manifest["image"].to_list() == [*range(7), *range(7, 12)]
    assert manifest["unit"].to_list() == [0] * 7 + [1] * 5
    assert manifest["key"].to_list() == [f"image{i:04d}" for i in range(12)]
    assert manifest["label"].to_list() == [i % 10 for i in range(12)]
    assert manifest["mask_id"].to_list() == [i % 10 + 300 for i in range(12)]
    for row in manifest.iter_rows(named=True):
        path = paths[row["unit"]]
        with tarfile.open(path) as tar:
            member = tar.extractfile(f"{row['key']}.jpg")
            assert member is not None
            assert read_member(path, row["offset"], row["size"]) == member.read()


def test_image_axis_has_gaps_behind_short_units(make_shards: Shards) -> None:
    plan = make_plan(make_shards((2, 4, 1)))
    assert plan.unit_images == 4
    assert plan.manifest["image"].to_list() == [0, 1, 4, 5, 6, 7, 8]


@pytest.mark.parametrize(
    ("most", "sizes"), [(1, [1] * 7), (2, [1, 2, 2, 2]), (3, [2, 2, 3]), (6, [3, 4]), (7, [7])]
)
def test_slices(make_shards: Shards, most: int, sizes: list[int]) -> None:
    def drop_masks_but_one(samples: list) -> None:
        for one in samples[1:]:
            del one.members["mask.png"]

    (path,) = make_shards((7,), change=drop_masks_but_one)
    whole = make_plan([path])
    plan = make_plan([path], max_unit_images=most)
    assert [unit.images for unit in plan.units] == sizes
    assert plan.unit_images == max(sizes)
    assert all(unit.masks for unit in plan.units)  # of the tar, not of the slice
    borders = [border for unit in plan.units for border in (unit.start, unit.stop)]
    assert [borders[0], *borders[-1:]] == [whole.units[0].start, whole.units[0].stop]
    assert borders[1:-1:2] == borders[2:-1:2]  # no gap: each unit begins where the last one ends
    columns = ["key", "offset", "size", "label", "mask_id"]
    assert plan.manifest.select(columns).equals(whole.manifest.select(columns))
    read = [s["__key__"] for unit in plan.units for s in read_samples(unit)]
    assert read == whole.manifest["key"].to_list()


def test_labels_and_mask_ids(tmp_path: Path) -> None:
    labels = {
        b"7": 7,
        b" 42\n": 42,
        b"+3": 3,
        b"-1": -1,
        b"2147483647": 2**31 - 1,
        b"2147483648": None,
        b"": None,
        b"1.0": None,
        b"1_0": None,
        "٣".encode(): None,  # a digit, but not an ASCII one
        b"cat": None,
        b"0" * 65: None,
    }
    records = {
        b'{"mask_id": 919, "synset": "n1"}': 919,
        b"{}": None,
        b'{"mask_id": "3"}': None,
        b'{"mask_id": true}': None,
        b'{"mask_id": 4294967296}': None,
        b"[1]": None,
        b"{": None,
        b"\xff": None,
        b"[" * 100_000: None,
        b'{"mask_id": 1, "x": "' + b" " * (1 << 20) + b'"}': None,
    }
    members = {}
    for i, data in enumerate(labels):
        members |= {f"label{i:02d}.cls": data, f"label{i:02d}.jpg": b""}
    for i, data in enumerate(records):
        members |= {f"record{i:02d}.jpg": b"", f"record{i:02d}.json": data}
    manifest = make_plan([write_members(tmp_path / "a.tar", members)]).manifest
    assert manifest["label"].to_list() == [*labels.values()] + [None] * len(records)
    assert manifest["mask_id"].to_list() == [None] * len(labels) + [*records.values()]


def test_no_masks(make_shards: Shards) -> None:
    plan = make_plan(make_shards((3, 2), mask=False))
    assert [unit.masks for unit in plan.units] == [False, False]


def test_members_of_no_interest(tmp_path: Path) -> None:
    plan = plan_of(
        tmp_path, "__meta__/a.jpg", "README", ".hidden", "a.JPG", "a.txt", "a.seg.jpg", "b.c/d.webp"
    )
    assert plan.manifest["key"].to_list() == ["a", "b.c/d"]
    assert plan.units[0].start == 3 * 1024  # the header of a.JPG: three members stand before it


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["a.jpg", "b.jpg", "a.cls", "b.cls"], r"'a.cls' at byte 2048 .* apart .*--sort=name"),
        (["a.jpg", "a.cls", "a.CLS"], r"'a.CLS' at byte 2048 is there twice"),
        (["a.jpg", "a.png"], r"'a.png' at byte 1024 is the second image of its key 'a'"),
        (["a.jpg", "b.cls", "c.jpg"], r"key 'b' at byte 1024 has no image"),
        (["README.md", "a.jpg"], r"key 'README' at byte 0 has no image"),
        (["README"], r"holds no image"),
        ([], r"holds no image"),
        # What macOS adds: webdataset takes "x/._a.jpg" for a member of the key "x/".
        (["x/._a.jpg", "x/a.jpg", "x/._a.cls", "x/a.cls"], r"'x/._a.cls' at byte 2048 is apart"),
    ],
)
def test_faults_of_grouping(tmp_path: Path, names: list[str], words: str) -> None:
    with pytest.raises(ShardError, match=words) as caught:
        plan_of(tmp_path, *names)
    assert str(tmp_path / "one.tar") in str(caught.value)


def test_damaged_tar(make_shards: Shards) -> None:
    paths = make_shards((3, 3))
    data = paths[1].read_bytes()
    paths[1].write_bytes(data[: len(data) // 2 // 512 * 512])
    with pytest.raises(ShardError, match=r"shard-1.tar: the file is cut"):
        make_plan(paths)


# Few keys and extensions, so that groups meet: dots in folders, upper case, meta and bare names.
KEYS = st.sampled_from(["a", "b", "B", "x/a", "x.y/a", "x.y/b", "x/", "__m__/a", "__m__", "", "é"])
ENDS = st.sampled_from([".jpg", ".JPG", ".cls", ".mask.png", ".json", ".txt", ".", "", ".tar.jpg"])
WILD = st.lists(st.builds(str.__add__, KEYS, ENDS).filter(lambda n: n not in {"", "."}), max_size=8)
SAMPLE_ENDS = st.lists(ENDS.filter(bool), unique_by=str.lower, max_size=4).map(
    lambda ends: ends if any(end.lower() == ".jpg" for end in ends) else [*ends, ".png"]
)
TAME = st.dictionaries(KEYS.filter(bool), SAMPLE_ENDS, max_size=5).map(
    lambda samples: [key + end for key, ends in samples.items() for end in ends]
)


@settings(max_examples=150, deadline=None)
@given(names=st.one_of(WILD, TAME))
def test_grouping_is_that_of_webdataset(
    tmp_path_factory: pytest.TempPathFactory, names: list[str]
) -> None:
    path = write_members(
        tmp_path_factory.getbasetemp() / "grouped.tar",
        [(n, str(i).encode()) for i, n in enumerate(names)],
    )
    whole = Unit(0, path, 0, path.stat().st_size, 0, masks=False)
    try:
        theirs = list(read_samples(whole))
    except ValueError:
        theirs = None  # webdataset found a member twice
    try:
        plan = make_plan([path])
    except ShardError:
        images = [sum(e in s for e in ("jpg", "jpeg", "png", "webp")) for s in theirs or []]
        keys = [s["__key__"] for s in theirs or []]
        assert not theirs or images != [1] * len(images) or len(set(keys)) < len(keys)
        return
    assert theirs is not None
    assert plan.manifest["key"].to_list() == [s["__key__"] for s in theirs]
    assert plan.units[0].masks == any("mask.png" in s for s in theirs)
    for row, sample in zip(plan.manifest.iter_rows(named=True), theirs, strict=True):
        data = read_member(path, row["offset"], row["size"])
        assert data == next(sample[e] for e in ("jpg", "png") if e in sample)
        assert row["label"] == (int(sample["cls"]) if "cls" in sample else None)


def test_fingerprint(make_shards: Shards, tmp_path: Path) -> None:
    paths = make_shards((7, 5))
    plan = make_plan(paths)
    fingerprint = plan.fingerprint()
    assert len(fingerprint) == 64
    assert set(fingerprint) <= set(string.hexdigits)
    moved = [Path(shutil.copy(p, tmp_path)) for p in paths]
    assert make_plan(moved).fingerprint() == fingerprint

    renamed = [moved[0].rename(tmp_path / "other.tar"), moved[1]]
    others = [
        make_plan(renamed),
        make_plan(paths[::-1]),
        make_plan(paths, max_unit_images=6),
        make_plan(paths[:1]),
        make_plan(make_shards((7, 5), mask=False)),
    ]
    for column in ("key", "offset", "size", "label", "mask_id"):
        first = pl.col("image") == 0
        value = pl.lit("?") if column == "key" else pl.col(column) + 1
        changed = pl.when(first).then(value).otherwise(pl.col(column)).alias(column)
        others.append(replace(plan, manifest=plan.manifest.with_columns(changed)))
    assert len({fingerprint, *(other.fingerprint() for other in others)}) == len(others) + 1


def test_read_member_of_a_lost_file(make_shards: Shards) -> None:
    (path,) = make_shards((1,))
    with pytest.raises(ShardError, match="has no 10 bytes at byte"):
        read_member(path, path.stat().st_size - 5, 10)
    path.unlink()
    with pytest.raises(ShardError, match="cannot be opened"):
        read_member(path, 0, 10)


def test_expand_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = ["val-000.tar", "val-001.tar", "sub/b.tar", "sub/a.tar", "sub/deep/c.tar", "{x}.tar"]
    for name in [*names, "sub/._a.tar", "sub/d.tar.part"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    sub = ["sub/a.tar", "sub/b.tar", "sub/deep/c.tar"]

    def expanded(*arguments: str) -> list[str]:
        paths = expand_shards(arguments)
        assert all(path.is_absolute() for path in paths)
        return [path.relative_to(tmp_path).as_posix() for path in paths]

    assert expanded("val-001.tar", "sub") == ["val-001.tar", *sub]
    assert expanded("val-{000..001}.tar", "{x}.tar") == ["val-000.tar", "val-001.tar", "{x}.tar"]
    assert expanded("sub/../{val-001,val-000}.tar") == ["val-001.tar", "val-000.tar"]
    (tmp_path / "link.tar").symlink_to("val-000.tar")
    assert expanded("link.tar") == ["link.tar"]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ([], UsageError, "No shards given"),
        (["pipe:cat a.tar"], UsageError, "copy the tar here"),
        (["https://example.org/a.tar"], UsageError, "copy the tar here"),
        (["a{0..1"], UsageError, "unbalanced braces"),
        (["missing.tar"], ShardError, "missing.tar does not exist"),
        (["{a,b}.tar"], ShardError, "b.tar does not exist"),
        (["empty"], ShardError, "holds no .*classlens pack"),
        (["a.tar", "./a.tar"], UsageError, "named twice"),
        (["a.tar", "link.tar"], UsageError, "named twice"),
        (["link.tar", "link.tar"], UsageError, "named twice"),
    ],
)
def test_refused_arguments(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    error: type[ClasslensError],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.tar").touch()
    (tmp_path / "link.tar").symlink_to("a.tar")
    (tmp_path / "empty").mkdir()
    with pytest.raises(error, match=words):
        expand_shards(arguments)


def test_no_paths() -> None:
    with pytest.raises(UsageError, match="No shards given"):
        make_plan([])
