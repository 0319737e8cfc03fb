"""What other commands wrote of a store's neurons, read for the site."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from classlens.analysis.neurons.accumulated import Accumulated
from classlens.analysis.neurons.localisation import Localisation
from classlens.analysis.neurons.site.content import Synthesised
from classlens.analysis.neurons.synthesis.folder import read_results
from classlens.extractor.errors import ConfigMismatchError, StoreError, UsageError
from classlens.extractor.schema import read_attributes

MISSING = {
    "exemplars": "There are no exemplars, for the store does not keep them: extract it with "
    "`classlens extract … --reduce neurons`.",
    "averages": "There are no class averages, for the store does not keep them: extract it with "
    "`classlens extract … --reduce neurons`.",
    "iou": "There is no dissection: run `classlens neurons dissect STORE --out DISSECTION` on a "
    "store whose images have masks, and write the site with `--dissection DISSECTION`.",
    "clip": "There is no word by CLIP: run `classlens neurons words STORE --clip-model TOWER "
    "--clip-classes TEXTS --out WORDS`, and write the site with `--words WORDS`.",
    "synthesised": "There are no synthesised images: run `classlens neurons synthesize STORE --out "
    "IMAGES`, and write the site with `--synthesis IMAGES`.",
}
"""What to say of a part that no source has."""
CLIP_COLUMNS = ("block", "neuron", "clip_word", "clip_class", "clip_score")
QUESTIONS = ("within_images", "over_data_set")
"""Of ``neurons localise``; see `classlens.analysis.neurons.localisation`."""


@dataclass(frozen=True)
class Sources:
    """What the site is made of. store: of `classlens extract`; the others are of the commands in
    ``MISSING`` and of ``neurons localise --json``, None where not given."""

    store: Path
    dissection: Path | None = None
    words: Path | None = None
    synthesis: Path | None = None
    localisation: Path | None = None


def dissection_quantile(store: Path, dissection: Path) -> float:
    """The quantile of the activations above which neurons were dissected.

    Raises:
        StoreError: one is no store. UsageError: the dissection is none. ConfigMismatchError: it is
        of other images or weights than the store.
    """
    Accumulated.open(dissection, "dissection")
    theirs, ours = read_attributes(dissection), read_attributes(store)
    if any(
        theirs["fingerprint"][k] != ours["fingerprint"][k] for k in ("images", "weights_sha256")
    ):
        raise ConfigMismatchError(
            f"{dissection} is of other images or weights than {store}; dissect this store."
        )
    return theirs["dissection"]["quantile"]


def read_clip_words(file: Path) -> pl.DataFrame | None:
    """The words by CLIP in a file of ``neurons words``, or None if no tower was given to it.

    Columns block, neuron, clip_word, clip_class, clip_score.

    Raises:
        UsageError: it is no such file.
    """
    try:
        frame = pl.read_parquet(file)
        frame.select("block", "neuron", "promoted_word")
    except (OSError, pl.exceptions.PolarsError) as error:
        raise UsageError(
            f"--words {file} holds no words of neurons ({type(error).__name__}); give a file that "
            "`classlens neurons words --out` wrote."
        ) from error
    return frame.select(CLIP_COLUMNS) if "clip_word" in frame.columns else None


def read_synthesised(folder: Path) -> dict[tuple[int, int], tuple[Synthesised, ...]]:
    """The images of each neuron, block and index, in whose objective it is.

    Raises:
        StoreError: the folder's table or an image that it names is missing.
    """
    results = read_results(folder)
    several = results["image"].max() != 0
    found: dict[tuple[int, int], list[Synthesised]] = {}
    for row in results.sort("variant", "label", "target", "image", "steps").to_dicts():
        file = folder / row["file"]
        if not file.is_file():
            raise StoreError(
                f"{file} is missing; run `classlens neurons synthesize --out {folder}` again."
            )
        image = Synthesised(
            file=file,
            series=f"{row['variant']}, for {row['name']}"
            + (f", image {row['image']}" if several else ""),
            steps=row["steps"],
            target=row["name"],
            predicted=row["predicted_name"],
        )
        for key in row["keys"].split():
            block, neuron = map(int, key.split(":"))
            found.setdefault((block, neuron), []).append(image)
    return {neuron: tuple(images) for neuron, images in found.items()}


def read_localisation(file: Path) -> dict[str, Localisation]:
    """What ``neurons localise --json`` printed, by question.

    Raises:
        UsageError: the file holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        found = {name: localised(content[name]) for name in QUESTIONS if name in content}
    except (OSError, ValueError, KeyError, TypeError, pl.exceptions.PolarsError):
        found = {}
    if not found:
        raise UsageError(
            f"--localisation {file} is no result of localisation; give what `classlens neurons "
            "localise STORE --json` printed."
        )
    return found


def localised(value: Mapping[str, Any]) -> Localisation:
    """The result saved by ``Localisation.to_json``."""
    mean, low, high = value["late_minus_early"]
    return Localisation(value["over"], value["n"], pl.DataFrame(value["blocks"]), (mean, low, high))
