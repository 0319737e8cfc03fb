"""Figures of a study: published numbers and ours."""

from __future__ import annotations

from typing import Any

import altair as alt
import polars as pl

from classlens.analysis.plot_style import CHANCE_COLOR, CONTROL_COLOR, STREAM_COLORS, styled

VERDICT_COLORS = {"met": STREAM_COLORS["mlp"], "not met": STREAM_COLORS["attn"]}
LINES = {"published": "published", "vilas2023": "ours, vilas2023", "corrected": "ours, corrected"}
COLORS = [CHANCE_COLOR, STREAM_COLORS["resid"], CONTROL_COLOR]
COLUMNS = 3


def differences_chart(findings: pl.DataFrame) -> Any:
    """How far each single number lies from the published one, in tolerances: a point a target.

    Args:
        findings: of ``verdicts.findings_frame``; measured single numbers are drawn, clipped at ±4.
    """
    rows = _measured(findings).filter(pl.col("id").is_unique())
    off = pl.when(pl.col("difference") != 0).then(pl.col("difference") / pl.col("tolerance"))
    rows = rows.with_columns(off=off.fill_null(0.0).clip(-4, 4))  # a tolerance may be 0
    met = pl.DataFrame({"low": [-1.0], "high": [1.0]})
    scale = alt.Scale(domain=[-4, 4], nice=False)
    title = "(ours, vilas2023 − published) / tolerance"
    band = alt.Chart(met).mark_rect(color="#E8F1EC").encode(x="low:Q", x2="high:Q")
    zero = alt.Chart(pl.DataFrame({"zero": [0.0]})).mark_rule(color=CHANCE_COLOR)
    color = alt.Color(
        "verdict:N",
        title=None,
        scale=alt.Scale(domain=list(VERDICT_COLORS), range=list(VERDICT_COLORS.values())),
    )
    points = (
        alt.Chart(rows)
        .mark_circle(size=70, opacity=1)
        .encode(
            x=alt.X("off:Q", title=title, scale=scale),
            y=alt.Y("id:N", title=None, sort=None, axis=alt.Axis(labelLimit=420)),
            color=color,
        )
    )
    step = alt.Step(22)
    return styled(
        alt.layer(band, zero.encode(x="zero:Q"), points).properties(width=420, height=step)
    )


def series_chart(findings: pl.DataFrame) -> Any:
    """Numbers of every block, published and ours in both conventions, a panel a target.

    Args:
        findings: of ``verdicts.findings_frame``; series with a measured block are drawn.
    """
    rows = _measured(findings).filter(~pl.col("id").is_unique())
    panels = []
    for (name,), series in rows.group_by("id", maintain_order=True):
        long = series.unpivot(
            list(LINES), index=["block", "tolerance"], variable_name="line", value_name="value"
        ).with_columns(pl.col("line").replace(LINES))
        long = long.with_columns(
            low=pl.when(pl.col("line") == "published").then(pl.col("value") - pl.col("tolerance")),
            high=pl.when(pl.col("line") == "published").then(pl.col("value") + pl.col("tolerance")),
        )
        color = alt.Color(
            "line:N", title=None, scale=alt.Scale(domain=list(LINES.values()), range=COLORS)
        )
        axis = alt.Axis(format="d", tickMinStep=1, grid=False)
        base = alt.Chart(long).encode(x=alt.X("block:Q", title="block (0-based)", axis=axis))
        # With room above and below, no label of an axis moves the title of its panel.
        y = alt.Y("value:Q", title=None, scale=alt.Scale(zero=False, nice=False, padding=10))
        panel = alt.layer(
            base.mark_area(opacity=0.15, color=CHANCE_COLOR)
            .encode(y=alt.Y("low:Q", title=None), y2="high:Q")
            .transform_filter(alt.datum.line == LINES["published"]),
            base.mark_line(strokeWidth=1.5).encode(y=y, color=color),
            base.mark_circle(size=22, opacity=1).encode(y=y, color=color),
        )
        panels.append(panel.properties(title=str(name), width=270, height=160))
    return styled(alt.concat(*panels, columns=COLUMNS, spacing=24))


def _measured(findings: pl.DataFrame) -> pl.DataFrame:
    return findings.filter(pl.col("verdict") != "not measured").cast({"verdict": pl.String})
