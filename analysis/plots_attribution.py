"""Charts of the perturbation test (paper §5)."""

from __future__ import annotations

import altair as alt
import polars as pl

from classlens.analysis.perturbation import PerturbationResult
from classlens.analysis.plot_style import styled

METHOD_COLORS = {
    "class-embedding": "#0072B2",
    "chefer": "#D55E00",
    "rollout": "#009E73",
    "linear-probe": "#CC79A7",
    "random": "#6B6B6B",
}
METHOD_DASHES = {
    "class-embedding": [1, 0],
    "chefer": [7, 2],
    "rollout": [3, 2],
    "linear-probe": [7, 2, 2, 2],
    "random": [1, 2],
}
PANELS = {
    "negative": ["negative test: the most relevant are kept", "a larger area is better"],
    "positive": ["positive test: the least relevant are kept", "a smaller area is better"],
}


def perturbation_chart(result: PerturbationResult) -> alt.HConcatChart:
    """Accuracy over the share of patches kept, a panel for each test, a line for each method.

    Bands are 95% bootstrap intervals over images; the legend has the areas with theirs.
    """
    tests = [test for test in PANELS if test in result.curves["test"].to_list()]
    panels = [_panel(result, test) for test in tests]
    return styled(
        alt.hconcat(*panels, spacing=40).resolve_scale(
            color="independent", strokeDash="independent"
        )
    )


def _panel(result: PerturbationResult, test: str) -> alt.LayerChart | alt.FacetChart:
    areas = result.auc.filter(pl.col("test") == test)
    names = {
        row["method"]: f"{row['method']}: {row['auc']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
        for row in areas.iter_rows(named=True)
    }
    rows = result.curves.filter(pl.col("test") == test).with_columns(
        pl.col("share", "accuracy", "low", "high") * 100,
        line=pl.col("method").cast(pl.String).replace(names),
    )
    legend = alt.Legend(
        title="area under the curve [95% interval]",
        titleLimit=400,
        symbolType="stroke",
        symbolSize=500,
        symbolStrokeWidth=2.5,
        orient="bottom",
        direction="vertical",
        columns=1,
    )
    domain = list(names.values())
    colors = alt.Scale(domain=domain, range=[METHOD_COLORS[name] for name in names])
    color = alt.Color("line:N", scale=colors, legend=legend)
    dash = alt.StrokeDash(
        "line:N",
        scale=alt.Scale(domain=domain, range=[METHOD_DASHES[name] for name in names]),
        legend=legend,
    )
    x = alt.X(
        "share:Q",
        title="image tokens kept (%)",
        scale=alt.Scale(domain=[0, 100]),
        axis=alt.Axis(tickCount=5, grid=False),
    )
    y = alt.Y(
        "accuracy:Q",
        title="accuracy (%)",
        scale=alt.Scale(domain=[0, 100]),
        axis=alt.Axis(tickCount=5),
    )
    base = alt.Chart(rows).encode(x=x)
    low = alt.Y("low:Q", title="accuracy (%)")
    fill = alt.Fill("line:N", scale=colors, legend=None)
    return alt.layer(
        base.mark_area(opacity=0.12).encode(y=low, y2="high:Q", fill=fill),
        base.mark_line(strokeWidth=2).encode(y=y, color=color, strokeDash=dash),
    ).properties(
        width=380,
        height=250,
        title=alt.TitleParams(PANELS[test][0], subtitle=PANELS[test][1], anchor="start"),
    )
