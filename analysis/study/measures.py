"""Measures: a name in a study file -> one number, in either convention.

A measure picks a number out of the JSON result of an analysis; the runner computes each analysis of
a run once and keeps it. To add one: an entry in ANALYSES where its analysis is new, an entry in
MEASURES, and no other change. A measure that returns None has nothing to measure there.

This module imports nothing heavy: plans are checked with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Subject:
    """What an analysis is given: a run's store, that of its control, and the study's settings."""

    store: Path
    control: Path | None
    seed: int
    permutations: int


@dataclass(frozen=True)
class Measure:
    """One number of an analysis.

    analysis: its name in ANALYSES; None for what cannot be measured yet. pick: takes the result in
    one convention, and the arguments, of which ``required`` must be given.
    """

    analysis: str | None
    pick: Callable[..., float | None]
    arguments: tuple[str, ...] = ()
    required: tuple[str, ...] = ()


def identifiability(subject: Subject, convention: str) -> Result:
    """Paper §4.1-4.2; see `classlens.analysis.identifiability`."""
    from classlens.analysis.identifiability import analyze_identifiability

    return analyze_identifiability(
        subject.store,
        subject.control,
        convention=convention,  # pyright: ignore[reportArgumentType]
        permutations=subject.permutations,
        seed=subject.seed,
    ).to_json()


def identifiability_rate(result: Result) -> float | None:
    """Image tokens with rank 0 in the last block, mean over images, in %."""
    return _row(result["rate"], source="model")["rate"]


def images_with_identifiable_token(result: Result) -> float | None:
    """Images with at least one image token of rank 0 in the last block, in %."""
    return _row(result["rate"], source="model")["images"]


def accuracy(result: Result) -> float | None:
    """Images whose prediction is their label, in %."""
    return _row(result["accuracy"], source="model")["accuracy"]


def block_change_rate(result: Result, block: int) -> float | None:
    """Share of image tokens whose label logit rises in a block."""
    return _value(result["change_rate"], "change_rate", source="model", block=block)


def mean_identifiability(
    result: Result, block: int, stream: str = "resid", group: str = "patch"
) -> float | None:
    """Mean identifiability of the tokens of a group in a stream of a block."""
    wanted = {"source": "model", "stream": stream, "group": group, "block": block}
    return _value(result["evolution"], "mean", **wanted)


def class_context_difference(result: Result, block: int) -> float | None:
    """Mean identifiability of class-labelled image tokens minus that of the others."""
    return _value(result["context"], "delta", block=block)


def not_yet(result: Result) -> float | None:
    """Of an analysis that is still to come."""
    return None


ANALYSES: dict[str, Callable[[Subject, str], Result]] = {"identifiability": identifiability}

MEASURES: dict[str, Measure] = {
    "identifiability_rate": Measure("identifiability", identifiability_rate),
    "images_with_identifiable_token": Measure("identifiability", images_with_identifiable_token),
    "accuracy": Measure("identifiability", accuracy),
    "block_change_rate": Measure("identifiability", block_change_rate, ("block",), ("block",)),
    "mean_identifiability": Measure(
        "identifiability", mean_identifiability, ("block", "stream", "group"), ("block",)
    ),
    "class_context_difference": Measure(
        "identifiability", class_context_difference, ("block",), ("block",)
    ),
    "tokens_rate": Measure(None, not_yet, ("tokens",), ("tokens",)),
    "class_context_logit_difference": Measure(
        None, not_yet, ("sublayer", "block"), ("sublayer", "block")
    ),
    "sublayer_change_rate": Measure(
        None, not_yet, ("sublayer", "group", "block"), ("sublayer", "group", "block")
    ),
    "class_value_cosine": Measure(None, not_yet, ("sublayer", "pick"), ("sublayer", "pick")),
    "key_value_agreement": Measure(None, not_yet, ("sublayer", "pick"), ("sublayer", "pick")),
    "memory_composition": Measure(None, not_yet, ("sublayer", "pick"), ("sublayer", "pick")),
    "perturbation_auc": Measure(None, not_yet, ("order", "method"), ("order", "method")),
    "probe_top1": Measure(None, not_yet, ("site", "block"), ("site", "block")),
}


def _row(rows: list[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    """The row with these values.

    Raises:
        LookupError: there is none.
    """
    for row in rows:
        if all(row[name] == value for name, value in wanted.items()):
            return row
    asked = ", ".join(f"{name} {value}" for name, value in wanted.items() if name != "source")
    raise LookupError(f"there is nothing for {asked}")


def _value(rows: list[dict[str, Any]], column: str, **wanted: Any) -> float | None:
    return _row(rows, **wanted)[column]
