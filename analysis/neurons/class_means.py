"""Class averages of every neuron's activation, and how far classes are apart (the report, §3.2.2).

The activation of an image is the mean over its patches; a class's average is the mean over its
images. Each image's mean is kept in units of 2^-16, so that an average is exact to 2^-17.

Shape letters: L blocks, F neurons of a block, K classes, N top neurons of a class.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from classlens.analysis.neurons.accumulated import Accumulated
from classlens.analysis.neurons.exemplars import Progress, checked_block
from classlens.extractor.errors import UsageError
from classlens.extractor.schema import CLASSES_FILE, MEAN_UNIT


@dataclass(frozen=True, eq=False)
class ClassMeans:
    """classes: int32 [K], those with a scored image, ascending. counts: int64 [K], their images.
    means: float64 [K, L, F]."""

    classes: np.ndarray
    counts: np.ndarray
    means: np.ndarray


def class_means(store: str | Path, progress: Progress | None = None) -> ClassMeans:
    """The class averages of all blocks; of ViT-B/16 and 1,000 classes they are 295 MB.

    Raises:
        StoreError: there is no store, or it is damaged. UsageError: it has no class averages.
    """
    found = Accumulated.open(store, "neurons")
    classes_K, counts_K = found.classes("neurons")
    layout = found.layout
    means_KLF = np.empty((len(classes_K), layout.blocks, layout.mlp_width))
    for block in range(layout.blocks):
        means_KLF[:, block] = _block_means(found, block, counts_K)
        if progress is not None:
            progress(block + 1, layout.blocks)
    return ClassMeans(classes_K, counts_K, means_KLF)


def block_class_means(store: str | Path, block: int) -> ClassMeans:
    """The same of one block alone, means [K, 1, F]; errors also where there is no such block."""
    found = Accumulated.open(store, "neurons")
    classes_K, counts_K = found.classes("neurons")
    means_KF = _block_means(found, checked_block(found, block), counts_K)
    return ClassMeans(classes_K, counts_K, means_KF[:, None])


def class_distances(means: ClassMeans, top_LKN: np.ndarray | None = None) -> np.ndarray:
    """L2 distances between the averages of each two classes in each block, float64 [L, K, K].

    Args:
        top_LKN: the top key neurons of each class in each block; two classes are compared at those
            of either of them. All neurons when None.

    The report compares the activation of each class at its own top neurons, hence at different
    ones; here both classes are looked at with the same neurons, so that a class is at 0 from itself
    and what differs is the activation.
    """
    K, L, _ = means.means.shape
    distances = np.empty((L, K, K))
    for block in range(L):
        means_KF = means.means[:, block]
        if top_LKN is None:
            distances[block] = [
                np.sqrt(np.square(means_KF - mean_F).sum(axis=1)) for mean_F in means_KF
            ]
            continue
        for a in range(K):
            distances[block, a] = _at_top_neurons(means_KF, top_LKN[block], a)
    return distances


def distance_table(store: str | Path, means: ClassMeans, distances_LKK: np.ndarray) -> pl.DataFrame:
    """One row a block: how far classes are apart, and which two are nearest.

    Columns: block Int16, mean (over pairs of different classes), running_mean (of that, over the
    blocks so far), smallest, class_a, name_a, class_b, name_b.

    Raises:
        UsageError: there is one class alone.
    """
    if len(means.classes) < 2:
        raise UsageError(f"The images of {store} are of one class, so there are no distances.")
    names = dict(pl.read_parquet(Path(store) / CLASSES_FILE).iter_rows())
    a_P, b_P = np.triu_indices(len(means.classes), k=1)
    pairs_LP = distances_LKK[:, a_P, b_P]
    nearest_L = pairs_LP.argmin(axis=1)
    frame = {
        "block": np.arange(len(pairs_LP), dtype=np.int16),
        "mean": pairs_LP.mean(axis=1),
        "running_mean": running_mean(pairs_LP.mean(axis=1)),
        "smallest": pairs_LP.min(axis=1),
    }
    for letter, side_P in (("a", a_P), ("b", b_P)):
        classes_L = means.classes[side_P[nearest_L]]
        frame[f"class_{letter}"] = classes_L
        frame[f"name_{letter}"] = [names[c] for c in classes_L]
    return pl.DataFrame(frame)


def running_mean(values: np.ndarray) -> np.ndarray:
    """The mean over the first blocks up to each one; blocks are the first axis."""
    count = np.arange(1, len(values) + 1).reshape(-1, *[1] * (values.ndim - 1))
    return values.cumsum(axis=0) / count


def _at_top_neurons(means_KF: np.ndarray, top_KN: np.ndarray, a: int) -> np.ndarray:
    """Distances of class ``a`` from each class, over the union of both classes' neurons, [K]."""
    square_K = np.square(means_KF[:, top_KN[a]] - means_KF[a, top_KN[a]]).sum(axis=1)
    theirs_KN = np.square(np.take_along_axis(means_KF, top_KN, axis=1) - means_KF[a, top_KN])
    return np.sqrt(square_K + (theirs_KN * ~np.isin(top_KN, top_KN[a])).sum(axis=1))


def _block_means(found: Accumulated, block: int, counts_K: np.ndarray) -> np.ndarray:
    sums_KF = found.by_class("neurons/class_sums", "neurons", block)
    return sums_KF * MEAN_UNIT / counts_K[:, None]
