"""The folder of a run: settings, a PNG of every image, one table of results; resumed by target.

A batch of targets is added to the table in one replacement of the file, after its images are
written; whatever a killed run left half-done is made again. Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from classlens.analysis.commands_query import replaced
from classlens.extractor.errors import ConfigMismatchError, StoreError, UsageError

SETTINGS_FILE = "settings.json"
RESULTS_FILE = "results.parquet"

SCHEMA = {
    "variant": pl.String(),
    "target": pl.String(),
    "label": pl.Int32(),
    "name": pl.String(),
    "block": pl.Int16(),
    "neuron": pl.Int32(),
    "keys": pl.String(),
    "image": pl.Int16(),
    "steps": pl.Int32(),
    "predicted": pl.Int32(),
    "predicted_name": pl.String(),
    "probability": pl.Float32(),
    "rank": pl.Int32(),
    "activation": pl.Float32(),
    "similarity": pl.Float32(),
    "seconds": pl.Float32(),
    "file": pl.String(),
}
"""One row for each image and number of steps.

label: the target's class, or the one that its neuron is most predictive of. block, neuron: of the
first key; keys: all of them, ``7:45 6:3``. probability, rank: of the label. activation: mean
coefficient over keys and patches, before the activation function. similarity: mean Gram cosine of
the target's images, null for a single one. seconds: that an image took, of a batch together.
file: of the PNG, in the folder.
"""


class Folder:
    """An output folder, new or begun.

    Attributes:
        results: what is finished, see ``SCHEMA``.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Opens the folder, or makes it.

        Args:
            settings: JSON-ready; all that decides what an image of a target looks like.

        Raises:
            ConfigMismatchError: it was made with others; names them.
            StoreError: its files cannot be read. UsageError: it cannot be written.
        """
        self.path = path
        self.results = pl.DataFrame(schema=SCHEMA)
        saved = path / SETTINGS_FILE
        if saved.exists():
            _require_same(path, _read_settings(saved), json.loads(json.dumps(settings)))
            if (path / RESULTS_FILE).exists():
                self.results = read_results(path)
            return
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{path} cannot be made ({error}); choose another --out.") from error
        with replaced(saved) as draft:
            draft.write_text(json.dumps(settings, indent=2) + "\n")

    def finished(self, variant: str) -> set[str]:
        """Names of the targets of a variant whose rows and images are all there."""
        rows = self.results.filter(pl.col("variant") == variant)
        there = rows.group_by("target").agg(pl.col("file"))
        return {
            target
            for target, files in there.iter_rows()
            if all((self.path / file).exists() for file in files)
        }

    def add(self, rows: Sequence[Mapping[str, Any]], pictures: Sequence[np.ndarray]) -> None:
        """Writes the images (uint8 [H, W, 3], one a row), then the rows in place of older ones."""
        from PIL import Image

        for row, pixels in zip(rows, pictures, strict=True):
            file = self.path / row["file"]
            file.parent.mkdir(exist_ok=True)
            with replaced(file) as draft:
                Image.fromarray(pixels).save(draft, "PNG")
        new = pl.DataFrame(list(rows), schema=SCHEMA)
        older = self.results.join(new, on=["variant", "target"], how="anti")
        self.results = pl.concat([older, new]).sort("variant", "label", "target", "image", "steps")
        with replaced(self.path / RESULTS_FILE) as draft:
            self.results.write_parquet(draft)


def read_results(path: Path) -> pl.DataFrame:
    """The table of a folder, see ``SCHEMA``.

    Raises:
        StoreError: there is none, or it is damaged.
    """
    try:
        return pl.read_parquet(path / RESULTS_FILE).select(
            pl.col(name).cast(dtype) for name, dtype in SCHEMA.items()
        )
    except (OSError, pl.exceptions.PolarsError) as error:
        raise StoreError(
            f"{path / RESULTS_FILE} cannot be read ({type(error).__name__}); give a folder that "
            "`classlens neurons synthesize --out` wrote, or delete the file to make all anew."
        ) from error


def _read_settings(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise StoreError(
            f"{file} cannot be read ({type(error).__name__}); choose another --out, or delete the "
            "folder."
        ) from error


def _require_same(path: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    differing = [name for name in sorted({*then, *now}) if then.get(name) != now.get(name)]
    if differing:
        shown = "; ".join(f"{name} was {then.get(name)}, is {now.get(name)}" for name in differing)
        raise ConfigMismatchError(
            f"{path} holds images made with other settings ({shown}); repeat those, or choose "
            "another --out."
        )
