"""Figures of the page that sums the neurons up by block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import altair as alt
import polars as pl
from markupsafe import Markup

from classlens.analysis.neurons.dissection import DETECTOR_IOU
from classlens.analysis.neurons.site.content import Content
from classlens.analysis.plot_style import (
    CONTROL_COLOR,
    STREAM_COLORS,
    block_axis,
    styled,
    to_svg,
)

PANEL = {"width": 560, "height": 230}
LOCALISATION = {
    "within_images": (
        "Do top key neurons lie where their class is, within an image?",
        "Where a neuron is above its 80th percentile of an image, against the mask of the image's "
        "class",
        "random neuron of the block",
    ),
    "over_data_set": (
        "Do top key neurons lie where their class is, over the data set?",
        "Where a neuron is above one threshold for all images (dissection), against the masks of "
        "its class",
        "mean of the other neurons of the block",
    ),
}
"""Title, what is compared, and what chance is, for each question of `localisation`."""


@dataclass(frozen=True)
class Figure:
    """A chart with the numbers behind it. anchor: its id on the page."""

    anchor: str
    title: str
    svg: Markup
    caption: str
    rows: pl.DataFrame


def figures(content: Content, table: pl.DataFrame) -> list[Figure]:
    """The figures for which there are numbers.

    Args:
        table: of `Table.frame`.
    """
    return [
        *_top_blocks(content),
        *_localisation(content),
        *_detectors(table),
        *_agreement(table),
    ]


def _detectors(table: pl.DataFrame) -> Iterator[Figure]:
    if table["iou"].is_null().all():
        return
    rows = table.group_by("block").agg(
        neurons=pl.len(),
        detectors=(pl.col("iou") > DETECTOR_IOU).sum(),
        share=(pl.col("iou") > DETECTOR_IOU).mean(),
        median_iou=pl.col("iou").median(),
    )
    yield _bars(
        "detectors",
        "Detectors",
        rows.sort("block"),
        "detectors",
        "neurons",
        f"Neurons of each block whose best class overlaps with an IoU above {DETECTOR_IOU}.",
    )


def _top_blocks(content: Content) -> Iterator[Figure]:
    blocks = content.top_blocks
    yield _bars(
        "top-neurons",
        "Where classes have their top key neuron",
        blocks,
        "classes",
        "classes",
        f"The neuron whose value vector promotes a class most, over all neurons of all blocks: the "
        f"block it is in, for {blocks['classes'].sum():,} classes.",
    )


def _localisation(content: Content) -> Iterator[Figure]:
    for question, found in content.localisation.items():
        title, compared, chance = LOCALISATION[question]
        lines = {"top": "top key neuron of the class", "random": chance}
        rows = pl.concat(
            found.blocks.select(
                "block",
                pl.lit(text).alias("line"),
                pl.col(name).alias("iou"),
                pl.col(f"{name}_low").alias("low"),
                pl.col(f"{name}_high").alias("high"),
            )
            for name, text in lines.items()
        )
        mean, low, high = (f"{x:+.4f}".replace("-", "−") for x in found.late_minus_early)
        ahead = found.blocks.filter(pl.col("difference_low") > 0)["block"].to_list()
        caption = (
            f"{compared}: mean IoU over {found.n:,} {found.over}, with 95% bootstrap intervals. "
            "Top neurons of the last half of the blocks minus those of the first half: "
            f"{mean} [{low}, {high}]. The interval of the difference from chance is above 0 in "
            + (f"blocks {', '.join(map(str, ahead))}." if ahead else "no block.")
        )
        svg = to_svg(_lines(rows, lines), f"{title} The numbers are in the table below.")
        yield Figure(question, title, Markup(svg), caption, found.blocks)


def _lines(rows: pl.DataFrame, lines: dict[str, str]) -> Any:
    """Mean IoU over the blocks with its interval, a colour for each ``line``."""
    colors = alt.Scale(domain=list(lines.values()), range=[STREAM_COLORS["mlp"], CONTROL_COLOR])
    legend = alt.Legend(symbolType="stroke", symbolSize=400, symbolOpacity=1, symbolStrokeWidth=2)
    color = alt.Color("line:N", title=None, scale=colors, legend=legend)
    base = alt.Chart(rows).encode(x=block_axis(rows), color=color)
    scale = alt.Scale(domain=[0, 1.1 * max(rows["high"])], nice=True)
    y = alt.Y("iou:Q", title="mean IoU with the mask of the class", scale=scale)
    layers = (
        base.mark_area(opacity=0.2).encode(y="low:Q", y2="high:Q"),
        base.mark_line(strokeWidth=2).encode(y=y),
        base.mark_circle(size=30, opacity=1).encode(y=y),
    )
    return styled(alt.layer(*layers).properties(**PANEL))


def _agreement(table: pl.DataFrame) -> Iterator[Figure]:
    if table["agreeing"].is_null().all():
        return
    rows = table.group_by("block").agg(
        neurons=pl.len(),
        agreeing=(pl.col("agreeing") > 0).sum(),
        share=100 * (pl.col("agreeing") > 0).mean(),
    )
    yield _bars(
        "agreement",
        "Agreement of words",
        rows.sort("block"),
        "share",
        "neurons (%)",
        "Neurons of which at least two words name the same class, in %.",
    )


def _bars(
    anchor: str, title: str, rows: pl.DataFrame, measure: str, axis: str, caption: str
) -> Figure:
    """A bar a block."""
    base = alt.Chart(rows).encode(
        x=alt.X("block:O", title="block (0-based)", axis={"labelAngle": 0})
    )
    top = max(1.0, 1.1 * float(rows[measure].max()))  # type: ignore[arg-type]
    scale = alt.Scale(domain=[0, top])
    y = alt.Y(f"{measure}:Q", title=axis, scale=scale, axis=alt.Axis(tickMinStep=1))
    bars = base.mark_bar(color=STREAM_COLORS["mlp"]).encode(y=y)
    form = ".0f" if rows[measure].dtype.is_integer() else ".1f"
    text = alt.Text(f"{measure}:Q", format=form)
    labels = base.mark_text(dy=-6, fontSize=11, color="#444").encode(y=y, text=text)
    chart: Any = styled(alt.layer(bars, labels).properties(**PANEL))
    svg = Markup(to_svg(chart, f"{title} by block; the numbers are in the table below."))
    return Figure(anchor, title, svg, caption, rows)
