"""Two stores that are to be compared image by image, token by token."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from classlens.analysis.scan import scan_images
from classlens.extractor.errors import UsageError
from classlens.extractor.schema import read_layout

PAIRED_AXES = ("blocks", "prefix_kinds", "grid", "classes")


def paired_images(
    store: Path, other: Path, *, remedy: str, axes: tuple[str, ...] = PAIRED_AXES
) -> pl.DataFrame:
    """The images that both stores have scored: image, key; ascending.

    Args:
        remedy: how to make an ``other`` that pairs; the end of the error's sentence.
        axes: names of ``Layout`` that must be equal.

    Raises:
        StoreError: a path is no store. UsageError: an axis differs, or a place on the image axis
            is another image's, or no image is scored in both.
    """
    ours, theirs = read_layout(store), read_layout(other)
    if differing := [name for name in axes if getattr(ours, name) != getattr(theirs, name)]:
        raise UsageError(f"{other} differs from {store} in {', '.join(differing)}; {remedy}")
    of_ours, of_theirs = (
        scan_images(path).filter(pl.col("status") == "ok").select("image", "key").collect()
        for path in (store, other)
    )
    pairs = of_ours.join(of_theirs, on="image", suffix="_other", maintain_order="left")
    if pairs.is_empty() or (pairs["key"] != pairs["key_other"]).any():
        raise UsageError(f"{other} and {store} do not hold the same images; {remedy}")
    return pairs.select("image", "key")
