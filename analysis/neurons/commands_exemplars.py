"""The commands ``neurons exemplars`` and ``neurons class-distances``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from classlens.analysis.neurons.options import split_neuron
from classlens.analysis.tables import json_option, new_table, store_argument
from classlens.extractor.console import bar
from classlens.extractor.errors import UsageError


@click.command()
@store_argument
@click.option("--neuron", required=True, metavar="BLOCK:J", help="Both from 0, such as 10:421.")
@json_option
def exemplars(store: Path, neuron: str, as_json: bool) -> None:
    """The images of a neuron's largest activation, and its quantiles.

    The share is that of the image's patches above the neuron's 0.99 quantile, which is the mask of
    an exemplar. STORE was extracted with --reduce neurons.

    \b
    classlens extract shards --model MODEL --reduce neurons --out store
    classlens neurons exemplars store --neuron 10:421
    """
    import polars as pl
    from rich.console import Console

    from classlens.analysis.neurons import exemplars as reading
    from classlens.extractor.codes import representatives
    from classlens.extractor.schema import CLASSES_FILE, read_layout

    block, j = split_neuron(neuron)
    neurons = read_layout(store).mlp_width
    if neurons and j >= neurons:
        raise UsageError(f"There is no neuron {j}; give 0 to {neurons - 1}.")
    counts_FC = reading.histogram(store, block)[j : j + 1]
    cut = reading.quantile_codes(counts_FC, reading.EXEMPLAR_QUANTILE)
    _, _, codes_FXG = reading.exemplar_codes(store, block)
    shares = reading.masks(codes_FXG[j : j + 1], cut)[0].mean(axis=-1)
    found = reading.exemplars(store, block).filter(neuron=j)
    names = pl.read_parquet(store / CLASSES_FILE)
    rows = found.with_columns(share=shares[: found.height]).join(
        names, left_on="label", right_on="class", how="left", maintain_order="left"
    )
    quantiles = {
        q: float(representatives(reading.quantile_codes(counts_FC, q))[0])
        for q in (0.01, 0.5, 0.99, 0.995)
    }
    if as_json:
        click.echo(json.dumps({"quantiles": quantiles, "exemplars": rows.to_dicts()}))
        return
    told = ", ".join(f"{q:g}: {value:.2f}" for q, value in quantiles.items())
    table = new_table(f"Exemplars of neuron {block}:{j}", f"quantiles {told}",
                      ["image", "key", "label", "activation", "share"])  # fmt: skip
    for row in rows.iter_rows(named=True):
        label = f"{row['label']} {row['name']}"
        cells = (str(row["image"]), row["key"], label)
        table.add_row(*cells, f"{row['value']:.3f}", f"{row['share']:.2f}")
    Console().print(table)


@click.command("class-distances")
@store_argument
@click.option("--top", type=click.IntRange(1, 5), metavar="K",
              help="At the K top key neurons of either class  [default: all]")  # fmt: skip
@json_option
def class_distances(store: Path, top: int | None, as_json: bool) -> None:
    """How far apart classes are in their average activation, block by block.

    L2 distances of each two classes, and their running mean over the blocks; top key neurons are
    those whose value vectors write the class most. STORE was extracted with --reduce neurons.

    \b
    classlens neurons class-distances store --top 1
    """
    from rich.console import Console

    from classlens.analysis.neurons import class_means as reading
    from classlens.analysis.neurons.alignment import top_neurons
    from classlens.analysis.neurons.subject import subject_of_store

    with bar("Reading") as progress:
        means = reading.class_means(store, progress)
    tops = None
    if top is not None:
        tops = top_neurons(subject_of_store(store), top).neurons[:, means.classes]
    by_block = reading.distance_table(store, means, reading.class_distances(means, tops))
    if as_json:
        click.echo(json.dumps(by_block.to_dicts()))
        return
    where = "all neurons" if top is None else f"the {top} top key neurons of either class"
    table = new_table(
        f"Distances between {len(means.classes)} class averages",
        f"L2, at {where}; nearest: the two classes of the smallest distance",
        ["block", "mean distance", "running mean", "smallest", "nearest"],
    )
    for row in by_block.iter_rows(named=True):
        numbers = (f"{row[name]:.3f}" for name in ("mean", "running_mean", "smallest"))
        table.add_row(str(row["block"]), *numbers, f"{row['name_a']} · {row['name_b']}")
    Console().print(table)
