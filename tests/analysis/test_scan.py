"""``scan`` against the frame that plain indexing of the arrays gives."""

import operator
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal
from synthetic_store import Store, expected_frame, expected_schema, make_layout, write_store
from zarr.abc.store import SuffixByteRequest
from zarr.storage import LocalStore

from classlens.analysis import scan, scan_images, source
from classlens.extractor import schema
from classlens.extractor.errors import StoreError, UsageError
from classlens.extractor.schema import Status

ENGINES = ("in-memory", "streaming")
BAD = {1: Status.UNDECODABLE, 4: Status.LABEL_INVALID, 11: Status.NONFINITE}

STORES: dict[str, Callable[[Path], Store]] = {
    # Units of unequal length, bad images (the first unit's last among them), one unit open.
    "masks": lambda path: write_store(
        path,
        make_layout(images_per_unit=[5, 3, 5, 4]),
        [5, 3, 5, 4],
        bad=BAD,
        uncommitted=(1,),
    ),
    # No prefix token, no masks, ranks that need 32 bits, streams with a gap when one is left out.
    "gap": lambda path: write_store(
        path,
        make_layout(
            images_per_unit=[3],
            blocks=4,
            streams=("resid", "mid", "attn", "mlp"),
            prefix_kinds=(),
            grid=(2, 2),
            classes=70_000,
            topk=3,
            masks=False,
        ),
        [3],
    ),
    "registers": lambda path: write_store(
        path,
        make_layout(
            images_per_unit=[2, 2],
            blocks=2,
            streams=("attn",),
            prefix_kinds=("cls", "dist", "register", "register"),
            grid=(1, 3),
        ),
        [2, 2],
        bad={0: Status.TOO_LARGE, 1: Status.MASK_MISSING},
    ),
    # Context removed; ranks of 16 and of 32 bits.
    "removed": lambda path: write_store(
        path, make_layout(images_per_unit=[3, 2], blocks=2, tokens_removed=True), [3, 2]
    ),
    "removed-wide": lambda path: write_store(
        path,
        make_layout(
            images_per_unit=[3], blocks=2, prefix_kinds=(), classes=70_000, tokens_removed=True
        ),
        [3],
    ),
}


@pytest.fixture(scope="session")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Store, pl.DataFrame]]:
    """Each store with all rows of its scan."""
    folder = tmp_path_factory.mktemp("stores")
    made = {name: make(folder / name) for name, make in STORES.items()}
    return {name: (store, expected_frame(store)) for name, store in made.items()}


@pytest.fixture
def own_store(tmp_path: Path) -> Store:
    """A store that a test may damage."""
    return STORES["masks"](tmp_path / "store")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("frame_rows", [10, 60, 1 << 21])
