"""The group ``neurons``. Heavy modules are imported when a command runs."""

from __future__ import annotations

import click

from classlens.analysis.neurons.commands_alignment import shared, top
from classlens.analysis.neurons.commands_dissect import dissect
from classlens.analysis.neurons.commands_exemplars import class_distances, exemplars
from classlens.analysis.neurons.commands_heatmap import heatmap
from classlens.analysis.neurons.commands_localise import localise
from classlens.analysis.neurons.commands_pages import pages
from classlens.analysis.neurons.commands_words import words
from classlens.analysis.neurons.synthesis.commands_synthesize import synthesize


@click.group()
def neurons() -> None:
    """The key-value pairs of every MLP: what a key looks for, what its value vector writes.

    A neuron is named BLOCK:INDEX, both from 0.
    """


neurons.add_command(top)
neurons.add_command(shared)
neurons.add_command(heatmap)
neurons.add_command(localise)
neurons.add_command(exemplars)
neurons.add_command(class_distances)
neurons.add_command(dissect)
neurons.add_command(words)
neurons.add_command(synthesize)
neurons.add_command(pages)
