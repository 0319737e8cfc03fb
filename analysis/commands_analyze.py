"""The group ``analyze``. Heavy modules are imported when it runs, so that ``--help`` is quick."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from classlens.analysis.commands_composition import composition
from classlens.analysis.commands_interventions import interventions
from classlens.analysis.commands_memories import memories, values
from classlens.analysis.commands_sublayers import sublayers
from classlens.analysis.tables import (
    FOLDER,
    analyse_and_show,
    context_table,
    convention_option,
    json_option,
    new_table,
    p_or_q,
    permutations_option,
    seed_option,
    store_argument,
    with_interval,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.table import Table

    from classlens.analysis.identifiability import IdentifiabilityResult


@click.group()
def analyze() -> None:
    """The paper's analyses of a finished store, as tables or JSON."""


analyze.add_command(sublayers)
analyze.add_command(composition)
analyze.add_command(memories)
analyze.add_command(values)
analyze.add_command(interventions)


@analyze.command()
@store_argument
@click.option("--control", type=FOLDER, help="Store of the same images with random weights.")
@convention_option
@permutations_option("class-context test")
@seed_option
@json_option
def identifiability(
    store: Path,
    control: Path | None,
    convention: str,
    permutations: int,
    seed: int,
    as_json: bool,
) -> None:
    """Class identifiability of tokens (paper §4.1-4.2).

    Rates in the last block, evolution over the blocks with a test against the control, block
    change rate, and class-labelled against context tokens where the store has masks.

    \b
    classlens analyze identifiability store --control control
    """
    from classlens.analysis.identifiability import analyze_identifiability

    analyse_and_show(
        lambda name: analyze_identifiability(
            store, control, convention=name, permutations=permutations, seed=seed
        ),
        _tables,
        convention,
        as_json,
    )


def _tables(result: IdentifiabilityResult) -> Iterator[Table]:
    yield _rate_table(result)
    for stream in result.evolution["stream"].unique(maintain_order=True):
        yield _evolution_table(result, stream)
    yield _change_table(result)
    if not result.context.is_empty():
        title = "Class-labelled against context tokens, resid"
        yield context_table(result, result.context, title, "identifiability")


def _rate_table(result: IdentifiabilityResult) -> Table:
    bad = f", {result.n_bad:,} not scored" if result.n_bad else ""
    rows = result.rate.join(result.accuracy.drop("n_images"), on="source", maintain_order="left")
    table = new_table(
        f"{result.store.name}: {result.n_images:,} images{bad} ({result.convention})",
        f"chance of a token to have rank 0, and of a prediction to be right: "
        f"{100 / result.classes:.3g}%; [ ]: 95% bootstrap interval over images",
        ["", *rows["source"]],
    )
    measures = {
        "rate": "image tokens with rank 0, last block %",
        "images": "images with such a token %",
        "accuracy": "accuracy %",
    }
    for name, text in measures.items():
        cells = [
            f"{row[name]:.2f} \\[{row[f'{name}_low']:.2f}, {row[f'{name}_high']:.2f}]"
            for row in rows.iter_rows(named=True)
        ]
        table.add_row(text, *cells)
    table.add_row("images", *(f"{n:,}" for n in rows["n_images"]))
    table.add_row("image tokens of each", *(str(n) for n in rows["n_tokens"]))
    return table


def _evolution_table(result: IdentifiabilityResult, stream: str) -> Table:
    import polars as pl

    of_stream = result.evolution.filter(pl.col("stream") == stream)
    rows = of_stream.filter(pl.col("source") == "model").sort("block", "group")
    columns = ["block", "tokens", "mean", "25% 50% 75%"]
    caption = f"chance 0.5; quartiles over tokens of {result.n_images:,} images"
    name, column = p_or_q(rows) if result.control else ("", "")
    if result.control:
        control = of_stream.filter(pl.col("source") == "control")
        control = control.select("block", "group", control_mean="mean")
        rows = rows.join(control, on=["block", "group"], maintain_order="left")
        columns += ["control", name]
        caption += f"; {name}: one-sided Wilcoxon test, model above control"
    table = new_table(
        f"Identifiability per block, {stream} ({result.convention})", caption, columns
    )
    for row in rows.iter_rows(named=True):
        cells = [str(row["block"]), "CLS" if row["group"] == "cls" else "image"]
        cells += [f"{row['mean']:.3f}", f"{row['q25']:.3f} {row['median']:.3f} {row['q75']:.3f}"]
        if result.control:
            cells += [f"{row['control_mean']:.3f}", f"{row[column]:.2g}"]
        table.add_row(*cells)
    return table


def _change_table(result: IdentifiabilityResult) -> Table:
    import polars as pl

    sources = result.change_rate["source"].unique(maintain_order=True).to_list()
    table = new_table(
        f"Block change rate, resid ({result.convention})",
        f"share of image tokens whose label logit rose; chance 0.5; "
        f"n = {result.n_images:,} images; [ ]: 95% bootstrap interval",
        ["block", *sources],
    )
    for (block,), rows in result.change_rate.group_by("block", maintain_order=True):
        cells = []
        for source in sources:
            row = rows.row(by_predicate=pl.col("source") == source, named=True)
            cells.append(with_interval(row, "change_rate", ".3f"))
        table.add_row(str(block), *cells)
    return table
