"""``analyze memories`` and ``analyze values``. Heavy modules are imported when they run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from classlens.analysis.neurons.options import split_neuron
from classlens.analysis.tables import new_table, with_interval
from classlens.extractor.console import status
from classlens.extractor.errors import UsageError
from classlens.extractor.schema import SUBLAYERS

if TYPE_CHECKING:
    import polars as pl
    from rich.table import Table

    from classlens.analysis.memories import MemoriesResult
    from classlens.analysis.values import ValuesResult

TITLES = {"attn": "attention", "mlp": "MLP"}
SHORT_GROUPS = {"all": "all", "cls": "CLS", "patch": "image"}


@click.command()
@click.argument("store", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--convention", type=click.Choice(["corrected", "vilas2023", "both"]),
              default="corrected", show_default=True,
              help="Agreement as in the paper's text, or as in its published code.")  # fmt: skip
@click.option("--permutations", default=1000, show_default=True, type=click.IntRange(1),
              help="Shuffles of correct against wrong images (vilas2023: 300).")  # fmt: skip
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
@click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
def memories(store: Path, convention: str, permutations: int, seed: int, as_json: bool) -> None:
    """Key-value memories that tokens activate (paper §4.3).

    Key-value agreement with its random-class control, correct minus wrong images, and memory
    compositionality, per block of attention and MLP. STORE was extracted with --reduce memories.

    \b
    classlens extract shards --model vit_base_patch16_224 --reduce memories --out store
    classlens analyze memories store --convention both
    """
    from classlens.analysis.memories import analyze_memories

    conventions = ("corrected", "vilas2023") if convention == "both" else (convention,)
    with status("Analysing"):
        results = [
            analyze_memories(
                store,
                convention=name,  # pyright: ignore[reportArgumentType]
                permutations=permutations,
                seed=seed,
            )
            for name in conventions
        ]
    if as_json:
        click.echo(json.dumps({result.convention: result.to_json() for result in results}))
        return
    for result in results:
        for name in SUBLAYERS:
            _print(_agreement_table(result, name))
        if not result.correct_minus_wrong.is_empty():
            _print(_correct_table(result))
    _print(_composition_table(results[0]))


@click.command()
@click.argument("model")
@click.option("--weights", default="pretrained", show_default=True,
              help="pretrained | random[:SEED] | FILE (safetensors or state dict).")  # fmt: skip
@click.option("--model-arg", "model_args", multiple=True, metavar="KEY=VALUE",
              help="Passed to timm.create_model; repeatable.")  # fmt: skip
@click.option("--control", default="random:0", show_default=True,
              help="Weights of the same architecture to compare with, or none.")  # fmt: skip
@click.option("--neuron", "neurons", multiple=True, metavar="BLOCK:J",
              help="Print the top classes of this value vector instead; repeatable.")  # fmt: skip
@click.option("--block", type=click.IntRange(0),
              help="Print the --top value vectors of this block with the largest products "
              "instead.")  # fmt: skip
@click.option("--sublayer", type=click.Choice(SUBLAYERS), default="mlp", show_default=True,
              help="For --neuron and --block.")  # fmt: skip
@click.option("--top", default=5, show_default=True, type=click.IntRange(1),
              help="Classes of each --neuron, value vectors of --block.")  # fmt: skip
@click.option("--chart", type=click.Path(path_type=Path, dir_okay=False),
              help="Also draw the agreement over the blocks: a .svg or .png file.")  # fmt: skip
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
@click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
def values(
    model: str,
    weights: str,
    model_args: tuple[str, ...],
    control: str,
    neurons: tuple[str, ...],
    block: int | None,
    sublayer: str,
    top: int,
    chart: Path | None,
    seed: int,
    as_json: bool,
) -> None:
    """What the weights of MODEL say about classes, without an image (paper §4.3).

    Class-value agreement: for each class the largest cosine with a value vector, averaged over
    classes, per block of attention and MLP, tested against random weights. With --neuron or --block
    the classes that single value vectors promote most.

    \b
    classlens analyze values vit_base_patch16_224
    classlens analyze values vit_base_patch16_224 --neuron 10:56
    classlens analyze values vit_base_patch16_224 --block 10 --top 20
    """
    from classlens.analysis.values import analyze_values, load_model, strongest, top_classes
    from classlens.extractor.commands import parse_model_arg

    arguments = dict(parse_model_arg(argument) for argument in model_args)
    if neurons or block is not None:
        with status("Reading the weights"):
            subject = load_model(model, weights, arguments)
            frames = [
                top_classes(subject, place, [j], sublayer=sublayer, top=top)
                for place, j in map(split_neuron, neurons)
            ]
            if block is not None:
                vectors = strongest(subject, block, sublayer=sublayer, top=top)
                classes = min(5, subject.space.num_classes)
                frames.append(top_classes(subject, block, vectors, sublayer=sublayer, top=classes))
        if as_json:
            click.echo(json.dumps([row for frame in frames for row in frame.to_dicts()]))
            return
        for frame in frames:
            _print(_classes_table(model, frame))
        return
    if chart is not None and chart.suffix not in (".svg", ".png"):
        raise UsageError(f"--chart {chart} has no known form; give a .svg or .png file.")
    with status("Reading the weights"):
        result = analyze_values(
            model,
            weights=weights,
            model_args=arguments,
            control=None if control == "none" else control,
            seed=seed,
        )
    if chart is not None:
        from classlens.analysis.plots_memories import class_value_chart

        drawn = class_value_chart(result.agreement).properties(background="white")
        drawn.save(str(chart), scale_factor=2)
    if as_json:
        click.echo(json.dumps(result.to_json()))
        return
    for name in SUBLAYERS:
        _print(_cosine_table(result, name))


def _print(content: Table) -> None:
    from rich.console import Console

    console = Console()
    console.print(content)
    console.print()


def _blocks(frame: pl.DataFrame) -> Iterator[tuple[int, dict[str, dict]]]:
    """Each block with its row of each sublayer."""
    for (block,), rows in frame.group_by("block", maintain_order=True):
        yield int(block), {row["sublayer"]: row for row in rows.iter_rows(named=True)}  # pyright: ignore


def _agreement_table(result: MemoriesResult, sublayer: str) -> Table:
    import polars as pl

    frame = result.agreement.filter(pl.col("sublayer") == sublayer)
    first = frame.row(0, named=True)
    shown = new_table(
        f"{result.store.name}: key-value agreement, {TITLES[sublayer]} ({result.convention})",
        f"share of tokens in %, mean over {first['n_classes']:,} classes; {first['n_images']:,} "
        f"images of {first['n_tokens']} tokens; random: another class of {result.classes:,}, drawn "
        "for each image; [ ]: 95% bootstrap interval over images",
        ["block", "agreement %", "random class %", "difference"],
    )
    for row in frame.iter_rows(named=True):
        cells = [with_interval(row, name, ".1f") for name in ("agreement", "control", "difference")]
        shown.add_row(str(row["block"]), *cells)
    return shown


def _correct_table(result: MemoriesResult) -> Table:
    frame = result.correct_minus_wrong
    first = frame.row(0, named=True)
    column = "p_value" if frame["q_value"].is_null().all() else "q_value"
    test = column[0]
    shown = new_table(
        f"Agreement of the CLS token, correct minus wrong images ({result.convention})",
        f"percentage points; no difference: 0; {first['n_correct']:,} correct and "
        f"{first['n_wrong']:,} wrong images; {test}: correct ahead, {result.permutations:,} "
        "shuffles of images; [ ]: 95% bootstrap interval",
        ["block", *(cell for name in SUBLAYERS for cell in (TITLES[name], test))],
    )
    for block, rows in _blocks(frame):
        cells = []
        for name in SUBLAYERS:
            row = rows[name]
            cells.append(f"{row['delta']:+.1f} \\[{row['low']:+.1f}, {row['high']:+.1f}]")
            cells.append(f"{row[column]:.4f}")
        shown.add_row(str(block), *cells)
    return shown


def _composition_table(result: MemoriesResult) -> Table:
    frame = result.composition
    groups = [group for group in SHORT_GROUPS if group in frame["group"].to_list()]
    shown = new_table(
        f"{result.store.name}: memory compositionality",
        "share of tokens in %, all, CLS and image tokens, whose sublayer's top class is the top "
        f"class of one of their 5 top value vectors; {result.n_images:,} images",
        ["block", *(f"{name} {SHORT_GROUPS[group]}" for name in SUBLAYERS for group in groups)],
    )
    cells = frame.select("sublayer", "group", "block", "composed").iter_rows()
    composed = {tuple(cell): share for *cell, share in cells}
    for block in frame["block"].unique().sort():
        shares = [composed[name, group, block] for name in SUBLAYERS for group in groups]
        shown.add_row(str(block), *(f"{share:.1f}" for share in shares))
    return shown


def _cosine_table(result: ValuesResult, sublayer: str) -> Table:
    import polars as pl

    frame = result.agreement.filter(pl.col("sublayer") == sublayer)
    control = {row["block"]: row for row in frame.filter(pl.col("source") == "control").to_dicts()}
    rows = frame.filter(pl.col("source") == "model").to_dicts()
    caption = (
        f"{result.model}, weights {Path(result.weights).name}; mean over "
        f"{rows[0]['n_classes']:,} classes; [ ]: 95% bootstrap interval over classes"
    )
    columns = ["block", "max cos(E, v)"]
    if control:
        caption += f"; q: one-sided Wilcoxon test, above the control ({result.control})"
        columns += ["control", "q"]
    shown = new_table(f"Class-value agreement, {TITLES[sublayer]}", caption, columns)
    for row in rows:
        cells = [f"{row['cosine']:.3f} \\[{row['low']:.3f}, {row['high']:.3f}]"]
        if control:
            cells += [f"{control[row['block']]['cosine']:.3f}", f"{row['q_value']:.2g}"]
        shown.add_row(str(row["block"]), *cells)
    return shown


def _classes_table(model: str, frame: pl.DataFrame) -> Table:
    first = frame.row(0, named=True)
    shown = new_table(
        f"Value vectors of {TITLES[first['sublayer']]}, block {first['block']}",
        f"{model}; their top classes by E·v, neither normalised",
        ["value vector", "product", "class", "name"],
    )
    shown.columns[-1].justify = "left"
    for row in frame.iter_rows(named=True):
        place = "" if row["place"] else str(row["neuron"])
        shown.add_row(place, f"{row['product']:+.3f}", str(row["class"]), row["name"])
    return shown
