"""Which neurons images are made for.

Of a class, the neurons whose value vectors are most predictive of it over all blocks, in one of two
senses:

- ``alignment``: the largest E_c·v_j (definitions §7);
- ``probability``: the largest softmax probability of c where v_j goes through the model's final
  LayerNorm and head, as the report's text has it (§3.4). The LayerNorm takes away the length of v_j
  and the softmax what it writes for other classes, so that fewer classes share a neuron.

Equal values: the lower block comes first, then the lower neuron.

Shape letters: C classes, F neurons of a block, K kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from classlens.analysis.neurons.synthesis.objectives import Key, Target
from classlens.extractor.errors import UsageError
from classlens.extractor.models import Subject
from classlens.extractor.value_vectors import value_vectors
from classlens.kernels.reference import logits_reference

Selection = Literal["alignment", "probability"]


def predictiveness(subject: Subject, block: int, selection: Selection) -> Tensor:
    """How much each value vector of a block's MLP speaks for each class, float64 [C, F]."""
    values_DF = value_vectors(subject.model, block, "mlp")
    if selection == "alignment":
        return subject.embedding() @ values_DF
    return logits_reference(values_DF.T, subject.space).softmax(dim=1).T


def class_targets(
    subject: Subject, classes: Sequence[int], keys: int, selection: Selection
) -> list[Target]:
    """A target for each class: its ``keys`` most predictive neurons over all blocks.

    Raises:
        UsageError: there is no such class, or there are not so many neurons.
    """
    known = subject.space.num_classes
    if outside := [c for c in classes if not 0 <= c < known]:
        raise UsageError(f"--classes names class {outside[0]}; the model has 0 to {known - 1}.")
    places: list[Key] = []
    best = torch.empty(len(classes), 0, dtype=torch.float64)
    kept = torch.empty(len(classes), 0, dtype=torch.long)
    for block in range(subject.blocks):
        scores = predictiveness(subject, block, selection)[list(classes)]
        here = torch.arange(len(places), len(places) + scores.shape[1]).expand(len(classes), -1)
        places += [(block, j) for j in range(scores.shape[1])]
        best, kept = torch.cat([best, scores], 1), torch.cat([kept, here], 1)
        order = best.sort(dim=1, descending=True, stable=True).indices[:, :keys]
        best, kept = best.gather(1, order), kept.gather(1, order)
    if not 1 <= keys <= len(places):
        raise UsageError(f"--keys is {keys}; the model has {len(places):,} neurons.")
    return [
        Target(c, tuple(places[i] for i in row), f"class{c}")
        for c, row in zip(classes, kept.tolist(), strict=True)
    ]


def neuron_targets(subject: Subject, neurons: Sequence[Key], selection: Selection) -> list[Target]:
    """A target for each neuron; its label is the class that its value vector is most predictive of.

    Raises:
        UsageError: there is no such neuron.
    """
    found = []
    for block, j in neurons:
        if not 0 <= block < subject.blocks:
            raise UsageError(f"--neurons names block {block}; give 0 to {subject.blocks - 1}.")
        scores_CF = predictiveness(subject, block, selection)
        if not 0 <= j < scores_CF.shape[1]:
            raise UsageError(f"--neurons names {block}:{j}; give 0 to {scores_CF.shape[1] - 1}.")
        label = int(scores_CF[:, j].argmax())
        found.append(Target(label, ((block, j),), f"neuron{block}-{j}"))
    return found
