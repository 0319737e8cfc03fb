"""Charts of paper §4 from the frames of :mod:`classlens.analysis.identifiability` and
:mod:`classlens.analysis.probes`, and static SVG.

Blocks are 0-based. Colours are those of Okabe and Ito, one for each stream throughout; controls are
grey and dashed, chance is dotted.
"""

from __future__ import annotations

import html
import io
import re
from typing import Any

import altair as alt
import polars as pl

STREAM_COLORS = {"resid": "#0072B2", "mid": "#CC79A7", "attn": "#D55E00", "mlp": "#009E73"}
STREAM_TITLES = {
    "resid": "residual stream (resid)",
    "mid": "after attention (mid)",
    "attn": "attention output (attn)",
    "mlp": "MLP output (mlp)",
}
GROUP_TITLES = {"cls": "CLS token", "patch": "image tokens"}
CONTROL_COLOR = "#6B6B6B"
CHANCE_COLOR = "#222222"
PROBE_COLOR = "#000000"
LEVEL = 0.05
BAR_WIDTH = 220
# The converter measures text in Liberation Sans; these have its widths.
FONT = "Arial, Helvetica, Liberation Sans, sans-serif"

LINES = {
    "model": "model",
    "control": "control (random weights)",
    "projection": "class-embedding projection",
    "probe": "linear probe",
    "chance": "chance",
}
DASHES = {
    "model": [1, 0],
    "control": [6, 3],
    "projection": [1, 0],
    "probe": [6, 3],
    "chance": [1.5, 3],
}


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
    color = _color({"resid": "model"})
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
    return _styled(alt.hconcat(*panels, spacing=32))


def evolution_chart(evolution: pl.DataFrame) -> alt.FacetChart:
    """Mean identifiability over blocks, a row for CLS and image tokens, a column for each stream.

    Args:
        evolution: one store's ``IdentifiabilityResult.evolution``. The band is the middle half of
            the tokens; a star marks blocks above the control (q < 0.05, p where there is no q).
    """
    streams = evolution["stream"].unique(maintain_order=True).to_list()
    is_model = pl.col("source") == "model"
    star = is_model & _significant() if "p_value" in evolution.columns else pl.lit(False)
    rows = _with_chance(evolution.with_columns(star=star), "mean").select(
        pl.col("stream").replace(STREAM_TITLES),
        pl.col("group").replace(GROUP_TITLES),
        pl.when(is_model).then("stream").otherwise("source").alias("color"),
        *("block", "mean", "q25", "q75", "star", "line"),
    )
    y = _identifiability(1.08)
    base = alt.Chart().encode(x=_blocks(evolution), color=_color({s: s for s in streams}))
    panel = alt.layer(
        base.mark_area(opacity=0.22)
        .encode(y=alt.Y("q25:Q", title="identifiability r"), y2="q75:Q")
        .transform_filter(alt.datum.line == LINES["model"]),
        base.mark_line(strokeWidth=2).encode(y=y, strokeDash=_dash(rows)),
        base.mark_circle(size=25, opacity=1)
        .encode(y=y)
        .transform_filter(alt.datum.line != LINES["chance"]),
        alt.Chart()
        .mark_text(text="★", fontSize=9, color=CONTROL_COLOR)
        .encode(x=_blocks(evolution), y=alt.datum(1.05))
        .transform_filter(alt.datum.star),
        data=rows,
    ).properties(width=262, height=175)
    return _faceted(panel, evolution)


