"""Curves and areas of the perturbation test (paper §5), from what `extractor.perturb` found.

``corrected``: the area under accuracy over the kept share, 0 and 100 % included, by the trapezoid
rule, over the accuracy with all patches, which is the same for every method. ``vilas2023``: the sum
of the accuracies with 1 to G − 1 patches over G times their largest, as the paper's code. Negative
test: larger is better; positive test: smaller is better.

Shape letters: N images, V curves (method and test), K counts, G patches, R resamples.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from classlens.analysis import statistics
from classlens.analysis.frames import Convention
from classlens.extractor.errors import UsageError

NOTE = (
    "On the numbers of the paper's authors (ViT-B/32) Chefer's relevance is ahead of theirs in "
    "both tests: 0.845 against 0.836 in the negative one, where more is better, 0.393 against "
    "0.413 in the positive one, where less is."
)
FACTS = "classlens"


@dataclass(frozen=True)
class PerturbationResult:
    """What a perturbation test found.

    facts: store, model, convention, seed and blocks. n_images, n_patches: tested, and G.
    curves: method, test, kept, share (kept / G), accuracy, low, high. auc: method, test, auc, low,
    high. differences: first, second (methods), test, difference of their areas, low, high. All
    intervals are 95% bootstrap intervals over images, the same resamples for all of them, so that
    differences are paired.
    """

    facts: dict[str, Any]
    n_images: int
    n_patches: int
    curves: pl.DataFrame
    auc: pl.DataFrame
    differences: pl.DataFrame

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready mapping; :meth:`from_json` reads it back."""
        frames = {name: _plain(getattr(self, name)) for name in ("curves", "auc", "differences")}
        counts = {"n_images": self.n_images, "n_patches": self.n_patches}
        return {"facts": self.facts, **counts, **frames, "note": NOTE}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> PerturbationResult:
        """The result saved by :meth:`to_json`."""
        numbers = ("share", "accuracy", "auc", "difference", "low", "high")
        frames = {
            name: pl.DataFrame(value[name]).with_columns(
                pl.col(column).cast(pl.Float64).fill_null(float("nan"))
                for column in numbers
                if value[name] and column in value[name][0]
            )
            for name in ("curves", "auc", "differences")
        }
        return PerturbationResult(value["facts"], value["n_images"], value["n_patches"], **frames)


def summarise(answers: pl.DataFrame, facts: Mapping[str, Any]) -> PerturbationResult:
    """Curves, areas and their differences.

    Args:
        answers: the rows of ``extractor.perturb.perturb``.
        facts: with ``convention`` and ``seed`` among them.

    Raises:
        UsageError: there is no image, or a count that the convention needs is missing.
    """
    if answers.is_empty():
        raise UsageError("No image was perturbed; take a store with scored images.")
    convention: Convention = facts["convention"]
    kept = answers["kept"].unique().sort().to_numpy().astype(int)
    patches, images = int(kept[-1]), answers["image"].n_unique()
    if convention == "vilas2023" and len(kept) != patches + 1:
        raise UsageError(
            "The area of vilas2023 adds up the accuracies with every number of patches; perturb "
            "without --steps."
        )
    methods, tests = (
        answers[name].cast(pl.String).unique(maintain_order=True) for name in ("method", "test")
    )
    names = [(method, test) for test in tests for method in methods]
    by_name = answers.sort("image", "kept").partition_by("method", "test", as_dict=True)
    right_NVK = np.stack(
        [by_name[name]["right"].to_numpy().reshape(images, len(kept)) for name in names], axis=1
    )
    pairs = [(i, j) for i, j in combinations(range(len(names)), 2) if names[i][1] == names[j][1]]
    one, other = [i for i, _ in pairs], [j for _, j in pairs]

    def all_numbers(means_R: np.ndarray) -> np.ndarray:
        accuracy_RVK = means_R.reshape(-1, len(names), len(kept))
        auc_RV = area(accuracy_RVK, kept, convention)
        return np.hstack([means_R, auc_RV, auc_RV[:, one] - auc_RV[:, other]])

    flat = right_NVK.reshape(images, -1)
    [value] = all_numbers(flat.mean(axis=0, keepdims=True))
    with warnings.catch_warnings():  # an area is NaN throughout where no prediction is ever right
        warnings.simplefilter("ignore", RuntimeWarning)
        low, high = statistics.bootstrap_interval(flat, all_numbers, seed=int(facts["seed"]))
    cuts = np.cumsum([flat.shape[1], len(names)])
    (points, areas, gaps) = zip(*(np.split(x, cuts) for x in (value, low, high)), strict=True)
    return PerturbationResult(
        facts=dict(facts),
        n_images=images,
        n_patches=patches,
        curves=pl.DataFrame(
            {
                "method": [method for method, _ in names for _ in kept],
                "test": [test for _, test in names for _ in kept],
                "kept": np.tile(kept, len(names)),
                "share": np.tile(kept / patches, len(names)),
                **_interval("accuracy", points),
            }
        ),
        auc=pl.DataFrame(
            {
                "method": [method for method, _ in names],
                "test": [test for _, test in names],
                **_interval("auc", areas),
            }
        ),
        differences=pl.DataFrame(
            {
                "first": pl.Series([names[i][0] for i in one], dtype=pl.String),
                "second": pl.Series([names[j][0] for j in other], dtype=pl.String),
                "test": pl.Series([names[i][1] for i in one], dtype=pl.String),
                **_interval("difference", gaps),
            }
        ),
    )


