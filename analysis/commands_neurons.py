"""The group ``neurons``. Heavy modules are imported when a command runs."""

from __future__ import annotations

import click

from classlens.analysis.neurons.synthesis.commands_synthesize import synthesize


@click.group()
def neurons() -> None:
    """The key-value pairs of every MLP: what a key looks for, what its value vector writes.

    A neuron is named BLOCK:INDEX, both from 0.
    """


neurons.add_command(synthesize)
