"""What the analyses of a store have in common: their result, and what they refuse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from classlens.analysis.frames import Convention
from classlens.analysis.scan import scan_images
from classlens.extractor.errors import UsageError
from classlens.extractor.schema import Layout


@dataclass(frozen=True)
class StoreResult:
    """Base of the results of analyses.

    n_images: scored images. n_bad: images that could not be scored.
    """

    store: Path
    convention: Convention
    seed: int
    n_images: int
    n_bad: int

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready mapping: settings and counts, and each frame as a list of rows."""

        def plain(value: Any) -> Any:
            if isinstance(value, pl.DataFrame):
                return value.to_dicts()
            return str(value) if isinstance(value, Path) else value

        return {name: plain(value) for name, value in vars(self).items()}


def scored_images(store: Path) -> tuple[pl.DataFrame, int]:
    """The scored images of a store (image, key), and how many could not be scored.

    Raises:
        StoreError: there is no store.
        UsageError: nothing is scored yet.
    """
    images = scan_images(store).select("image", "key", "status").collect()
    scored = images.filter(pl.col("status") == "ok").drop("status")
    if scored.is_empty():
        raise UsageError(f"{store} has no scored image yet; run `classlens extract` to its end.")
    return scored, images.height - scored.height


def require_streams(store: Path, layout: Layout, wanted: Sequence[str], reason: str) -> None:
    """Raises UsageError, giving the reason, unless the store holds the streams."""
    lacking = [stream for stream in wanted if stream not in layout.streams]
    if lacking:
        raise UsageError(
            f"{store} holds {', '.join(layout.streams)} only, and {reason}; extract a store with "
            f"`--streams` that include {' and '.join(lacking)}."
        )
