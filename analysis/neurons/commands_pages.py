"""``neurons pages``. Heavy modules are imported when it runs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from classlens.analysis.tables import FOLDER, store_argument
from classlens.extractor.console import bar
from classlens.extractor.console import status as spinner

if TYPE_CHECKING:
    from classlens.extractor.models import Subject

FILE = click.Path(path_type=Path, exists=True, dir_okay=False)


@click.command()
@store_argument
@click.option("--out", required=True, type=click.Path(path_type=Path, file_okay=False),
              help="Folder of the site; an older site there is replaced.")  # fmt: skip
@click.option("--dissection", type=FOLDER, help="Store that `neurons dissect` made.")
@click.option("--words", type=FILE, help="File that `neurons words` wrote, for words by CLIP.")
@click.option("--synthesis", type=FOLDER, help="Folder that `neurons synthesize` wrote.")
@click.option("--localisation", type=FILE,
              help="What `neurons localise STORE --json` printed.")  # fmt: skip
@click.option("--blocks", metavar="0-5,8", help="Pages for these blocks only.")
@click.option("--neuron", "names", multiple=True, metavar="B:J",
              help="Pages for these neurons only; repeatable.")  # fmt: skip
def pages(
    store: Path,
    out: Path,
    dissection: Path | None,
    words: Path | None,
    synthesis: Path | None,
    localisation: Path | None,
    blocks: str | None,
    names: tuple[str, ...],
) -> None:
    """A page on every key neuron of STORE, and an index to search and sort: a folder to browse.

    Each page has the classes that the value vector promotes, the images on which the key is most
    active with their masks, class averages, overlap with segmentation masks, words, and synthesised
    images, as far as they were computed; what is missing is said with the command that adds it.
    Open index.html in a browser; nothing is loaded from anywhere else. The shards of STORE must
    still be there.

    \b
    classlens extract shards --model M --reduce neurons --out STORE
    classlens neurons dissect STORE --out DISSECTION
    classlens neurons pages STORE --dissection DISSECTION --out site
    classlens neurons pages STORE --neuron 10:56 --neuron 11:2 --out two-pages
    """
    from classlens.analysis.neurons.site.gather import gather
    from classlens.analysis.neurons.site.pages import check_place, write_site
    from classlens.analysis.neurons.site.sources import Sources

    started_s = time.monotonic()
    check_place(out)
    sources = Sources(store, dissection, words, synthesis, localisation)
    with spinner("Reading the store and the weights"):
        content = gather(sources, lambda subject: chosen_neurons(subject, blocks, names))
    with bar("Writing pages") as progress:
        written = write_site(content, out, progress)
    click.echo(
        f"{written.pages:,} pages, {written.pictures:,} pictures, {written.files:,} files, "
        f"{written.bytes / 1e6:,.1f} MB in {time.monotonic() - started_s:.0f} s"
    )
    for sentence in dict.fromkeys(content.missing.values()):
        click.echo(sentence)
    click.echo(f"Open {out / 'index.html'} in a browser.")


def chosen_neurons(
    subject: Subject, blocks: str | None, names: Sequence[str]
) -> Mapping[int, Sequence[int]]:
    """The neurons of each block that ``--blocks`` and ``--neuron`` leave, ascending.

    Raises:
        UsageError: they name a block or neuron that the model has not, or leave none.
    """
    from classlens.analysis.commands_perturb import parse_blocks
    from classlens.analysis.neurons.options import parse_neuron
    from classlens.analysis.neurons.site.gather import every_neuron
    from classlens.extractor.errors import UsageError

    wanted = parse_blocks(blocks, subject.blocks)
    every = every_neuron(subject)
    named = [parse_neuron(name, subject) for name in names]
    chosen = {
        block: sorted({j for b, j in named if b == block}) if names else neurons
        for block, neurons in every.items()
        if wanted is None or block in wanted
    }
    chosen = {block: neurons for block, neurons in chosen.items() if len(neurons)}
    if not chosen:
        raise UsageError("No --neuron lies in --blocks; leave one of the options out.")
    return chosen
