"""What all charts share: colours, axes, chance, marks of significance, static SVG.

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
LEVEL = 0.05
# The converter measures text in Liberation Sans; these have its widths.
FONT = "Arial, Helvetica, Liberation Sans, sans-serif"

LINES = {"model": "model", "control": "control (random weights)", "chance": "chance"}
DASHES = {LINES["model"]: [1, 0], LINES["control"]: [6, 3], LINES["chance"]: [1.5, 3]}


def to_svg(chart: Any, description: str) -> str:
    """A static SVG element to set into a page; needs no network and no script.

    Args:
        description: read out in place of the picture.
    """
    buffer = io.StringIO()
    chart.save(buffer, format="svg")
    svg = re.sub(r'\s(role|aria-[a-z]+)="[^"]*"', "", buffer.getvalue())
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(description)}" ', 1)


def with_chance(frame: pl.DataFrame, measure: str) -> pl.DataFrame:
    """Rows of a line at 0.5 added as source "chance", and ``line``, the name in the legend."""
    same = frame.filter(pl.col("source") == "model").select(
        pl.lit("chance").alias("source"),
        pl.lit(0.5).alias(measure),
        *(name for name in ("stream", "group", "block") if name in frame.columns),
    )
    rows = pl.concat([frame, same], how="diagonal")
    return rows.with_columns(line=pl.col("source").replace(LINES))


def block_axis(frame: pl.DataFrame) -> alt.X:
    """The field ``block`` on the horizontal axis, as long as the frame's blocks."""
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


def line_dash(rows: pl.DataFrame, dashes: dict[str, list[float]]) -> alt.StrokeDash:
    """Dash by the field ``line``, with a legend of those lines of ``dashes`` that occur."""
    shown = [line for line in dashes if line in rows["line"].to_list()]
    return alt.StrokeDash(
        "line:N",
        title=None,
        scale=alt.Scale(domain=shown, range=[dashes[line] for line in shown]),
        legend=alt.Legend(symbolType="stroke", symbolSize=400, symbolStrokeColor="#444444"),
    )


def color_of(streams: dict[str, str]) -> alt.Color:
    """Colour by the field ``color``: a stream's value of it, "control" or "chance"."""
    colors = {value: STREAM_COLORS[stream] for stream, value in streams.items()}
    colors |= {"control": CONTROL_COLOR, "chance": CHANCE_COLOR}
    scale = alt.Scale(domain=list(colors), range=list(colors.values()))
    return alt.Color("color:N", scale=scale, legend=None)


def faceted(panel: Any, columns: list[str], rows: list[str]) -> alt.FacetChart:
    """A layered chart for each value of its data's fields ``column`` and ``row``, in this order."""
    titles: dict[str, Any] = {
        "labelFontSize": 13,
        "labelColor": "#222",
        "labelPadding": 6,
        "labelFontWeight": 600,
    }
    header = alt.Header(**titles)
    return panel.facet(
        column=alt.Column("column:N", title=None, sort=columns, header=header),
        row=alt.Row("row:N", title=None, sort=rows, header=header),
        spacing=14,
    )


def difference_chart(frame: pl.DataFrame, *, title: str, ahead: str, color: str) -> Any:
    """A layered chart: a difference for each block with its interval, and a line at 0.

    Args:
        frame: columns block, delta, low, high, p_value, q_value; with ``null``, a grey tick stands
            at this value. Filled points: q < 0.05 (p where there is no q).
        title: of the vertical axis. ahead: what filled points say, for the legend.
    """
    signs = [f"{ahead}, {p_or_q(frame)} < {LEVEL}", "not significantly ahead"]
    rows = frame.with_columns(
        significance=pl.when(significant()).then(pl.lit(signs[0])).otherwise(pl.lit(signs[1]))
    )
    base = alt.Chart(rows).encode(x=block_axis(frame))
    y = alt.Y("delta:Q", title=title)
    fill = alt.Fill(
        "significance:N",
        title=None,
        scale=alt.Scale(domain=signs, range=[color, "#FFFFFF"]),
        legend=alt.Legend(symbolStrokeColor=color, symbolSize=70),
    )
    zero = alt.Chart(pl.DataFrame({"zero": [0.0]})).mark_rule(color=CHANCE_COLOR)
    null = base.mark_tick(color=CONTROL_COLOR, thickness=2, size=16, orient="horizontal")
    return alt.layer(
        zero.encode(y="zero:Q"),
        *([null.encode(y="null:Q")] if "null" in frame.columns else []),
        base.mark_rule(color=color, strokeWidth=2).encode(y="low:Q", y2="high:Q"),
        base.mark_point(size=70, stroke=color, strokeWidth=2, opacity=1).encode(y=y, fill=fill),
    )


def significant() -> pl.Expr:
    """Whether a row's q-value, or its p-value where there is none, is below the level."""
    return pl.coalesce("q_value", "p_value") < LEVEL


def p_or_q(frame: pl.DataFrame) -> str:
    """Which of the two decides."""
    return "p" if frame["q_value"].is_null().all() else "q"


def styled(chart: Any) -> Any:
    """The whole chart in the common fonts and greys."""
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
