"""Reading a scanned frame piece by piece: its axes, its image tokens, batches of images as arrays.

Every image of a frame is expected to have the same blocks, streams and tokens, as
:func:`classlens.analysis.scan` gives them; scores of removed tokens are null there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import polars as pl

from classlens.extractor.errors import UsageError

Convention = Literal["corrected", "vilas2023"]
CONVENTIONS: tuple[Convention, ...] = ("corrected", "vilas2023")

BATCH_ROWS = 2_000_000


def axis(frame: pl.LazyFrame, name: str) -> list:
    """The distinct values of ``block`` or ``stream`` of a frame, ascending; read off one image."""
    return _first_image(frame).select(pl.col(name).unique().sort()).collect().to_series().to_list()


def token_kinds(frame: pl.LazyFrame) -> np.ndarray:
    """The kind of each token of a frame, in order, strings [T]; read off one image."""
    kinds = _first_image(frame).select("token", pl.col("kind").cast(pl.String))
    return kinds.unique().sort("token").collect()["kind"].to_numpy()


def batches(
    tokens: pl.LazyFrame, columns: Sequence[str], rows: int = BATCH_ROWS, *, nulls: bool = False
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of images in ascending order, each column as an array [images, blocks, tokens].

    Args:
        tokens: a scanned frame filtered to one stream.
        rows: upper bound of the rows held at a time (one image at least).
        nulls: whether there may be nulls, which become NaN.

    Raises:
        UsageError: there are nulls and may be none; tokens were removed from the model.
    """
    block = pl.col("block")
    facts = _first_image(tokens).select(block.min(), n=block.n_unique(), rows=pl.len())
    first_block, blocks, image_rows = facts.collect().row(0)
    step = max(1, rows // image_rows)
    in_order = ("image", "block", "token")
    one_block = tokens.filter(block == first_block)
    images = one_block.select(pl.col("image").unique().sort()).collect(engine="streaming")
    images = images.to_series()
    for start in range(0, len(images), step):
        wanted = images[start : start + step]
        batch = (
            tokens.filter(pl.col("image").is_between(wanted[0], wanted[-1]))
            .select(*in_order, *columns)
            .sort(in_order)
            .collect()
        )
        if not nulls and sum(batch.null_count().row(0)):
            raise UsageError(
                "Some tokens of these images were removed and have no scores; filter them out, or "
                "compare the store by `classlens analyze interventions`."
            )
        yield {c: batch[c].to_numpy().reshape(len(wanted), blocks, -1) for c in columns}


def _first_image(frame: pl.LazyFrame) -> pl.LazyFrame:
    image = frame.select("image").head(1).collect().item()
    return frame.filter(pl.col("image") == image)
