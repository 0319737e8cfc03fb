"""Words for neurons: what each is called by its weights, by its exemplars and by CLIP (§7).

Three words for a neuron j of block b, none of which knows the others:

- *promoted*: the class of the largest alignment E_c · v_j, what its value vector writes;
- *exemplar*: the label that most of its exemplars have, what its key looks for;
- *clip*: the text that an image tower finds in its masked exemplars, see
  `classlens.analysis.neurons.clip`.

Shape letters: C classes, E exemplars of a neuron, F neurons of a block.
"""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
from scipy import stats

from classlens.analysis.neurons.alignment import TOP, largest
from classlens.analysis.values import products

if TYPE_CHECKING:
    from collections.abc import Sequence

    from classlens.extractor.models import Subject

WORDS = ("promoted", "exemplar", "clip")
ABSENT = -1
"""Stands where a neuron has fewer exemplars."""
KEYS = {"block": pl.Int16, "neuron": pl.Int32}


def promoted_words(subject: Subject, block: int, top: int = TOP) -> pl.DataFrame:
    """The classes that each value vector of a block promotes most.

    Columns: block, neuron, promoted (list of the ``top`` classes, the largest alignment first, ties
    to the lower class), alignments and promoted_words (lists of them), promoted_class (the first),
    promoted_word (its name).

    Raises:
        UsageError: there is no such block.
    """
    products_FC = np.ascontiguousarray(products(subject, block).T)
    neurons, classes = products_FC.shape
    promoted = largest(products_FC, min(top, classes))
    frame = {
        "block": [block] * neurons,
        "neuron": range(neurons),
        "promoted": promoted.tolist(),
        "alignments": np.take_along_axis(products_FC, promoted, axis=1).tolist(),
        "promoted_words": [[subject.class_names[c] for c in of_neuron] for of_neuron in promoted],
        "promoted_class": promoted[:, 0],
        "promoted_word": [subject.class_names[c] for c in promoted[:, 0]],
    }
    return pl.DataFrame(frame, schema_overrides={**KEYS, "promoted": pl.List(pl.Int32)})


def exemplar_words(
    block: int, labels_FE: np.ndarray, frequency_C: np.ndarray, names: Sequence[str]
) -> pl.DataFrame:
    """The label that most exemplars of each neuron have, and whether chance would give as many.

    Args:
        labels_FE: labels of the exemplars, `ABSENT` where a neuron has fewer.
        frequency_C: how many images of the data have each label, the exemplars among them.

    Columns: block, neuron, n_exemplars, exemplar_class (ties to the lower class; null without
    exemplars), exemplar_word, exemplar_share (of the exemplars), exemplar_p (that so many images
    or more, drawn without replacement from the data, have the label: the hypergeometric tail,
    times the number of labels that occur, at most 1).
    """
    there_FE = labels_FE != ABSENT
    n_F = there_FE.sum(1)
    alike_FE = (labels_FE[:, :, None] == labels_FE[:, None, :]).sum(2) * there_FE
    most_F = alike_FE.max(1)
    beyond = len(frequency_C)
    label_F = np.where(alike_FE == np.maximum(most_F, 1)[:, None], labels_FE, beyond).min(1)
    known_F = label_F < beyond
    label_F = np.where(known_F, label_F, 0)
    tail_F = stats.hypergeom.sf(most_F - 1, frequency_C.sum(), frequency_C[label_F], n_F)
    p_F = np.minimum(1.0, tail_F * np.count_nonzero(frequency_C))
    frame = pl.DataFrame(
        {
            "block": [block] * len(labels_FE),
            "neuron": range(len(labels_FE)),
            "n_exemplars": n_F.astype(np.int32),
            "exemplar_class": label_F.astype(np.int32),
            "exemplar_word": [names[c] for c in label_F],
            "exemplar_share": most_F / np.maximum(n_F, 1),
            "exemplar_p": p_F,
        },
        schema_overrides=KEYS,
    )
    of_exemplars = pl.col("^exemplar_.*$")
    return frame.with_columns(pl.when(pl.Series(known_F)).then(of_exemplars))