def change_rate_chart(change_rate: pl.DataFrame) -> alt.LayerChart:
    """Share of image tokens whose label logit rose in each block, with its interval.

    Args:
        change_rate: one store's ``IdentifiabilityResult.change_rate``.
    """
    rows = _with_chance(change_rate, "change_rate")
    base = alt.Chart(rows.with_columns(color="source")).encode(
        x=_blocks(change_rate), color=_color({"resid": "model"})
    )
    title = "share of image tokens rising"
    y = alt.Y("change_rate:Q", title=title, scale=alt.Scale(domain=[0, 1]))
    return _styled(
        alt.layer(
            base.mark_area(opacity=0.25).encode(y=alt.Y("low:Q", title=title), y2="high:Q"),
            base.mark_line(strokeWidth=2).encode(y=y, strokeDash=_dash(rows)),
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
    signs = [f"class ahead, {_test_name(context)} < {LEVEL}", "not significant"]
    frame = context.with_columns(
        significance=pl.when(_significant()).then(pl.lit(signs[0])).otherwise(pl.lit(signs[1]))
    )
    color = STREAM_COLORS["resid"]
    base = alt.Chart(frame).encode(x=_blocks(context))
    y = alt.Y("delta:Q", title="Δ identifiability r, class − context")
    fill = alt.Fill(
        "significance:N",
        title=None,
        scale=alt.Scale(domain=signs, range=[color, "#FFFFFF"]),
        legend=alt.Legend(symbolStrokeColor=color, symbolSize=70),
    )
    zero = alt.Chart(pl.DataFrame({"zero": [0.0]})).mark_rule(color=CHANCE_COLOR)
    return _styled(
        alt.layer(
            zero.encode(y="zero:Q"),
            base.mark_tick(color=CONTROL_COLOR, thickness=2, size=16, orient="horizontal").encode(
                y="null:Q"
            ),
            base.mark_rule(color=color, strokeWidth=2).encode(y="low:Q", y2="high:Q"),
            base.mark_point(size=70, stroke=color, strokeWidth=2, opacity=1).encode(y=y, fill=fill),
        ).properties(width=400, height=230)
    )


def probe_chart(comparison: pl.DataFrame) -> alt.FacetChart:
    """Mean identifiability over blocks by projection and by probe, each with its interval.

    A row for CLS and image tokens, a column for each stream.

    Args:
        comparison: the frame of ``probes.compare_probe``.
    """
    streams = comparison["stream"].unique(maintain_order=True).to_list()
    projected = pl.col("source") == "projection"
    rows = _with_chance(comparison, "mean").select(
        pl.col("stream").replace(STREAM_TITLES),
        pl.col("group").replace(GROUP_TITLES),
        pl.when(projected).then("stream").otherwise("source").alias("color"),
        *("block", "mean", "low", "high", "line"),
    )
    base = alt.Chart().encode(x=_blocks(comparison), color=_color({s: s for s in streams}))
    y = _identifiability(1)
    drawn = alt.datum.line != LINES["chance"]
    panel = alt.layer(
        base.mark_area(opacity=0.22)
        .encode(y=alt.Y("low:Q", title="identifiability r"), y2="high:Q", detail="line:N")
        .transform_filter(drawn),
        base.mark_line(strokeWidth=2).encode(y=y, strokeDash=_dash(rows)),
        base.mark_circle(size=25, opacity=1).encode(y=y).transform_filter(drawn),
        data=rows,
    ).properties(width=262, height=175)
    return _faceted(panel, comparison)


def to_svg(chart: Any, description: str) -> str:
    """A static SVG element to set into a page; needs no network and no script.

    Args:
        description: read out in place of the picture.
    """
    buffer = io.StringIO()
    chart.save(buffer, format="svg")
    svg = re.sub(r'\s(role|aria-[a-z]+)="[^"]*"', "", buffer.getvalue())
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(description)}" ', 1)


def _faceted(panel: Any, frame: pl.DataFrame) -> alt.FacetChart:
    """The panel for each stream (columns) and group (rows) of a frame."""
    streams = frame["stream"].unique(maintain_order=True).to_list()
    groups = [group for group in GROUP_TITLES if group in frame["group"].to_list()]
    titles = {"labelFontSize": 13, "labelColor": "#222", "labelPadding": 6}
    return _styled(
        panel.facet(
            column=alt.Column(
                "stream:N",
                title=None,
                sort=[STREAM_TITLES[stream] for stream in streams],
                header=alt.Header(**titles, labelFontWeight=600),
            ),
            row=alt.Row(
                "group:N",
                title=None,
                sort=[GROUP_TITLES[group] for group in groups],
                header=alt.Header(**titles, labelFontWeight=600),
            ),
            spacing=14,
        )
    )


def _identifiability(top: float) -> alt.Y:
    """The axis of mean r, from 0."""
    axis = alt.Axis(values=[0, 0.2, 0.4, 0.6, 0.8, 1], tickCount=6)
    scale = alt.Scale(domain=[0, top], nice=False)
    return alt.Y("mean:Q", title="identifiability r", scale=scale, axis=axis)


def _with_chance(frame: pl.DataFrame, measure: str) -> pl.DataFrame:
    """Rows of a line at 0.5 added as source "chance", and ``line``, the name in the legend."""
    same = frame.filter(pl.col("source") == frame["source"][0]).select(
        pl.lit("chance").alias("source"),
        pl.lit(0.5).alias(measure),
        *(name for name in ("stream", "group", "block") if name in frame.columns),
    )
    rows = pl.concat([frame, same], how="diagonal")
    return rows.with_columns(line=pl.col("source").replace(LINES))


def _blocks(frame: pl.DataFrame) -> alt.X:
    blocks = sorted(set(frame["block"].to_list()))
    return alt.X(
        "block:Q",
        title="block (0-based)",
        scale=alt.Scale(domain=[blocks[0] - 0.3, blocks[-1] + 0.3], nice=False),
        axis=alt.Axis(
            values=blocks if len(blocks) <= 12 else blocks[::2],
            tickCount=len(blocks),
            format="d",
            grid=False,
        ),
    )


def _dash(rows: pl.DataFrame) -> alt.StrokeDash:
    shown = [source for source, line in LINES.items() if line in rows["line"].to_list()]
    return alt.StrokeDash(
        "line:N",
        title=None,
        scale=alt.Scale(
            domain=[LINES[source] for source in shown], range=[DASHES[source] for source in shown]
        ),
        legend=alt.Legend(symbolType="stroke", symbolSize=400, symbolStrokeColor="#444444"),
    )


def _color(streams: dict[str, str]) -> alt.Color:
    """Colour by the field ``color``: a stream's value of it, "control", "probe" or "chance"."""
    colors = {value: STREAM_COLORS[stream] for stream, value in streams.items()}
    colors |= {"control": CONTROL_COLOR, "probe": PROBE_COLOR, "chance": CHANCE_COLOR}
    scale = alt.Scale(domain=list(colors), range=list(colors.values()))
    return alt.Color("color:N", scale=scale, legend=None)


def _with_interval_text(rates: pl.DataFrame, measure: str) -> pl.DataFrame:
    numbers = rates.select(measure, f"{measure}_low", f"{measure}_high").iter_rows()
    return rates.with_columns(
        interval=pl.Series([f"{value:.2f} [{low:.2f}, {high:.2f}]" for value, low, high in numbers])
    )


def _significant() -> pl.Expr:
    return pl.coalesce("q_value", "p_value") < LEVEL


def _test_name(frame: pl.DataFrame) -> str:
    return "p" if frame["q_value"].is_null().all() else "q"


def _styled(chart: Any) -> Any:
    text = {"labelFontSize": 12, "titleFontSize": 12.5, "labelColor": "#222", "titleColor": "#222"}
    return (
        chart.configure(font=FONT, background="transparent")
        .configure_view(stroke=None)
        .configure_axis(
            **text,
            titleFontWeight="normal",
            gridColor="#E4E4E4",
            domainColor="#888",
            titlePadding=8,
        )
        .configure_legend(
            labelFontSize=12, labelColor="#222", orient="bottom", labelLimit=400, columnPadding=24
        )
        .configure_title(fontSize=13, fontWeight=600, anchor="middle", color="#222")
    )
