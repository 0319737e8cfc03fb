"""Do top key neurons lie where their class is? Late blocks against early ones and against chance.

Two questions, both answered by intersection over union (IoU) with the class of segmentation masks:

- *within images*: the patches where the top key neuron of the image's class is above its 80th
  percentile of this image, against the patches of the class. Chance is another neuron of the block,
  drawn anew for each image and block.
- *over the data set*: where the neuron is above one threshold for all images, which is Network
  Dissection. A neuron that is active on its class's images, anywhere on them, does well here and
  not there. Chance is the mean over the other neurons of the block.

Shape letters: F neurons of a block, G patches, K classes with images, L blocks, N images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from classlens.analysis import statistics
from classlens.analysis.neurons.heatmap import above_percentile
from classlens.analysis.neurons.subject import neuron_count
from classlens.extractor.errors import UsageError

if TYPE_CHECKING:
    from classlens.analysis.neurons.alignment import TopNeurons
    from classlens.extractor.prepare import Prepared
    from classlens.extractor.scorer import Scorer

CLASS_FRACTION = 0.5
BATCH = 64


@dataclass(frozen=True, eq=False)
class Overlaps:
    """IoU of neurons with the class of each image. images: [N]. top, random: float64 [N, L].

    n_without: images left out, for no patch of theirs is class-labelled.
    """

    images: np.ndarray
    top: np.ndarray
    random: np.ndarray
    n_without: int


@dataclass(frozen=True)
class Localisation:
    """What :func:`localisation` finds.

    over: what a row of the sample is, "images" or "classes"; n: their number. blocks: one row a
    block: block; top, random, difference (top − random), means over the sample, each with its 95%
    bootstrap interval in …_low and …_high. late_minus_early: mean of the top neurons in the last
    half of the blocks minus that in the first half (the middle block of an odd number is in
    neither), and its interval.
    """

    over: str
    n: int
    blocks: pl.DataFrame
    late_minus_early: tuple[float, float, float]

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        return vars(self) | {"blocks": self.blocks.to_dicts()}


def overlaps(
    prepared: Prepared,
    scorer: Scorer,
    tops: TopNeurons,
    images: Iterable[int],
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Overlaps:
    """Runs the model over some images of a store.

    Args:
        images: places on the image axis; ones that can no longer be read are left out.
        seed: of the random neurons, which depend on it, the image and the block alone.
        progress: called with (images done, images).

    Raises:
        ShardError: the shards no longer hold what was planned.
        UsageError: the images have no masks, or none shows its class.
    """
    import torch

    from classlens.analysis.neurons.activations import key_activations
    from classlens.extractor.pictures import read_pictures

    wanted, done, n_without = sorted(set(images)), 0, 0
    width = neuron_count(prepared.subject)
    found = []
    for pictures in read_pictures(prepared, BATCH, wanted):
        if pictures.mask_fraction is None:
            raise UsageError(
                "The store has no segmentation masks, so there is no place to compare neurons "
                "with; take shards with masks (`classlens pack imagenet-s`)."
            )
        done += len(pictures.pixels)
        places = pictures.targets.images.numpy()
        top_NL = tops.neurons[:, pictures.targets.labels.numpy(), 0].T
        other_NL = np.stack(
            [
                other_neurons(top_L, width, [seed, n])
                for top_L, n in zip(top_NL, places, strict=True)
            ]
        )
        pairs_NLK = torch.from_numpy(np.stack([top_NL, other_NL], axis=2).astype(np.int64))
        activation = key_activations(scorer, pictures.pixels, pairs_NLK).numpy()
        class_NG = pictures.mask_fraction >= 255 * CLASS_FRACTION
        shown_N = class_NG.any(1)
        n_without += int((~shown_N).sum())
        above_NLKG = above_percentile(activation[..., None, :])[..., 0, :]
        found.append((places[shown_N], iou(above_NLKG, class_NG[:, None, None])[shown_N]))
        if progress is not None:
            progress(done, len(wanted))
    if not sum(len(places) for places, _ in found):
        raise UsageError("No image has a patch that shows its class; give more --images.")
    iou_NLK = np.concatenate([part for _, part in found])
    where = np.concatenate([places for places, _ in found])
    return Overlaps(where, iou_NLK[:, :, 0], iou_NLK[:, :, 1], n_without)


def other_neurons(top_L: np.ndarray, neurons: int, seed: list[int]) -> np.ndarray:
    """A neuron of each block that is not its top one, all others equally likely, [L]."""
    drawn_L = np.random.default_rng(seed).integers(neurons - 1, size=len(top_L))
    return drawn_L + (drawn_L >= top_L)


def iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Intersection over union of boolean [..., G]; 0 where both are empty."""
    both, either = (first & second).sum(-1), (first | second).sum(-1)
    return both / np.maximum(either, 1)


def dissected(
    tops: TopNeurons, iou_of: Iterable[tuple[np.ndarray, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
    """IoU over the data set of each class with its top neuron and with the other neurons.

    Args:
        iou_of: of each block the classes, [K], and their IoU with each neuron, [K, F].

    Returns:
        of the top neuron, and the mean over all other neurons of the block; float64 [K, L] each.
    """
    top, others = [], []
    for top_C, (classes_K, iou_KF) in zip(tops.neurons[:, :, 0], iou_of, strict=True):
        of_top_K = iou_KF[np.arange(len(classes_K)), top_C[classes_K]]
        top.append(of_top_K)
        others.append((iou_KF.sum(1) - of_top_K) / (iou_KF.shape[1] - 1))
    return np.stack(top, axis=1), np.stack(others, axis=1)


def localisation(
    top_NL: np.ndarray, random_NL: np.ndarray, *, over: str, seed: int = 0
) -> Localisation:
    """Top neurons beside others, late blocks beside early ones.

    Args:
        top_NL, random_NL: IoU of an image, or of a class, in each block; of :func:`overlaps` or
            :func:`dissected`. over: what N counts.
        seed: of the bootstrap.
    """
    half = top_NL.shape[1] // 2
    late_N = top_NL[:, -half:].mean(1) - top_NL[:, :half].mean(1)
    low, high = statistics.bootstrap_interval(late_N[:, None], seed=seed)
    columns = {"block": pl.Series(range(top_NL.shape[1]), dtype=pl.Int16)}
    measures = {"top": top_NL, "random": random_NL, "difference": top_NL - random_NL}
    for name, values_NL in measures.items():
        ends = statistics.bootstrap_interval(values_NL, seed=seed)
        columns |= {name: values_NL.mean(0), f"{name}_low": ends[0], f"{name}_high": ends[1]}
    return Localisation(
        over, len(top_NL), pl.DataFrame(columns), (late_N.mean(), low.item(), high.item())
    )
