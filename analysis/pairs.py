"""Two stores of the same images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from classlens.analysis.scan import scan_images
from classlens.extractor.errors import UsageError
from classlens.extractor.schema import read_layout


def check_pair(store: Path, other: Path, fields: Sequence[str], remedy: str) -> None:
    """Checks that two stores pair image by image in all that both have scored.

    Args:
        fields: of the layout that must be equal. remedy: ends the error's sentence.

    Raises:
        UsageError: they do not.
    """
    layout, theirs = read_layout(store), read_layout(other)
    differing = [name for name in fields if getattr(layout, name) != getattr(theirs, name)]
    if differing:
        raise UsageError(f"{other} differs from {store} in {', '.join(differing)}; {remedy}")
    ours, others = (
        scan_images(path).filter(pl.col("status") == "ok").select("image", "key").collect()
        for path in (store, other)
    )
    pairs = ours.join(others, on="image", suffix="_other")
    if pairs.is_empty() or (pairs["key"] != pairs["key_other"]).any():
        raise UsageError(f"{other} and {store} do not hold the same images; {remedy}")
