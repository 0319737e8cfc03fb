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
    from classlens.analysis.neurons.localisation import Localisation


@click.command()
@store_argument
@click.option("--images", type=click.IntRange(1), metavar="N",
              help="Only N images, evenly spread  [default: all]")  # fmt: skip
@click.option("--device", help="cpu, cuda, cuda:1 …  [default: the GPU if there is one]")
@seed_option
@json_option
def localise(store: Path, images: int | None, device: str | None, seed: int, as_json: bool) -> None:
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
    within = localisation(found.top, found.random, over="images", seed=seed)
    if as_json:
        facts = {"store": str(store), "seed": seed, "n_without": found.n_without}
        click.echo(json.dumps(facts | {"within_images": within.to_json()}))
        return
    without = f"; {found.n_without:,} without a class patch left out" if found.n_without else ""
    _print(
        within,
        f"{store.name}: key neurons and the mask of the class, within images",
        f"IoU, mean over {within.n:,} images{without}; patches above the 80th percentile of the "
        "class's top neuron, or of another neuron",
    )


def _device(gpu: bool) -> str:
    return "cuda" if gpu else "cpu"


def _print(result: Localisation, title: str, caption: str) -> None:
    from rich.console import Console

    shown = new_table(
        title,
        f"{caption}; [ ]: 95% bootstrap interval over {result.over}; q: one-sided Wilcoxon test, "
        "top ahead of random",
        ["block", "top neuron", "random", "difference", "q"],
    )
    for row in result.blocks.iter_rows(named=True):
        shown.add_row(
            str(row["block"]),
            with_interval(row, "top", ".3f"),
            f"{row['random']:.3f}",
            with_interval(row, "difference", "+.3f"),
            f"{row['q_value']:.2g}",
        )
    Console().print(shown)
    mean, low, high = result.late_minus_early
    click.echo(
        f"Top neurons, last half of the blocks minus first half: {mean:+.4f} [{low:+.4f}, "
        f"{high:+.4f}]\n"
    )
