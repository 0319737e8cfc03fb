"""``neurons words``. Heavy modules are imported when it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from classlens.analysis.tables import json_option, new_table, store_argument
from classlens.extractor.console import bar
from classlens.extractor.console import status as spinner
from classlens.extractor.errors import UsageError

if TYPE_CHECKING:
    import polars as pl
    from rich.table import Table

    from classlens.analysis.neurons.clip import Tower

FILE = click.Path(path_type=Path, exists=True, dir_okay=False)
PROMOTED_SHOWN = 3
TABLE_WIDTH = 70
"""At least, so that captions have room."""


@click.command()
@store_argument
@click.option("--blocks", metavar="0,3,5-7", help="Of these blocks only  [default: all]")
@click.option("--clip-model", metavar="NAME",
              help="A CLIP or SigLIP image tower of timm, which sees the masked "
              "exemplars.")  # fmt: skip
@click.option("--clip-weights", default="pretrained", show_default=True,
              help="Of the tower: pretrained | random[:SEED] | FILE.")  # fmt: skip
@click.option("--clip-classes", type=FILE, metavar="FILE",
              help="Embeddings of texts for the tower, as of `extract --classes`.")  # fmt: skip
@click.option("--device", help="Of the tower: cpu, cuda …  [default: the GPU if there is one]")
@click.option("--limit", default=10, show_default=True, type=click.IntRange(0),
              help="Neurons to print, those with the least p.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False),
              help="Also write the words of every neuron: a .parquet file.")  # fmt: skip
@json_option
def words(
    store: Path,
    blocks: str | None,
    clip_model: str | None,
    clip_weights: str,
    clip_classes: Path | None,
    device: str | None,
    limit: int,
    out: Path | None,
    as_json: bool,
) -> None:
    """Words for the neurons of STORE, and how often they agree.

    STORE was extracted with --reduce neurons. Each neuron is named by the class that its value
    vector promotes most (E·v), by the label that most of its 15 exemplars have, and, given an image
    tower and texts, by the text that fits its masked exemplars best: cosine, less its mean over all
    neurons, so that texts which fit every picture do not win. Every exemplar then passes the tower:
    550,000 pictures for a ViT-B.

    \b
    classlens neurons words STORE --out words.parquet
    classlens neurons words STORE --blocks 10,11 --clip-model vit_base_patch16_clip_224.openai \\
        --clip-classes texts.safetensors
    """
    from classlens.analysis.neurons.store_words import words_of_store
    from classlens.analysis.neurons.words import agreement
    from classlens.extractor.config import parse_blocks

    if (clip_model is None) != (clip_classes is None):
        raise UsageError("--clip-model and --clip-classes belong together; give both or neither.")
    tower = None
    if clip_model is not None and clip_classes is not None:
        with spinner("Loading the image tower"):
            tower = _tower(clip_model, clip_weights, clip_classes, device)
    with bar("Naming" if tower is None else "Looking at exemplars") as progress:
        chosen = None if blocks is None else parse_blocks(blocks)
        found = words_of_store(store, chosen, tower=tower, progress=progress)
    agreeing = agreement(found)
    if out is not None:
        found.write_parquet(out)
    if as_json:
        click.echo(json.dumps({"agreement": agreeing.to_dicts(), "words": found.to_dicts()}))
        return
    from rich.console import Console

    console = Console()
    console.print(_agreement_table(store, agreeing))
    if limit:
        console.print(_words_table(found, limit))
    if out is not None:
        click.echo(f"written to {out}")


def _tower(model: str, weights: str, classes: Path, device: str | None) -> Tower:
    import torch

    from classlens.analysis.neurons.clip import open_tower

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return open_tower(model, weights, classes, device=device)


def _agreement_table(store: Path, frame: pl.DataFrame) -> Table:
    pairs = frame.select("first", "second").unique(maintain_order=True).rows()
    shown = new_table(
        f"{store.name}: how often two words of a neuron are the same class",
        "% of the neurons that have both; [ ]: 95% Wilson interval; chance: if the two were "
        "independent; promoted: by its value vector, exemplar: by its exemplars' labels"
        + (", clip: by its masked exemplars" if len(pairs) > 1 else ""),
        ["block", *(text for pair in pairs for text in (" = ".join(pair), "chance"))],
    )
    shown.min_width = TABLE_WIDTH
    for (block,), rows in frame.group_by("block", maintain_order=True):
        cells = []
        for row in rows.iter_rows(named=True):
            share, low, high, chance = (
                100 * row[name] for name in ("agreement", "low", "high", "chance")
            )
            cells += [f"{share:.1f} \\[{low:.1f}, {high:.1f}]", f"{chance:.1f}"]
        shown.add_row("all" if block is None else str(block), *cells)
    return shown


def _words_table(frame: pl.DataFrame, limit: int) -> Table:
    import polars as pl

    has_clip = "clip_word" in frame.columns
    shown = new_table(
        "Neurons whose exemplars agree most on a label",
        "promoted: classes of the largest E·v; p: that chance gives so many exemplars of one label",
        ["neuron", "promoted", "exemplars", "share", "p", *(["clip"] if has_clip else [])],
    )
    for column in (1, 2, *([5] if has_clip else [])):
        shown.columns[column].justify = "left"
    shown.min_width = TABLE_WIDTH
    best = frame.drop_nulls("exemplar_p").sort(
        "exemplar_p", pl.col("agreeing"), "block", "neuron", descending=[False, True, True, False]
    )
    for row in best.head(limit).iter_rows(named=True):
        shown.add_row(
            f"{row['block']}:{row['neuron']}",
            " · ".join(row["promoted_words"][:PROMOTED_SHOWN]),
            row["exemplar_word"],
            f"{row['exemplar_share']:.0%}",
            f"{row['exemplar_p']:.1g}",
            *([row["clip_word"] or ""] if has_clip else []),
        )
    return shown
