"""``scan_memories`` and the SQL table against plain indexing of the stored bytes."""

import json

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner
from polars.testing import assert_frame_equal
from synthetic_store import make_layout, write_store

from classlens.analysis import scan_memories, source
from classlens.cli import cli
from classlens.extractor import schema
from classlens.extractor.errors import StoreError, UsageError
from classlens.extractor.schema import Status

UNITS = [5, 3, 4]
FLAGS = ("agreement", "agreement_control", "agreement_text", "agreement_text_control", "composed")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    layout = make_layout(
        images_per_unit=UNITS, prefix_kinds=("cls", "register"), reducers=("memories",)
    )
    bad = {1: Status.UNDECODABLE, 11: Status.NONFINITE}
    return write_store(
        tmp_path_factory.mktemp("m") / "store", layout, UNITS, bad=bad, uncommitted=(1,)
    )


@pytest.fixture(scope="module")
def expected(store):
    """Every row in order, one by one."""
    layout, arrays = store.layout, store.arrays
    rows = []
    for unit in store.committed:
        first = unit * layout.unit_images
        places = range(first, first + layout.unit_images)
        images = [i for i in places if arrays["images/status"][i] == Status.OK]
        for block in range(layout.blocks):
            for s, sublayer in enumerate(("attn", "mlp")):
                for image in images:
                    for token in range(layout.tokens):
                        patch = token - 2
                        bits = int(arrays["memories/flags"][image, block, s, token])
                        rows.append(
                            (
                                image,
                                store.keys[image],
                                int(arrays["images/label"][image]),
                                int(arrays["images/prediction"][image]),
                                block,
                                sublayer,
                                token,
                                "patch" if patch >= 0 else layout.prefix_kinds[token],
                                patch // 3 if patch >= 0 else None,
                                patch % 3 if patch >= 0 else None,
                                *(bool(bits & 1 << bit) for bit in range(5)),
                            )
                        )
    types = {
        "image": pl.Int32,
        "key": pl.String,
        "label": pl.Int32,
        "prediction": pl.Int32,
        "block": pl.Int16,
        "sublayer": pl.Enum(["attn", "mlp"]),
        "token": pl.Int16,
        "kind": pl.Enum(["cls", "dist", "register", "patch"]),
        "row": pl.Int16,
        "col": pl.Int16,
        **dict.fromkeys(FLAGS, pl.Boolean),
    }
    return pl.DataFrame(rows, types, orient="row")


def test_all_rows(store, expected):
    assert_frame_equal(scan_memories(store.path).collect(), expected)
    assert scan_memories(store.path).collect_schema() == expected.schema


@pytest.mark.parametrize(
    "predicate",
    [
        pl.col("sublayer") == "mlp",
        (pl.col("block") == 1) & (pl.col("kind") == "cls") & (pl.col("image") > 3),
        pl.col("agreement") & ~pl.col("composed"),
        (pl.col("sublayer") == "attn") | pl.col("agreement_text"),
        pl.col("label") == pl.col("prediction"),
    ],
    ids=str,
)
def test_filters(store, expected, predicate):
    actual = scan_memories(store.path).filter(predicate).select("key", "token", "composed")
    assert_frame_equal(
        actual.collect(), expected.filter(predicate).select("key", "token", "composed")
    )


def test_some_images_and_first_rows(store, expected):
    actual = scan_memories(store.path, images=[10, 0, 10]).collect()
    assert_frame_equal(actual, expected.filter(pl.col("image").is_in([0, 10])))
    assert_frame_equal(scan_memories(store.path).head(17).collect(), expected.head(17))


def test_only_the_wanted_cell_is_read(store, monkeypatch):
    read, read_region = [], source.SlabReader.read

    def recorded(self, slabs):
        read.append((slabs.unit, slabs.blocks.tolist(), slabs.streams.tolist()))
        return read_region(self, slabs)

    monkeypatch.setattr(source.SlabReader, "read", recorded)
    wanted = (pl.col("block") == 2) & (pl.col("sublayer") == "mlp") & (pl.col("image") < 5)
    scan_memories(store.path).filter(wanted).select("agreement").collect()
    assert read == [(0, [2], [1])]


def test_damage_and_absence_are_named(store, tmp_path):
    layout = make_layout(images_per_unit=[2])
    plain = write_store(tmp_path / "plain", layout, [2])
    with pytest.raises(UsageError, match=r"holds no memories; extract .* `--reduce memories`"):
        scan_memories(plain.path)
    layout = make_layout(images_per_unit=[2], reducers=("memories",))
    cut = write_store(tmp_path / "cut", layout, [2])
    (spec,) = schema.memory_arrays(layout)
    (cut.path / schema.shard_file(spec, 0)).unlink()
    with pytest.raises((StoreError, pl.exceptions.ComputeError), match="lacks memories/flags"):
        scan_memories(cut.path).collect()


def test_sql(store, expected):
    sql = (
        "SELECT block, AVG(CAST(agreement AS INT)) AS rate FROM memories "
        "WHERE sublayer = 'mlp' GROUP BY block ORDER BY block"
    )
    result = CliRunner().invoke(cli, ["query", str(store.path), sql, "--format", "json"])
    assert result.exit_code == 0, result.output
    mlp = expected.filter(pl.col("sublayer") == "mlp")
    rates = [mlp.filter(pl.col("block") == b)["agreement"].mean() for b in range(3)]
    np.testing.assert_allclose([row["rate"] for row in json.loads(result.stdout)], rates)
