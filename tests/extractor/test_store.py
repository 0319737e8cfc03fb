import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import zarr

from classlens.extractor import ledger
from classlens.extractor.errors import ConfigMismatchError, StoreError
from classlens.extractor.schema import (
    STAGING_DIR,
    Layout,
    Status,
    all_arrays,
    committed_units,
    ledger_file,
    read_layout,
    shard_file,
)
from classlens.extractor.store import FLOAT16_MAX, Store, Tables, status_totals, verify

LAYOUT = Layout(
    images=14,
    unit_images=7,
    blocks=3,
    streams=("resid", "attn"),
    prefix_kinds=("cls",),
    grid=(2, 3),
    classes=10,
    topk=2,
    masks=True,
)
COUNTS = (7, 5)  # the second unit has two places of padding


def tables() -> Tables:
    places = [(u, u * LAYOUT.unit_images + i) for u, n in enumerate(COUNTS) for i in range(n)]
    manifest = pl.DataFrame(
        {
            "image": [image for _, image in places],
            "key": [f"key{image}" for _, image in places],
            "unit": [unit for unit, _ in places],
        },
        schema_overrides={"unit": pl.Int32},
    )
    return Tables(manifest, pl.DataFrame({"unit": [0, 1]}), pl.DataFrame({"class": range(10)}))


def attributes(**fingerprint) -> dict:
    return {"config": {}, "fingerprint": {"dtype": "float32", **fingerprint}}


def expected(spec, unit: int) -> np.ndarray:
    """Values of a unit's part of an array, different in every place."""
    shape = (COUNTS[unit], *spec.shard(LAYOUT)[1:])
    values = np.random.default_rng([unit, len(spec.path)]).integers(0, 9, shape)
    return np.zeros(shape, int) if spec.path == "images/status" else values


def fill(store: Store, units=(0, 1)) -> None:
    for unit in units:
        with store.stage(unit) as staged:
            assert staged is not None
            for spec in store.arrays:
                staged.put(spec.path, np.arange(COUNTS[unit]), expected(spec, unit))
    store.finish()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open_or_create(tmp_path / "store", LAYOUT, tables(), attributes())


def test_any_zarr_reader_sees_what_was_put(store):
    fill(store)
    root = zarr.open_group(str(store.path), mode="r")
    for spec in all_arrays(LAYOUT):
        array = root[spec.path]
        assert array.shape == spec.shape(LAYOUT)
        assert array.metadata.dimension_names == spec.axes
        for unit, count in enumerate(COUNTS):
            first = unit * LAYOUT.unit_images
            np.testing.assert_array_equal(array[first : first + count], expected(spec, unit))
            padding = np.asarray(array[first + count : first + LAYOUT.unit_images])
            np.testing.assert_array_equal(padding, np.full_like(padding, spec.fill))
    assert read_layout(store.path) == LAYOUT
    assert not (store.path / "_staging").exists()


def test_a_unit_is_one_file_an_array_and_one_chunk_a_slab(store):
    fill(store)
    for spec in all_arrays(LAYOUT):
        array = zarr.open_array(str(store.path / spec.path), mode="r")
        assert array.shards == spec.shard(LAYOUT)
        assert array.chunks == spec.chunk(LAYOUT)
        files = {str(p.relative_to(store.path)) for p in (store.path / spec.path / "c").rglob("*")}
        assert {shard_file(spec, 0), shard_file(spec, 1)} <= files
    rank = zarr.open_array(str(store.path / "scores/rank"), mode="r")
    assert rank.chunks == (7, 1, 1, 7)


def test_floats_beyond_float16_are_clipped_and_counted(store):
    with store.stage(0) as staged:
        values = np.zeros((1, 3, 2, 7), np.float32)
        values[0, 0, 0, :3] = (1e6, -1e6, np.nan)
        staged.put("scores/label_logit", np.array([0]), values)
    stored = zarr.open_array(str(store.path / "scores/label_logit"), mode="r")[0, 0, 0]
    assert stored[:2].tolist() == [FLOAT16_MAX, -FLOAT16_MAX]
    assert np.isnan(stored[2])
    assert ledger.read_record(store.path, 0).saturated == 2


def test_a_unit_is_committed_once(store):
    fill(store, [0])
    before = (store.path / ledger_file(0)).read_bytes()
    with store.stage(0) as staged:
        assert staged is None
    record = ledger.read_record(store.path, 0)
    assert not ledger.commit(store.path, record)
    assert (store.path / ledger_file(0)).read_bytes() == before
    assert committed_units(store.path) == [0]


def test_a_leased_unit_is_left_to_its_holder(store):
    with store.stage(0) as first, store.stage(0) as second, store.stage(1) as other:
        assert first is not None
        assert second is None
        assert other is not None


