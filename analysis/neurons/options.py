"""Arguments and options that commands of ``neurons`` share. Heavy modules load when they run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from classlens.extractor.errors import UsageError

if TYPE_CHECKING:
    from classlens.extractor.models import Subject


def subject_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The argument ``source``, a model or a store, and what says more of a model."""
    options = (
        click.argument("source", metavar="MODEL|STORE"),
        click.option("--weights",
                     help="Of MODEL: pretrained | random[:SEED] | FILE  [default: pretrained]"),
        click.option("--model-arg", "model_args", multiple=True, metavar="KEY=VALUE",
                     help="Passed to timm.create_model; repeatable."),
        click.option("--class-names", type=click.Path(path_type=Path, exists=True, dir_okay=False),
                     help="One class name a line, in class order."),
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def chosen_subject(
    source: str, weights: str | None, model_args: tuple[str, ...], class_names: Path | None
) -> Subject:
    """What the options of `subject_options` stand for; errors as of `open_subject`."""
    from classlens.analysis.neurons.subject import open_subject
    from classlens.extractor.commands import parse_model_arg

    return open_subject(
        source,
        weights=weights,
        model_args=dict(parse_model_arg(argument) for argument in model_args),
        class_names=class_names,
    )


def split_neuron(text: str) -> tuple[int, int]:
    """BLOCK:J -> block and index.

    Raises:
        UsageError: it is not of this form.
    """
    block, _, j = text.partition(":")
    if not (block.isdecimal() and j.isdecimal()):
        raise UsageError(f"--neuron takes BLOCK:J, two whole numbers such as 10:421; got {text!r}.")
    return int(block), int(j)


def parse_neuron(text: str, subject: Subject) -> tuple[int, int]:
    """BLOCK:J of a model -> its block and index.

    Raises:
        UsageError: it is not of this form, or the model has no such neuron.
    """
    from classlens.analysis.neurons.subject import neuron_count

    block, j = split_neuron(text)
    if block >= subject.blocks:
        raise UsageError(f"There is no block {block}; give 0 to {subject.blocks - 1}.")
    if j >= neuron_count(subject):
        last = neuron_count(subject) - 1
        raise UsageError(f"There is no neuron {j} in block {block}; give 0 to {last}.")
    return block, j
