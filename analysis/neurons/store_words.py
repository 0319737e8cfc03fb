"""The words of a store's neurons, from its exemplars and its model's weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from classlens.analysis.neurons.exemplars import (
    EXEMPLAR_QUANTILE,
    exemplar_codes,
    masks,
    thresholds,
)
from classlens.analysis.neurons.subject import subject_of_store
from classlens.analysis.neurons.words import (
    ABSENT,
    clip_words,
    exemplar_words,
    join_words,
    promoted_words,
)
from classlens.analysis.scan import scan_images
from classlens.extractor.errors import UsageError

if TYPE_CHECKING:
    from classlens.analysis.neurons.clip import Tower

    Progress = Callable[[int, int], None]


def words_of_store(
    store: Path,
    blocks: Sequence[int] | None = None,
    *,
    tower: Tower | None = None,
    progress: Progress | None = None,
) -> pl.DataFrame:
    """The words of every neuron of some blocks, a row a neuron, ordered by block and neuron.

    Columns: those of `promoted_words`, `exemplar_words`, with a tower those of `clip_words`, whose
    scores are then relative to the mean over all neurons of these blocks; and ``agreeing``, see
    `join_words`.

    Args:
        store: with exemplars. blocks: all when None.
        progress: called with (exemplars done, exemplars) of the tower, or (blocks done, blocks).

    Raises:
        StoreError: there is no store, or it is damaged.
        UsageError: it has no exemplars, or no such block.
        ConfigMismatchError, ModelError: its model is gone or another one.
        ShardError: with a tower, its shards are gone or have changed.
    """
    subject = subject_of_store(store)
    wanted = range(subject.blocks) if blocks is None else sorted(set(blocks))
    label_of, frequency_C = _labels(store, len(subject.class_names))
    frames = []
    for done, block in enumerate(wanted):
        _, images_FX, _ = exemplar_codes(store, block)
        labels_FX = np.where(images_FX >= 0, label_of[images_FX], ABSENT)
        of_exemplars = exemplar_words(block, labels_FX, frequency_C, subject.class_names)
        frames.append([promoted_words(subject, block), of_exemplars])
        if progress is not None and tower is None:
            progress(done + 1, len(wanted))
    if tower is not None:
        found = _clip_words(store, wanted, tower, subject.class_names, progress)
        frames = [[*words, of_clip] for words, of_clip in zip(frames, found, strict=True)]
    return pl.concat([join_words(*words) for words in frames])


def _labels(store: Path, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """The label of each place on the image axis (−1 where none), and how many images have each."""
    rows = scan_images(store).filter(pl.col("status") == "ok").select("image", "label").collect()
    if rows.is_empty():
        raise UsageError(f"{store} has no scored image yet; run `classlens extract` to its end.")
    labels = rows["label"].to_numpy()
    label_of = np.full(int(rows["image"].max()) + 1, ABSENT)  # pyright: ignore
    label_of[rows["image"].to_numpy()] = labels
    return label_of, np.bincount(labels, minlength=classes)


def _clip_words(
    store: Path,
    blocks: Sequence[int],
    tower: Tower,
    names: Sequence[str],
    progress: Progress | None,
) -> list[pl.DataFrame]:
    """The frame of each block."""
    from classlens.analysis.neurons.clip import best_texts, exemplar_embeddings
    from classlens.extractor.prepare import prepare_again

    threshold_LF, _ = thresholds(store, EXEMPLAR_QUANTILE)
    images, inside = [], []
    for block in blocks:
        _, images_FX, codes_FXG = exemplar_codes(store, block)
        images.append(images_FX)
        inside.append(masks(codes_FXG, threshold_LF[block]))
    prepared = prepare_again(store, device="cpu")
    embeddings = exemplar_embeddings(
        tower, prepared, np.concatenate(images), np.concatenate(inside), progress
    )
    texts_N, scores_N = best_texts(embeddings, tower.texts)
    per_block = zip(np.split(texts_N, len(blocks)), np.split(scores_N, len(blocks)), strict=True)
    return [
        clip_words(block, texts_F, scores_F, tower.names, names)
        for block, (texts_F, scores_F) in zip(blocks, per_block, strict=True)
    ]
