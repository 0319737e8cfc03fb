"""The commands ``query`` and ``export``. Polars and Zarr are imported inside the functions."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from classlens.extractor.errors import UsageError

if TYPE_CHECKING:
    import polars as pl

STORE = click.Path(path_type=Path, exists=True, file_okay=False)
FILE = click.Path(path_type=Path, dir_okay=False)
EXPORT_ROW_GROUP = 1 << 20


@click.command()
@click.argument("store", type=STORE)
@click.argument("sql", metavar='"SELECT …"')
@click.option("--format", "form", type=click.Choice(["table", "csv", "json", "parquet"]),
              default="table", show_default=True,
              help="json is an array of row objects; parquet needs --out.")  # fmt: skip
@click.option("--out", type=FILE, help="Write to this file instead of stdout.")
@click.option("--rows", type=click.IntRange(1), default=100, show_default=True,
              help="Most rows that --format table shows.")  # fmt: skip
def query(store: Path, sql: str, form: str, out: Path | None, rows: int) -> None:
    """Answers an SQL query over the scores of STORE.

    `scores` has a row for each image, block, stream and token:

    \b
      image, key, label, prediction             the picture
      block (0, 1, …), stream                   resid | mid | attn | mlp
      token, kind, row, col                     kind: cls | dist | register | patch
      mask_fraction                             how much of a patch the class covers
      rank, identifiability                     0 is best; 1 - rank / classes
      label_logit, label_logprob, top1 …        of the label; best classes

    `images` has a row for each planned image (image, key, label, prediction, status, unit, shard,
    offset, size), `classes` for each class (class, name). A store extracted with --reduce memories
    has `memories` too, a row for each image, block, sublayer (attn | mlp) and token:

    \b
      agreement, agreement_control              a top value vector is the label's; another class's
      agreement_text, agreement_text_control    a top value vector has the class among its top ones
      composed                                  the sublayer's top class is that of one of them

    One extracted with --reduce attribution has `attribution` (image, key, label, prediction, block,
    row, col, relevance) and, where heads are kept, `head_attribution` with a column head.

    Only what the WHERE clause leaves is read: conditions on picture, block, stream or sublayer, and
    token, joined by AND, make a query quick.

    \b
    How often is the label the top class, block by block?
      classlens query STORE "SELECT block, AVG(CAST(rank = 0 AS INT)) AS rate
        FROM scores WHERE stream = 'resid' AND kind = 'patch'
        GROUP BY block ORDER BY block"
    \b
    Which classes does the model find early?
      classlens query STORE "SELECT name, AVG(identifiability) AS mean
        FROM scores JOIN classes ON scores.label = classes.class
        WHERE stream = 'resid' AND block = 3 AND kind = 'cls'
        GROUP BY name ORDER BY mean DESC LIMIT 10"
    \b
    Which images could not be scored?
      classlens query STORE "SELECT key, status FROM images WHERE status != 'ok'"
    \b
    All tokens of one picture, for a notebook:
      classlens query STORE "SELECT * FROM scores WHERE image = 17" \\
        --format parquet --out image17.parquet
    """
    import polars as pl

    from classlens.analysis.scan import scan, scan_attribution, scan_images, scan_memories
    from classlens.analysis.source import scan_table
    from classlens.extractor.schema import CLASSES_FILE, read_layout

    if form == "parquet" and out is None:
        raise UsageError("Parquet is not for terminals; give a file with --out.")
    tables = {
        "scores": scan(store),
        "images": scan_images(store),
        "classes": scan_table(store, CLASSES_FILE),
    }
    layout = read_layout(store)
    if "memories" in layout.reducers:
        tables["memories"] = scan_memories(store)
    if "attribution" in layout.reducers:
        tables["attribution"] = scan_attribution(store)
    if layout.per_head:
        tables["head_attribution"] = scan_attribution(store, heads=True)
    try:
        answer = pl.SQLContext(tables).execute(sql, eager=False)
        if out is None:
            _write(answer, form, None, rows)
        else:
            with replaced(out) as draft:
                _write(answer, form, draft, rows)
    except pl.exceptions.PolarsError as error:
        reason = str(error).partition("\n")[0].partition("; valid columns")[0].rstrip(".")
        columns = "; ".join(
            f"{name}({', '.join(table.collect_schema())})" for name, table in tables.items()
        )
        raise UsageError(f"This query has no answer: {reason}. There are {columns}.") from error


@click.command()
@click.argument("store", type=STORE)
@click.option("--parquet", required=True, type=FILE, help="The file to write.")
@click.option("--streams", help="Only these, e.g. resid,mlp  [default: all of the store's]")
def export(store: Path, parquet: Path, streams: str | None) -> None:
    """Writes the scores of STORE as one long Parquet file.

    One row for each image, block, stream and token, with all columns of the table `scores` (see
    `classlens query --help`), for tools that do not read Zarr. Rows are ordered by unit, block,
    stream, image, token, so a reader can skip blocks and streams it does not want. The file appears
    when it is complete; memory does not grow with the store.

    \b
    classlens export STORE --parquet scores.parquet --streams resid
    python -c "import polars as pl; print(pl.scan_parquet('scores.parquet')
      .group_by('block').agg(pl.mean('identifiability')).collect())"
    """
    import polars as pl

    from classlens.analysis.scan import scan
    from classlens.extractor.schema import read_layout

    frame = scan(store)
    if streams is not None:
        frame = frame.filter(pl.col("stream").is_in(_streams(streams, read_layout(store).streams)))
    with replaced(parquet) as draft:
        frame.sink_parquet(draft, row_group_size=EXPORT_ROW_GROUP, engine="streaming")
    rows = pl.scan_parquet(parquet).select(pl.len()).collect().item()
    size_mib = parquet.stat().st_size / 2**20
    click.echo(f"Wrote {rows:,} rows, {size_mib:,.1f} MiB, to {parquet}.", err=True)


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A draft beside ``path`` that takes its place when the block ends without an error."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    try:
        yield draft
        draft.replace(path)
    except OSError as error:
        raise UsageError(f"{path} cannot be written ({error}); choose another file.") from error
    finally:
        draft.unlink(missing_ok=True)


def _write(answer: pl.LazyFrame, form: str, path: Path | None, rows: int) -> None:
    if form == "csv":
        _sink_csv(answer, path)
    elif form == "parquet" and path is not None:
        answer.sink_parquet(path, engine="streaming")
    else:
        text = _json(answer) if form == "json" else _table(answer, rows)
        if path is None:
            click.echo(text)
        else:
            path.write_text(text + "\n")


def _sink_csv(answer: pl.LazyFrame, path: Path | None) -> None:
    try:
        answer.sink_csv(path or sys.stdout.buffer, engine="streaming")
    except OSError as error:
        if "Broken pipe" not in str(error):
            raise
        # As Python raises it, with its number, so that click ends quietly: `| head` is no fault.
        raise BrokenPipeError(errno.EPIPE, "Broken pipe") from error


def _json(answer: pl.LazyFrame) -> str:
    return answer.collect(engine="streaming").write_json()


def _table(answer: pl.LazyFrame, rows: int) -> str:
    import polars as pl

    frame = answer.head(rows + 1).collect(engine="streaming")
    if frame.height > rows:
        click.echo(
            f"Showing the first {rows} rows of more; --rows N shows more, --format csv all.",
            err=True,
        )
    with pl.Config(
        tbl_cols=-1,
        tbl_rows=-1,
        tbl_width_chars=-1,
        fmt_str_lengths=200,
        tbl_hide_dataframe_shape=True,
        tbl_hide_column_data_types=True,
    ):
        return str(frame.head(rows))


def _streams(text: str, known: tuple[str, ...]) -> list[str]:
    wanted = [name.strip() for name in text.split(",")]
    if unknown := [name for name in wanted if name not in known]:
        raise UsageError(f"The store has no stream {unknown[0]!r}; it has {', '.join(known)}.")
    return wanted
