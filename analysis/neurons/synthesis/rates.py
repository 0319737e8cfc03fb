"""How many images the model takes for their target, per variant and number of steps."""

from __future__ import annotations

import polars as pl
from scipy.stats import binomtest


def rates(results: pl.DataFrame) -> pl.DataFrame:
    """One row for each variant and number of steps of a table of `folder.SCHEMA`.

    Columns: variant, steps, targets, images, right (predicted as the target), share, low, high (95%
    Wilson interval, images taken as independent), top5 (share), probability, activation,
    similarity, seconds (means over images).
    """
    right = pl.col("predicted") == pl.col("label")
    grouped = results.group_by("variant", "steps", maintain_order=True).agg(
        pl.col("target").n_unique().alias("targets"),
        pl.len().alias("images"),
        right.sum().cast(pl.Int64).alias("right"),
        (pl.col("rank") < 5).mean().alias("top5"),
        *(pl.col(name).mean() for name in ("probability", "activation", "similarity", "seconds")),
    )
    intervals = [wilson(k, n) for k, n in grouped.select("right", "images").iter_rows()]
    low, high = zip(*intervals, strict=True)
    return grouped.select(
        "variant", "steps", "targets", "images", "right",
        (pl.col("right") / pl.col("images")).alias("share"),
        pl.Series("low", low), pl.Series("high", high),
        "top5", "probability", "activation", "similarity", "seconds",
    )  # fmt: skip


def wilson(right: int, trials: int) -> tuple[float, float]:
    """The 95% Wilson score interval of a share; trials ≥ 1."""
    interval = binomtest(right, trials).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def strongest(results: pl.DataFrame, variant: str, top: int = 8) -> pl.DataFrame:
    """The images of a variant's last step with the largest activation, the largest first."""
    rows = results.filter(pl.col("variant") == variant)
    last = rows.filter(pl.col("steps") == rows["steps"].max())
    return last.sort("activation", descending=True, maintain_order=True).head(top)
