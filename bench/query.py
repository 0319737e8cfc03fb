"""``classlens bench query``: named questions to a store and to the same rows as long Parquet."""

from __future__ import annotations

import statistics
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

if TYPE_CHECKING:
    import numpy as np
    import polars as pl

    from classlens.extractor.schema import Layout
    from classlens.extractor.store import Store, Tables

BLOCKS, CLASSES, GRID = 12, 1000, (14, 14)  # ViT-B/16
STREAMS = ("resid", "attn", "mlp")
UNIT_IMAGES = 512
CANDIDATES = 8


class Query(NamedTuple):
    """One question: ``SELECT what FROM scores WHERE where rest``."""

    what: str
    where: str
    rest: str

    def sql(self) -> str:
        """The whole statement."""
        return f"SELECT {self.what} FROM scores WHERE {self.where} {self.rest}"


QUERIES = {
    "rate by block": Query(
        "block, AVG(CAST(rank = 0 AS INT)) AS rate",
        "stream = 'resid' AND kind = 'patch'",
        "GROUP BY block ORDER BY block",
    ),
    "CLS by block": Query(
        "block, AVG(identifiability) AS mean",
        "stream = 'resid' AND kind = 'cls'",
        "GROUP BY block ORDER BY block",
    ),
    "one image": Query(
        "block, stream, token, rank, label_logit, label_logprob, top1",
        "image = 7",
        "ORDER BY block, stream, token",
    ),
    "mean by block and stream": Query(
        "block, stream, AVG(identifiability) AS mean",
        "kind = 'patch'",
        "GROUP BY block, stream ORDER BY block, stream",
    ),
    "top-1 share by place": Query(
        "row, col, AVG(CAST(top1 = prediction AS INT)) AS share",
        f"stream = 'resid' AND block = {BLOCKS - 1} AND kind = 'patch'",
        "GROUP BY row, col ORDER BY row, col",
    ),
}


@click.command()
@click.option("--images", default=1000, show_default=True, type=click.IntRange(8),
              help="ImageNet-S has 12419 to validate on, 88 million rows.")  # fmt: skip
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1),
              help="Each round asks every question of both, in turn.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path, file_okay=False),
              help="Keep store and Parquet file here; they are used again.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def query(images: int, rounds: int, out: Path | None, as_json: bool) -> None:
    """Named questions to a store and to the Parquet file that `export` makes of it.

    The store has the shape of ViT-B/16's: 12 blocks, three streams, 197 tokens, 1,000 classes, one
    top class, and random ranks that fall over the blocks as a trained model's do. Both are asked
    the same SQL through Polars' streaming engine, their files in the page cache. Before anything is
    timed, the answers are compared.
    """
    from classlens.bench.machine import machine_facts
    from classlens.bench.result import print_result
    from classlens.extractor.console import status as spinner

    folder = tempfile.TemporaryDirectory() if out is None else nullcontext(str(out))
    with folder as path, spinner("Measuring"):
        rows = measure(Path(path), images, rounds)
    print_result({"benchmark": "query", "machine": machine_facts(), "rows": rows}, as_json)


def measure(folder: Path, images: int, rounds: int) -> list[dict[str, Any]]:
    """One row for each question, seconds as medians over the rounds.

    Raises:
        AssertionError: store and Parquet file give different answers.
    """
    import polars as pl

    from classlens.analysis.commands_query import export
    from classlens.analysis.scan import scan
    from classlens.bench.machine import time_in_turn

    store, parquet = write_store(folder / "store", images), folder / "scores.parquet"
    if not parquet.exists():
        export.main([str(store), "--parquet", str(parquet)], standalone_mode=False)
    tables = {"store": scan(store), "parquet": pl.scan_parquet(parquet)}
    size = {
        "store": sum(f.stat().st_size for f in store.rglob("*") if f.is_file()),
        "parquet": parquet.stat().st_size,
    }
    scanned = {
        name: _answer(tables["store"], f"SELECT COUNT(*) AS n FROM scores WHERE {q.where}").item()
        for name, q in QUERIES.items()
    }
    for name, q in QUERIES.items():
        ours, theirs = (_answer(table, q.sql()) for table in tables.values())
        _require_equal(ours, theirs, scanned[name])
    seconds = time_in_turn(
        {
            f"{name} of {kind}": lambda table=table, q=q: _answer(table, q.sql())
            for name, q in QUERIES.items()
            for kind, table in tables.items()
        },
        rounds,
    )
    rows = []
    for name in QUERIES:
        store_s, parquet_s = (statistics.median(seconds[f"{name} of {kind}"]) for kind in tables)
        rows.append(
            {
                "query": name,
                "images": images,
                "rows": scanned[name],
                "store_s": round(store_s, 5),
                "parquet_s": round(parquet_s, 5),
                "parquet_of_store": round(parquet_s / store_s, 2),
                "store_bytes": size["store"],
                "parquet_bytes": size["parquet"],
                "shape": {
                    "blocks": BLOCKS,
                    "streams": len(STREAMS),
                    "tokens": 1 + GRID[0] * GRID[1],
                    "classes": CLASSES,
                },
                "polars_threads": pl.thread_pool_size(),
                "seconds": {
                    kind: [round(s, 5) for s in seconds[f"{name} of {kind}"]] for kind in tables
                },
            }
        )
    return rows


