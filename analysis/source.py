"""The Polars IO sources behind ``scan`` and ``scan_images``: prune on small grids, read, expand.

A row belongs to one place in each of three small grids: cells (block, stream), tokens (token, kind,
row, col) and images (image, key, label, prediction). Terms of a predicate that concern one grid are
decided there, once, and only what is left of the product of the grids is read and built.

Letters: C cells, I images of one unit, T tokens, each after pruning.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isqrt
from pathlib import Path

import numpy as np
import polars as pl
from polars.io.plugins import register_io_source

from classlens.analysis.slabs import MASK_PATH, SlabReader, Slabs, read_ahead, read_image_array
from classlens.extractor import schema
from classlens.extractor.errors import StoreError, UsageError

FRAME_ROWS = 1 << 21
"""Most rows of a frame."""
READ_VALUES = 1 << 25
"""Most values that one read decodes, bar a single larger chunk, of which all but the wanted rows
are dropped at once."""
READ_AHEAD = 2


def scan_scores(store: Path, images: Sequence[int] | np.ndarray | pl.Series | None) -> pl.LazyFrame:
    """See :func:`classlens.analysis.scan.scan`."""
    layout = schema.read_layout(store)
    if not layout.streams:
        raise UsageError(f"{store} holds no scores; give a store that `classlens extract` wrote.")
    source = ScoreSource(store, layout, None if images is None else checked_images(images, layout))
    return register_io_source(source.frames, schema=score_schema(layout), is_pure=True)


def scan_manifest(store: Path) -> pl.LazyFrame:
    """See :func:`classlens.analysis.scan.scan_images`."""
    layout = schema.read_layout(store)

    def frames(
        with_columns: list[str] | None,
        predicate: pl.Expr | None,
        n_rows: int | None,
        batch_size: int | None,
    ) -> Iterator[pl.DataFrame]:
        frame = manifest_frame(store, layout)
        yield finished(frame, n_rows, predicate, with_columns)

    return register_io_source(frames, schema=manifest_schema(), is_pure=True)


def score_schema(layout: schema.Layout) -> dict[str, pl.DataType]:
    """Names and types of the columns of ``scan``, in order."""
    return {
        "image": pl.Int32(),
        "key": pl.String(),
        "label": pl.Int32(),
        "prediction": pl.Int32(),
        "block": pl.Int16(),
        "stream": pl.Enum(layout.streams),
        "token": pl.Int16(),
        "kind": pl.Enum(schema.TOKEN_KINDS),
        "row": pl.Int16(),
        "col": pl.Int16(),
        "mask_fraction": pl.Float32(),
        "rank": pl.Int32(),
        "identifiability": pl.Float64(),
        "label_logit": pl.Float32(),
        "label_logprob": pl.Float32(),
        **{f"top{place + 1}": pl.Int32() for place in range(layout.topk)},
    }


def manifest_schema() -> dict[str, pl.DataType]:
    """Names and types of the columns of ``scan_images``, in order."""
    return {
        "image": pl.Int32(),
        "key": pl.String(),
        "label": pl.Int32(),
        "prediction": pl.Int32(),
        "status": pl.Enum(_status_names()),
        "unit": pl.Int32(),
        "shard": pl.String(),
        "offset": pl.Int64(),
        "size": pl.Int64(),
    }


@dataclass(frozen=True)
class Piece:
    """One read and the frame made of it: some images of a unit (I rows) in some cells (C rows)."""

    slabs: Slabs
    images: pl.DataFrame
    cells: pl.DataFrame


@dataclass(frozen=True)
class ScoreSource:
    """The IO source of ``scan``. images: ascending places on the image axis, or None for all.

    A source of another array with a row a token overrides ``columns``, ``cells``, ``paths`` and
    ``values``.
    """

    store: Path
    layout: schema.Layout
    images: np.ndarray | None

    def columns(self) -> dict[str, pl.DataType]:
        """Names and types of all columns, in order."""
        return score_schema(self.layout)

    def cells(self) -> pl.DataFrame:
        """The grid of the two axes between image and token."""
        return cell_grid(self.layout)

    def paths(self) -> dict[str, str]:
        """The array that each column is made of."""
        return score_paths(self.layout)

    def frames(
        self,
        with_columns: list[str] | None,
        predicate: pl.Expr | None,
        n_rows: int | None,
        batch_size: int | None,
    ) -> Iterator[pl.DataFrame]:
        """Of the first ``n_rows`` rows those that satisfy the predicate, in parts.

        ``batch_size``, a hint, is not used: Polars cuts larger frames itself.
        """
        names = list(self.columns()) if with_columns is None else with_columns
        # Older Polars asks for no column when it only counts; a frame needs one to have rows.
        names = names or ["image"]
        used = {*names, *(predicate.meta.root_names() if predicate is not None else ())}
        # n_rows counts rows before the filter, so none may be pruned under the count.
        terms = and_terms(predicate) if predicate is not None and n_rows is None else []
        cells = prune(self.cells(), terms)
        tokens = prune(token_grid(self.layout), terms)
        images = self.image_grid(used, terms)
        if not (cells.height and tokens.height and images.height):
            return
        limit = FRAME_ROWS if n_rows is None else max(1, min(FRAME_ROWS, n_rows))
        pieces = self.pieces(images, cells, tokens.height, limit)
        paths = [path for column, path in self.paths().items() if column in used]
        reader = SlabReader(self.store, self.layout, tokens["token"].to_numpy(), paths)
        left = n_rows
        for piece, values in read_ahead(lambda piece: reader.read(piece.slabs), pieces, READ_AHEAD):
            # Several frames only where a single cell has more rows than the limit.
            step = max(1, limit // (piece.cells.height * tokens.height))
            for start in range(0, piece.images.height, step):
                span = slice(start, start + step)
                part = {path: array[..., span, :] for path, array in values.items()}
                frame = self.frame(piece.images[span], piece.cells, tokens, part, used)
                yield finished(frame, left, predicate, names)
                if left is not None:
                    left -= frame.height
                    if left <= 0:
                        return

    def image_grid(self, used: set[str], terms: list[pl.Expr]) -> pl.DataFrame:
        """OK images of committed units that the terms leave, with the columns in ``used``."""
        layout = self.layout
        committed = np.array(schema.committed_units(self.store), dtype=np.int64)
        places = (committed[:, None] * layout.unit_images + np.arange(layout.unit_images)).ravel()
        if self.images is not None:
            places = np.intersect1d(places, self.images, assume_unique=True)
        # Terms on the number alone come first: they may spare most units' files.
        grid = prune(pl.DataFrame({"image": places.astype(np.int32)}), terms)
        places = grid["image"].to_numpy()
        status = read_image_array(self.store, layout, "images/status", places)
        places = places[status == schema.Status.OK]
        grid = pl.DataFrame({"image": places})
        for name in ("label", "prediction"):
            if name in used:
                values = read_image_array(self.store, layout, f"images/{name}", places)
                grid = grid.with_columns(pl.Series(name, values))
        if "key" in used:
            manifest = scan_table(self.store, schema.MANIFEST_FILE)
            keys = manifest.select(pl.col("image").cast(pl.Int32), "key")
            grid = grid.lazy().join(keys, on="image", how="left", maintain_order="left").collect()
        return prune(grid, terms)

    def pieces(
        self, images: pl.DataFrame, cells: pl.DataFrame, tokens: int, limit: int
    ) -> Iterator[Piece]:
        """The pieces in row order; one has at most ``limit`` rows, or a single cell."""
        layout = self.layout
        cells_per_read = READ_VALUES // (layout.unit_images * layout.tokens)
        unit, place = np.divmod(images["image"].to_numpy(), layout.unit_images)
        edges = [*np.flatnonzero(np.diff(unit, prepend=-1)).tolist(), len(unit)]
        for start, stop in pairwise(edges):
            cells_per_frame = limit // ((stop - start) * tokens)
            for part in cells.iter_slices(max(1, min(cells_per_frame, cells_per_read))):
                slabs = Slabs(
                    int(unit[start]),
                    place[start:stop],
                    part["block"].to_numpy(),
                    part[part.columns[1]].to_physical().to_numpy(),
                )
                yield Piece(slabs, images[start:stop], part)

    def frame(
        self,
        images: pl.DataFrame,
        cells: pl.DataFrame,
        tokens: pl.DataFrame,
        values: dict[str, np.ndarray],
        used: set[str],
    ) -> pl.DataFrame:
        """The columns in ``used`` of every (cell, image, token), in this order.

        values: by array path, [C, I, T], or [I, T] for the mask fraction.
        """
        C, I, T = cells.height, images.height, tokens.height  # noqa: E741
        return pl.DataFrame(
            [
                *tiled(each_repeated(images, used, T), C),
                *each_repeated(cells, used, I * T),
                *tiled(each_repeated(tokens, used, 1), C * I),
                *self.values(values, used, C, I * T),
            ]
        )

    def values(
        self, values: dict[str, np.ndarray], used: set[str], cells: int, cell_rows: int
    ) -> list[pl.Series]:
        """The columns that arrays are read for, in the order of the rows."""
        columns = []
        for name, path in self.paths().items():
            if name in used:
                flat = pl.Series(name, values[path].ravel())
                if self.layout.tokens_removed and path != MASK_PATH:
                    flat = removed_as_null(flat, self.layout)
                if name == "identifiability":
                    flat = 1 - flat / self.layout.classes
                elif name == "mask_fraction":
                    [flat] = tiled([flat.fill_nan(None)], cells)
                columns.append(flat)
        if "mask_fraction" in used and not self.layout.masks:
            nothing = pl.Series("mask_fraction", [None], pl.Float32)
            columns.append(nothing.new_from_index(0, cells * cell_rows))
        return columns


def score_paths(layout: schema.Layout) -> dict[str, str]:
    """The array that each column is made of."""
    scores = ("rank", "label_logit", "label_logprob", *(f"top{k + 1}" for k in range(layout.topk)))
    return {
        **({"mask_fraction": MASK_PATH} if layout.masks else {}),
        **{name: f"scores/{name}" for name in scores},
        "identifiability": "scores/rank",
    }


def removed_as_null(scores: pl.Series, layout: schema.Layout) -> pl.Series:
    """A score column with the fill values of removed tokens as nulls."""
    if scores.dtype.is_float():
        return scores.fill_nan(None)
    largest = np.iinfo(schema.class_dtype(layout.classes)).max
    return scores.set(scores == int(np.array(largest).astype(np.int32)), None)


def cell_grid(layout: schema.Layout) -> pl.DataFrame:
    """All (block, stream), by block."""
    types = score_schema(layout)
    blocks = pl.Series("block", range(layout.blocks), types["block"]).to_frame()
    return blocks.join(
        pl.Series("stream", layout.streams, types["stream"]).to_frame(),
        how="cross",
        maintain_order="left_right",
    )


def token_grid(layout: schema.Layout) -> pl.DataFrame:
    """All (token, kind, row, col)."""
    row, col = np.divmod(np.arange(layout.patches), layout.grid[1])
    nothing = [None] * layout.prefix
    types = score_schema(layout)
    return pl.DataFrame(
        {
            "token": range(layout.tokens),
            "kind": [*layout.prefix_kinds, *["patch"] * layout.patches],
            "row": [*nothing, *row.tolist()],
            "col": [*nothing, *col.tolist()],
        },
        schema={name: types[name] for name in ("token", "kind", "row", "col")},
    )


def scan_table(store: Path, name: str) -> pl.LazyFrame:
    """One of the store's Parquet tables.

    Raises:
        StoreError: it is missing.
    """
    if not (store / name).is_file():
        raise StoreError(
            f"{store} lacks {name}, which is written once, when a store is made; copy it back or "
            "extract into a new folder."
        )
    return pl.scan_parquet(store / name)


def manifest_frame(store: Path, layout: schema.Layout) -> pl.DataFrame:
    """All rows of ``scan_images``."""
    committed = schema.committed_units(store)
    frame = (
        scan_table(store, schema.MANIFEST_FILE)
        .filter(pl.col("unit").is_in(committed))
        .join(scan_table(store, schema.UNITS_FILE).select("unit", "shard"), on="unit")
        .with_columns(pl.col("image").cast(pl.Int32))
        .sort("image")
        .collect()
    )
    images = frame["image"].to_numpy()
    status = read_image_array(store, layout, "images/status", images)
    if (status == schema.Status.ABSENT).any():
        image = images[status == schema.Status.ABSENT][0]
        raise StoreError(
            f"{store} has no status for image {image}, which its manifest plans; `classlens "
            "verify` says what else is wrong."
        )
    prediction = pl.Series(
        "prediction", read_image_array(store, layout, "images/prediction", images)
    )
    names = pl.Series(_status_names(), dtype=pl.Enum(_status_names()))
    return frame.with_columns(
        names.gather(status).alias("status"),
        prediction.set(pl.Series(status != schema.Status.OK), None),
    ).select(list(manifest_schema()))


def and_terms(predicate: pl.Expr) -> list[pl.Expr]:
    """The expressions whose AND the predicate is."""
    inputs = predicate.meta.pop()
    if len(inputs) == 2:
        for left, right in (inputs, inputs[::-1]):
            if (left & right).meta.eq(predicate):
                return [*and_terms(left), *and_terms(right)]
    return [predicate]


def prune(grid: pl.DataFrame, terms: Sequence[pl.Expr]) -> pl.DataFrame:
    """Rows of the grid that may satisfy every term; a term is used where the grid has its columns.

    Exact, because Polars hands a source only predicates that look at each row by itself (it filters
    ``col("rank") == col("rank").max()`` and the like on its own), and because a row for which a
    term is null cannot satisfy the whole.
    """
    for term in terms:
        names = set(term.meta.root_names())
        if names and names <= set(grid.columns):
            grid = grid.filter(term)
    return grid


def each_repeated(grid: pl.DataFrame, used: set[str], times: int) -> list[pl.Series]:
    """The grid's columns in ``used``, each value ``times`` times in a row."""
    columns = [grid[name] for name in grid.columns if name in used]
    if times == 1:
        return columns
    return [
        pl.concat([column.new_from_index(row, times) for row in range(len(column))], rechunk=True)
        for column in columns
    ]


