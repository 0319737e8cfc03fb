"""``neurons top`` and ``neurons shared``. Heavy modules are imported when they run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from classlens.analysis.neurons.options import chosen_subject, subject_options
from classlens.analysis.tables import json_option, new_table
from classlens.extractor.console import bar
from classlens.extractor.console import status as spinner

if TYPE_CHECKING:
    import polars as pl
    from rich.table import Table

    from classlens.analysis.neurons.alignment import TopNeurons
    from classlens.extractor.models import Subject

BAR = 40
EACH_BLOCK = "Rank within each block; else over all blocks together."


@click.command()
@subject_options
@click.option("--class", "classes", multiple=True, metavar="NAME|INDEX",
              help="Print the top neurons of this class; repeatable.")  # fmt: skip
@click.option("--top", default=5, show_default=True, type=click.IntRange(1),
              help="Neurons of each class.")  # fmt: skip
@click.option("--each-block", is_flag=True, help=EACH_BLOCK)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False),
              help="Also write the top neurons of all classes: a .parquet file.")  # fmt: skip
@json_option
def top(
    classes: tuple[str, ...],
    top: int,
    each_block: bool,
    out: Path | None,
    as_json: bool,
    **source: Any,
) -> None:
    """The neurons whose value vectors write a class most: its top key neurons.

    Alignment is E·v, the product of the class embedding and the value vector, neither normalised.
    Without --class: in which block the classes have their top neuron. A STORE names model and
    weights itself.

    \b
    classlens neurons top vit_base_patch16_224
    classlens neurons top vit_base_patch16_224 --class tench --class 207 --each-block
    classlens neurons top STORE --top 10 --out top.parquet
    """
    import polars as pl

    from classlens.analysis.neurons.alignment import block_distribution
    from classlens.analysis.neurons.subject import find_class

    subject, tops = _top_neurons(top, source)
    chosen = [find_class(subject.class_names, name) for name in classes]
    frame = _ranked(tops, each_block)
    if out is not None:
        frame.write_parquet(out)
    distribution = block_distribution(tops)
    if as_json:
        rows = frame.filter(pl.col("class").is_in(chosen)) if chosen else frame
        click.echo(json.dumps({"blocks": distribution.to_dicts(), "top": rows.to_dicts()}))
        return
    if not chosen:
        _print(_distribution_table(distribution))
    for c in chosen:
        of_class = frame.filter(pl.col("class") == c)
        _print(_blocks_table(of_class) if each_block else _class_table(of_class))


@click.command()
@subject_options
@click.option("--each-block", is_flag=True, help=EACH_BLOCK)
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1),
              help="Rows of the table.")  # fmt: skip
@json_option
def shared(each_block: bool, limit: int, as_json: bool, **source: Any) -> None:
    """Neurons that are the top one of several classes: candidates for "base classes".

    \b
    classlens neurons shared vit_base_patch16_224
    classlens neurons shared STORE --each-block --json
    """
    import polars as pl

    from classlens.analysis.neurons.alignment import shared_neurons

    _, tops = _top_neurons(1, source)
    parts = [[b] for b in range(len(tops.neurons))] if each_block else [None]
    frame = pl.concat([shared_neurons(tops, part) for part in parts])
    frame = frame.sort("n_classes", descending=True, maintain_order=True)
    if as_json:
        click.echo(json.dumps(frame.to_dicts()))
        return
    _print(_shared_table(frame, len(tops.names), limit))


def _top_neurons(top: int, source: dict[str, Any]) -> tuple[Subject, TopNeurons]:
    from classlens.analysis.neurons.alignment import top_neurons

    with spinner("Reading the weights"):
        subject = chosen_subject(**source)
    with bar("Blocks") as progress:
        return subject, top_neurons(subject, top, progress)


def _ranked(tops: TopNeurons, each_block: bool) -> pl.DataFrame:
    import polars as pl

    if not each_block:
        return tops.over()
    return pl.concat([tops.over([block]) for block in range(len(tops.neurons))])


def _distribution_table(frame: pl.DataFrame) -> Table:
    shown = new_table(
        "Block of each class's top key neuron",
        "of the largest E·v over all blocks; --class NAME lists the top neurons of a class",
        ["block", "classes", "%", ""],
    )
    shown.columns[-1].justify = "left"
    longest = frame["share"].max()
    for row in frame.iter_rows(named=True):
        bar_of_block = "█" * round(BAR * row["share"] / longest)
        share = f"{100 * row['share']:.1f}"
        shown.add_row(str(row["block"]), f"{row['classes']:,}", share, bar_of_block)
    return shown


def _class_table(frame: pl.DataFrame) -> Table:
    shown = new_table(_title(frame), "over all blocks, by E·v", ["place", "neuron", "alignment"])
    shown.min_width = 50
    for row in frame.iter_rows(named=True):
        shown.add_row(str(row["place"] + 1), _neuron(row), f"{row['alignment']:+.3f}")
    return shown


def _blocks_table(frame: pl.DataFrame) -> Table:
    places = range(frame["place"].n_unique())
    shown = new_table(
        _title(frame),
        "within each block: neuron and alignment E·v",
        ["block", *(f"{place + 1}." for place in places)],
    )
    for (block,), rows in frame.group_by("block", maintain_order=True):
        cells = (f"{_neuron(row)} {row['alignment']:+.3f}" for row in rows.iter_rows(named=True))
        shown.add_row(str(block), *cells)
    return shown


def _shared_table(frame: pl.DataFrame, classes: int, limit: int) -> Table:
    shown = new_table(
        "Neurons that are the top one of several classes",
        f"{frame.height:,} neurons for {frame['n_classes'].sum():,} places; {classes:,} classes, "
        "the largest alignment first",
        ["neuron", "classes", "names"],
    )
    shown.columns[-1].justify = "left"
    for row in frame.head(limit).iter_rows(named=True):
        names = " · ".join(row["names"][:10]) + (" …" if row["n_classes"] > 10 else "")
        shown.add_row(_neuron(row), str(row["n_classes"]), names)
    return shown


def _title(frame: pl.DataFrame) -> str:
    first = frame.row(0, named=True)
    return f"Top key neurons of class {first['class']}, {first['name']}"


def _neuron(row: dict[str, Any]) -> str:
    return f"{row['block']}:{row['neuron']}"


def _print(content: Table) -> None:
    from rich.console import Console

    console = Console()
    console.print(content)
    console.print()