def test_workers_that_start_and_end_together_leave_each_other_alone(store):
    """Each takes, gives back and closes the staging area at whatever moment, at most one a time."""
    holders, most = [], []

    def work(worker: int) -> None:
        taken = 0
        while taken < 100:
            with ledger.lease(store.path, 0) as staging:
                if staging is not None:
                    holders.append(worker)
                    most.append(len(holders))
                    (staging / "part").write_text(str(worker))
                    assert (staging / "part").read_text() == str(worker)
                    taken += 1
                    holders.remove(worker)
            ledger.close_staging(store.path)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert set(most) == {1}
    assert not (store.path / STAGING_DIR).exists()


def test_an_error_commits_nothing_and_its_leftovers_are_cleared(store):
    with pytest.raises(RuntimeError, match="boom"), store.stage(0):
        raise RuntimeError("boom")
    assert committed_units(store.path) == []
    assert any((store.path / "_staging").iterdir())
    fill(store)
    assert not (store.path / "_staging").exists()
    assert verify(store.path) == []


def test_a_crash_between_commit_and_promotion_is_mended(store, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(ledger, "promote", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fill(store, [0])
    rank = store.path / shard_file(all_arrays(LAYOUT)[4], 0)
    assert committed_units(store.path) == [0]
    assert not rank.exists()
    with Store(store.path).stage(0) as staged:
        assert staged is None  # recovered, not extracted again
    assert rank.exists()
    fill(store, [1])
    assert verify(store.path) == []


def test_a_lost_file_makes_its_unit_pending_again(store):
    fill(store)
    (store.path / shard_file(all_arrays(LAYOUT)[4], 1)).unlink()
    with store.stage(1) as staged:
        assert staged is not None
        for spec in store.arrays:
            staged.put(spec.path, np.arange(COUNTS[1]), expected(spec, 1))
    assert verify(store.path) == []


def test_another_configuration_is_refused_and_named(store):
    with pytest.raises(ConfigMismatchError, match=r"dtype: store has \"float32\", this run \"fl"):
        Store.open_or_create(store.path, LAYOUT, tables(), attributes(dtype="float16"))
    with pytest.raises(ConfigMismatchError, match="topk: store has null, this run 3"):
        Store.open_or_create(store.path, LAYOUT, tables(), attributes(topk=3))


def test_a_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("do not lose")
    with pytest.raises(StoreError, match="--out"):
        Store.open_or_create(tmp_path, LAYOUT, tables(), attributes())
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_verify_finds_every_flipped_bit(store):
    fill(store)
    assert verify(store.path) == []
    assert status_totals(store.path) == {"ok": 12}
    files = sorted(p for p in store.path.rglob("*") if p.is_file() and p.name != "SHA256SUMS")
    rng = np.random.default_rng(0)
    for file in files:
        whole = file.read_bytes()
        bit = int(rng.integers(len(whole) * 8))
        broken = bytearray(whole)
        broken[bit // 8] ^= 1 << bit % 8
        file.write_bytes(broken)
        assert verify(store.path), f"bit {bit} of {file.name} went unseen"
        file.write_bytes(whole)
    assert verify(store.path) == []


def test_zarr_itself_refuses_a_flipped_bit_in_a_chunk(store):
    fill(store)
    file = store.path / shard_file(all_arrays(LAYOUT)[4], 0)
    whole = file.read_bytes()
    for byte in (0, 40, 200):
        broken = bytearray(whole)
        broken[byte] ^= 4
        file.write_bytes(broken)
        with pytest.raises(ValueError, match="checksum"):
            zarr.open_array(str(store.path / "scores/rank"), mode="r")[:7]


def test_verify_finds_missing_shards_units_and_rows_and_repairs(store):
    fill(store)
    (store.path / shard_file(all_arrays(LAYOUT)[5], 0)).unlink()
    (store.path / ledger_file(1)).unlink()
    assert [(d.unit, d.problem.split(";")[0]) for d in verify(store.path, repair=True)] == [
        (0, "is missing"),
        (1, "not extracted yet"),
    ]
    assert committed_units(store.path) == []
    for unit, count in enumerate(COUNTS):
        with store.stage(unit) as staged:
            staged.put("images/status", np.arange(count - unit), np.zeros(count - unit))
    assert [(d.unit, d.problem) for d in verify(store.path)] == [
        (1, "1 planned images have no row")
    ]


def test_a_store_of_a_newer_format_is_refused(store):
    shutil.copytree(store.path, store.path.with_name("newer"))
    path = store.path.with_name("newer") / "zarr.json"
    root = json.loads(path.read_text())
    root["attributes"]["classlens"]["format"] = 99
    path.write_text(json.dumps(root))
    with pytest.raises(StoreError, match="upgrade"):
        read_layout(path.parent)
    with pytest.raises(StoreError, match="not a classlens store"):
        read_layout(path.parent / "scores")


def test_status_names_are_all_lower_case_words():
    assert {s.name.lower() for s in Status} >= {"ok", "undecodable", "absent"}
