"""Class-labelled against context tokens: any number of an image token, for each block.

A patch is class-labelled when its segmentation mask covers enough of it, else it is context.

Shape letters: n images of one batch, B blocks, G image tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import polars as pl

from classlens.analysis import statistics
from classlens.analysis.frames import Convention, axis
from classlens.analysis.scan import scan, scan_images
from classlens.extractor.schema import UNITS_FILE

SCHEMA = {
    "convention": pl.String(),
    "block": pl.Int16(),
    **dict.fromkeys(("delta", "low", "high", "null", "p_value", "q_value"), pl.Float64()),
    **dict.fromkeys(("n_images", "n_class", "n_context"), pl.Int64()),
}
"""Columns of :func:`class_context`."""


def class_context(
    patches: pl.LazyFrame,
    blocks: Sequence[int],
    values: Iterable[tuple[np.ndarray, np.ndarray]],
    *,
    convention: Convention,
    class_fraction: float,
    permutations: int,
    seed: int,
) -> pl.DataFrame:
    """Δ = mean over class-labelled − mean over context tokens, over the tokens of all images.

    ``corrected``: labels shuffled within images, p = (1+#)/(1+n), Benjamini–Hochberg q-values over
    blocks. ``vilas2023``: 300 shuffles pooled over images, p = #{Δ < Δ_perm}/300, no q-values.
    One-sided: small p says that class tokens are ahead. Mask fractions are the store's in both;
    their squashed masks need ``extract --geometry squash``.

    Args:
        patches: the image tokens of one stream; their masks are counted.
        blocks: those of the values, [B].
        values: batches of those images in order: values [n, B, G], mask fractions [n, G]. Not
            consumed where one kind of token is missing.
        class_fraction: a patch is class-labelled when its mask covers at least this share.
        permutations: of the ``corrected`` test.

    Columns: convention, block, delta, low, high (95% bootstrap interval over images), null (mean Δ
    over all shuffles: what differences between images alone bring about), p_value, q_value,
    n_images, n_class, n_context (tokens). No rows where one kind of token is missing.
    """
    is_class = pl.col("mask_fraction") >= class_fraction
    counts = (
        patches.filter(pl.col("block") == axis(patches, "block")[0])
        .group_by("image")
        .agg(class_tokens=is_class.sum(), tokens=pl.len())
        .sort("image")
        .collect(engine="streaming")
    )
    n_class = int(counts["class_tokens"].sum())
    n_context = int(counts["tokens"].sum()) - n_class
    if not (n_class and n_context and len(blocks)):
        return pl.DataFrame(schema=SCHEMA)
    test = statistics.ClassContextTest(
        counts["class_tokens"].to_numpy(),
        counts["tokens"].item(0),
        pooled=convention == "vilas2023",
        permutations=statistics.permutations_of(convention, permutations),
        seed=seed,
    )
    for values_nBG, fraction_nG in values:
        test.add(values_nBG, fraction_nG >= class_fraction)
    low, high = test.interval()
    p_values = test.p_values()
    q_values = statistics.benjamini_hochberg(p_values) if convention == "corrected" else None
    return pl.DataFrame(
        {
            "convention": convention,
            "block": blocks,
            "delta": test.delta(),
            "low": low,
            "high": high,
            "null": test.delta_when_shuffled(),
            "p_value": p_values,
            "q_value": q_values,
            "n_images": counts.height,
            "n_class": n_class,
            "n_context": n_context,
        },
        schema=SCHEMA,
    )


def with_masks(store: str | Path) -> pl.LazyFrame:
    """The scanned images of a store that have a segmentation mask; all of them where none has."""
    units = pl.read_parquet(Path(store) / UNITS_FILE)
    if units["masks"].all() or not units["masks"].any():
        return scan(store)
    images = scan_images(store).select("image", "unit").collect()
    masked = images.join(units.filter("masks"), on="unit", how="semi")
    return scan(store, images=masked["image"].to_list())
