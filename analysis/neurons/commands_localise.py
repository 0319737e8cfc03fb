"""``neurons localise``. Heavy modules are imported when it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from classlens.analysis.tables import (
    FOLDER,
    json_option,
    new_table,
    seed_option,
    store_argument,
    with_interval,
)
from classlens.extractor.console import bar
from classlens.extractor.console import status as spinner
from classlens.extractor.errors import UsageError
from classlens.extractor.schema import read_attributes

if TYPE_CHECKING:
    from classlens.analysis.neurons.localisation import Localisation


@click.command()
@store_argument
@click.option("--dissection", type=FOLDER,
              help="What `neurons dissect STORE` wrote; adds the IoU over all images.")  # fmt: skip
@click.option("--images", type=click.IntRange(1), metavar="N",
              help="Only N images, evenly spread  [default: all]")  # fmt: skip
@click.option("--device", help="cpu, cuda, cuda:1 …  [default: the GPU if there is one]")
@seed_option
@json_option
def localise(
    store: Path,
    dissection: Path | None,
    images: int | None,
    device: str | None,
    seed: int,
    as_json: bool,
) -> None:
    """Whether top key neurons are active where their class is, block by block.

    Each image of STORE passes the model once more. In every block the patches where the top key
    neuron of the image's class is above its 80th percentile are compared with the patches that the
    segmentation mask gives to the class; so are those of another neuron of the block, drawn at
    random. The shards of STORE must have masks and still be there.

    That asks for the place on one image. Which images a neuron is active on counts in Network
    Dissection, with one threshold for all images: --dissection adds the IoU of each class with its
    top neuron, beside the mean of the other neurons.

    \b
    classlens neurons localise STORE --images 2000
    classlens neurons localise STORE --dissection DISSECTION --json
    """
    import torch

    from classlens.analysis.commands_perturb import spread_images
    from classlens.analysis.neurons.alignment import top_neurons
    from classlens.analysis.neurons.dissection import areas
    from classlens.analysis.neurons.localisation import dissected, localisation, overlaps
    from classlens.extractor.prepare import prepare_again
    from classlens.extractor.scorer import DTYPES, Scorer
    from classlens.extractor.value_vectors import require_value_vectors

    _require_same(store, dissection)
    chosen = spread_images(store, images)
    with spinner("Walking the shards and loading the model"):
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        prepared = prepare_again(store, device=device)
        config, subject = prepared.config, prepared.subject
        require_value_vectors(subject, config.model)
        tops = top_neurons(subject, 1)
        dtype, convention = DTYPES[config.dtype], config.convention
        scorer = Scorer(subject, [], dtype=dtype, device=device, convention=convention)
    with bar("Localising") as progress:
        found = overlaps(prepared, scorer, tops, chosen, seed=seed, progress=progress)
    results = {
        "within_images": localisation(found.top, found.random, over="images", seed=seed),
    }
    if dissection is not None:
        parts = (areas(dissection, block) for block in range(subject.blocks))
        iou_of = ((part.classes, part.iou()) for part in parts)
        results["over_data_set"] = localisation(*dissected(tops, iou_of), over="classes", seed=seed)
    if as_json:
        facts = {"store": str(store), "seed": seed, "n_without": found.n_without}
        click.echo(json.dumps(facts | {name: one.to_json() for name, one in results.items()}))
        return
    without = f" ({found.n_without:,} without a class patch left out)" if found.n_without else ""
    titles = {
        "within_images": (
            f"{store.name}: key neurons and the mask of the class, within images",
            f"{without}; patches above the 80th percentile of the class's top neuron, or of "
            "another neuron",
        ),
        "over_data_set": (
            f"{store.name}: key neurons and the masks of the class, over the data set",
            "; patches above the 0.995 quantile of the class's top neuron over all images; random: "
            "mean of the other neurons",
        ),
    }
    for name, result in results.items():
        _print(result, *titles[name])


def _require_same(store: Path, dissection: Path | None) -> None:
    """Raises UsageError unless the store is of the model as it is, and the dissection of both."""
    attributes = read_attributes(store)
    intervention = attributes["config"].get("intervene")
    if intervention is not None:
        raise UsageError(
            f"{store} is of a changed model (--intervene {intervention}); give a store of the "
            "model as it is."
        )
    if dissection is None:
        return
    ours, theirs = attributes["fingerprint"], read_attributes(dissection)["fingerprint"]
    if differing := [k for k in ("images", "weights_sha256") if ours[k] != theirs[k]]:
        raise UsageError(
            f"{dissection} is no dissection of {store} (other {' and '.join(differing)}); make "
            f"one with `classlens neurons dissect {store}`."
        )


def _print(result: Localisation, title: str, caption: str) -> None:
    from rich.console import Console

    shown = new_table(
        title,
        f"IoU, mean over {result.n:,} {result.over}{caption}; [ ]: 95% bootstrap interval over "
        f"{result.over}",
        ["block", "top neuron", "random", "difference"],
    )
    for row in result.blocks.iter_rows(named=True):
        shown.add_row(
            str(row["block"]),
            with_interval(row, "top", ".4f"),
            f"{row['random']:.4f}",
            with_interval(row, "difference", "+.4f"),
        )
    Console().print(shown)
    mean, low, high = result.late_minus_early
    click.echo(
        f"Top neurons, last half of the blocks minus first half: {mean:+.4f} [{low:+.4f}, "
        f"{high:+.4f}]\n"
    )
