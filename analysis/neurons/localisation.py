"""Do top key neurons lie where their class is? Late blocks against early ones and against chance.

For each image with a segmentation mask and each block: the patches where the top key neuron of the
image's class is above its 80th percentile, against the patches that the mask gives to the class,
by intersection over union (IoU). Chance is another neuron of the block, drawn anew for each image
and block.

Shape letters: G patches, L blocks, N images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from classlens.analysis import statistics
from classlens.analysis.neurons.heatmap import above_percentile
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
class LocalisationResult:
    """What :func:`localisation` finds.

    blocks: see :func:`by_block`. late_minus_early: mean IoU of the top neurons in the last half of
    the blocks minus that in the first half (the middle block of an odd number is in neither), with
    its 95% bootstrap interval over images.
    """

    n_images: int
    n_without: int
    seed: int
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
    width = scorer.model.blocks[0].mlp.fc2.in_features  # pyright: ignore
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
            [other_neurons(top_L, width, [seed, n]) for top_L, n in zip(top_NL, places, strict=True)]
        )
        pairs_NLK = torch.from_numpy(np.stack([top_NL, other_NL], axis=2).astype(np.int64))
        activation = key_activations(scorer, pictures.pixels, pairs_NLK).numpy()
        class_NG = pictures.mask_fraction >= 255 * CLASS_FRACTION
        shown_N = class_NG.any(1)
        n_without += int((~shown_N).sum())
        above = above_percentile(activation[shown_N][:, :, :, None])[:, :, :, 0]
        found.append((places[shown_N], iou(above, class_NG[shown_N][:, None, None])))
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


def localisation(found: Overlaps, *, seed: int = 0) -> LocalisationResult:
    """Means over images with 95% bootstrap intervals."""
    blocks = found.top.shape[1]
    half = blocks // 2
    late = found.top[:, blocks - half :].mean(1) - found.top[:, :half].mean(1)
    low, high = statistics.bootstrap_interval(late[:, None], seed=seed)
    return LocalisationResult(
        n_images=len(found.images),
        n_without=found.n_without,
        seed=seed,
        blocks=by_block(found.top, found.random, seed=seed),
        late_minus_early=(float(late.mean()), float(low[0]), float(high[0])),
    )


def by_block(top_NL: np.ndarray, random_NL: np.ndarray, *, seed: int = 0) -> pl.DataFrame:
    """Mean IoU of each block.

    Columns: block; top, random, difference (top − random), each with its 95% bootstrap interval
    over images in …_low and …_high; p_value (one-sided paired Wilcoxon test over images that the
    top neuron exceeds the random one), q_value (Benjamini–Hochberg over blocks).
    """
    columns = {"block": pl.Series(range(top_NL.shape[1]), dtype=pl.Int16)}
    for name, values_NL in (
        ("top", top_NL),
        ("random", random_NL),
        ("difference", top_NL - random_NL),
    ):
        low, high = statistics.bootstrap_interval(values_NL, seed=seed)
        columns |= {name: values_NL.mean(0), f"{name}_low": low, f"{name}_high": high}
    p_values = [statistics.wilcoxon_greater(*pair) for pair in zip(top_NL.T, random_NL.T, strict=True)]
    q_values = statistics.benjamini_hochberg(np.array(p_values))
    return pl.DataFrame(columns | {"p_value": p_values, "q_value": q_values})