def clip_words(
    block: int,
    texts_F: np.ndarray,
    scores_F: np.ndarray,
    texts: Sequence[str],
    names: Sequence[str],
) -> pl.DataFrame:
    """The text that fits each neuron's masked exemplars best.

    Args:
        texts_F, scores_F: of `clip.best_texts`; −1 and NaN for a neuron
            without exemplars.
        texts: of the class file. names: of the model's classes.

    Columns: block, neuron, clip_word (the text), clip_class (the model's class of the same name,
    case ignored, the lower of several; null where none is called so), clip_score.
    """
    if tuple(texts) == tuple(names):
        class_of_text = list(range(len(names)))
    else:
        lower_first = {name.casefold(): c for c, name in reversed(list(enumerate(names)))}
        class_of_text = [lower_first.get(text.casefold()) for text in texts]
    known = [None if text < 0 else int(text) for text in texts_F]
    frame = {
        "block": [block] * len(texts_F),
        "neuron": range(len(texts_F)),
        "clip_word": [None if text is None else texts[text] for text in known],
        "clip_class": [None if text is None else class_of_text[text] for text in known],
        "clip_score": scores_F,
    }
    types = {**KEYS, "clip_word": pl.String, "clip_class": pl.Int32}
    frame = pl.DataFrame(frame, schema_overrides=types)
    return frame.with_columns(pl.col("clip_score").fill_nan(None))


def join_words(*frames: pl.DataFrame) -> pl.DataFrame:
    """Words of the same neurons side by side, and ``agreeing``: how many pairs of words agree.

    Two words agree when they are the same class of the model.
    """
    joined = frames[0]
    for frame in frames[1:]:
        joined = joined.join(frame, on=list(KEYS), how="left", maintain_order="left")
    pairs = [
        (pl.col(f"{x}_class") == pl.col(f"{y}_class")).fill_null(False) for x, y in pairs_of(joined)
    ]
    return joined.with_columns(pl.sum_horizontal(pl.lit(0), *pairs).cast(pl.Int8).alias("agreeing"))


def pairs_of(words: pl.DataFrame) -> list[tuple[str, str]]:
    """The pairs of the kinds of words that a frame holds."""
    return list(combinations([w for w in WORDS if f"{w}_class" in words.columns], 2))


def agreement(words: pl.DataFrame) -> pl.DataFrame:
    """How often two kinds of words agree, by block and over all blocks (block null, last).

    Args:
        words: of `join_words`, of any blocks.

    Columns: block, first, second (kinds of words), n_neurons (that have both), agreement (share
    of them; NaN of none), low, high (95% Wilson interval), chance (the agreement if the two were
    independent: Σ_c of the shares of neurons that either calls c).
    """
    rows = []
    for block in [*words["block"].unique().sort(), None]:
        of_block = words if block is None else words.filter(pl.col("block") == block)
        for first, second in pairs_of(words):
            both = of_block.select(f"{first}_class", f"{second}_class").drop_nulls().to_numpy()
            rows.append((block, first, second, len(both), *_agreement(both)))
    columns = {
        "block": pl.Int16,
        "first": pl.String,
        "second": pl.String,
        "n_neurons": pl.Int32,
        **dict.fromkeys(("agreement", "low", "high", "chance"), pl.Float64),
    }
    return pl.DataFrame(rows, columns, orient="row")


def _agreement(both_N2: np.ndarray) -> tuple[float, float, float, float]:
    """Agreement, its interval and its chance level."""
    if not len(both_N2):
        nan = float("nan")
        return nan, nan, nan, nan
    first_N, second_N = both_N2.T
    agreeing = int((first_N == second_N).sum())
    interval = stats.binomtest(agreeing, len(both_N2)).proportion_ci(method="wilson")
    classes = int(both_N2.max()) + 1
    by_class = np.bincount(first_N, minlength=classes) @ np.bincount(second_N, minlength=classes)
    share, chance = agreeing / len(both_N2), by_class / len(both_N2) ** 2
    return share, float(interval.low), float(interval.high), float(chance)
