"""The chart of linear probes beside the class embedding."""

from __future__ import annotations

import altair as alt
import polars as pl

from classlens.analysis.plot_style import (
    DASHES,
    GROUP_TITLES,
    LINES,
    STREAM_TITLES,
    block_axis,
    color_of,
    faceted,
    identifiability_axis,
    line_dash,
    styled,
    with_chance,
)


def probe_chart(comparison: pl.DataFrame) -> alt.FacetChart:
    """Mean identifiability over blocks by projection and by probe, each with its interval.

    A row for CLS and image tokens, a column for each stream.

    Args:
        comparison: the frame of ``probes.compare_probe``.
    """
    streams = comparison["stream"].unique(maintain_order=True).to_list()
    projected = pl.col("source") == "projection"
    rows = with_chance(comparison, "mean").select(
        pl.col("stream").replace(STREAM_TITLES).alias("column"),
        pl.col("group").replace(GROUP_TITLES).alias("row"),
        pl.when(projected).then("stream").otherwise("source").alias("color"),
        *("block", "mean", "low", "high", "line"),
    )
    base = alt.Chart().encode(x=block_axis(comparison), color=color_of({s: s for s in streams}))
    y = identifiability_axis(1)
    drawn = alt.datum.line != LINES["chance"]
    panel = alt.layer(
        base.mark_area(opacity=0.22)
        .encode(y=alt.Y("low:Q", title="identifiability r"), y2="high:Q", detail="line:N")
        .transform_filter(drawn),
        base.mark_line(strokeWidth=2).encode(y=y, strokeDash=line_dash(rows, DASHES)),
        base.mark_circle(size=25, opacity=1).encode(y=y).transform_filter(drawn),
        data=rows,
    ).properties(width=262 if len(streams) <= 3 else 190, height=175)
    groups = [group for group in GROUP_TITLES if group in comparison["group"].to_list()]
    return styled(
        faceted(
            panel,
            columns=[STREAM_TITLES[stream] for stream in streams],
            rows=[GROUP_TITLES[group] for group in groups],
        )
    )