def area(accuracy: np.ndarray, kept: np.ndarray, convention: Convention) -> np.ndarray:
    """Area under each curve, see the module; NaN where the normaliser is 0.

    Args:
        accuracy: [..., K] at the counts ``kept``, [K], ascending from 0 to G.
    """
    patches = kept[-1]
    with np.errstate(invalid="ignore", divide="ignore"):
        if convention == "vilas2023":
            inner = accuracy[..., (kept > 0) & (kept < patches)]
            return inner.sum(axis=-1) / (inner.max(axis=-1) * patches)
        return np.trapezoid(accuracy, kept / patches, axis=-1) / accuracy[..., -1]


def write_result(path: Path, answers: pl.DataFrame, result: PerturbationResult) -> None:
    """Writes ``.parquet``, every image's answers, or ``.json``, curves and areas.

    Raises:
        UsageError: another suffix.
    """
    require_suffix(path)
    if path.suffix == ".json":
        path.write_text(json.dumps(result.to_json()) + "\n")
    else:
        answers.write_parquet(path, metadata={FACTS: json.dumps(result.facts)})


def read_result(path: Path) -> PerturbationResult:
    """The result behind a file of :func:`write_result`; a Parquet file is summarised anew.

    Raises:
        UsageError: it is not such a file.
    """
    require_suffix(path)
    try:
        if path.suffix == ".json":
            return PerturbationResult.from_json(json.loads(path.read_text()))
        return summarise(pl.read_parquet(path), json.loads(pl.read_parquet_metadata(path)[FACTS]))
    except (OSError, ValueError, KeyError, TypeError, pl.exceptions.PolarsError) as error:
        raise UsageError(
            f"{path} is no result of `classlens perturb` ({type(error).__name__}); give the file "
            "that its --out names."
        ) from error


def require_suffix(path: Path) -> None:
    """Raises UsageError unless a result can be written under this name."""
    if path.suffix not in (".parquet", ".json"):
        raise UsageError(f"{path} must end in .parquet (every answer) or .json (curves and areas).")


def _interval(name: str, numbers: tuple[np.ndarray, ...]) -> dict[str, np.ndarray]:
    return dict(zip((name, "low", "high"), numbers, strict=True))


def _plain(frame: pl.DataFrame) -> list[dict[str, Any]]:
    return frame.fill_nan(None).to_dicts()
