"""Measures: a name in a study file -> one number or one a block, in either convention.

A measure finds numbers in the JSON result of an analysis; the runner computes each analysis of
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
from typing import Any, Literal

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
class Reading:
    """A number. low, high: its 95% interval. p: of the analysis' own test, over blocks corrected
    for their number in the convention ``corrected``. None where the analysis has none."""

    value: float
    low: float | None = None
    high: float | None = None
    p: float | None = None


Series = Mapping[int, Reading]
"""A number of every block, by block, ascending."""


@dataclass(frozen=True)
class Measure:
    """What is measured of a run.

    analysis: its name in ANALYSES, or a kind of step. find: takes the result in one convention, and
    the arguments, of which ``required`` must be given; raises LookupError where it has no such row.
    choose: the argument that takes one number out of a `Series`; None where ``find`` gives one.
    """

    analysis: str
    find: Callable[..., Reading | Series]
    arguments: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    choose: Literal["block", "pick"] | None = None

    def read(self, result: Result, **arguments: Any) -> Reading | Series:
        """One number; of a series all blocks, unless an argument chooses.

        Raises:
            LookupError: there is no such row or block, or nothing of that name to pick.
        """
        choice = arguments.pop(self.choose, None) if self.choose else None
        found = self.find(result, **arguments)
        if choice is None or isinstance(found, Reading):
            return found
        return _block(found, choice) if self.choose == "block" else _pick(found, choice)


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


def identifiability_rate(result: Result) -> Reading:
    """Image tokens with rank 0 in the last block, mean over images, in %."""
    return _reading(_row(result["rate"], source="model"), "rate")


def images_with_identifiable_token(result: Result) -> Reading:
    """Images with at least one image token of rank 0 in the last block, in %."""
    return _reading(_row(result["rate"], source="model"), "images")


def accuracy(result: Result) -> Reading:
    """Images whose prediction is their label, in %."""
    return _reading(_row(result["accuracy"], source="model"), "accuracy")


def block_change_rate(result: Result) -> Series:
    """Share of image tokens whose label logit rises in a block."""
    return _series(result["change_rate"], "change_rate", source="model")


def mean_identifiability(result: Result, stream: str = "resid", group: str = "patch") -> Series:
    """Mean identifiability of the tokens of a group in a stream; p against the control."""
    return _series(result["evolution"], "mean", source="model", stream=stream, group=group)


def class_context_difference(result: Result) -> Series:
    """Mean identifiability of class-labelled image tokens minus that of the others."""
    return _series(result["context"], "delta")


def sublayer_change_rate(result: Result, sublayer: str, group: str) -> Series:
    """Share of the tokens of a group whose label logit a sublayer raises."""
    return _series(result["change_rate"], "change_rate", sublayer=sublayer, group=group)


def class_context_logit_difference(result: Result, sublayer: str) -> Series:
    """How much more a sublayer raises the label logits of class-labelled tokens than of others."""
    return _series(result["context"], "delta", sublayer=sublayer)


def intervention_rate(result: Result, state: str, of: str = "rate") -> Reading:
    """The "rate", "images" or "accuracy" in %, in the state "perturbed" or "unperturbed", or the
    "difference", perturbed - unperturbed, on the same images and tokens."""
    return _reading(_row(result["rates"], measure=of, source=state), "value")


def class_value_cosine(result: Result, sublayer: str, source: str = "model") -> Series:
    """Class-value agreement of a sublayer, of the "model" or of its "control"."""
    return _series(result["agreement"], "cosine", source=source, sublayer=sublayer)


def key_value_agreement(result: Result, sublayer: str, of: str = "agreement") -> Series:
    """Key-value "agreement" rate of a sublayer, in %; the "control" rate of a random class, or the
    "difference" of both."""
    return _series(result["agreement"], of, sublayer=sublayer)


def agreement_of_correct_minus_wrong(result: Result, sublayer: str) -> Series:
    """How much larger the key-value agreement rate of CLS is in correctly predicted images."""
    return _series(result["correct_minus_wrong"], "delta", sublayer=sublayer)


def memory_composition(result: Result, sublayer: str) -> Series:
    """Tokens with the top class of a single memory, in %."""
    return _series(result["composition"], "composed", sublayer=sublayer, group="all")


def perturbation_auc(result: Result, test: str, method: str) -> Reading:
    """Area under the curve of a method in a perturbation test."""
    return _reading(_row(result["auc"], test=test, method=method), "auc")


def perturbation_difference(result: Result, test: str, first: str, second: str) -> Reading:
    """The area of a method minus that of another, on the same images."""
    rows = result["differences"]
    try:
        return _reading(_row(rows, test=test, first=first, second=second), "difference")
    except LookupError:
        found = _reading(_row(rows, test=test, first=second, second=first), "difference")
        low, high = (end if end is None else -end for end in (found.high, found.low))
        return Reading(-found.value, low, high)


def probe_top1(result: Result, stream: str, group: str = "patch", source: str = "probe") -> Series:
    """Share of tokens whose linear "probe" puts the label first, or whose "projection" does."""
    found = _series(result["comparison"], "rate", source=source, stream=stream, group=group)
    return {block: _share(reading) for block, reading in found.items()}


def _measure(
    find: Callable[..., Reading | Series],
    analysis: str,
    choose: Literal["block", "pick"] | None = None,
) -> Measure:
    """A measure with the arguments that its function has behind the result, and its choice."""
    arguments = list(signature(find).parameters.values())[1:]
    required = tuple(a.name for a in arguments if a.default is a.empty)
    names = tuple(a.name for a in arguments)
    chosen = (choose,) if choose else ()
    return Measure(analysis, find, (*names, *chosen), (*required, *chosen), choose)


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
    "block_change_rate": _measure(block_change_rate, "identifiability", "block"),
    "mean_identifiability": _measure(mean_identifiability, "identifiability", "block"),
    "class_context_difference": _measure(class_context_difference, "identifiability", "block"),
    "sublayer_change_rate": _measure(sublayer_change_rate, "sublayers", "block"),
    "class_context_logit_difference": _measure(
        class_context_logit_difference, "sublayers", "block"
    ),
    "intervention_rate": _measure(intervention_rate, "interventions"),
    "class_value_cosine": _measure(class_value_cosine, "values", "pick"),
    "key_value_agreement": _measure(key_value_agreement, "memories", "pick"),
    "agreement_of_correct_minus_wrong": _measure(
        agreement_of_correct_minus_wrong, "memories", "pick"
    ),
    "memory_composition": _measure(memory_composition, "memories", "pick"),
    "perturbation_auc": _measure(perturbation_auc, "perturb"),
    "perturbation_difference": _measure(perturbation_difference, "perturb"),
    "probe_top1": _measure(probe_top1, "probe", "block"),
}


def _rows(rows: list[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    """The rows with these values.

    Raises:
        LookupError: there is none.
    """
    found = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    if not found:
        asked = ", ".join(f"{name} {value}" for name, value in wanted.items() if name != "source")
        raise LookupError(f"there is nothing for {asked}" if asked else "there is no such number")
    return found


def _row(rows: list[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    return _rows(rows, **wanted)[0]


def _reading(row: Mapping[str, Any], column: str) -> Reading:
    """A column of a row, with the interval and the p-value that stand beside it.

    Raises:
        LookupError: there is no number, as where an analysis keeps NaN.
    """
    if not _is_number(row[column]):
        raise LookupError("there is no such number")
    low, high = (row.get(f"{column}_{end}", row.get(end)) for end in ("low", "high"))
    q, p = row.get("q_value"), row.get("p_value")
    return Reading(row[column], low, high, p if q is None else q)


def _series(rows: list[dict[str, Any]], column: str, **wanted: Any) -> Series:
    """Of the blocks that have a number.

    Raises:
        LookupError: there is none.
    """
    found = sorted(_rows(rows, **wanted), key=lambda row: row["block"])
    series = {r["block"]: _reading(r, column) for r in found if _is_number(r[column])}
    if not series:
        raise LookupError("there is no such number")
    return series


def _is_number(value: Any) -> bool:
    return value is not None and value == value


def _share(percent: Reading) -> Reading:
    low, high = (end if end is None else end / 100 for end in (percent.low, percent.high))
    return Reading(percent.value / 100, low, high, percent.p)


def _block(series: Series, block: int) -> Reading:
    if block not in series:
        raise LookupError(f"there is nothing for block {block}")
    return series[block]


def _pick(series: Series, pick: str) -> Reading:
    """The largest ("peak"), its block, or the last block's."""
    peak = max(series, key=lambda block: series[block].value)
    picks = {
        "peak": series[peak],
        "peak_block": Reading(peak),
        "last": series[max(series)],
    }
    if pick not in picks:
        raise LookupError(f"pick is {pick!r}, which is none of {', '.join(picks)}")
    return picks[pick]
