"""The Polars IO source behind ``scan_memories``: that of the scores, over another array."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from polars.io.plugins import register_io_source

from classlens.analysis.source import ScoreSource, checked_images, score_schema
from classlens.extractor import schema
from classlens.extractor.errors import UsageError


def scan_flags(store: Path, images: Sequence[int] | np.ndarray | pl.Series | None) -> pl.LazyFrame:
    """See :func:`classlens.analysis.scan.scan_memories`."""
    layout = schema.read_layout(store)
    if "memories" not in layout.reducers:
        raise UsageError(
            f"{store} holds no memories; extract a store with `--reduce memories` to have them."
        )
    places = None if images is None else checked_images(images, layout)
    source = MemorySource(store, layout, places)
    return register_io_source(source.frames, schema=source.columns(), is_pure=True)


@dataclass(frozen=True)
class MemorySource(ScoreSource):
    """The IO source of ``scan_memories``."""

    def columns(self) -> dict[str, pl.DataType]:
        scores = score_schema(self.layout)
        grids = ("token", "kind", "row", "col")
        return {
            **{name: scores[name] for name in ("image", "key", "label", "prediction", "block")},
            "sublayer": pl.Enum(schema.SUBLAYERS),
            **{name: scores[name] for name in grids},
            **{name: pl.Boolean() for name in schema.MEMORY_FLAGS},
        }

    def cells(self) -> pl.DataFrame:
        types = self.columns()
        return pl.DataFrame(
            [(block, name) for block in range(self.layout.blocks) for name in schema.SUBLAYERS],
            schema={name: types[name] for name in ("block", "sublayer")},
            orient="row",
        )

    def paths(self) -> dict[str, str]:
        return dict.fromkeys(schema.MEMORY_FLAGS, schema.MEMORY_FLAGS_PATH)

    def values(
        self, values: dict[str, np.ndarray], used: set[str], cells: int, cell_rows: int
    ) -> list[pl.Series]:
        wanted = [(bit, name) for bit, name in enumerate(schema.MEMORY_FLAGS) if name in used]
        if not wanted:
            return []
        bits = values[schema.MEMORY_FLAGS_PATH].ravel()
        return [pl.Series(name, bits >> bit & 1 == 1) for bit, name in wanted]
