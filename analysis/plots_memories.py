"""Charts of paper §4.3 from the frames of ``analysis.memories`` and ``analysis.values``."""

from __future__ import annotations

from typing import Any

import altair as alt
import polars as pl

from classlens.analysis.plot_style import CONTROL_COLOR, LEVEL, block_axis, color_of, styled
from classlens.analysis.plots_sublayers import difference_panels

SUBLAYER_TITLES = {"attn": "attention", "mlp": "MLP"}
GROUP_LINES = {"all": "all tokens", "cls": "CLS token"}
DASHES = ([1, 0], [6, 3])
PANEL = {"width": 330, "height": 220}


def agreement_chart(agreement: pl.DataFrame) -> Any:
    """Key-value agreement rate over blocks with the random-class control, a panel a sublayer.

    Args:
        agreement: of ``memories.agreement``, of one convention.
    """
    lines = {"agreement": "image's class", "control": "random class"}
    rows = pl.concat(
        agreement.select(
            "sublayer",
            "block",
            pl.lit(text).alias("line"),
            pl.lit(source).alias("source"),
            pl.col(source).alias("value"),
            pl.col(f"{source}_low").alias("low"),
            pl.col(f"{source}_high").alias("high"),
        )
        for source, text in lines.items()
    )
    return _panels(rows, "tokens with agreeing memories (%)", list(lines.values()))


def composition_chart(composition: pl.DataFrame) -> Any:
    """Tokens whose sublayer's top class is that of a single memory, a panel a sublayer.

    Args:
        composition: of ``memories.composition``. Image tokens have no line of their own: nearly all
            tokens are image tokens.
    """
    lines = {g: text for g, text in GROUP_LINES.items() if g in composition["group"].to_list()}
    rows = composition.filter(pl.col("group").is_in(list(lines))).with_columns(
        line=pl.col("group").replace(lines), source=pl.lit("model"), value=pl.col("composed")
    )
    return _panels(rows, "tokens with the class of one memory (%)", list(lines.values()))


def correct_minus_wrong_chart(difference: pl.DataFrame) -> Any:
    """Agreement rate of CLS in correct less wrong images, a panel a sublayer.

    Args:
        difference: of ``memories.correct_minus_wrong``, of one convention, not empty.
    """
    title = "Δ agreement of CLS (points), correct − wrong"
    panels = difference_panels(difference, "sublayer", title, "correct ahead")
    return styled(panels.resolve_scale(fill="independent", y="shared"))


def class_value_chart(agreement: pl.DataFrame) -> Any:
    """Class-value agreement over blocks, model and control, a panel a sublayer.

    Args:
        agreement: of ``values.class_value``. A star marks blocks above the control, q < 0.05.
    """
    lines, star = {"model": "model"}, pl.lit(False)
    if "q_value" in agreement.columns:
        lines = {"model": f"model (starred: q < {LEVEL})", "control": "random weights"}
        star = (pl.col("q_value") < LEVEL).fill_null(False)
    rows = agreement.with_columns(
        line=pl.col("source").replace(lines), value=pl.col("cosine"), star=star
    )
    return _panels(rows, "mean over classes of max cos(E, v)", list(lines.values()))


def _panels(rows: pl.DataFrame, title: str, lines: list[str]) -> Any:
    """A panel a sublayer: ``value`` over ``block`` with its band, a dash for each ``line``."""
    panels = []
    lowest, highest = rows.select(pl.col("low").min(), pl.col("high").max()).row(0)
    for i, (sublayer, name) in enumerate(SUBLAYER_TITLES.items()):
        is_control = pl.col("source") == "control"
        part = rows.filter(pl.col("sublayer") == sublayer).with_columns(
            color=pl.when(is_control).then("source").otherwise("sublayer")
        )
        color = color_of({stream: stream for stream in SUBLAYER_TITLES})
        base = alt.Chart(part).encode(x=block_axis(rows), color=color, detail="line:N")
        y_title = title if i == 0 else None
        scale = alt.Scale(domain=[min(0.0, lowest), 1.08 * highest], nice=True)
        y = alt.Y("value:Q", title=y_title, scale=scale)
        dash = alt.StrokeDash(
            "line:N",
            title=None,
            sort=lines,
            scale=alt.Scale(domain=lines, range=list(DASHES[: len(lines)])),
            legend=alt.Legend(symbolType="stroke", symbolSize=400, symbolStrokeColor="#444444"),
        )
        layers = [
            base.mark_area(opacity=0.2).encode(y=alt.Y("low:Q", title=y_title), y2="high:Q"),
            base.mark_line(strokeWidth=2).encode(y=y, strokeDash=dash),
            base.mark_circle(size=28, opacity=1).encode(y=y),
        ]
        if "star" in rows.columns:
            stars = alt.Chart(part.filter("star")).encode(x=block_axis(rows), y="high:Q")
            layers.append(stars.mark_text(text="★", fontSize=9, dy=-9, color=CONTROL_COLOR))
        panels.append(alt.layer(*layers).properties(title=name, **PANEL))
    return styled(alt.hconcat(*panels, spacing=24))
