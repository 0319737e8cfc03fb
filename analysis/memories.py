"""How attention and MLP write categories: the memories that tokens activate (paper §4.3).

Functions take a frame of :func:`per_image` and return small frames. Blocks are 0-based. The
conventions are two definitions of agreement: ``corrected`` that of the paper's text (some of a
token's top value vectors has the class among its own top classes), ``vilas2023`` that of its
published code (some of a token's top value vectors is among the top ones of the class). The random
class is drawn once an image and is never its label; their code draws one a class and block.

Memory: a few numbers of every image, block and sublayer.

Shape letters: N images, B blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from classlens.analysis import statistics
from classlens.analysis.frames import Convention
from classlens.analysis.result import StoreResult, scored_images
from classlens.analysis.scan import scan_memories
from classlens.extractor.schema import MEMORY_FLAGS, SUBLAYERS, read_layout

FLAGS: dict[Convention, str] = {"corrected": "agreement_text", "vilas2023": "agreement"}
GROUPS = ("all", "cls", "patch")
AGREEMENT_COLUMNS = ("agreement", "control", "difference")


def per_image(frame: pl.LazyFrame) -> pl.DataFrame:
    """How many tokens of each image have each flag.

    Args:
        frame: of :func:`classlens.analysis.scan.scan_memories`.

    Columns: image, label, prediction, block, sublayer; tokens_all, tokens_cls, tokens_patch; for
    each flag and group ``{flag}_{group}``; and ``{flag}_first``, that of token 0, which the paper's
    code takes for the CLS token of every model. Ordered by sublayer, image, block.
    """
    kind = pl.col("kind").cast(pl.String)
    groups = {
        "all": pl.lit(True),
        "cls": kind == "cls",
        "patch": kind == "patch",
        "first": pl.col("token") == 0,
    }
    sums = {f"tokens_{name}": member.sum() for name, member in groups.items() if name in GROUPS}
    sums["tokens_all"] = pl.len()
    for flag in MEMORY_FLAGS:
        for name, member in groups.items():
            sums[f"{flag}_{name}"] = (pl.col(flag) & member).sum()
    cell = ("image", "label", "prediction", "block", "sublayer")
    return (
        frame.group_by(cell)
        .agg(**sums)
        .collect(engine="streaming")
        .sort(pl.col("sublayer").to_physical(), "image", "block")
    )


def agreement(
    images: pl.DataFrame, *, convention: Convention = "corrected", seed: int = 0
) -> pl.DataFrame:
    """Key-value agreement rate of each sublayer and block, in %, with its random-class control.

    For each class the share of tokens, over its images and all their tokens, that activate a value
    vector of the class; then the mean over classes. 95% bootstrap intervals are over images.

    Columns: convention, sublayer, block; agreement, control (the same for another class) and
    difference (agreement − control), each with ``_low`` and ``_high``; n_images, n_classes,
    n_tokens (of one image).
    """
    flag = FLAGS[convention]
    rows = []
    for sublayer, part, blocks in _sublayers(images):
        tokens = part["tokens_all"].item(0)
        share_NB = _by_block(part, f"{flag}_all", blocks) * 100 / tokens
        control_NB = _by_block(part, f"{flag}_control_all", blocks) * 100 / tokens
        label_N = part["label"].to_numpy()[:: len(blocks)]
        values = np.column_stack([share_NB, control_NB, share_NB - control_NB])
        ends = statistics.class_averages(values, label_N, seed=seed)
        mean, low, high = (end.reshape(len(AGREEMENT_COLUMNS), -1) for end in ends)
        columns = {}
        for i, name in enumerate(AGREEMENT_COLUMNS):
            columns |= {name: mean[i], f"{name}_low": low[i], f"{name}_high": high[i]}
        counts = {
            "n_images": len(label_N),
            "n_classes": len(np.unique(label_N)),
            "n_tokens": tokens,
        }
        rows.append(_frame(sublayer, blocks, columns, counts))
    return pl.concat(rows).select(pl.lit(convention).alias("convention"), pl.all())


def composition(images: pl.DataFrame, *, seed: int = 0) -> pl.DataFrame:
    """Memory compositionality: tokens whose sublayer's top class is that of a single memory, in %.

    The share of tokens for which the top class of the sublayer's output is the top class of one of
    their top value vectors, over the tokens of all images; what is missing to 100 is composed. 95%
    bootstrap intervals are over images. The same in both conventions.

    Columns: sublayer, block, group ("all" tokens, "cls", "patch"), composed, low, high, n_images,
    n_tokens (of one image).
    """
    rows = []
    for sublayer, part, blocks in _sublayers(images):
        for group in GROUPS:
            tokens = part[f"tokens_{group}"].item(0)
            if not tokens:
                continue
            share_NB = _by_block(part, f"composed_{group}", blocks) * 100 / tokens
            low, high = statistics.bootstrap_interval(share_NB, seed=seed)
            columns = {"composed": share_NB.mean(0), "low": low, "high": high}
            counts = {"n_images": len(share_NB), "n_tokens": tokens}
            frame = _frame(sublayer, blocks, columns, counts)
            frame.insert_column(2, pl.lit(group).alias("group"))
            rows.append(frame)
    return pl.concat(rows)


def correct_minus_wrong(
    images: pl.DataFrame,
    *,
    convention: Convention = "corrected",
    permutations: int = 1000,
    seed: int = 0,
) -> pl.DataFrame:
    """Agreement rate of the CLS tokens of correctly predicted images − of wrongly predicted ones.

    In percentage points. Permutation test over images, one-sided; see
    :func:`classlens.analysis.statistics.correct_minus_wrong`. ``corrected``: with
    Benjamini–Hochberg q-values over the blocks; empty for a model without CLS. ``vilas2023``: token
    0 stands for CLS, which in a model without CLS is a patch; no q-values. Empty where all
    predictions are right, or all wrong.

    Columns: convention, sublayer, block, delta, low, high (95% bootstrap interval over images),
    p_value, q_value, n_correct, n_wrong.
    """
    column = "first" if convention == "vilas2023" else "cls"
    rows = []
    for sublayer, part, blocks in _sublayers(images):
        one_block = part.filter(pl.col("block") == blocks[0])
        correct_N = (one_block["prediction"] == one_block["label"]).to_numpy()
        no_cls = column == "cls" and not part["tokens_cls"].item(0)
        if no_cls or correct_N.all() or not correct_N.any():
            continue
        counted_NB = 100 * _by_block(part, f"{FLAGS[convention]}_{column}", blocks)
        found = statistics.correct_minus_wrong(
            counted_NB, correct_N, permutations=permutations, convention=convention, seed=seed
        )
        q_values = [None] * len(blocks)
        if convention == "corrected":
            q_values = statistics.benjamini_hochberg(found.p_values)
        columns = {
            "delta": found.delta,
            "low": found.low,
            "high": found.high,
            "p_value": found.p_values,
            "q_value": pl.Series(q_values, dtype=pl.Float64),
        }
        n_correct = int(correct_N.sum())
        counts = {"n_correct": n_correct, "n_wrong": len(correct_N) - n_correct}
        rows.append(_frame(sublayer, blocks, columns, counts))
    if not rows:
        return pl.DataFrame()
    return pl.concat(rows).select(pl.lit(convention).alias("convention"), pl.all())


@dataclass(frozen=True)
class MemoriesResult(StoreResult):
    """All analyses of a store's memories: frames of the functions of these names."""

    permutations: int
    classes: int
    agreement: pl.DataFrame
    composition: pl.DataFrame
    correct_minus_wrong: pl.DataFrame


