"""Measures: a name in a study file -> one number, in either convention.

A measure picks a number out of the JSON result of an analysis; the runner computes each analysis of
a run once and keeps it. To add one: an entry in ANALYSES where its analysis is new (``perturb`` and
``probe`` are steps of their own), an entry in MEASURES, and no other change. A measure whose
analysis is missing is reported as not measured.

This module imports nothing heavy: plans are checked with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Subject:
    """What an analysis is given.

    store, control, original: of the run, of its control and of the run that it perturbs, where
    there are such. seed, permutations: of the study.
    """

    store: Path
    control: Path | None
    original: Path | None
    seed: int
    permutations: int


@dataclass(frozen=True)
class Measure:
    """One number of an analysis.

    analysis: its name in ANALYSES, or a kind of step. pick: takes the result in one convention, and
    the arguments, of which ``required`` must be given; raises LookupError where it has no such row.
    """

    analysis: str
    pick: Callable[..., float]
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


def sublayers(subject: Subject, convention: str) -> Result:
    """Paper §4.3; see `classlens.analysis.sublayers`."""
    from classlens.analysis.sublayers import analyze_sublayers

    return analyze_sublayers(
        subject.store,
        convention=convention,  # pyright: ignore[reportArgumentType]
        permutations=subject.permutations,
        seed=subject.seed,
    ).to_json()


def memories(subject: Subject, convention: str) -> Result:
    """Paper §4.3; see `classlens.analysis.memories`."""
    from classlens.analysis.memories import analyze_memories

    return analyze_memories(
        subject.store,
        convention=convention,  # pyright: ignore[reportArgumentType]
        permutations=subject.permutations,
        seed=subject.seed,
    ).to_json()


def values(subject: Subject, convention: str) -> Result:
    """Paper §4.3, of the weights alone and the same in both conventions; see
    `classlens.analysis.values`."""
    from classlens.analysis.values import analyze_values
    from classlens.extractor.schema import read_attributes

    config = read_attributes(subject.store)["config"]
    return analyze_values(
        config["model"],
        weights=config["weights"],
        model_args=config["model_args"],
        seed=subject.seed,
    ).to_json()


def interventions(subject: Subject, convention: str) -> Result:
    """Paper §4.2; see `classlens.analysis.interventions`."""
    from classlens.analysis.interventions import analyze_interventions

    assert subject.original is not None, "a perturbed run names the run that it perturbs"
    return analyze_interventions(
        subject.original,
        [subject.store],
        convention=convention,  # pyright: ignore[reportArgumentType]
        seed=subject.seed,
    ).to_json()


def identifiability_rate(result: Result) -> float:
    """Image tokens with rank 0 in the last block, mean over images, in %."""
    return _row(result["rate"], source="model")["rate"]


def images_with_identifiable_token(result: Result) -> float:
    """Images with at least one image token of rank 0 in the last block, in %."""
    return _row(result["rate"], source="model")["images"]


def accuracy(result: Result) -> float:
    """Images whose prediction is their label, in %."""
    return _row(result["accuracy"], source="model")["accuracy"]


def block_change_rate(result: Result, block: int) -> float:
    """Share of image tokens whose label logit rises in a block."""
    return _value(result["change_rate"], "change_rate", source="model", block=block)


def mean_identifiability(
    result: Result, block: int, stream: str = "resid", group: str = "patch"
) -> float:
    """Mean identifiability of the tokens of a group in a stream of a block."""
    wanted = {"source": "model", "stream": stream, "group": group, "block": block}
    return _value(result["evolution"], "mean", **wanted)


def class_context_difference(result: Result, block: int) -> float:
    """Mean identifiability of class-labelled image tokens minus that of the others."""
    return _value(result["context"], "delta", block=block)


def sublayer_change_rate(result: Result, sublayer: str, group: str, block: int) -> float:
    """Share of the tokens of a group whose label logit a sublayer raises."""
    wanted = {"sublayer": sublayer, "group": group, "block": block}
    return _value(result["change_rate"], "change_rate", **wanted)


def class_context_logit_difference(result: Result, sublayer: str, block: int) -> float:
    """How much more a sublayer raises the label logits of class-labelled tokens than of others."""
    return _value(result["context"], "delta", sublayer=sublayer, block=block)


def intervention_rate(result: Result, state: str, of: str = "rate") -> float:
    """The "rate", "images" or "accuracy" in %, in the state "perturbed" or "unperturbed"."""
    return _value(result["rates"], "value", measure=of, source=state)


def class_value_cosine(result: Result, sublayer: str, pick: str) -> float:
    """Class-value agreement of the blocks of a sublayer."""
    return _picked(result["agreement"], "cosine", pick, source="model", sublayer=sublayer)


def key_value_agreement(result: Result, sublayer: str, pick: str) -> float:
    """Key-value agreement rate of the blocks of a sublayer, in %."""
    return _picked(result["agreement"], "agreement", pick, sublayer=sublayer)


def memory_composition(result: Result, sublayer: str, pick: str) -> float:
    """Tokens with the top class of a single memory, of the blocks of a sublayer, in %."""
    return _picked(result["composition"], "composed", pick, sublayer=sublayer, group="all")


def perturbation_auc(result: Result, test: str, method: str) -> float:
    """Area under the curve of a method in a perturbation test."""
    return _value(result["auc"], "auc", test=test, method=method)


def probe_top1(result: Result, stream: str, block: int, group: str = "patch") -> float:
    """Share of tokens whose linear probe puts the label first."""
    wanted = {"source": "probe", "stream": stream, "group": group, "block": block}
    return _value(result["comparison"], "rate", **wanted) / 100


def _measure(pick: Callable[..., float], analysis: str) -> Measure:
    """A measure with the arguments that its function has behind the result."""
    arguments = list(signature(pick).parameters.values())[1:]
    required = tuple(a.name for a in arguments if a.default is a.empty)
    return Measure(analysis, pick, tuple(a.name for a in arguments), required)


ANALYSES: dict[str, Callable[[Subject, str], Result]] = {
    "identifiability": identifiability,
    "sublayers": sublayers,
    "memories": memories,
    "values": values,
    "interventions": interventions,
}

MEASURES: dict[str, Measure] = {
    "identifiability_rate": _measure(identifiability_rate, "identifiability"),
    "images_with_identifiable_token": _measure(images_with_identifiable_token, "identifiability"),
    "accuracy": _measure(accuracy, "identifiability"),
    "block_change_rate": _measure(block_change_rate, "identifiability"),
    "mean_identifiability": _measure(mean_identifiability, "identifiability"),
    "class_context_difference": _measure(class_context_difference, "identifiability"),
    "sublayer_change_rate": _measure(sublayer_change_rate, "sublayers"),
    "class_context_logit_difference": _measure(class_context_logit_difference, "sublayers"),
    "intervention_rate": _measure(intervention_rate, "interventions"),
    "class_value_cosine": _measure(class_value_cosine, "values"),
    "key_value_agreement": _measure(key_value_agreement, "memories"),
    "memory_composition": _measure(memory_composition, "memories"),
    "perturbation_auc": _measure(perturbation_auc, "perturb"),
    "probe_top1": _measure(probe_top1, "probe"),
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


def _value(rows: list[dict[str, Any]], column: str, **wanted: Any) -> float:
    return _row(rows, **wanted)[column]


def _picked(rows: list[dict[str, Any]], column: str, pick: str, **wanted: Any) -> float:
    """Of the blocks with these values: the largest ("peak"), its block, or the last block's.

    Raises:
        LookupError: there is no such block, or nothing of that name to pick.
    """
    _row(rows, **wanted)
    found = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    blocks = {row["block"]: row[column] for row in found}
    peak = max(blocks, key=blocks.__getitem__)
    picks = {"peak": blocks[peak], "peak_block": peak, "last": blocks[max(blocks)]}
    if pick not in picks:
        raise LookupError(f"pick is {pick!r}, which is none of {', '.join(picks)}")
    return picks[pick]
