"""How class identifiability evolves over the blocks (paper §4.2), with its test against a control.

Ranks are few, so tokens are counted by rank as they stream past; what is held in memory is those
counts, and for the tests one number an image, block and group of one stream (``vilas2023``: the
tokens of one block of one stream).
"""

from __future__ import annotations

import numpy as np
import polars as pl

from classlens.analysis import statistics
from classlens.analysis.frames import Convention, axis

GROUPS = ("cls", "patch")
CELL = ("stream", "block", "group")
QUARTILES = {"q25": 0.25, "median": 0.5, "q75": 0.75}


def evolution(
    frame: pl.LazyFrame,
    control: pl.LazyFrame | None = None,
    *,
    convention: Convention = "corrected",
    bin_pairs_to: int | None = None,
) -> pl.DataFrame:
    """Identifiability per block, stream and group of tokens (paper §4.2).

    Args:
        control: the same images through the same architecture with random weights; adds one-sided
            paired Wilcoxon tests that identifiability exceeds the control's. ``corrected``: over
            means per image, for each group, with Benjamini–Hochberg q-values over the blocks.
            ``vilas2023``: one test a block over all tokens of all images, CLS and image tokens
            together, no q-values.
        bin_pairs_to: a model with twice as many blocks has them joined in pairs.

    Columns: convention, stream, block, group ("cls" or "patch"; other prefix tokens are left out),
    mean, q25, median, q75 (over tokens of all images), n_images, n_tokens; with a control also
    p_value, n_pairs, q_value.

    Raises:
        ValueError: the blocks are neither ``bin_pairs_to`` nor twice as many.
    """
    blocks = axis(frame, "block")
    step = 1
    if bin_pairs_to is not None and len(blocks) != bin_pairs_to:
        step = 2
        if len(blocks) != 2 * bin_pairs_to:
            raise ValueError(
                f"{len(blocks)} blocks cannot be joined in pairs to {bin_pairs_to}; leave "
                "bin_pairs_to out."
            )
    result = _summary(frame, step)
    if control is not None:
        result = result.join(_tests(frame, control, step, convention), on=CELL)
    streams = pl.Enum(axis(frame, "stream"))
    return result.sort(pl.col("stream").cast(streams), "group", "block").select(
        pl.lit(convention).alias("convention"), pl.all()
    )


def _cells(frame: pl.LazyFrame, step: int) -> pl.LazyFrame:
    """CLS and image tokens with their ``group``; blocks joined in steps, ``part`` their place.
    Tokens that were removed are left out."""
    kind = pl.col("kind").cast(pl.String)
    part = pl.col("block") % step
    there = pl.col("rank").is_not_null()
    return frame.filter(kind.is_in(GROUPS) & there).with_columns(
        group=kind, part=part, block=(pl.col("block") - part) // step
    )


def _rank_counts(frame: pl.LazyFrame, step: int) -> pl.DataFrame:
    """Number of tokens of each cell and rank, r ascending: CELL, r, tokens."""
    return (
        _cells(frame, step)
        .group_by(*CELL, "rank")
        .agg(r=pl.col("identifiability").first(), tokens=pl.len())
        .collect(engine="streaming")
        .cast({"stream": pl.String})
        .sort("rank", descending=True)
    )


def _summary(frame: pl.LazyFrame, step: int) -> pl.DataFrame:
    one_block = frame.filter(pl.col("block") == axis(frame, "block")[0])
    n_images = one_block.select(pl.col("image").n_unique()).collect(engine="streaming").item()
    rows = []
    for cell, counts in _rank_counts(frame, step).group_by(CELL, maintain_order=True):
        r, n = counts["r"].to_numpy(), counts["tokens"].to_numpy().astype(np.int64)
        quartiles = [_quantile(r, n, q) for q in QUARTILES.values()]
        rows.append((*cell, r @ n / n.sum(), *quartiles, n_images, n.sum()))
    columns = [*CELL, "mean", *QUARTILES, "n_images", "n_tokens"]
    return pl.DataFrame(rows, columns, orient="row").cast({"block": pl.Int16})


def _quantile(values: np.ndarray, counts: np.ndarray, q: float) -> float:
    """Linearly interpolated quantile of ascending values that occur ``counts`` times each."""
    ends = counts.cumsum()
    place = q * (ends[-1] - 1)
    below, above = values[np.searchsorted(ends, [np.floor(place), np.ceil(place)], side="right")]
    return below + (place % 1) * (above - below)


def _tests(
    frame: pl.LazyFrame, control: pl.LazyFrame, step: int, convention: Convention
) -> pl.DataFrame:
    """Wilcoxon tests of ours against the control: CELL, p_value, n_pairs, q_value."""
    streams = [pl.col("stream") == stream for stream in axis(frame, "stream")]
    if convention == "corrected":
        tested, unit, pieces = list(CELL), ["image"], streams
    else:
        tested, unit = ["stream", "block"], ["image", "token", "part"]
        blocks = axis(frame, "block")
        joined = [blocks[i : i + step] for i in range(0, len(blocks), step)]
        pieces = [s & pl.col("block").is_in(b) for s in streams for b in joined]
    rows = []
    for piece in pieces:
        ours, theirs = (_rank_sums(f.filter(piece), step, unit) for f in (frame, control))
        pairs = ours.join(theirs, on=[*CELL, *unit], suffix="_control")
        for cell, pair in pairs.group_by(tested):
            # Sums of ranks order images as mean identifiability does (the other way round), and
            # being whole numbers they tie exactly where rounded means would not.
            control_rank, rank = pair["rank_control"].to_numpy(), pair["rank"].to_numpy()
            rows.append((*cell, statistics.wilcoxon_greater(control_rank, rank), pair.height))
    tests = pl.DataFrame(rows, [*tested, "p_value", "n_pairs"], orient="row")
    tests = tests.cast({"block": pl.Int16}).sort(tested)
    if convention == "vilas2023":
        groups = pl.DataFrame({"group": GROUPS})
        return tests.join(groups, how="cross").with_columns(q_value=pl.lit(None, pl.Float64))
    return pl.concat(
        family.with_columns(
            q_value=pl.Series(statistics.benjamini_hochberg(family["p_value"].to_numpy()))
        )
        for family in tests.partition_by("stream", "group")
    )


def _rank_sums(frame: pl.LazyFrame, step: int, unit: list[str]) -> pl.DataFrame:
    return (
        _cells(frame, step)
        .group_by(*CELL, *unit)
        .agg(pl.col("rank").cast(pl.Int64).sum())
        .collect(engine="streaming")
        .cast({"stream": pl.String})
    )
