"""The command ``analyze interventions``. Heavy modules are imported when it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from classlens.analysis.tables import new_table
from classlens.extractor.console import status

if TYPE_CHECKING:
    from collections.abc import Iterator

    import polars as pl
    from rich.table import Table

    from classlens.analysis.interventions import InterventionsResult

FOLDER = click.Path(path_type=Path, exists=True, file_okay=False)


@click.command()
@click.argument("store", type=FOLDER)
@click.argument("perturbed", nargs=-1, required=True, type=FOLDER)
@click.option("--convention", type=click.Choice(["corrected", "vilas2023", "both"]),
              default="corrected", show_default=True,
              help="Over the same tokens, or as the paper's code counts them.")  # fmt: skip
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
@click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
def interventions(
    store: Path, perturbed: tuple[Path, ...], convention: str, seed: int, as_json: bool
) -> None:
    """Attention knockout and token removal beside the model as it is (paper §4.2).

    PERTURBED are stores of the same images and model, extracted with --intervene. Compared image by
    image, over the tokens that the intervention leaves: identifiability rate, images with an
    identifiable token, accuracy, and mean identifiability per block.

    \b
    classlens extract shards --model vit_base_patch16_224 --out store
    classlens extract shards --model vit_base_patch16_224 --intervene no-cls --out no-cls
    classlens analyze interventions store no-cls
    """
    from classlens.analysis.interventions import analyze_interventions

    conventions = ("corrected", "vilas2023") if convention == "both" else (convention,)
    with status("Comparing"):
        results = [
            analyze_interventions(
                store,
                perturbed,
                convention=name,  # pyright: ignore[reportArgumentType]
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
        for table in _rate_tables(result):
            console.print(table)
            console.print()
    for table in _block_tables(results[0]):
        console.print(table)
        console.print()


def _rate_tables(result: InterventionsResult) -> Iterator[Table]:
    for (name,), rows in result.rates.group_by("name", maintain_order=True):
        of_measure = {key[0]: part for key, part in rows.group_by("measure", maintain_order=True)}
        table = new_table(
            f"{name} ({rows['intervention'][0]}) against {result.store.name}, % "
            f"({result.convention})",
            f"rate: image tokens with rank 0 in the last block; images: those with such a token; "
            f"chance of rank 0 and of a right prediction: {100 / result.classes:.3g}; "
            f"n = {_images(of_measure['rate'])} images, {_images(of_measure['accuracy'])} for the "
            "accuracy; [ ]: 95% bootstrap interval over images, paired for the difference",
            ["", "unperturbed", "perturbed", "difference"],
        )
        for measure, part in of_measure.items():
            cells = [_interval(row, row["value"], 2) for row in part.iter_rows(named=True)]
            table.add_row(str(measure), *cells)
        yield table


def _images(rows: pl.DataFrame) -> str:
    return f"{rows['n_images'].min():,}"


def _block_tables(result: InterventionsResult) -> Iterator[Table]:
    for (name, group), rows in result.blocks.group_by("name", "group", maintain_order=True):
        tokens = "CLS token" if group == "cls" else "image tokens"
        n_images, n_tokens = rows.select("n_images", "n_tokens").row(0)
        table = new_table(
            f"Mean identifiability per block, {tokens}: {name}",
            f"chance 0.5; {n_tokens:,} tokens of {n_images:,} images; [ ]: 95% bootstrap interval",
            ["block", "unperturbed", "perturbed", "difference"],
        )
        for (block,), row in rows.group_by("block", maintain_order=True):
            cells = [_interval(r, r["mean"], 3) for r in row.iter_rows(named=True)]
            table.add_row(str(block), *cells)
        yield table


def _interval(row: dict[str, Any], value: float, digits: int) -> str:
    form = ("+" if row["source"] == "difference" else "") + f".{digits}f"
    return f"{value:{form}} \\[{row['low']:{form}}, {row['high']:{form}}]"