def analyze_memories(
    store: str | Path,
    *,
    convention: Convention = "corrected",
    permutations: int = 1000,
    seed: int = 0,
) -> MemoriesResult:
    """All analyses of the memories in the committed units of a store.

    Raises:
        StoreError: there is no store.
        UsageError: it was extracted without ``--reduce memories``, or nothing is scored yet.
    """
    store = Path(store)
    frame = scan_memories(store)
    scored, n_bad = scored_images(store)
    images = per_image(frame)
    return MemoriesResult(
        store=store,
        convention=convention,
        seed=seed,
        n_images=scored.height,
        n_bad=n_bad,
        permutations=statistics.permutations_of(convention, permutations),
        classes=read_layout(store).classes,
        agreement=agreement(images, convention=convention, seed=seed),
        composition=composition(images, seed=seed),
        correct_minus_wrong=correct_minus_wrong(
            images, convention=convention, permutations=permutations, seed=seed
        ),
    )


def _sublayers(images: pl.DataFrame) -> Iterator[tuple[str, pl.DataFrame, list[int]]]:
    """Each sublayer with its rows, by image and block, and the blocks."""
    for sublayer in SUBLAYERS:
        part = images.filter(pl.col("sublayer") == sublayer)
        yield sublayer, part, part["block"].unique().sort().to_list()


def _by_block(part: pl.DataFrame, column: str, blocks: list[int]) -> np.ndarray:
    """A column of one sublayer as [N, B]."""
    return part[column].to_numpy().reshape(-1, len(blocks)).astype(np.float64)


def _frame(sublayer: str, blocks: list[int], columns: dict, counts: dict[str, int]) -> pl.DataFrame:
    """One row a block."""
    return pl.DataFrame(
        {
            "sublayer": [sublayer] * len(blocks),
            "block": pl.Series(blocks, dtype=pl.Int16),
            **columns,
            **{name: pl.Series([n] * len(blocks), dtype=pl.Int64) for name, n in counts.items()},
        }
    )