def tiled(columns: list[pl.Series], times: int) -> list[pl.Series]:
    """The columns, all of each ``times`` times over."""
    # In two steps, for it is slow to append very many short columns to each other.
    inner = isqrt(times)
    outer, rest = divmod(times, inner)
    return [
        pl.concat([*[pl.concat([column] * inner)] * outer, *[column] * rest], rechunk=True)
        for column in columns
    ]


def finished(
    frame: pl.DataFrame, n_rows: int | None, predicate: pl.Expr | None, names: list[str] | None
) -> pl.DataFrame:
    """What Polars asks of a source: first rows, then the whole predicate, then columns."""
    if n_rows is not None:
        frame = frame.head(n_rows)
    if predicate is not None:
        frame = frame.filter(predicate)
    return frame if names is None else frame.select(names)


def checked_images(
    images: Sequence[int] | np.ndarray | pl.Series, layout: schema.Layout
) -> np.ndarray:
    """Places on the image axis, each once, ascending.

    Raises:
        UsageError: a value is no such place.
    """
    places = np.unique(np.asarray(images))
    if not len(places):
        return np.empty(0, np.int64)
    if places.dtype.kind not in "iu" or not 0 <= places[0] <= places[-1] < layout.images:
        raise UsageError(
            f"images has values from {places[0]} to {places[-1]}; give values of the column image, "
            f"which are whole numbers from 0 to {layout.images - 1}."
        )
    return places.astype(np.int64)


def _status_names() -> list[str]:
    return [status.name.lower() for status in schema.Status if status is not schema.Status.ABSENT]
