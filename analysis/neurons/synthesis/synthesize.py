"""Gradient ascent on images, batched over targets (definitions §7; the report, §3.4).

Looked at as dependencies: torch-lucent (2021) finds features by hooks, draws one transform for the
whole batch and knows no token model; horama and captum's optim module make one image at a time or
are not released; so the Fourier image, transforms and objectives here are written anew.

What is drawn at random for an image depends on (seed, target, number of the image, step) alone, and
no operation mixes targets: a batch of other targets or size changes an image by rounding only.

Shape letters: N images, M targets, H and W of the image, V of its spectrum.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from classlens.analysis.neurons.synthesis.fourier_image import first_spectrum, to_rgb
from classlens.analysis.neurons.synthesis.objectives import Target, objective
from classlens.analysis.neurons.synthesis.transforms import DRAWS, REPORT, Recipe, resize, transform
from classlens.extractor.blocks import embed
from classlens.extractor.models import Subject, predict

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Ascent:
    """How images are made.

    size: rows and columns of an image. steps: after how many steps to look, ascending. diversity:
    weight of the Gram similarity of a target's images; 0 leaves it out. tokens, after_activation:
    see `objective`. dtype: of the model's forward and backward pass; images and Adam's moments are
    float32.
    """

    size: tuple[int, int]
    steps: tuple[int, ...] = (250, 500, 750)
    images: int = 1
    diversity: float = 0.0
    tokens: str = "patches"
    after_activation: bool = False
    recipe: Recipe = REPORT
    learning_rate: float = 0.05
    dtype: str = "float32"
    seed: int = 0


class Checkpoint(NamedTuple):
    """pixels: uint8 [N, H, W, 3] after ``steps`` steps, which took ``seconds`` for the batch."""

    steps: int
    pixels: np.ndarray
    seconds: float


def draws(seed: int, target: Target, image: int) -> tuple[np.random.Generator, ...]:
    """Generators of the first spectrum of an image and of its transforms, one step after another.

    They depend on the seed, the target's name and the image's number.
    """
    digits = int.from_bytes(target.name.encode(), "big")
    return tuple(np.random.default_rng([purpose, seed, image, digits]) for purpose in (0, 1))


def ascend(
    subject: Subject,
    targets: Sequence[Target],
    ascent: Ascent,
    *,
    device: str = "cpu",
    progress: Callable[[int], None] = lambda steps: None,
) -> Iterator[Checkpoint]:
    """Makes the images of a batch of targets; those of a target stand one after another.

    Args:
        targets: none deeper than the one before it. progress: called with the steps done.
    """
    model, each = subject.model.to(device), ascent.images
    normalise = _normaliser(subject, device)
    generators = [draws(ascent.seed, t, i) for t in targets for i in range(each)]
    first_N3HV2 = np.stack([first_spectrum(ascent.size, first) for first, _ in generators])
    spectrum_N3HV2 = torch.from_numpy(first_N3HV2).to(device).requires_grad_()
    optimizer = torch.optim.Adam([spectrum_N3HV2], lr=ascent.learning_rate)
    started_s = time.perf_counter()
    for step in range(1, ascent.steps[-1] + 1):
        uniform_N6 = np.stack([rng.random(DRAWS) for _, rng in generators])
        images = to_rgb(spectrum_N3HV2, ascent.size)
        seen = normalise(transform(images, ascent.recipe, uniform_N6, subject.geometry.input_size))
        with torch.autocast(
            torch.device(device).type, torch.bfloat16, enabled=ascent.dtype == "bfloat16"
        ):
            terms = objective(
                model,
                seen,
                targets,
                images_per_target=each,
                tokens=ascent.tokens,
                after_activation=ascent.after_activation,
                with_similarity=ascent.diversity > 0,
            )
        # A sum over targets, so that no target's gradient depends on the others.
        loss = -terms.activation.sum() / each + ascent.diversity * terms.similarity.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress(step)
        if step in ascent.steps:
            with torch.no_grad():
                rgb_N3HW = to_rgb(spectrum_N3HV2, ascent.size)
            pixels = (255 * rgb_N3HW).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
            yield Checkpoint(step, pixels, time.perf_counter() - started_s)


class Seen(NamedTuple):
    """What the whole model makes of untransformed images.

    predicted: int64 [N]. probability, rank: of the target's class, float32 and int64 [N]; ties to
    the lower class. activation: mean key coefficient before the activation function, float32 [N].
    similarity: `gram_similarity` of a target's images, float32 [M]; 0 for a single image.
    """

    predicted: np.ndarray
    probability: np.ndarray
    rank: np.ndarray
    activation: np.ndarray
    similarity: np.ndarray


@torch.inference_mode()
def look(
    subject: Subject,
    targets: Sequence[Target],
    pixels: np.ndarray,
    *,
    images: int = 1,
    device: str = "cpu",
) -> Seen:
    """Classifies images as they are saved, in float32.

    Args:
        targets, pixels: of `ascend`; uint8 [N, H, W, 3]. images: number of them a target.
    """
    model = subject.model.to(device)
    planes = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float() / 255
    seen = _normaliser(subject, device)(resize(planes, subject.geometry.input_size))
    x = embed(model, seen)
    for block in model.blocks:
        x = block(x)
    embeddings = subject.classes and subject.classes.embeddings.to(device, torch.float32)
    logits_NC = predict(model, x, embeddings=embeddings).float()
    labels_N = torch.tensor([t.label for t in targets], device=device).repeat_interleave(images)
    order_NC = logits_NC.sort(dim=1, descending=True, stable=True).indices
    terms = objective(model, seen, targets, images_per_target=images, with_similarity=images > 1)
    found = (
        order_NC[:, 0],
        logits_NC.softmax(1).gather(1, labels_N[:, None])[:, 0],
        (order_NC == labels_N[:, None]).int().argmax(1),
        *terms,
    )
    return Seen(*(part.cpu().numpy() for part in found))


def _normaliser(subject: Subject, device: str) -> Callable[[Tensor], Tensor]:
    """The model's own normalisation of images in 0 to 1."""
    mean, std = (
        torch.tensor(values, device=device).view(3, 1, 1)
        for values in (subject.geometry.mean, subject.geometry.std)
    )
    return lambda images: (images - mean) / std
