"""Charts of paper §4.3 from the frames of :mod:`classlens.analysis.sublayers` and
:mod:`classlens.analysis.composition`."""

from __future__ import annotations

import altair as alt
import polars as pl

from classlens.analysis.plot_style import (
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
    styled,
)

OWN_INPUT = "against the sublayer's own input (corrected)"
BLOCK_INPUT = "against the block's input (vilas2023)"
BASELINE_DASHES = {OWN_INPUT: [1, 0], BLOCK_INPUT: [6, 3], LINES["chance"]: DASHES["chance"]}

SOURCE_COLORS = {
    "prev": STREAM_COLORS["resid"],
    "attn": STREAM_COLORS["attn"],
    "mlp": STREAM_COLORS["mlp"],
    "several": "#F0E442",
    "comp": "#BDBDBD",
}
SOURCE_TITLES = {
    "prev": "residual stream before, alone (prev)",
    "attn": "attention alone (attn)",
    "mlp": "MLP alone (mlp)",
    "several": "two or three of these (several)",
    "comp": "none of these (comp)",
}


def sublayer_rate_chart(change_rate: pl.DataFrame) -> alt.FacetChart:
    """Share of tokens whose label logit a sublayer raises, with its interval; chance 0.5.

    Args:
        change_rate: ``sublayer_change_rate`` of one convention, or of both: attention, for which
            the conventions are the same, is drawn once.
    """
    own = {"attn": "resid", "mlp": "mid"}
    is_own = pl.col("baseline") == pl.col("sublayer").replace(own)
    rows = change_rate.unique(["sublayer", "baseline", "group", "block"], maintain_order=True)
    rows = rows.select(
        pl.col("sublayer").replace(STREAM_TITLES).alias("column"),
        pl.col("group").replace(GROUP_TITLES).alias("row"),
        pl.when(is_own).then(pl.lit(OWN_INPUT)).otherwise(pl.lit(BLOCK_INPUT)).alias("line"),
        pl.col("sublayer").alias("color"),
        *("block", "change_rate", "low", "high"),
    )
    chance = (
        rows.select("column", "row", "block")
        .unique()
        .with_columns(line=pl.lit(LINES["chance"]), color=pl.lit("chance"), change_rate=pl.lit(0.5))
    )
    rows = pl.concat([rows, chance], how="diagonal")
    title = "share of tokens rising"
    y = alt.Y("change_rate:Q", title=title, scale=alt.Scale(domain=[0, 1]))
    dash = line_dash(rows, BASELINE_DASHES)
    sublayers = [s for s in own if s in rows["color"].to_list()]
    base = alt.Chart().encode(x=block_axis(rows), color=color_of({s: s for s in sublayers}))
    panel = alt.layer(
        base.mark_area(opacity=0.2).encode(
            y=alt.Y("low:Q", title=title), y2="high:Q", detail="line:N"
        ),
        base.mark_line(strokeWidth=2).encode(y=y, strokeDash=dash),
        base.mark_circle(size=30, opacity=1)
        .encode(y=y, detail="line:N")
        .transform_filter(alt.datum.line != LINES["chance"]),
        data=rows,
    ).properties(width=400, height=165)
    columns = [STREAM_TITLES[sublayer] for sublayer in sublayers]
    groups = [title for title in GROUP_TITLES.values() if title in rows["row"].to_list()]
    return styled(faceted(panel, columns=columns, rows=groups))


def sublayer_context_chart(context: pl.DataFrame) -> alt.ConcatChart:
    """Change of the label logit in class-labelled less context tokens, a panel a sublayer.

    Args:
        context: ``sublayer_context`` of one convention, not empty.
    """
    title = "Δ change of label logit, class − context"
    panels = difference_panels(context, "sublayer", title, "class ahead")
    return styled(panels.resolve_scale(fill="independent", y="independent"))


def correct_minus_wrong_chart(difference: pl.DataFrame) -> alt.ConcatChart:
    """Identifiability of CLS in correct less wrong images, a panel a stream.

    Args:
        difference: ``cls_correct_minus_wrong`` of one convention, not empty.
    """
    title = "Δ identifiability r of CLS, correct − wrong"
    panels = difference_panels(difference, "stream", title, "correct ahead")
    return styled(panels.resolve_scale(fill="independent", y="shared"))


def composition_chart(composition: pl.DataFrame) -> alt.FacetChart:
    """Exclusive split of the residual stream's top classes, a bar a block; CLS and image tokens.

    Args:
        composition: frame of ``composition``, ``corrected``.
    """
    wanted = (pl.col("split") == "exclusive") & pl.col("group").is_in(list(GROUP_TITLES))
    order = {source: place for place, source in enumerate(SOURCE_TITLES)}
    rows = composition.filter(wanted).select(
        pl.col("group").replace(GROUP_TITLES).alias("column"),
        pl.lit("").alias("row"),
        pl.col("source").replace(SOURCE_TITLES).alias("title"),
        pl.col("source").replace_strict(order).alias("order"),
        "block",
        "percent",
    )
    color = alt.Color(
        "title:N",
        title=None,
        scale=alt.Scale(domain=list(SOURCE_TITLES.values()), range=list(SOURCE_COLORS.values())),
        legend=alt.Legend(columns=3, symbolType="square"),
    )
    bars = (
        alt.Chart()
        .mark_bar()
        .encode(
            x=alt.X("block:O", title="block (0-based)", axis=alt.Axis(labelAngle=0)),
            y=alt.Y(
                "percent:Q", title="% of tokens", stack="zero", scale=alt.Scale(domain=[0, 100])
            ),
            color=color,
            order="order:O",
        )
    )
    panel = alt.layer(bars, data=rows).properties(width=400, height=220)
    groups = [title for title in GROUP_TITLES.values() if title in rows["column"].to_list()]
    return styled(faceted(panel, columns=groups, rows=[""]))


def difference_panels(frame: pl.DataFrame, by: str, title: str, ahead: str) -> alt.ConcatChart:
    """A :func:`difference_chart` for each value of a column that names a stream."""
    streams = frame[by].unique(maintain_order=True).to_list()
    in_row = 3 if len(streams) == 3 else 2
    panels = [
        difference_chart(
            frame.filter(pl.col(by) == stream),
            title=title if place % in_row == 0 else "",
            ahead=ahead,
            color=STREAM_COLORS[stream],
        ).properties(width=255 if in_row == 3 else 400, height=210, title=STREAM_TITLES[stream])
        for place, stream in enumerate(streams)
    ]
    return alt.concat(*panels, columns=in_row, spacing=30)
