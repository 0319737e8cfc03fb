"""The group ``analyze``. Heavy modules are imported when it runs, so that ``--help`` is quick."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from classlens.analysis.commands_interventions import interventions
from classlens.analysis.commands_memories import memories, values
from classlens.analysis.tables import plain_table
from classlens.extractor.console import status

if TYPE_CHECKING:
    from collections.abc import Iterator

    import polars as pl
    from rich.table import Table

    from classlens.analysis.identifiability import IdentifiabilityResult

FOLDER = click.Path(path_type=Path, exists=True, file_okay=False)


@click.group()
def analyze() -> None:
    """The paper's analyses of a finished store, as tables or JSON."""


@analyze.command()
@click.argument("store", type=FOLDER)
@click.option("--control", type=FOLDER, help="Store of the same images with random weights.")
@click.option("--convention", type=click.Choice(["corrected", "vilas2023", "both"]),
              default="corrected", show_default=True,
              help="What the paper means, or what its published code computes.")  # fmt: skip
@click.option("--permutations", default=1000, show_default=True, type=click.IntRange(1),
              help="Shuffles of the class-context test (vilas2023: always 300).")  # fmt: skip
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
@click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
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

    conventions = ("corrected", "vilas2023") if convention == "both" else (convention,)
    with status("Analysing"):
        results = [
            analyze_identifiability(
                store,
                control,
                convention=name,  # pyright: ignore[reportArgumentType]
                permutations=permutations,
                seed=seed,
            )
            for name in conventions
        ]
    if as_json:
        click.echo(json.dumps({result.convention: result.to_json() for result in results}))
        return
    from rich.console import Console

    console = Console()
    for result in results:
        for table in _tables(result):
            console.print(table)
            console.print()


def _tables(result: IdentifiabilityResult) -> Iterator[Table]:
    yield _rate_table(result)
    for stream in result.evolution["stream"].unique(maintain_order=True):
        yield _evolution_table(result, stream)
    yield _change_table(result)
    if not result.context.is_empty():
        yield _context_table(result)


def _rate_table(result: IdentifiabilityResult) -> Table:
    bad = f", {result.n_bad:,} not scored" if result.n_bad else ""
    rows = result.rate.join(result.accuracy.drop("n_images"), on="source", maintain_order="left")
    table = plain_table(
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
    name, column = _test_column(rows) if result.control else ("", "")
    if result.control:
        control = of_stream.filter(pl.col("source") == "control")
        control = control.select("block", "group", control_mean="mean")
        rows = rows.join(control, on=["block", "group"], maintain_order="left")
        columns += ["control", name]
        caption += f"; {name}: one-sided Wilcoxon test, model above control"
    table = plain_table(
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
    table = plain_table(
        f"Block change rate, resid ({result.convention})",
        f"share of image tokens whose label logit rose; chance 0.5; "
        f"n = {result.n_images:,} images; [ ]: 95% bootstrap interval",
        ["block", *sources],
    )
    for (block,), rows in result.change_rate.group_by("block", maintain_order=True):
        cells = []
        for source in sources:
            row = rows.row(by_predicate=pl.col("source") == source, named=True)
            cells.append(f"{row['change_rate']:.3f} \\[{row['low']:.3f}, {row['high']:.3f}]")
        table.add_row(str(block), *cells)
    return table


def _context_table(result: IdentifiabilityResult) -> Table:
    name, column = _test_column(result.context)
    first = result.context.row(0, named=True)
    how = "within images" if result.convention == "corrected" else "pooled over images"
    table = plain_table(
        f"Class-labelled against context tokens, resid ({result.convention})",
        f"no difference: Δ = 0; {first['n_images']:,} images, {first['n_class']:,} class and "
        f"{first['n_context']:,} context tokens; {name}: class ahead, {result.permutations:,} "
        f"shuffles {how}; [ ]: 95% bootstrap interval",
        ["block", "Δ identifiability", "Δ shuffled", name],
    )
    for row in result.context.iter_rows(named=True):
        delta = f"{row['delta']:+.4f} \\[{row['low']:+.4f}, {row['high']:+.4f}]"
        table.add_row(str(row["block"]), delta, f"{row['null']:+.4f}", f"{row[column]:.4f}")
    return table


def _test_column(rows: pl.DataFrame) -> tuple[str, str]:
    """How the test's result is called, and its column: q-values where there are any."""
    return ("p", "p_value") if rows["q_value"].is_null().all() else ("q", "q_value")


analyze.add_command(memories)
analyze.add_command(values)
analyze.add_command(interventions)
