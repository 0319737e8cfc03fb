"""The part of a store's section on how its blocks write the class (paper §4.3)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from classlens.analysis import plots_sublayers as plots
from classlens.analysis.composition import analyze_composition
from classlens.analysis.plot_style import significant
from classlens.analysis.scan import scan
from classlens.analysis.sublayers import (
    SublayersResult,
    analyze_sublayers,
    sublayer_change_rate,
)
from classlens.extractor.errors import UsageError

GROUPS = {"cls": "CLS", "patch": "image tokens"}
NAMES = {"attn": "attention", "mlp": "the MLP", "resid": "the residual stream", "mid": "mid"}


@dataclass(frozen=True)
class Table:
    """Numbers behind figures: a heading for each column, of which the first is the block."""

    caption: str
    columns: list[str]
    rows: list[list[float | int | None]]


@dataclass(frozen=True)
class Writing:
    """charts: by name, with a description each, as far as the store has the streams. seen: by the
    same names, what stands out in them. notes: why one or a part of one is missing.
    """

    result: SublayersResult
    charts: dict[str, tuple[Any, str]]
    seen: dict[str, str]
    notes: list[str]
    tables: list[Table]


def make_writing(store: Path, name: str, *, permutations: int, seed: int) -> Writing:
    """Figures and numbers, ``corrected``; change rates of the MLP in both conventions.

    Args:
        name: of the store on the page.
    """
    result = analyze_sublayers(store, permutations=permutations, seed=seed)
    published = sublayer_change_rate(scan(store), convention="vilas2023", seed=seed)
    charts, seen, tables = {}, {}, []
    notes = list(result.missing.values())
    rates = pl.concat([result.change_rate, published.filter(pl.col("sublayer") == "mlp")])
    if not rates.is_empty():
        chart = plots.sublayer_rate_chart(rates)
        charts["sublayer_rate"] = (chart, f"Line charts of the change rates of {name}'s sublayers.")
        seen["sublayer_rate"] = _highest_rates(rates)
        tables.append(_rate_table(rates))
    if not result.context.is_empty():
        chart = plots.sublayer_context_chart(result.context)
        description = f"Class-minus-context difference of the logit changes of {name}'s sublayers."
        charts["sublayer_context"] = (chart, description)
        seen["sublayer_context"] = _where_ahead(result.context, "sublayer", "class-labelled tokens")
        tables.append(
            _difference_table(result.context, "sublayer", "Class − context, logit change")
        )
    try:
        shares = analyze_composition(store, seed=seed).composition
    except UsageError as error:
        notes.append(str(error))
    else:
        if not shares.is_empty():
            description = f"Stacked bars of the sources of top classes over the blocks of {name}."
            charts["composition"] = (plots.composition_chart(shares), description)
            seen["composition"] = _kept(shares)
            tables.append(_composition_table(shares))
    correct = result.correct_minus_wrong
    if not correct.is_empty():
        description = f"Identifiability of CLS in correct minus wrong images of {name}, by stream."
        charts["correct_wrong"] = (plots.correct_minus_wrong_chart(correct), description)
        seen["correct_wrong"] = _where_ahead(correct, "stream", "correct images")
        tables.append(_difference_table(correct, "stream", "CLS, correct − wrong images, Δ r"))
    return Writing(result, charts, seen, notes, tables)


def _highest_rates(rates: pl.DataFrame) -> str:
    """Of each sublayer and group the block with the highest rate."""
    parts = []
    for (sublayer,), of_sublayer in rates.group_by("sublayer", maintain_order=True):
        # The rows against its own input, where there are any, come first.
        first = of_sublayer.filter(pl.col("baseline") == of_sublayer["baseline"].first())
        for (group,), rows in first.group_by("group", maintain_order=True):
            top = rows.sort("change_rate", descending=True, maintain_order=True).row(0, named=True)
            parts.append(
                f"{NAMES[sublayer]} on {GROUPS[group]} in block {top['block']} "
                f"({top['change_rate']:.2f})"
            )
    return f"Highest here: {_listed(parts)}."


def _where_ahead(frame: pl.DataFrame, by: str, who: str) -> str:
    """How many blocks of each stream have a significant difference."""
    parts = [
        f"{rows.filter(significant()).height} of {rows.height} blocks for {NAMES[stream]}"
        for (stream,), rows in frame.group_by(by, maintain_order=True)
    ]
    return f"Here {who} are significantly ahead in {_listed(parts)}."


def _kept(shares: pl.DataFrame) -> str:
    """How many tokens keep their class, and how many have one that no source has."""
    all_tokens = shares.filter((pl.col("group") == "all") & (pl.col("split") == "overlapping"))
    parts = []
    for source, text in {
        "prev": "keep the class they had",
        "comp": "take one of no source",
    }.items():
        rows = all_tokens.filter(pl.col("source") == source)
        low, high = (
            rows.sort("percent", descending=down, maintain_order=True).row(0, named=True)
            for down in (False, True)
        )
        parts.append(
            f"{low['percent']:.0f}% (block {low['block']}) to {high['percent']:.0f}% "
            f"(block {high['block']}) {text}"
        )
    return f"Of all tokens here, {_listed(parts)}."


def _listed(parts: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))


def _rate_table(rates: pl.DataFrame) -> Table:
    convention = pl.when(pl.col("convention") == "vilas2023").then(pl.lit(", vilas2023"))
    heading = pl.format(
        "{}, {}{}", "sublayer", pl.col("group").replace(GROUPS), convention.otherwise(pl.lit(""))
    )
    return _wide("Class-similarity change rate", rates, heading, "change_rate")


def _difference_table(frame: pl.DataFrame, by: str, caption: str) -> Table:
    long = frame.unpivot(["delta", "q_value"], index=["block", by], value_name="value")
    symbol = pl.col("variable").replace({"delta": "Δ", "q_value": "q"})
    # Back to the order of streams, Δ and q of each side by side.
    streams = pl.Enum(frame[by].unique(maintain_order=True))
    long = long.sort(pl.col(by).cast(streams), "variable", "block")
    return _wide(caption, long, pl.format("{} {}", symbol, by), "value")


def _composition_table(shares: pl.DataFrame) -> Table:
    rows = shares.filter((pl.col("group") == "all") & (pl.col("split") == "exclusive"))
    caption = "Residual composition, % of all tokens, each once"
    return _wide(caption, rows, pl.col("source"), "percent")


def _wide(caption: str, long: pl.DataFrame, heading: pl.Expr, value: str) -> Table:
    """A row a block, a column for each heading in order of appearance."""
    named = long.with_columns(heading=heading)
    wide = named.pivot("heading", index="block", values=value).sort("block")
    return Table(caption, wide.columns[1:], [list(row) for row in wide.iter_rows()])
