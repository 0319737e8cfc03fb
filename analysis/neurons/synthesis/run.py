"""Makes the images of all targets of a variant, batch by batch, into a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from classlens.analysis.neurons.synthesis.folder import Folder
from classlens.analysis.neurons.synthesis.objectives import Target
from classlens.analysis.neurons.synthesis.synthesize import (
    Ascent,
    Checkpoint,
    Seen,
    ascend,
    look,
)
from classlens.extractor.models import Subject

Look = Callable[[Sequence[Target], np.ndarray], Seen]


def synthesize(
    subject: Subject,
    variant: str,
    targets: Sequence[Target],
    ascent: Ascent,
    folder: Folder,
    *,
    batch_size: int = 32,
    device: str = "cpu",
    progress: Callable[[int], None] = lambda image_steps: None,
) -> None:
    """Makes the images of the targets, and adds them to the folder after each batch.

    Args:
        batch_size: images at a time, in whole targets. progress: called with the image-steps that
            were done since the call before.
    """

    def seen(batch: Sequence[Target], pixels: np.ndarray) -> Seen:
        return look(subject, batch, pixels, images=ascent.images, device=device)

    for batch in batches(targets, max(1, batch_size // ascent.images)):
        count = len(batch) * ascent.images
        checkpoints = ascend(
            subject, batch, ascent, device=device, progress=lambda _, n=count: progress(n)
        )
        made = [
            (row, pixels)
            for checkpoint in checkpoints
            for row, pixels in zip(
                rows_of(variant, batch, checkpoint, seen, subject.class_names),
                checkpoint.pixels,
                strict=True,
            )
        ]
        folder.add(*zip(*made, strict=True))


def batches(targets: Sequence[Target], size: int) -> Iterator[list[Target]]:
    """The deepest targets first, so that images leave the walk from the batch's end."""
    ordered = sorted(targets, key=lambda target: -target.depth)
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def rows_of(
    variant: str,
    targets: Sequence[Target],
    checkpoint: Checkpoint,
    look: Look,
    names: Sequence[str],
) -> list[dict[str, Any]]:
    """The rows of `folder.SCHEMA` for the images of a checkpoint, in their order."""
    each = len(checkpoint.pixels) // len(targets)
    seen = look(targets, checkpoint.pixels)
    rows = []
    for n in range(len(checkpoint.pixels)):
        target, image = targets[n // each], n % each
        predicted = int(seen.predicted[n])
        block, neuron = target.keys[0]
        rows.append(
            {
                "variant": variant,
                "target": target.name,
                "label": target.label,
                "name": names[target.label],
                "block": block,
                "neuron": neuron,
                "keys": " ".join(f"{b}:{j}" for b, j in target.keys),
                "image": image,
                "steps": checkpoint.steps,
                "predicted": predicted,
                "predicted_name": names[predicted],
                "probability": float(seen.probability[n]),
                "rank": int(seen.rank[n]),
                "activation": float(seen.activation[n]),
                "similarity": float(seen.similarity[n // each]) if each > 1 else None,
                "seconds": checkpoint.seconds / len(checkpoint.pixels),
                "file": f"{variant}/{target.name}-{image}-{checkpoint.steps}.png",
            }
        )
    return rows