def write_store(path: Path, images: int) -> Path:
    """A committed store of that many images with random scores; one that is there is completed.

    Raises:
        ConfigMismatchError: the store at ``path`` is of another size.
    """
    from classlens.extractor.schema import Layout
    from classlens.extractor.store import Store

    unit_images = min(images, UNIT_IMAGES)
    units = -(-images // unit_images)
    layout = Layout(
        images=units * unit_images,
        unit_images=unit_images,
        blocks=BLOCKS,
        streams=STREAMS,
        prefix_kinds=("cls",),
        grid=GRID,
        classes=CLASSES,
        topk=1,
        masks=False,
    )
    attributes = {"config": {}, "versions": {}, "fingerprint": {"synthetic_images": images}}
    store = Store.open_or_create(path, layout, _tables(layout, images), attributes)
    for unit in range(units):
        _fill(store, unit)
    store.finish()
    return path


def _fill(store: Store, unit: int) -> None:
    import numpy as np

    from classlens.extractor.schema import Status

    with store.stage(unit) as staged:
        if staged is None:
            return
        labels = store.unit_rows(unit)["label"].to_numpy()
        places = np.arange(len(labels))
        rng = np.random.default_rng([unit, 0])
        for path, values in _scores(rng, labels, store.layout).items():
            staged.put(path, places, values)
        staged.put("images/label", places, labels)
        staged.put("images/status", places, np.full(len(labels), Status.OK))


def _scores(rng: np.random.Generator, labels: np.ndarray, layout: Layout) -> dict[str, np.ndarray]:
    """Scores by array path: 1 − rank / C rises over the blocks, most in ``resid``, and the logits
    go with it; a token that does not see the label sees one of the image's few other classes."""
    import numpy as np

    images = len(labels)
    shape = (images, layout.blocks, len(layout.streams), layout.tokens)
    depth = np.linspace(0, 1, layout.blocks)[None, :, None, None]
    pull = np.array([1.0, 0.4, 0.5])[None, None, :, None]
    ease = rng.lognormal(0, 0.4, (images, 1, 1, 1))
    steepness = 1 + 11 * ease * pull * depth**1.5
    rank = (CLASSES * rng.random(shape) ** steepness).astype(np.int32)
    distance = np.log1p(rank)
    logit = 11 - 1.6 * distance + rng.normal(0, 0.5, shape)
    logprob = -0.2 - 1.2 * distance - rng.exponential(0.3, shape)
    others = rng.integers(0, CLASSES, (images, CANDIDATES))
    choice = rng.integers(0, CANDIDATES, shape)
    other = others[np.arange(images)[:, None, None, None], choice]
    top1 = np.where(rank == 0, labels[:, None, None, None], other)
    return {
        "scores/rank": rank,
        "scores/label_logit": logit,
        "scores/label_logprob": logprob,
        "scores/top1": top1,
        "images/prediction": np.where(rank[:, -1, 0, 0] == 0, labels, others[:, 0]),
    }


def _tables(layout: Layout, images: int) -> Tables:
    import numpy as np
    import polars as pl

    from classlens.extractor.plan import MANIFEST_SCHEMA, UNITS_SCHEMA
    from classlens.extractor.store import Tables

    place = np.arange(images)
    manifest = {
        "image": place,
        "key": [f"val_{i:08d}" for i in place],
        "unit": place // layout.unit_images,
        "offset": 0,
        "size": 0,
        "label": place * 7919 % CLASSES,
        "mask_id": None,
    }
    units = {
        "unit": range(layout.units),
        "shard": [f"synthetic-{unit:06d}.tar" for unit in range(layout.units)],
        "start": 0,
        "stop": 0,
        "images": np.bincount(place // layout.unit_images),
        "masks": False,
    }
    classes = pl.DataFrame(
        {"class": range(CLASSES), "name": [str(c) for c in range(CLASSES)]},
        schema={"class": pl.Int32, "name": pl.String},
    )
    return Tables(
        pl.DataFrame(manifest, schema=MANIFEST_SCHEMA),
        pl.DataFrame(units, schema=UNITS_SCHEMA),
        classes,
    )


def _answer(table: pl.LazyFrame, sql: str) -> pl.DataFrame:
    import polars as pl

    return pl.SQLContext(scores=table).execute(sql, eager=False).collect(engine="streaming")


def _require_equal(ours: pl.DataFrame, theirs: pl.DataFrame, rows: int) -> None:
    from polars.testing import assert_frame_equal

    # A mean of that many values of one sign, added up in two orders of any kind.
    assert_frame_equal(ours, theirs, check_exact=False, rel_tol=rows * 2.0**-52, abs_tol=0)
