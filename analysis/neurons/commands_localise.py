"""``neurons localise``. Heavy modules are imported when it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from classlens.analysis.tables import (
    json_option,
    new_table,
    seed_option,
    store_argument,
    with_interval,
)
from classlens.extractor.console import bar
from classlens.extractor.console import status as spinner
from classlens.extractor.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from classlens.analysis.neurons.localisation import LocalisationResult


@click.command()
@store_argument
@click.option("--images", type=click.IntRange(1), metavar="N",
              help="Only N images, evenly spread  [default: all]")  # fmt: skip
@click.option("--device", help="cpu, cuda, cuda:1 …  [default: the GPU if there is one]")
@seed_option
@json_option
def localise(
    store: Path, images: int | None, device: str | None, seed: int, as_json: bool
) -> None:
    """Whether top key neurons are active where their class is, block by block.

    Each image of STORE passes the model once more. In every block the patches where the top key
    neuron of the image's class is above its 80th percentile are compared with the patches that the
    segmentation mask gives to the class; so are those of another neuron of the block, drawn at
    random. The shards of STORE must have masks and still be there.

    \b
    classlens neurons localise STORE
    classlens neurons localise STORE --images 2000 --json
    """
    import torch

    from classlens.analysis.commands_perturb import spread_images
    from classlens.analysis.neurons.alignment import top_neurons
    from classlens.analysis.neurons.localisation import localisation, overlaps
    from classlens.extractor.prepare import prepare_again
    from classlens.extractor.scorer import DTYPES, Scorer
    from classlens.extractor.value_vectors import require_value_vectors

    chosen = spread_images(store, images)
    with spinner("Walking the shards and loading the model"):
        prepared = prepare_again(store, device=device or _device(torch.cuda.is_available()))
        config = prepared.config
        if config.intervene is not None:
            raise UsageError(
                f"{store} is of a changed model (--intervene {config.intervene}); give a store of "
                "the model as it is."
            )
        require_value_vectors(prepared.subject, config.model)
        tops = top_neurons(prepared.subject, 1)
        scorer = Scorer(
            prepared.subject,
            [],
            dtype=DTYPES[config.dtype],
            device=config.device,
            convention=config.convention,
        )
    with bar("Localising") as progress:
        found = overlaps(prepared, scorer, tops, chosen, seed=seed, progress=progress)
    result = localisation(found, seed=seed)
    if as_json:
        click.echo(json.dumps({"store": str(store)} | result.to_json()))
        return
    from rich.console import Console

    Console().print(_table(store, result))
    mean, low, high = result.late_minus_early
    click.echo(
        f"top neurons, last half of the blocks minus first half: {mean:+.3f} [{low:+.3f}, "
        f"{high:+.3f}]"
    )


def _device(gpu: bool) -> str:
    return "cuda" if gpu else "cpu"


def _table(store: Path, result: LocalisationResult) -> Table:
    without = f"; {result.n_without:,} without a class patch are left out"
    shown = new_table(
        f"{store.name}: IoU of key neurons with the mask of the class",
        f"{result.n_images:,} images{without if result.n_without else ''}; patches above the 80th "
        "percentile of the class's top neuron, or of another neuron; [ ]: 95% bootstrap interval "
        "over images; q: one-sided Wilcoxon test, top ahead of random",
        ["block", "top neuron", "random neuron", "difference", "q"],
    )
    for row in result.blocks.iter_rows(named=True):
        cells = [with_interval(row, name, ".3f") for name in ("top", "random")]
        difference = with_interval(row, "difference", "+.3f")
        shown.add_row(str(row["block"]), *cells, difference, f"{row['q_value']:.2g}")
    return shown
