"""The Polars IO source behind ``scan_attribution``: one read for each unit and block.

Letters: H heads (1 where they are summed), I images of one unit, G patches, each after pruning.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import zarr
from polars.io.plugins import register_io_source

from classlens.analysis.slabs import open_array, read_region, require_shard
from classlens.analysis.source import (
    ScoreSource,
    and_terms,
    checked_images,
    each_repeated,
    finished,
    prune,
    score_schema,
    tiled,
    token_grid,
)
from classlens.extractor import schema
from classlens.extractor.errors import UsageError

RELEVANCE, HEADS, EXPONENT = (
    f"attribution/{name}" for name in ("relevance", "head_relevance", "exponent")
)


def scan_relevance(
    store: Path, heads: bool, images: Sequence[int] | np.ndarray | pl.Series | None
) -> pl.LazyFrame:
    """See :func:`classlens.analysis.scan.scan_attribution`."""
    layout = schema.read_layout(store)
    if "attribution" not in layout.reducers:
        raise UsageError(
            f"{store} holds no attribution; extract it with `--reduce attribution` into a new "
            "folder."
        )
    if heads and not layout.per_head:
        raise UsageError(
            f"{store} holds the attribution summed over heads only; extract it with `--reduce "
            "attribution --per-head` into a new folder."
        )
    chosen = None if images is None else checked_images(images, layout)
    source = RelevanceSource(store, layout, heads, chosen)
    return register_io_source(source.frames, schema=relevance_schema(layout, heads), is_pure=True)


def relevance_schema(layout: schema.Layout, heads: bool) -> dict[str, pl.DataType]:
    """Names and types of the columns, in order."""
    types = score_schema(layout)
    return {
        **{name: types[name] for name in ("image", "key", "label", "prediction", "block")},
        **({"head": pl.Int16()} if heads else {}),
        **{name: types[name] for name in ("row", "col")},
        "relevance": pl.Float32(),
    }


@dataclass(frozen=True)
class RelevanceSource:
    """The IO source. images: ascending places on the image axis, or None for all."""

    store: Path
    layout: schema.Layout
    heads: bool
    images: np.ndarray | None

    def frames(
        self,
        with_columns: list[str] | None,
        predicate: pl.Expr | None,
        n_rows: int | None,
        batch_size: int | None,
    ) -> Iterator[pl.DataFrame]:
        """Of the first ``n_rows`` rows those that satisfy the predicate, a block at a time.

        ``batch_size``, a hint, is not used: Polars cuts larger frames itself.
        """
        types = relevance_schema(self.layout, self.heads)
        names = (list(types) if with_columns is None else with_columns) or ["image"]
        used = {*names, *(predicate.meta.root_names() if predicate is not None else ())}
        # n_rows counts rows before the filter, so none may be pruned under the count.
        terms = and_terms(predicate) if predicate is not None and n_rows is None else []
        blocks = prune(pl.Series("block", range(self.layout.blocks), pl.Int16).to_frame(), terms)
        count = self.layout.heads if self.heads else 1
        heads = prune(pl.Series("head", range(count), pl.Int16).to_frame(), terms)
        patches = prune(token_grid(self.layout).filter(pl.col("kind") == "patch"), terms)
        images = ScoreSource(self.store, self.layout, self.images).image_grid(used, terms)
        if not (blocks.height and heads.height and patches.height and images.height):
            return
        left = n_rows
        for part in _by_unit(images, self.layout):
            for block in blocks.iter_slices(1):
                frame = self.frame(part, block, heads, patches, used)
                yield finished(frame, left, predicate, names)
                if left is not None:
                    left -= frame.height
                    if left <= 0:
                        return

    def frame(
        self,
        images: pl.DataFrame,
        block: pl.DataFrame,
        heads: pl.DataFrame,
        patches: pl.DataFrame,
        used: set[str],
    ) -> pl.DataFrame:
        """The columns in ``used`` of every (head, image, patch) of one block, in this order."""
        H, I, G = heads.height, images.height, patches.height  # noqa: E741
        columns = [
            *tiled(each_repeated(images, used, G), H),
            *each_repeated(block, used, H * I * G),
            *(each_repeated(heads, used, I * G) if self.heads else []),
            *tiled(each_repeated(patches.select("row", "col"), used, 1), H * I),
        ]
        if "relevance" in used:
            patch = patches["token"].to_numpy() - self.layout.prefix
            places = images["image"].to_numpy()
            values = self.read(places, int(block["block"][0]), heads["head"].to_numpy(), patch)
            columns.append(pl.Series("relevance", values.ravel()))
        return pl.DataFrame(columns)

    def read(
        self, places: np.ndarray, block: int, heads: np.ndarray, patches: np.ndarray
    ) -> np.ndarray:
        """Relevance of some images of one unit, float32 [H, I, G]."""
        span = slice(int(places[0]), int(places[-1]) + 1)
        path = HEADS if self.heads else RELEVANCE
        values = self._region(path, places, (span, block))[places - span.start]
        exponent_I = self._region(EXPONENT, places, (span, block))[places - span.start]
        values_IHG = values[:, heads] if self.heads else values[:, None]
        values_IHG = values_IHG[..., patches].astype(np.float32)
        return np.ldexp(values_IHG, exponent_I[:, None, None]).transpose(1, 0, 2)

    def _region(self, path: str, places: np.ndarray, selection: tuple[slice | int, ...]):
        [spec] = [s for s in schema.attribution_arrays(self.layout) if s.path == path]
        require_shard(self.store, spec, int(places[0]) // self.layout.unit_images)
        array: zarr.Array = open_array(self.store, path)
        return read_region(array, selection, self.store, path)


def _by_unit(images: pl.DataFrame, layout: schema.Layout) -> Iterator[pl.DataFrame]:
    unit = images["image"].to_numpy() // layout.unit_images
    edges = [*np.flatnonzero(np.diff(unit, prepend=-1)).tolist(), len(unit)]
    for start, stop in pairwise(edges):
        yield images[start:stop]
