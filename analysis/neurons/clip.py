"""CLIP scores of masked exemplars: which text an image tower finds in them (definitions §7).

The image tower of a CLIP or SigLIP model sees each exemplar with everything outside its mask in the
tower's mean colour. A neuron is the mean of the unit embeddings of its exemplars, and its score for
a text the cosine of both, less the mean of that cosine over all neurons looked at:

    score(j, t) = ⟨t̂, ē_j − mean_i ē_i⟩

Some texts are near to every masked picture. MILAN divides by the prior p(text) for this reason
(pointwise mutual information); the mean over neurons is its stand-in here, for cosines are log
probabilities but for a temperature and a constant, and subtracting it needs neither a language
model nor a weight λ that has to be tuned.

Shape letters: C texts, D width of the tower's output, E exemplars, G patches, N neurons.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from classlens.analysis.neurons.words import ABSENT
from classlens.analysis.report.pictures import covered

if TYPE_CHECKING:
    from pathlib import Path

    from classlens.extractor.geometry import Geometry
    from classlens.extractor.prepare import Prepared
    from classlens.extractor.scorer import Scorer

BATCH = 64
NEURONS_AT_A_TIME = 4096


@dataclass(frozen=True, eq=False)
class Tower:
    """An image tower and the texts it is asked for.

    texts: the embeddings of a class file, [C, D]. names: of the texts.
    """

    scorer: Scorer
    geometry: Geometry
    texts: np.ndarray
    names: tuple[str, ...]


def open_tower(
    model: str,
    weights: str,
    classes: Path,
    *,
    model_args: dict[str, Any] | None = None,
    device: str = "cpu",
) -> Tower:
    """A tower of timm, in float32 on a CPU and in float16 elsewhere.

    Args:
        weights: as of `ExtractConfig`. classes: texts, see `classlens.extractor.class_file`.

    Raises:
        ModelError: it cannot be loaded, or has no class-embedding space.
        UsageError: the texts are unusable, or not as wide as the tower's output.
    """
    from classlens.extractor.config import ExtractConfig
    from classlens.extractor.models import load_subject
    from classlens.extractor.scorer import DTYPES, Scorer

    dtype = DTYPES["float32" if device == "cpu" else "float16"]
    subject = load_subject(
        ExtractConfig(
            model=model, weights=weights, model_args=model_args or {}, classes=str(classes)
        )
    )
    assert subject.classes is not None
    return Tower(
        scorer=Scorer(subject, [], dtype=dtype, device=device, convention="corrected"),
        geometry=subject.geometry,
        texts=subject.classes.embeddings.double().numpy(),
        names=subject.class_names,
    )


def resized(pixels: np.ndarray, geometry: Geometry) -> np.ndarray:
    """A picture, uint8 [H, W, 3], squashed to a tower's input, uint8 [H', W', 3]."""
    height, width = geometry.input_size
    picture = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(picture)


def masked(pixels: np.ndarray, masks: np.ndarray, geometry: Geometry) -> np.ndarray:
    """A picture under some masks, with the tower's mean colour outside, uint8 [n, H', W', 3].

    Args:
        pixels: uint8 [H', W', 3], wholly covered by the patches. masks: bool [n, rows, columns] of
            patches; a pixel belongs to the patch that its centre lies in.
    """
    rows, columns = (
        (2 * np.arange(count) + 1) * patches // (2 * count)
        for count, patches in zip(pixels.shape[:2], masks.shape[1:], strict=True)
    )
    inside = masks[:, rows[:, None], columns]
    mean = np.rint(255 * np.array(geometry.mean)).astype(np.uint8)
    return np.where(inside[..., None], pixels, mean)


def exemplar_embeddings(
    tower: Tower,
    prepared: Prepared,
    images_NE: np.ndarray,
    masks_NEG: np.ndarray,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """The mean unit embedding of each neuron's masked exemplars, float64 [N, D]; NaN without any.

    Each picture is read once. Pictures that can no longer be read are left out.

    Args:
        prepared: what the exemplars were found with. images_NE: places on its image axis, `ABSENT`
            where a neuron has fewer. masks_NEG: bool.
        progress: called with (exemplars done, exemplars).

    Raises:
        ShardError: the shards no longer hold what was planned.
    """
    from classlens.extractor.pictures import read_pictures

    grid = prepared.subject.grid
    sums_ND = np.zeros((len(images_NE), tower.texts.shape[1]))
    counts_N = np.zeros(len(images_NE))
    total, done = int((images_NE != ABSENT).sum()), 0
    neurons, places = np.nonzero(images_NE != ABSENT)
    by_image = np.argsort(images_NE[neurons, places], kind="stable")
    neurons, places = neurons[by_image], places[by_image]
    images = images_NE[neurons, places]
    for pictures in read_pictures(prepared, BATCH, set(images.tolist())):
        for pixels, image in zip(pictures.pixels.numpy(), pictures.targets.images, strict=True):
            whole = resized(covered(pixels, grid), tower.geometry)
            first, stop = np.searchsorted(images, [int(image), int(image) + 1])
            for start in range(first, stop, BATCH):
                part = slice(start, min(start + BATCH, stop))
                masks = masks_NEG[neurons[part], places[part]].reshape(-1, *grid)
                seen = masked(whole, masks, tower.geometry)
                np.add.at(sums_ND, neurons[part], embed(tower, seen))
                np.add.at(counts_N, neurons[part], 1)
            done += stop - first
            if progress is not None:
                progress(done, total)
    counts_N[counts_N == 0] = np.nan
    return sums_ND / counts_N[:, None]


def embed(tower: Tower, pixels: np.ndarray) -> np.ndarray:
    """The tower's unit embeddings of pictures uint8 [n, H', W', 3], float64 [n, D]."""
    import torch

    with torch.inference_mode():
        images = tower.scorer.images(torch.from_numpy(pixels))
        found = tower.scorer.model(images).double().cpu().numpy()
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def best_texts(embeddings_ND: np.ndarray, texts_CD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The text of the largest score of each neuron, ties to the lower, and the score, two [N].

    −1 and NaN for neurons without an embedding.

    Args:
        embeddings_ND: of `exemplar_embeddings`, of all neurons that the mean is to be over.
    """
    best_N, scores_N = np.full(len(embeddings_ND), ABSENT), np.full(len(embeddings_ND), np.nan)
    [known] = np.nonzero(~np.isnan(embeddings_ND).any(axis=1))
    if not len(known):
        return best_N, scores_N
    unit_CD = texts_CD / np.linalg.norm(texts_CD, axis=1, keepdims=True)
    mean_D = embeddings_ND[known].mean(axis=0)
    for start in range(0, len(known), NEURONS_AT_A_TIME):
        part = known[start : start + NEURONS_AT_A_TIME]
        scores = (embeddings_ND[part] - mean_D) @ unit_CD.T
        best_N[part] = scores.argmax(axis=1)
        scores_N[part] = scores.max(axis=1)
    return best_N, scores_N
