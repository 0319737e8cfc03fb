"""The group ``neurons``. Heavy modules are imported when a command runs."""

from __future__ import annotations

import click


@click.group()
def neurons() -> None:
    """The key-value pairs of every MLP: what a key looks for, what its value vector writes.

    A neuron is named BLOCK:INDEX, both from 0.
    """
