"""What the page says of a store's key-value memories (paper §4.3)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
from markupsafe import Markup

from classlens.analysis import plots_memories
from classlens.analysis.memories import MemoriesResult, analyze_memories
from classlens.analysis.plot_style import to_svg
from classlens.extractor.schema import SUBLAYERS, read_layout


@dataclass(frozen=True)
class MemorySection:
    """result: of the ``corrected`` convention. charts: SVG by name. rows: of the table behind the
    figures, one a block; names are sublayer and measure joined by ``_``."""

    result: MemoriesResult
    charts: dict[str, Markup]
    rows: list[dict[str, Any]]


def memory_section(
    store: Path, name: str, *, permutations: int = 1000, seed: int = 0
) -> MemorySection | None:
    """The section of a store called ``name``; None where it holds no memories."""
    if "memories" not in read_layout(store).reducers:
        return None
    result = analyze_memories(store, permutations=permutations, seed=seed)
    published = analyze_memories(store, convention="vilas2023", seed=seed)
    charts = {
        "agreement": to_svg(
            plots_memories.agreement_chart(result.agreement),
            f"Line charts of the key-value agreement rate over the blocks of {name}; the numbers "
            "are in the table below.",
        ),
        "composition": to_svg(
            plots_memories.composition_chart(result.composition),
            f"Line charts of memory compositionality over the blocks of {name}; the numbers are "
            "in the table below.",
        ),
    }
    if not result.correct_minus_wrong.is_empty():
        charts["correct_wrong"] = to_svg(
            plots_memories.correct_minus_wrong_chart(result.correct_minus_wrong),
            f"Agreement rate of CLS in correctly less wrongly predicted images over the blocks of "
            f"{name}; the numbers are in the table below.",
        )
    return MemorySection(
        result, {k: Markup(chart) for k, chart in charts.items()}, _rows(result, published)
    )


def _rows(result: MemoriesResult, published: MemoriesResult) -> list[dict[str, Any]]:
    table = result.agreement.select("block").unique()
    all_tokens = result.composition.filter(pl.col("group") == "all")
    parts = {
        "agreement": (result.agreement, "agreement"),
        "control": (result.agreement, "control"),
        "published": (published.agreement, "agreement"),
        "published_control": (published.agreement, "control"),
        "composed": (all_tokens, "composed"),
    }
    if not result.correct_minus_wrong.is_empty():
        parts["correct"] = (result.correct_minus_wrong, "delta")
        parts["correct_q"] = (result.correct_minus_wrong, "q_value")
    for measure, (frame, column) in parts.items():
        for sublayer in SUBLAYERS:
            of_sublayer = frame.filter(pl.col("sublayer") == sublayer)
            values = of_sublayer.select("block", pl.col(column).alias(f"{sublayer}_{measure}"))
            table = table.join(values, on="block", how="left")
    return table.sort("block").to_dicts()
