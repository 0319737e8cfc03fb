"""Alignment: which value vectors of the MLPs write which class (definitions §7; the report, §3.1).

Alignment of block b is E · W_out, [C, F]: the product of each class embedding with each column of
``fc2.weight``; see `classlens.extractor.value_vectors` for what is left out. The *top key neurons*
of a class are those of its largest alignments. Equal alignments: the lower block comes first, then
the lower neuron; for the classes of a neuron, the lower class.

One block's products are held at a time. Torch is imported when a function runs.

Shape letters: C classes, F neurons of a block, L blocks, K kept of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from classlens.analysis.values import products
from classlens.extractor.errors import UsageError

if TYPE_CHECKING:
    from classlens.extractor.models import Subject

TOP = 5


@dataclass(frozen=True, eq=False)
class TopNeurons:
    """The top key neurons of each class within each block, the largest alignment first.

    neurons: int32 [L, C, K]. alignment: float64 [L, C, K]. names: of the classes.
    """

    neurons: np.ndarray
    alignment: np.ndarray
    names: tuple[str, ...]

    def over(self, blocks: Sequence[int] | None = None) -> pl.DataFrame:
        """The K top key neurons of each class over some blocks together; over all when None.

        Columns: class, name, place (0 is the largest alignment), block, neuron, alignment; ordered
        by class and place.
        """
        chosen_B = np.arange(len(self.neurons)) if blocks is None else np.array(sorted(set(blocks)))
        classes, kept = self.neurons.shape[1:]
        by_class = (classes, len(chosen_B) * kept)
        alignment = self.alignment[chosen_B].swapaxes(0, 1).reshape(by_class)
        neurons = self.neurons[chosen_B].swapaxes(0, 1).reshape(by_class)
        order_CK = np.argsort(-alignment, axis=1, kind="stable")[:, :kept]
        return pl.DataFrame(
            {
                "class": np.repeat(np.arange(classes, dtype=np.int32), kept),
                "name": np.repeat(np.array(self.names, dtype=object), kept).tolist(),
                "place": np.tile(np.arange(kept, dtype=np.int16), classes),
                "block": chosen_B[order_CK // kept].astype(np.int16).ravel(),
                "neuron": np.take_along_axis(neurons, order_CK, axis=1).ravel(),
                "alignment": np.take_along_axis(alignment, order_CK, axis=1).ravel(),
            }
        )


def top_neurons(
    subject: Subject, top: int = TOP, progress: Callable[[int, int], None] | None = None
) -> TopNeurons:
    """The ``top`` key neurons of each class within each block.

    Args:
        progress: called with (blocks done, blocks).

    Raises:
        UsageError: a block has not so many neurons.
    """
    neurons, alignment = [], []
    for block in range(subject.blocks):
        block_CF = products(subject, block)
        if not 1 <= top <= block_CF.shape[1]:
            raise UsageError(f"--top is {top}; a block has {block_CF.shape[1]:,} neurons.")
        best_CK = largest(block_CF, top)
        neurons.append(best_CK)
        alignment.append(np.take_along_axis(block_CF, best_CK, axis=1))
        if progress is not None:
            progress(block + 1, subject.blocks)
    return TopNeurons(np.stack(neurons), np.stack(alignment), subject.class_names)


def largest(values: np.ndarray, k: int) -> np.ndarray:
    """Indices of the k largest of each row, the largest first, ties to the lower; int32."""
    import torch

    from classlens.kernels.key_topk import key_topk

    return key_topk(torch.from_numpy(values), k).numpy()


def block_distribution(tops: TopNeurons) -> pl.DataFrame:
    """In which block each class has its top neuron over all blocks (the report, figure 3).

    Columns: block, classes (their number), share.
    """
    firsts = tops.over().filter(pl.col("place") == 0)["block"].to_numpy()
    counts_L = np.bincount(firsts, minlength=len(tops.neurons))
    return pl.DataFrame(
        {"block": range(len(counts_L)), "classes": counts_L, "share": counts_L / len(firsts)},
        schema_overrides={"block": pl.Int16},
    )


def shared_neurons(tops: TopNeurons, blocks: Sequence[int] | None = None) -> pl.DataFrame:
    """Neurons that are the top one of several classes: the report's "base classes" (§5).

    Args:
        blocks: a class's top neuron is that over these blocks together; all when None.

    Columns: block, neuron, n_classes (two or more), classes, names, alignments (lists, the largest
    alignment first); ordered by n_classes, the most first, then block and neuron.
    """
    firsts = tops.over(blocks).filter(pl.col("place") == 0)
    in_order = firsts.sort(pl.col("alignment"), "class", descending=[True, False])
    return (
        in_order.group_by("block", "neuron", maintain_order=True)
        .agg(
            pl.len().cast(pl.Int32).alias("n_classes"),
            pl.col("class").alias("classes"),
            pl.col("name").alias("names"),
            pl.col("alignment").alias("alignments"),
        )
        .filter(pl.col("n_classes") > 1)
        .sort("n_classes", "block", "neuron", descending=[True, False, False])
    )
