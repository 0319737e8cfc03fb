"""Charts of paper §4.1–4.2 from the frames of :mod:`classlens.analysis.identifiability`."""

from __future__ import annotations

import altair as alt
import polars as pl

from classlens.analysis.plot_style import (
    CHANCE_COLOR,
    CONTROL_COLOR,
    DASHES,
    GROUP_TITLES,
    LINES,
    STREAM_COLORS,
    STREAM_TITLES,
    block_axis,
    color_of,
    difference_chart,
    faceted,
    line_dash,
    significant,
    styled,
    with_chance,
)

BAR_WIDTH = 220


def rate_chart(rates: pl.DataFrame) -> alt.HConcatChart:
    """Identifiability rate and images with an identifiable token, a bar for each row.

    Args:
        rates: rows of ``identifiability.rate`` with a column ``source`` ("model", "control"), a
            unique ``name`` and ``chance`` (100/C: of a token to have rank 0, in %).
    """
    titles = {
        "rate": ["image tokens with rank 0, mean over images (%)", "tick: chance"],
        "images": ["images with at least one such token (%)"],
    }
    color = color_of({"resid": "model"})
    panels = []
    for measure, title in titles.items():
        names = alt.Axis(labelLimit=320) if not panels else None
        rows = _with_interval_text(rates, measure).with_columns(color="source")
        base = alt.Chart(rows).encode(y=alt.Y("name:N", title=None, sort=None, axis=names))
        layers = [
            base.mark_bar(height={"band": 0.55}).encode(
                x=alt.X(
                    f"{measure}:Q",
                    title=title,
                    scale=alt.Scale(domain=[0, 100]),
                    axis=alt.Axis(tickCount=5),
                ),
                color=color,
            ),
            base.mark_rule(strokeWidth=1.5).encode(x=f"{measure}_low:Q", x2=f"{measure}_high:Q"),
            base.mark_text(align="left", fontSize=12).encode(
                x=alt.value(BAR_WIDTH + 8), text="interval:N"
            ),
        ]
        if measure == "rate":
            tick = base.mark_tick(color=CHANCE_COLOR, thickness=2, height={"band": 0.8})
            layers.append(tick.encode(x="chance:Q"))
        panels.append(alt.layer(*layers).properties(width=BAR_WIDTH, height=alt.Step(32)))
    return styled(alt.hconcat(*panels, spacing=32))


def evolution_chart(evolution: pl.DataFrame) -> alt.FacetChart:
    """Mean identifiability over blocks, a row for CLS and image tokens, a column for each stream.

    Args:
        evolution: one store's ``IdentifiabilityResult.evolution``. The band is the middle half of
            the tokens; a star marks blocks above the control (q < 0.05, p where there is no q).
    """
    streams = evolution["stream"].unique(maintain_order=True).to_list()
    groups = [group for group in GROUP_TITLES if group in evolution["group"].to_list()]
    is_model = pl.col("source") == "model"
    star = is_model & significant() if "p_value" in evolution.columns else pl.lit(False)
    rows = with_chance(evolution.with_columns(star=star), "mean").select(
        pl.col("stream").replace(STREAM_TITLES).alias("column"),
        pl.col("group").replace(GROUP_TITLES).alias("row"),
        pl.when(is_model).then("stream").otherwise("source").alias("color"),
        *("block", "mean", "q25", "q75", "star", "line"),
    )
    scale = alt.Scale(domain=[0, 1.08], nice=False)
    axis = alt.Axis(values=[0, 0.2, 0.4, 0.6, 0.8, 1], tickCount=6)
    y = alt.Y("mean:Q", title="identifiability r", scale=scale, axis=axis)
    base = alt.Chart().encode(x=block_axis(evolution), color=color_of({s: s for s in streams}))
    panel = alt.layer(
        base.mark_area(opacity=0.22)
        .encode(y=alt.Y("q25:Q", title="identifiability r"), y2="q75:Q")
        .transform_filter(alt.datum.line == LINES["model"]),
        base.mark_line(strokeWidth=2).encode(y=y, strokeDash=line_dash(rows, DASHES)),
        base.mark_circle(size=25, opacity=1)
        .encode(y=y)
        .transform_filter(alt.datum.line != LINES["chance"]),
        alt.Chart()
        .mark_text(text="★", fontSize=9, color=CONTROL_COLOR)
        .encode(x=block_axis(evolution), y=alt.datum(1.05))
        .transform_filter(alt.datum.star),
        data=rows,
    ).properties(width=262 if len(streams) < 4 else 190, height=175)
    return styled(
        faceted(
            panel,
            columns=[STREAM_TITLES[stream] for stream in streams],
            rows=[GROUP_TITLES[group] for group in groups],
        )
    )


def change_rate_chart(change_rate: pl.DataFrame) -> alt.LayerChart:
    """Share of image tokens whose label logit rose in each block, with its interval.

    Args:
        change_rate: one store's ``IdentifiabilityResult.change_rate``.
    """
    rows = with_chance(change_rate, "change_rate")
    base = alt.Chart(rows.with_columns(color="source")).encode(
        x=block_axis(change_rate), color=color_of({"resid": "model"})
    )
    title = "share of image tokens rising"
    y = alt.Y("change_rate:Q", title=title, scale=alt.Scale(domain=[0, 1]))
    return styled(
        alt.layer(
            base.mark_area(opacity=0.25).encode(y=alt.Y("low:Q", title=title), y2="high:Q"),
            base.mark_line(strokeWidth=2).encode(y=y, strokeDash=line_dash(rows, DASHES)),
            base.mark_circle(size=40, opacity=1)
            .encode(y=y)
            .transform_filter(alt.datum.line != LINES["chance"]),
        ).properties(width=400, height=230)
    )


def context_chart(context: pl.DataFrame) -> alt.LayerChart:
    """Class-labelled minus context tokens for each block, with its interval.

    Args:
        context: one store's ``IdentifiabilityResult.context``. Filled points: q < 0.05 (p where
            there is no q). Grey ticks: the mean over all shuffles.
    """
    chart = difference_chart(
        context,
        title="Δ identifiability r, class − context",
        ahead="class ahead",
        color=STREAM_COLORS["resid"],
    )
    return styled(chart.properties(width=400, height=230))


def _with_interval_text(rates: pl.DataFrame, measure: str) -> pl.DataFrame:
    numbers = rates.select(measure, f"{measure}_low", f"{measure}_high").iter_rows()
    return rates.with_columns(
        interval=pl.Series([f"{value:.2f} [{low:.2f}, {high:.2f}]" for value, low, high in numbers])
    )
