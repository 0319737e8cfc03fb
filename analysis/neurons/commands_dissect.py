"""The command ``neurons dissect``. Heavy modules are imported when it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from classlens.analysis.tables import json_option, new_table, store_argument
from classlens.extractor.console import bar
from classlens.extractor.console import status as spinner

if TYPE_CHECKING:
    import polars as pl
    from rich.table import Table


@click.command()
@store_argument
@click.option("--out", required=True, type=click.Path(path_type=Path, file_okay=False),
              help="The dissection, a store; an unfinished one is resumed.")  # fmt: skip
@click.option("--quantile", default=0.995, show_default=True,
              type=click.FloatRange(0, 1, min_open=True, max_open=True),
              help="Of a neuron's activation, above which it is active.")  # fmt: skip
@click.option("--device", help="cpu, cuda, cuda:1 …  [default: the extraction's]")
@json_option
def dissect(store: Path, out: Path, quantile: float, device: str | None, as_json: bool) -> None:
    """Network Dissection: which class's pixels each neuron covers.

    STORE was extracted with --reduce neurons from images with segmentation masks. They are scored
    once more; thresholds are the neurons' quantiles, and IoU is that of all pixels above the
    threshold with all pixels of a class. A killed run goes on where it stopped.

    \b
    classlens extract shards --model MODEL --reduce neurons --out store
    classlens neurons dissect store --out dissection
    """
    from classlens.analysis.neurons.dissection import detectors, iou
    from classlens.analysis.neurons.exemplars import thresholds
    from classlens.extractor.dissect import dissect as run_dissect
    from classlens.extractor.dissect import require_dissection
    from classlens.extractor.prepare import prepare_again

    with spinner("Walking the shards and loading the model"):
        prepared = prepare_again(store, device=device)
        require_dissection(prepared, store)
    with bar("Thresholds") as progress:
        _, values = thresholds(store, quantile, progress)
    with bar("Dissecting") as progress:
        summary = run_dissect(prepared, store, values, quantile, out, progress)
    left = summary.units - summary.units_committed
    if left:
        click.echo(f"{left} units are with other processes; this command goes on with them.")
        return
    with bar("Reading") as progress:
        best = iou(out, progress)
    by_block = detectors(best)
    if as_json:
        click.echo(json.dumps({"dissection": str(out), "blocks": by_block.to_dicts()}))
        return
    from rich.console import Console

    Console().print(_table(by_block, best, quantile))


def _table(by_block: pl.DataFrame, best: pl.DataFrame, quantile: float) -> Table:
    table = new_table(
        "Detectors (IoU > 0.04)",
        f"active above the {quantile:g} quantile; of classes: different ones detected; "
        "mean IoU: with each neuron's best class; best neuron: of the largest IoU",
        ["block", "detectors", "of classes", "mean IoU", "best neuron", "its class", "IoU"],
    )
    for row in by_block.iter_rows(named=True):
        of_block = best.filter(block=row["block"]).sort("iou", "neuron", descending=[True, False])
        first = of_block.row(0, named=True)
        table.add_row(
            str(row["block"]),
            f"{row['detectors']:,} of {row['neurons']:,}",
            f"{row['classes']:,}",
            f"{row['mean_iou']:.4f}",
            f"{first['block']}:{first['neuron']}",
            first["name"],
            f"{first['iou']:.4f}",
        )
    return table