@pytest.mark.parametrize("name", STORES)
def test_all_rows_in_documented_order(stores, name, frame_rows, engine):
    store, expected = stores[name]
    with patch.object(source, "FRAME_ROWS", frame_rows):
        rows = scan(store.path).collect(engine=engine)
    assert_frame_equal(rows, expected)
    assert rows.schema == scan(store.path).collect_schema()
    assert dict(rows.schema) == expected_schema(store.layout)
    order = [pl.col("image") // store.layout.unit_images, "block", "stream", "image", "token"]
    assert_frame_equal(rows, rows.sort(order))


def literals(name: str, dtype: pl.DataType) -> st.SearchStrategy:
    """Values to compare a column with: some of its own, some that it never has."""
    if isinstance(dtype, pl.Enum):
        return st.sampled_from(dtype.categories.to_list())
    if dtype == pl.String:
        return st.sampled_from(["val_00000", "val_15838", "val_4", "", "nobody"])
    if dtype.is_float():
        return st.sampled_from([-3.0, 0.0, 0.2, 0.5, 1.0, float("nan")])
    return st.integers(-1, 18)


@st.composite
def atoms(draw: st.DrawFn, types: dict[str, pl.DataType]) -> pl.Expr:
    """A condition on one or two columns."""
    name = draw(st.sampled_from(sorted(types)))
    column, values = pl.col(name), literals(name, types[name])
    numbers = sorted(n for n, t in types.items() if t.is_numeric())
    comparison = st.sampled_from(
        [operator.eq, operator.ne, operator.lt, operator.ge, pl.Expr.eq_missing, pl.Expr.ne_missing]
    )
    form = draw(st.integers(0, 8))
    if form == 0:
        return draw(comparison)(column, draw(values))
    if form == 1:
        return column.is_in(draw(st.lists(values | st.none(), min_size=1, max_size=4)))
    if form == 2:
        return draw(st.sampled_from([column.is_null(), column.is_not_null()]))
    if form == 3:
        missing = pl.lit(None, dtype=types[name])
        return draw(st.sampled_from([operator.eq, pl.Expr.eq_missing, pl.Expr.ne_missing]))(
            column, missing
        )
    if form == 4:
        left, right = draw(st.sampled_from(numbers)), draw(st.sampled_from(numbers))
        return draw(comparison)(pl.col(left), pl.col(right))
    if form == 5:
        left, right = draw(st.sampled_from(numbers)), draw(st.sampled_from(numbers))
        return (pl.col(left) + pl.col(right)) % draw(st.integers(1, 4)) == draw(st.integers(0, 2))
    if form == 6:
        text = column.cast(pl.String)
        return draw(st.sampled_from([text.str.ends_with("8"), text.str.contains("a|1|null")]))
    if form == 7:
        chosen = pl.when(column.is_null()).then(pl.col("block")).otherwise(pl.col("token"))
        return chosen >= draw(st.integers(0, 4))
    return draw(
        st.sampled_from([pl.lit(True), pl.lit(False), pl.col(numbers[0]).fill_null(3).is_in([3])])
    )


def predicates(types: dict[str, pl.DataType]) -> st.SearchStrategy[pl.Expr]:
    """Nested conditions."""
    pair = st.sampled_from(
        [operator.and_, operator.and_, operator.or_, operator.xor, pl.all_horizontal]
    )
    return st.recursive(
        atoms(types),
        lambda inner: st.one_of(
            st.builds(lambda op, a, b: op(a, b), pair, inner, inner),
            inner.map(operator.invert),
        ),
        max_leaves=6,
    )


@st.composite
def query_ends(draw: st.DrawFn, names: list[str]) -> Callable[[pl.LazyFrame], pl.LazyFrame]:
    """What follows the filter."""
    columns = draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    count = draw(st.integers(0, 30))
    keys = ["image", "block", "stream", "token"]
    ends: dict[str, Callable[[pl.LazyFrame], pl.LazyFrame]] = {
        "project": lambda frame: frame.select(columns),
        "head": lambda frame: frame.select(columns).head(count),
        "slice": lambda frame: frame.slice(count, 7).select(columns),
        "tail": lambda frame: frame.select(columns).tail(count),
        "sort": lambda frame: frame.sort(*columns, *keys).head(count).select(columns),
        "index": lambda frame: frame.with_row_index().filter(pl.col("index") % 3 == 1),
        "count": lambda frame: frame.select(pl.len()),
        "group": lambda frame: (
            frame.group_by("block", "kind").agg(pl.len(), pl.sum("rank")).sort("block", "kind")
        ),
    }
    return ends[draw(st.sampled_from(sorted(ends)))]


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_random_queries_equal_those_on_the_materialised_frame(stores, data):
    store, rows = stores[data.draw(st.sampled_from(sorted(STORES)), label="store")]
    types = expected_schema(store.layout)
    predicate = data.draw(predicates(types), label="predicate")
    head = data.draw(st.none() | st.integers(0, 90), label="head before the filter")
    end = data.draw(query_ends(list(types)), label="end")
    engine = data.draw(st.sampled_from(ENGINES), label="engine")
    frame_rows = data.draw(st.sampled_from([10, 60, 1 << 21]), label="frame rows")

    def query(frame: pl.LazyFrame) -> pl.LazyFrame:
        return end((frame if head is None else frame.head(head)).filter(predicate))

    expected = query(rows.lazy()).collect(engine="in-memory")
    with patch.object(source, "FRAME_ROWS", frame_rows):
        answer = query(scan(store.path)).collect(engine=engine)
    assert_frame_equal(answer, expected)


NOT_ROW_BY_ROW = {
    "max": pl.col("rank") == pl.col("rank").max(),
    "max of a dimension": pl.col("block") == pl.col("block").max(),
    "max with a term": (pl.col("token") == pl.col("token").max()) & (pl.col("stream") == "attn"),
    "len": pl.col("token") < pl.len() % 5,
    "row number": pl.int_range(pl.len()) % 5 == 0,
    "first distinct": pl.col("image").is_first_distinct(),
    "unique": pl.col("label_logit").is_unique(),
    "shift": pl.col("block").shift(1) != pl.col("block"),
    "diff": pl.col("token").diff() < 0,
    "over": pl.col("rank").min().over("image", "block") == pl.col("rank"),
    "rank": pl.col("image").rank("dense") <= 2,
    "cumulative": pl.col("block").cum_sum() > 40,
    "forward fill": pl.col("row").forward_fill() == 1,
    "in a part of itself": pl.col("image").is_in(pl.col("image").tail(3).implode()),
    "any": (pl.col("kind") == "cls").any() & (pl.col("block") == 1),
    "mean": pl.col("label") > pl.col("label").mean(),
    "function of a batch": pl.col("block").map_batches(lambda s: s == s.max(), pl.Boolean),
    "function of a value": pl.col("block").map_elements({0, 2}.__contains__, pl.Boolean),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", NOT_ROW_BY_ROW)
def test_predicates_that_look_at_other_rows(stores, name, engine):
    store, rows = stores["masks"]
    expected = rows.filter(NOT_ROW_BY_ROW[name])
    assert 0 < expected.height < rows.height
    with patch.object(source, "FRAME_ROWS", 200):
        answer = scan(store.path).filter(NOT_ROW_BY_ROW[name]).collect(engine=engine)
    assert_frame_equal(answer, expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_joins(stores, engine):
    store, rows = stores["masks"]
    late = rows.filter((pl.col("stream") == "resid") & (pl.col("block") == 2))
    keys = ["image", "token"]

    lazy = scan(store.path).filter(pl.col("stream") == "resid")
    steps = lazy.filter(pl.col("block") == 2).join(
        lazy.filter(pl.col("block") == 1), on=keys, suffix="_before"
    )
    answer = steps.select(*keys, "rank", "rank_before").sort(keys).collect(engine=engine)
    assert answer.height == late.height
    before = rows.filter((pl.col("stream") == "resid") & (pl.col("block") == 1)).sort(keys)
    assert answer["rank_before"].to_list() == before["rank"].to_list()

    of_shard = scan(store.path).join(
        scan_images(store.path).filter(pl.col("shard") == "/data/000002.tar"), on="image"
    )
    counts = of_shard.group_by("image").len().sort("image").collect(engine=engine)
    assert counts["image"].to_list() == [10, 12, 13, 14]


@pytest.mark.parametrize(
    "images",
    [[14, 0, 14, 2], (3,), range(2, 12), np.array([15, 16], np.uint8), pl.Series([1, 6, 10]), []],
    ids=str,
)
def test_only_wanted_images(stores, images):
    store, rows = stores["masks"]
    expected = rows.filter(pl.col("image").is_in([int(i) for i in images]))
    assert_frame_equal(scan(store.path, images=images).collect(), expected)
    first = scan(store.path, images=images).head(20).filter(pl.col("rank") < 5).collect()
    assert_frame_equal(first, expected.head(20).filter(pl.col("rank") < 5))


@pytest.mark.parametrize("images", [[-1], [0, 20], [0.5], ["val_00000"], [True]], ids=str)
def test_wanted_images_that_are_none(stores, images):
    with pytest.raises(UsageError, match="values of the column image"):
        scan(stores["masks"][0].path, images=images)


def test_images(stores):
    store, _ = stores["masks"]
    frame = scan_images(store.path).collect()
    assert frame.schema == scan_images(store.path).collect_schema()
    planned = [i for i in store.keys if i // 5 != 1]
    assert frame["image"].to_list() == planned
    assert frame["key"].to_list() == [store.keys[i] for i in planned]
    assert frame["unit"].to_list() == [i // 5 for i in planned]
    assert frame["shard"].to_list() == [f"/data/{i // 5:06d}.tar" for i in planned]
    status = {i: BAD[i].name.lower() if i in BAD else "ok" for i in planned}
    assert dict(frame.select("image", "status").iter_rows()) == status
    prediction = {
        i: None if i in BAD else int(store.arrays["images/prediction"][i]) for i in planned
    }
    assert dict(frame.select("image", "prediction").iter_rows()) == prediction
    assert frame.filter(pl.col("label").is_null())["image"].to_list() == [1, 4, 11]
    some = scan_images(store.path).filter(pl.col("status") != "ok").select("offset").head(2)
    assert some.collect()["offset"].to_list() == [512 * 2, 512 * 5]


def test_a_unit_appears_when_it_is_committed(own_store):
    lazy, images = scan(own_store.path), scan_images(own_store.path)
    assert 5 not in lazy.select("image").collect()["image"]
    (own_store.path / schema.ledger_file(1)).write_text("{}")
    assert lazy.select("image").unique().collect()["image"].is_in([5, 6, 7]).sum() == 3
    assert images.filter(pl.col("unit") == 1).collect().height == 3


def test_a_store_without_a_committed_unit(own_store):
    for marker in (own_store.path / schema.LEDGER_DIR).iterdir():
        marker.unlink()
    assert scan(own_store.path).collect().is_empty()
    assert scan_images(own_store.path).collect().is_empty()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["scores/rank", "images/status", "images/mask_fraction"])
def test_a_missing_file_is_an_error(own_store, name, engine):
    spec = next(s for s in schema.all_arrays(own_store.layout) if s.path == name)
    (own_store.path / schema.shard_file(spec, 2)).unlink()
    with pytest.raises(StoreError, match=f"lacks {name}/c/2"):
        scan(own_store.path).collect(engine=engine)
    untouched = scan(own_store.path).filter(pl.col("image") < 5).collect(engine=engine)
    assert untouched["image"].unique().to_list() == [0, 2, 3]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_flipped_bit_is_an_error(own_store, engine):
    spec = next(s for s in schema.all_arrays(own_store.layout) if s.path == "scores/top1")
    file = own_store.path / schema.shard_file(spec, 0)
    damaged = bytearray(file.read_bytes())
    damaged[20] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(StoreError, match=r"scores/top1 in .* is damaged .*checksum"):
        scan(own_store.path).select("top1").collect(engine=engine)


def test_no_store(tmp_path):
    for function in (scan, scan_images):
        with pytest.raises(StoreError, match="not a classlens store"):
            function(tmp_path)


@contextmanager
def chunks_read(store: Store) -> Iterator[set[tuple]]:
    """Collects (array, unit, block, stream) of each score chunk whose bytes are fetched, and
    (array, unit) of other arrays."""
    seen: set[tuple] = set()
    get = LocalStore.get
    cells = [(b, s) for b in range(store.layout.blocks) for s in range(len(store.layout.streams))]

    async def recording(self, key, prototype, byte_range=None):
        array = Path(self.root).relative_to(store.path).as_posix()
        if key.startswith("c/") and not isinstance(byte_range, SuffixByteRequest):
            unit = int(key.split("/")[1])
            if array.startswith("images/"):
                seen.add((array, unit))
            else:
                index = (Path(self.root) / key).read_bytes()[-16 * len(cells) - 4 : -4]
                starts = np.frombuffer(index, "<u8")[::2].tolist()
                at = range(len(cells)) if byte_range is None else [starts.index(byte_range.start)]
                seen.update((array, unit, *cells[i]) for i in at)
        return await get(self, key, prototype, byte_range)

    with patch.object(LocalStore, "get", recording):
        yield seen


RESID_RATE = """
    SELECT block, AVG(CAST(rank = 0 AS INT)) AS rate FROM scores
    WHERE stream = 'resid' AND kind = 'patch' GROUP BY block ORDER BY block
"""
COMMITTED = (0, 2, 3)
STATUS = {("images/status", unit) for unit in COMMITTED}


def score_chunks(
    *arrays: str, units=COMMITTED, blocks=range(3), streams=range(3)
) -> set[tuple[str, int, int, int]]:
    return {
        (f"scores/{a}", u, b, s) for a in arrays for u in units for b in blocks for s in streams
    }


@pytest.mark.parametrize(
    ("sql", "chunks"),
    [
        (RESID_RATE, STATUS | score_chunks("rank", streams=[0])),
        ("SELECT COUNT(*) FROM scores", STATUS),
        ("SELECT key, token FROM scores WHERE kind = 'cls'", STATUS),
        ("SELECT rank FROM scores WHERE token = 99", STATUS),
        (
            "SELECT identifiability, rank FROM scores WHERE stream <> 'attn' AND block >= 1",
            STATUS | score_chunks("rank", blocks=[1, 2], streams=[0, 2]),
        ),
        (
            "SELECT rank FROM scores WHERE (block = 0 AND stream = 'mlp') OR (block = 2 AND "
            "stream = 'resid')",
            STATUS
            | score_chunks("rank", blocks=[0], streams=[2])
            | score_chunks("rank", blocks=[2], streams=[0]),
        ),
        (
            "SELECT AVG(label_logit) FROM scores WHERE image = 12 AND stream = 'mlp'",
            {("images/status", 2)} | score_chunks("label_logit", units=[2], streams=[2]),
        ),
        (
            "SELECT label, rank FROM scores WHERE key IN ('val_00000', 'val_15838') AND block = 0",
            STATUS
            | {("images/label", u) for u in COMMITTED}
            | score_chunks("rank", units=[0], blocks=[0]),
        ),
        (
            "SELECT top1 FROM scores WHERE mask_fraction >= 0.5 AND stream = 'attn' AND rank < 3",
            STATUS
            | {("images/mask_fraction", u) for u in COMMITTED}
            | score_chunks("top1", "rank", streams=[1]),
        ),
    ],
)
@pytest.mark.parametrize("engine", ENGINES)
def test_sql_reads_only_the_chunks_it_needs(stores, sql, chunks, engine):
    store, rows = stores["masks"]
    with chunks_read(store) as seen:
        answer = pl.SQLContext(scores=scan(store.path)).execute(sql).collect(engine=engine)
    assert seen == chunks
    assert_frame_equal(answer, pl.SQLContext(scores=rows).execute(sql).collect())


def test_wanted_images_spare_the_other_units(stores):
    store, _ = stores["masks"]
    with chunks_read(store) as seen:
        scan(store.path, images=[16]).filter(pl.col("block") == 0).select("rank").collect()
    assert seen == {("images/status", 3)} | score_chunks("rank", units=[3], blocks=[0])


def test_scanning_needs_no_torch(own_store):
    code = f"""
import sys
from classlens.analysis import scan, scan_images
assert not {{"polars", "zarr"}} & set(sys.modules), "importing scan is to be quick"
assert scan({str(own_store.path)!r}).collect().height > 0
assert scan_images({str(own_store.path)!r}).collect().height > 0
assert not any(name.partition(".")[0] in ("torch", "timm") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
