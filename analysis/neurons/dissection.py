"""True Network Dissection: which class's pixels a neuron covers (Bau et al. 2017; definitions §7).

    IoU(j, c) = |M_j ∧ S_c| / |M_j ∨ S_c|

over the images that have a mask. M_j is where neuron j's activation is above its 0.995 quantile,
S_c what masks give to class c; an image shows its label and no other class. Areas are whole numbers
of 1/255 of a patch, and so exact: M_j is constant on a patch, and the covered part of a patch is
kept as a byte. That is the resolution of the model's own grid, activations taken to pixels by
nearest neighbour; the original takes them there bilinearly, at 112 × 112, which smooths the border
of M_j.

Shape letters: L blocks, F neurons of a block, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from classlens.analysis.neurons.accumulated import Accumulated
from classlens.analysis.neurons.exemplars import Progress, checked_block
from classlens.extractor.schema import CLASSES_FILE, PATCH_AREA

DETECTOR_IOU = 0.04
"""Above it a neuron is a detector of its best class."""


@dataclass(frozen=True, eq=False)
class Areas:
    """The areas of one block, in units of 1/255 of a patch.

    classes: int32 [K], ascending. intersection: int64 [K, F], of M_j and S_c. active: int64 [F], of
    M_j over all images. covered: int64 [K], of S_c.
    """

    classes: np.ndarray
    intersection: np.ndarray
    active: np.ndarray
    covered: np.ndarray

    def iou(self) -> np.ndarray:
        """IoU of each class and neuron, float64 [K, F]; 0 where both areas are empty."""
        union_KF = self.active + self.covered[:, None] - self.intersection
        return self.intersection / np.maximum(union_KF, 1)


def areas(dissection: str | Path, block: int) -> Areas:
    """The areas of one block.

    Args:
        dissection: a store that ``classlens neurons dissect`` wrote.

    Raises:
        StoreError: there is no store, or it is damaged. UsageError: it is no dissection, or has no
        such block.
    """
    found = Accumulated.open(dissection, "dissection")
    checked_block(found, block)
    return Areas(
        classes=found.classes("dissection")[0],
        intersection=found.by_class("dissection/intersection", "dissection", block),
        active=found.total("dissection/active_area", block),
        covered=found.by_class("dissection/class_area", "dissection"),
    )


def iou(dissection: str | Path, progress: Progress | None = None) -> pl.DataFrame:
    """The best class of every neuron, ties to the lower class.

    Columns: block Int16, neuron Int32, class Int32, name String, iou Float64, detector Boolean (IoU
    > 0.04), intersection, active, covered Float64 (areas in patches; active: of the neuron over all
    images, covered: of the class). Ordered by block and neuron. Errors as of :func:`areas`.
    """
    blocks = Accumulated.open(dissection, "dissection").layout.blocks
    frames = []
    for block in range(blocks):
        of_block = areas(dissection, block)
        best_F = of_block.iou().argmax(axis=0)
        frames.append(_frame(of_block, block, best_F, np.arange(len(best_F))))
        if progress is not None:
            progress(block + 1, blocks)
    return _named(pl.concat(frames), dissection)


def neuron_iou(dissection: str | Path, block: int, neuron: int) -> pl.DataFrame:
    """All classes of one neuron, the largest IoU first, ties to the lower class.

    Columns as of :func:`iou`; errors as of :func:`areas`.
    """
    of_block = areas(dissection, block)
    classes = np.arange(len(of_block.classes))
    frame = _frame(of_block, block, classes, np.full(len(classes), neuron))
    return _named(frame, dissection).sort("iou", "class", descending=[True, False])


def detectors(best: pl.DataFrame) -> pl.DataFrame:
    """How many neurons of each block detect a class.

    Args:
        best: of :func:`iou`.

    Columns: block, neurons, detectors, share, classes (different ones that are detected),
    mean_iou (of the best classes), max_iou.
    """
    is_detector = pl.col("detector")
    return (
        best.group_by("block", maintain_order=True)
        .agg(
            pl.len().cast(pl.Int32).alias("neurons"),
            is_detector.sum().cast(pl.Int32).alias("detectors"),
            is_detector.mean().alias("share"),
            pl.col("class").filter(is_detector).n_unique().cast(pl.Int32).alias("classes"),
            pl.col("iou").mean().alias("mean_iou"),
            pl.col("iou").max().alias("max_iou"),
        )
        .sort("block")
    )


def _frame(of_block: Areas, block: int, rows: np.ndarray, neurons: np.ndarray) -> pl.DataFrame:
    iou_R = of_block.iou()[rows, neurons]
    return pl.DataFrame(
        {
            "block": np.full(len(rows), block, np.int16),
            "neuron": neurons.astype(np.int32),
            "class": of_block.classes[rows],
            "iou": iou_R,
            "detector": iou_R > DETECTOR_IOU,
            "intersection": of_block.intersection[rows, neurons] / PATCH_AREA,
            "active": of_block.active[neurons] / PATCH_AREA,
            "covered": of_block.covered[rows] / PATCH_AREA,
        }
    )


def _named(frame: pl.DataFrame, dissection: str | Path) -> pl.DataFrame:
    names = pl.read_parquet(Path(dissection) / CLASSES_FILE)
    named = frame.join(names, on="class", how="left", maintain_order="left")
    first = ("block", "neuron", "class", "name")
    return named.select(*first, pl.exclude(first))
