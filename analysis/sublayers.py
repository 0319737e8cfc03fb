"""How attention and MLP write categories: the change of label logits in a sublayer (paper §4.3).

Functions take the lazy frame of :func:`classlens.analysis.scan.scan` and return small frames. A
sublayer's output is compared with its baseline, from block 1 on. ``corrected``: the input of the
sublayer itself, which is the residual stream of the block before for attention, and ``mid`` of the
same block for the MLP. ``vilas2023``: the residual stream of the block before, for both; the
published numbers of models without CLS also need a store of ``extract --convention vilas2023``.

Logits are stored in float16: a logit that rounds to the same number as its baseline counts as not
risen. Memory: one batch of images is held at a time, and a few numbers of every image.

Shape letters: N images, n images of one batch, B blocks from the second on, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from classlens.analysis import statistics
from classlens.analysis.class_context import SCHEMA as CONTEXT_SCHEMA
from classlens.analysis.class_context import class_context, with_masks
from classlens.analysis.frames import Convention, axis, batches, token_kinds
from classlens.analysis.result import StoreResult, require_streams, scored_images
from classlens.analysis.scan import scan
from classlens.extractor.schema import STREAMS, read_layout

SUBLAYERS = ("attn", "mlp")
GROUPS = ("cls", "patch")

CHANGE_SCHEMA = {
    **dict.fromkeys(("convention", "sublayer", "baseline", "group"), pl.String()),
    "block": pl.Int16(),
    **dict.fromkeys(("change_rate", "low", "high"), pl.Float64()),
    **dict.fromkeys(("n_images", "n_tokens"), pl.Int64()),
}
DIFFERENCE_SCHEMA = {
    **dict.fromkeys(("convention", "stream"), pl.String()),
    "block": pl.Int16(),
    **dict.fromkeys(("delta", "low", "high", "p_value", "q_value"), pl.Float64()),
    **dict.fromkeys(("n_correct", "n_wrong"), pl.Int64()),
}


def baseline_of(sublayer: str, convention: Convention) -> str:
    """The stream a sublayer is compared with: ``resid`` (of the block before) or ``mid``."""
    return "mid" if sublayer == "mlp" and convention == "corrected" else "resid"


def missing_sublayers(streams: Sequence[str], convention: Convention) -> dict[str, str]:
    """The sublayers that cannot be compared in a store of these streams, each with the reason."""
    reasons = {}
    for sublayer in SUBLAYERS:
        baseline = baseline_of(sublayer, convention)
        wanted = [s for s in STREAMS if s in {"resid", *streams, sublayer, baseline}]
        remedy = f"extract a store with `--streams {','.join(wanted)}`."
        if sublayer not in streams:
            reasons[sublayer] = f"The store lacks the stream {sublayer}; {remedy}"
        elif baseline not in streams:
            reasons[sublayer] = (
                f"The {convention} change of {sublayer} is against its own input, the stream "
                f"{baseline}, which the store lacks; {remedy}"
            )
    return reasons


def sublayer_change_rate(
    frame: pl.LazyFrame, *, convention: Convention = "corrected", seed: int = 0
) -> pl.DataFrame:
    """Class-similarity change rate: the share of tokens whose label logit a sublayer raises.

    A token counts when the label's logit is larger in the sublayer's output than in its baseline;
    chance 0.5. Per image the share of its tokens, then the mean over images. Sublayers of which
    the frame lacks a stream (see :func:`missing_sublayers`) have no rows.

    Columns: convention, sublayer ("attn", "mlp"), baseline ("resid" of the block before, or "mid"),
    group ("cls" or "patch"; other prefix tokens are left out), block (from 1), change_rate, low,
    high (95% bootstrap interval over images), n_images, n_tokens.
    """
    tokens = frame.filter(pl.col("kind").cast(pl.String).is_in(GROUPS))
    kinds = token_kinds(tokens)
    results = [pl.DataFrame(schema=CHANGE_SCHEMA)]
    for sublayer in _compared(frame, convention):
        baseline = baseline_of(sublayer, convention)
        shares: dict[str, list[np.ndarray]] = {g: [] for g in GROUPS if g in kinds}
        for output, before, _ in _logits(tokens, sublayer, baseline):
            risen_nBT = output > before
            for group, parts in shares.items():
                parts.append(risen_nBT[..., kinds == group].mean(axis=2))
        for group, parts in shares.items():
            share_NB = np.concatenate(parts)
            low, high = statistics.bootstrap_interval(share_NB, seed=seed)
            columns = {
                "convention": convention,
                "sublayer": sublayer,
                "baseline": baseline,
                "group": group,
                "block": axis(frame, "block")[1:],
                "change_rate": share_NB.mean(0),
                "low": low,
                "high": high,
                "n_images": len(share_NB),
                "n_tokens": len(share_NB) * int((kinds == group).sum()),
            }
            results.append(pl.DataFrame(columns, schema=CHANGE_SCHEMA))
    return pl.concat(results)


def sublayer_context(
    frame: pl.LazyFrame,
    *,
    convention: Convention = "corrected",
    class_fraction: float = 0.5,
    permutations: int = 1000,
    seed: int = 0,
) -> pl.DataFrame:
    """Where a sublayer raises the label's logit more: in class-labelled or in context tokens.

    Of label_logit(sublayer) − label_logit(baseline), the mean over class-labelled image tokens less
    that over the others. Tests, further arguments and columns are those of
    :func:`classlens.analysis.class_context.class_context`; a column ``sublayer`` comes second, and
    blocks count from 1.

    Args:
        frame: images with a segmentation mask.
    """
    patches = frame.filter(pl.col("kind") == "patch")
    results = [pl.DataFrame(schema={**CONTEXT_SCHEMA, "sublayer": pl.String()})]
    for sublayer in _compared(frame, convention):
        logits = _logits(patches, sublayer, baseline_of(sublayer, convention), "mask_fraction")
        of_sublayer = class_context(
            patches.filter(pl.col("stream") == sublayer),
            axis(frame, "block")[1:],
            (
                (output.astype(np.float64) - before, batch["mask_fraction"][:, 0])
                for output, before, batch in logits
            ),
            convention=convention,
            class_fraction=class_fraction,
            permutations=permutations,
            seed=seed,
        )
        results.append(of_sublayer.with_columns(sublayer=pl.lit(sublayer)))
    return pl.concat(results).select("convention", "sublayer", pl.exclude("convention", "sublayer"))


def cls_correct_minus_wrong(
    frame: pl.LazyFrame,
    *,
    convention: Convention = "corrected",
    permutations: int = 1000,
    seed: int = 0,
) -> pl.DataFrame:
    """Identifiability of the CLS token: mean over correctly − over wrongly predicted images.

    For each stream and block, with the test of :func:`statistics.correct_minus_wrong`;
    ``corrected`` adds Benjamini–Hochberg q-values over the blocks of a stream.

    Columns: convention, stream, block, delta, low, high (95% bootstrap interval over images),
    p_value, q_value, n_correct, n_wrong (images). No rows for models without CLS, and where all
    images are correct, or all wrong.
    """
    tokens = frame.filter(pl.col("kind") == "cls")
    results = [pl.DataFrame(schema=DIFFERENCE_SCHEMA)]
    for stream in axis(frame, "stream") if "cls" in token_kinds(frame) else []:
        values, correct = [], []
        of_stream = tokens.filter(pl.col("stream") == stream)
        for batch in batches(of_stream, ["identifiability", "label", "prediction"]):
            values.append(batch["identifiability"][:, :, 0])
            correct.append((batch["label"] == batch["prediction"])[:, 0, 0])
        correct_N = np.concatenate(correct)
        if correct_N.all() or not correct_N.any():
            break
        test = statistics.correct_minus_wrong(
            np.concatenate(values),
            correct_N,
            permutations=permutations,
            convention=convention,
            seed=seed,
        )
        is_corrected = convention == "corrected"
        columns = {
            "convention": convention,
            "stream": stream,
            "block": axis(frame, "block"),
            "delta": test.delta,
            "low": test.low,
            "high": test.high,
            "p_value": test.p_values,
            "q_value": statistics.benjamini_hochberg(test.p_values) if is_corrected else None,
            "n_correct": int(correct_N.sum()),
            "n_wrong": int((~correct_N).sum()),
        }
        results.append(pl.DataFrame(columns, schema=DIFFERENCE_SCHEMA))
    return pl.concat(results)


@dataclass(frozen=True)
class SublayersResult(StoreResult):
    """How the sublayers of one store change label logits.

    change_rate, context, correct_minus_wrong: frames of ``sublayer_change_rate``,
    ``sublayer_context`` (empty without masks) and ``cls_correct_minus_wrong``. missing: sublayers
    without rows in the first two, each with the reason.
    """

    permutations: int
    missing: dict[str, str]
    change_rate: pl.DataFrame
    context: pl.DataFrame
    correct_minus_wrong: pl.DataFrame


def analyze_sublayers(
    store: str | Path,
    *,
    convention: Convention = "corrected",
    permutations: int = 1000,
    class_fraction: float = 0.5,
    seed: int = 0,
) -> SublayersResult:
    """What attention and MLP do to label logits, on the committed units of a store.

    Args:
        permutations: of the ``corrected`` tests.

    Raises:
        StoreError: there is no store.
        UsageError: nothing is scored yet, or there is no residual stream.
    """
    store = Path(store)
    scored, n_bad = scored_images(store)
    layout = read_layout(store)
    require_streams(store, layout, ["resid"], "sublayers are compared with the residual stream")
    frame = scan(store)
    return SublayersResult(
        store=store,
        convention=convention,
        seed=seed,
        permutations=statistics.permutations_of(convention, permutations),
        n_images=scored.height,
        n_bad=n_bad,
        missing=missing_sublayers(layout.streams, convention),
        change_rate=sublayer_change_rate(frame, convention=convention, seed=seed),
        context=sublayer_context(
            with_masks(store),
            convention=convention,
            class_fraction=class_fraction,
            permutations=permutations,
            seed=seed,
        ),
        correct_minus_wrong=cls_correct_minus_wrong(
            frame, convention=convention, permutations=permutations, seed=seed
        ),
    )


def _compared(frame: pl.LazyFrame, convention: Convention) -> list[str]:
    missing = missing_sublayers(axis(frame, "stream"), convention)
    return [sublayer for sublayer in SUBLAYERS if sublayer not in missing]


def _logits(
    tokens: pl.LazyFrame, sublayer: str, baseline: str, *columns: str
) -> Iterator[tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]]:
    """Label logits of a sublayer and of its baseline from block 1 on, [n, B, T], and the sublayer's
    other columns in all blocks; a batch of images at a time."""
    outputs = batches(tokens.filter(pl.col("stream") == sublayer), ["label_logit", *columns])
    inputs = batches(tokens.filter(pl.col("stream") == baseline), ["label_logit"])
    blocks = slice(1, None) if baseline == "mid" else slice(None, -1)
    for output, before in zip(outputs, inputs, strict=True):
        yield output["label_logit"][:, 1:], before["label_logit"][:, blocks], output
