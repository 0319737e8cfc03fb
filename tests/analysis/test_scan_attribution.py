"""scan_attribution against plain indexing, with and without pushdown; the tables for SQL."""

import json

import polars as pl
import pytest
from click.testing import CliRunner
from synthetic_store import make_layout, write_store

from classlens.analysis import scan_attribution
from classlens.analysis.attribution import RelevanceSource
from classlens.analysis.commands_query import query
from classlens.extractor.errors import StoreError, UsageError
from classlens.extractor.schema import Status, shard_file

UNITS = [5, 3]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    layout = make_layout(
        images_per_unit=UNITS, heads=2, reducers=("attribution",), per_head=True,
        prefix_kinds=("cls", "register"),
    )  # fmt: skip
    path = tmp_path_factory.mktemp("attribution") / "store"
    return write_store(path, layout, UNITS, bad={1: Status.UNDECODABLE}, seed=4)


def expected(store, heads):
    """Every row in its order, by plain indexing."""
    layout, arrays = store.layout, store.arrays
    values = arrays["attribution/head_relevance" if heads else "attribution/relevance"]
    rows = []
    for unit in store.committed:
        first = unit * layout.unit_images
        for block in range(layout.blocks):
            for head in range(layout.heads if heads else 1):
                for image in range(first, first + layout.unit_images):
                    if arrays["images/status"][image] != Status.OK:
                        continue
                    for patch in range(layout.patches):
                        place = (image, block, head, patch) if heads else (image, block, patch)
                        scale = 2.0 ** int(arrays["attribution/exponent"][image, block])
                        rows.append(
                            {
                                "image": image,
                                "key": store.keys[image],
                                "label": int(arrays["images/label"][image]),
                                "prediction": int(arrays["images/prediction"][image]),
                                "block": block,
                                **({"head": head} if heads else {}),
                                "row": patch // 3,
                                "col": patch % 3,
                                "relevance": float(values[place]) * scale,
                            }
                        )
    return pl.DataFrame(rows)


@pytest.mark.parametrize("heads", [False, True])
def test_rows_are_the_arrays(store, heads):
    found = scan_attribution(store.path, heads=heads).collect()
    wanted = expected(store, heads)
    assert found.columns == wanted.columns
    assert found.schema["relevance"] == pl.Float32
    assert found.select(pl.exclude("relevance")).rows() == wanted.drop("relevance").rows()
    # float16 times a power of two is a float32 exactly.
    assert found["relevance"].to_list() == wanted["relevance"].to_list()


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize(
    "predicate",
    [
        pl.col("block") == 1,
        (pl.col("row") == 1) & (pl.col("col") > 0) & (pl.col("image") > 2),
        pl.col("key").str.ends_with("7") & (pl.col("relevance") > 0),
        (pl.col("label") < 5) | (pl.col("block") == 0),
        pl.col("image") > 100,
    ],
)
def test_filters_give_what_they_would_give_afterwards(store, heads, predicate):
    found = scan_attribution(store.path, heads=heads).filter(predicate).collect()
    after = scan_attribution(store.path, heads=heads).collect().filter(predicate)
    assert found.rows() == after.rows()


def test_only_wanted_blocks_and_units_are_read(store, monkeypatch):
    reads = []
    read = RelevanceSource.read

    def spying(self, places, block, heads, patches):
        reads.append((places.tolist(), block, heads.tolist(), patches.tolist()))
        return read(self, places, block, heads, patches)

    monkeypatch.setattr(RelevanceSource, "read", spying)
    frame = scan_attribution(store.path, heads=True, images=[0, 2, 4])
    frame = frame.filter(pl.col("block") == 2, pl.col("head") == 1, pl.col("col") == 0)
    assert frame.collect().height == 3 * 2
    assert reads == [([0, 2, 4], 2, [1], [0, 3])]
    reads.clear()
    assert scan_attribution(store.path).select("image", "block").collect().height == 7 * 3 * 6
    assert reads == []  # the column is not used


def test_head_of_a_frame_and_counts(store):
    frame = scan_attribution(store.path)
    assert frame.head(4).collect().rows() == frame.collect().head(4).rows()
    assert frame.select(pl.len()).collect().item() == 7 * 3 * 6


def test_what_a_store_does_not_hold_is_named(store, tmp_path):
    plain = write_store(tmp_path / "plain", make_layout(images_per_unit=[2]), [2])
    with pytest.raises(UsageError, match="holds no attribution; extract it with"):
        scan_attribution(plain.path)
    layout = make_layout(images_per_unit=[2], heads=2, reducers=("attribution",))
    summed = write_store(tmp_path / "summed", layout, [2])
    assert scan_attribution(summed.path).collect().height == 2 * 3 * 6
    with pytest.raises(UsageError, match="--per-head"):
        scan_attribution(summed.path, heads=True)
    with pytest.raises(UsageError, match="whole numbers from 0 to 1"):
        scan_attribution(summed.path, images=[7])
    spec = next(s for s in specs(layout) if s.path == "attribution/relevance")
    (summed.path / shard_file(spec, 0)).unlink()
    with pytest.raises((StoreError, pl.exceptions.ComputeError), match="lacks attribution"):
        scan_attribution(summed.path).collect()


def specs(layout):
    from classlens.extractor.schema import attribution_arrays

    return attribution_arrays(layout)


def test_sql_has_the_tables(store):
    sql = (
        "SELECT a.block, SUM(h.relevance) AS heads, SUM(a.relevance) AS whole "
        "FROM attribution a JOIN head_attribution h ON a.image = h.image AND a.block = h.block "
        "AND a.row = h.row AND a.col = h.col GROUP BY a.block ORDER BY a.block"
    )
    result = CliRunner().invoke(query, [str(store.path), sql, "--format", "json"])
    assert result.exception is None, result.output
    assert [row["block"] for row in json.loads(result.stdout)] == [0, 1, 2]
