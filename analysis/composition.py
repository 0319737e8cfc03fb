"""What the residual stream is made of: whose top class a token carries on (paper §4.3).

A token's top class after a block may be the top class of the residual stream before the block
(``prev``), of what attention adds (``attn``), of what the MLP adds (``mlp``), or of none of them:
then the block composed it (``comp``). Several may hold at once.

Shape letters: N images, n images of one batch, B blocks from the second on, T tokens, S the eight
sets of sources {prev, attn, mlp} that a token's class may be equal to, P parts reported.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from classlens.analysis import statistics
from classlens.analysis.frames import Convention, axis, batches, token_kinds
from classlens.analysis.result import StoreResult, require_streams, scored_images
from classlens.analysis.scan import scan
from classlens.extractor.errors import UsageError
from classlens.extractor.schema import read_layout

SOURCES = ("prev", "attn", "mlp")
SETS = range(2 ** len(SOURCES))
"""A set of sources is a number: bit i says whether ``SOURCES[i]`` is in it."""
EXCLUSIVE = {"prev": [1], "attn": [2], "mlp": [4], "several": [3, 5, 6, 7], "comp": [0]}
GROUPS = ("all", "cls", "patch")

SCHEMA = {
    **dict.fromkeys(("convention", "split", "group"), pl.String()),
    "block": pl.Int16(),
    "source": pl.String(),
    **dict.fromkeys(("percent", "low", "high"), pl.Float64()),
    **dict.fromkeys(("n_images", "n_tokens"), pl.Int64()),
}


def composition(
    frame: pl.LazyFrame, *, convention: Convention = "corrected", seed: int = 0
) -> pl.DataFrame:
    """Residual composition: % of tokens whose top class is that of each source, b ≥ 1.

    Two splits. ``overlapping``: ``prev``, ``attn``, ``mlp`` count every token whose class is equal
    to theirs, so they may sum to more than 100; ``comp`` counts the tokens equal to none of them.
    In ``vilas2023`` comp looks at prev and attn only, as the published code does, so that tokens
    of the MLP alone are in ``mlp`` and in ``comp``. ``exclusive`` (``corrected`` only): every token
    once, in ``prev``, ``attn`` or ``mlp`` where its class is equal to that source alone, in
    ``several`` where it is equal to two or three of them (no source takes precedence), in ``comp``
    where to none; sums to 100.

    Args:
        frame: with streams resid, attn and mlp, and column top1.

    Columns: convention, split, group ("all": every token, registers too; "cls"; "patch"), block
    (from 1), source, percent, low, high (95% bootstrap interval over images), n_images, n_tokens.
    """
    kinds = token_kinds(frame)
    of_group = {"all": np.full(len(kinds), True), "cls": kinds == "cls", "patch": kinds == "patch"}
    shares: dict[str, list[np.ndarray]] = {g: [] for g in GROUPS if of_group[g].any()}
    streams = (
        batches(frame.filter(pl.col("stream") == stream), ["top1"])
        for stream in ("resid", "attn", "mlp")
    )
    for resid, attn, mlp in zip(*streams, strict=True):
        after_nBT = resid["top1"][:, 1:]
        sources = (resid["top1"][:, :-1], attn["top1"][:, 1:], mlp["top1"][:, 1:])
        set_nBT = sum((after_nBT == top1) << bit for bit, top1 in enumerate(sources))
        is_set_nBTS = np.asarray(set_nBT)[..., None] == np.array(SETS)
        for group, parts in shares.items():
            parts.append(is_set_nBTS[:, :, of_group[group]].mean(axis=2))
    blocks = axis(frame, "block")[1:]
    results = [pl.DataFrame(schema=SCHEMA)]
    for group, parts in shares.items():
        share_NBS = np.concatenate(parts)
        for split, sets_of in _splits(convention).items():
            percent_BP, low_BP, high_BP = _percentages(share_NBS, list(sets_of.values()), seed)
            columns = {
                "convention": convention,
                "split": split,
                "group": group,
                "block": np.repeat(np.array(blocks, dtype=np.int16), len(sets_of)),
                "source": list(sets_of) * len(blocks),
                "percent": percent_BP.ravel(),
                "low": low_BP.ravel(),
                "high": high_BP.ravel(),
                "n_images": len(share_NBS),
                "n_tokens": len(share_NBS) * int(of_group[group].sum()),
            }
            results.append(pl.DataFrame(columns, schema=SCHEMA))
    return pl.concat(results)


def _splits(convention: Convention) -> dict[str, dict[str, list[int]]]:
    """Of each split, the parts and the sets of sources that count in them."""
    overlapping = {source: [s for s in SETS if s >> bit & 1] for bit, source in enumerate(SOURCES)}
    if convention == "vilas2023":
        # Their condition names attention twice and the MLP never.
        return {"overlapping": overlapping | {"comp": [0, 4]}}
    return {"overlapping": overlapping | {"comp": [0]}, "exclusive": EXCLUSIVE}


def _percentages(
    share_NBS: np.ndarray, sets_of: list[list[int]], seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """% of tokens in the sets of each part, and its 95% bootstrap interval, three [B, P]."""
    images, blocks, _ = share_NBS.shape
    counts_SP = np.array([[s in sets for sets in sets_of] for s in SETS], dtype=np.float64)

    def percent(means: np.ndarray) -> np.ndarray:
        return 100 * means.reshape(len(means), blocks, len(SETS)) @ counts_SP

    share_NK = share_NBS.reshape(images, blocks * len(SETS))
    low_BP, high_BP = statistics.bootstrap_interval(share_NK, percent, seed=seed)
    return percent(share_NK.mean(0)[None])[0], low_BP, high_BP


@dataclass(frozen=True)
class CompositionResult(StoreResult):
    """Residual composition of one store: the frame of :func:`composition`."""

    composition: pl.DataFrame


def analyze_composition(
    store: str | Path, *, convention: Convention = "corrected", seed: int = 0
) -> CompositionResult:
    """Residual composition on the committed units of a store.

    Raises:
        StoreError: there is no store.
        UsageError: nothing is scored yet, or the store lacks a stream or the top class.
    """
    store = Path(store)
    scored, n_bad = scored_images(store)
    layout = read_layout(store)
    reason = "residual composition compares the top classes of resid, attn and mlp"
    require_streams(store, layout, ["resid", "attn", "mlp"], reason)
    if not layout.topk:
        raise UsageError(
            f"{store} holds no top classes, and {reason}; extract a store with `--topk 1`."
        )
    return CompositionResult(
        store=store,
        convention=convention,
        seed=seed,
        n_images=scored.height,
        n_bad=n_bad,
        composition=composition(scan(store), convention=convention, seed=seed),
    )
