"""Charts of :mod:`classlens.analysis.interventions`: blue is the model as it is, orange the
perturbed one."""

from __future__ import annotations

from typing import Any

import altair as alt
import polars as pl

from classlens.analysis.plot_style import (
    CHANCE_COLOR,
    GROUP_TITLES,
    STREAM_COLORS,
    block_axis,
    styled,
)

COLORS = {"unperturbed": STREAM_COLORS["resid"], "perturbed": "#E69F00", "chance": CHANCE_COLOR}
DASHES = {"unperturbed": [1, 0], "perturbed": [7, 2.5], "chance": [1.5, 3]}
SHAPES = {"unperturbed": "circle", "perturbed": "diamond"}
MEASURE_TITLES = {
    "rate": "image tokens with rank 0 (%)",
    "images": "images with such a token (%)",
    "accuracy": "accuracy (%)",
}
PANEL_WIDTH = 170


def intervention_rates_chart(rates: pl.DataFrame) -> Any:
    """Rates and accuracy, perturbed and not, a row for each perturbed store.

    Args:
        rates: ``InterventionsResult.rates`` of one convention. Lines are the intervals.
    """
    panels = []
    for measure, title in MEASURE_TITLES.items():
        rows = rates.filter(pl.col("measure") == measure, pl.col("source") != "difference")
        names = alt.Axis(labelLimit=260, domain=False, ticks=False) if not panels else None
        scale = alt.Scale(domain=[-3, 103], nice=False)
        axis = alt.Axis(values=[0, 25, 50, 75, 100])
        base = alt.Chart(rows).encode(
            y=alt.Y("name:N", title=None, sort=None, axis=names),
            yOffset=alt.YOffset("source:N", sort=list(SHAPES)),
            color=_color(tuple(SHAPES), alt.Legend(symbolSize=60)),
        )
        x = alt.X("value:Q", title=title, scale=scale, axis=axis)
        panels.append(
            alt.layer(
                base.mark_point(size=60, filled=True, opacity=1).encode(x=x, shape=_shape()),
                base.mark_rule(strokeWidth=2).encode(
                    x=alt.X("low:Q", title=title, axis=axis), x2="high:Q"
                ),
            ).properties(width=PANEL_WIDTH, height=alt.Step(16, **{"for": "offset"}))
        )
    return styled(alt.hconcat(*panels, spacing=24))


def intervention_blocks_chart(blocks: pl.DataFrame) -> Any:
    """Mean identifiability over the blocks, a column for each perturbed store.

    Args:
        blocks: ``InterventionsResult.blocks``. Both lines are over the same tokens; bands are the
            intervals.
    """
    names = blocks["name"].unique(maintain_order=True).to_list()
    groups = [group for group in GROUP_TITLES if group in blocks["group"].to_list()]
    chance = blocks.filter(pl.col("source") == "difference").with_columns(
        source=pl.lit("chance"), mean=0.5, low=0.5, high=0.5
    )
    measured = blocks.filter(pl.col("source") != "difference")
    rows = pl.concat([measured, chance]).with_columns(pl.col("group").replace(GROUP_TITLES))
    title = "identifiability r"
    scale = alt.Scale(domain=[0, 1])
    y = alt.Y("mean:Q", title=title, scale=scale, axis=alt.Axis(tickCount=6))
    legend = alt.Legend(symbolType="stroke", symbolSize=500, symbolOpacity=1)
    base = alt.Chart().encode(x=block_axis(blocks), color=_color(tuple(COLORS), legend))
    panel = alt.layer(
        # The legend takes after the first layer.
        base.mark_line(strokeWidth=2).encode(y=y, strokeDash=_dash(legend)),
        base.mark_area(opacity=0.22).encode(y=alt.Y("low:Q", title=title), y2="high:Q"),
        base.mark_circle(size=25, opacity=1)
        .encode(y=y)
        .transform_filter(alt.datum.source != "chance"),
        data=rows,
    ).properties(width=230 if len(names) <= 3 else 190, height=160)
    header = alt.Header(labelFontSize=13, labelColor="#222", labelPadding=6, labelFontWeight=600)
    return styled(
        panel.facet(
            column=alt.Column("name:N", title=None, sort=names, header=header),
            row=alt.Row(
                "group:N", title=None, sort=[GROUP_TITLES[g] for g in groups], header=header
            ),
            spacing=14,
        )
    )


def _color(sources: tuple[str, ...], legend: alt.Legend) -> alt.Color:
    scale = alt.Scale(domain=list(sources), range=[COLORS[source] for source in sources])
    return alt.Color("source:N", title=None, scale=scale, legend=legend)


def _dash(legend: alt.Legend) -> alt.StrokeDash:
    scale = alt.Scale(domain=list(DASHES), range=list(DASHES.values()))
    return alt.StrokeDash("source:N", title=None, scale=scale, legend=legend)


def _shape() -> alt.Shape:
    scale = alt.Scale(domain=list(SHAPES), range=list(SHAPES.values()))
    return alt.Shape("source:N", title=None, scale=scale)
