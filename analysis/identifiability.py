"""Class identifiability over a scanned store (paper §4.1–4.2).

Functions take the lazy frame of :func:`classlens.analysis.scan` and return small frames. Blocks are
0-based. ``convention`` is ``corrected`` (what the paper means) or ``vilas2023`` (what its published
code computes) and stands in a column of every result that depends on it.

Memory: one batch of images is held at a time, and a few numbers of every image.

Shape letters: N images, n images of one batch, B blocks, G image tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from classlens.analysis import statistics
from classlens.analysis.class_context import class_context, with_masks
from classlens.analysis.evolution import evolution
from classlens.analysis.frames import Convention, axis, batches
from classlens.analysis.pairing import PAIRED_AXES, paired_images
from classlens.analysis.result import StoreResult, require_streams, scored_images
from classlens.analysis.scan import scan, scan_images
from classlens.extractor.errors import UsageError
from classlens.extractor.schema import read_layout


def rate(
    frame: pl.LazyFrame, *, convention: Convention = "corrected", seed: int = 0
) -> pl.DataFrame:
    """Class identifiability rate (paper §4.1), one row; percentages with 95% bootstrap intervals.

    ``rate``: per image the share of image tokens with rank 0 in the last block's residual stream,
    mean over images, in %. ``images``: share of images with at least one such token, in %.
    ``vilas2023`` leaves out token 0 even where it is a patch (models without CLS).

    Columns: convention, rate, rate_low, rate_high, images, images_low, images_high, n_images,
    n_tokens (image tokens counted in each image; the most, where tokens were removed). An image
    without any is left out.
    """
    tokens = _image_tokens(frame, convention).filter(
        pl.col("block") == axis(frame, "block")[-1], pl.col("rank").is_not_null()
    )
    per_image = (
        tokens.group_by("image")
        .agg(share=(pl.col("rank") == 0).mean(), tokens=pl.len())
        .sort("image")
        .collect(engine="streaming")
    )
    share = per_image["share"].to_numpy()
    values = 100 * np.column_stack([share, share > 0])
    low, high = statistics.bootstrap_interval(values, seed=seed)
    mean = values.mean(0)
    return pl.DataFrame(
        {
            "convention": [convention],
            "rate": mean[0],
            "rate_low": low[0],
            "rate_high": high[0],
            "images": mean[1],
            "images_low": low[1],
            "images_high": high[1],
            "n_images": per_image.height,
            "n_tokens": per_image["tokens"].max(),
        }
    )


def accuracy(images: pl.LazyFrame, *, seed: int = 0) -> pl.DataFrame:
    """Top-1 accuracy of the model's own predictions over scored images, in %, one row.

    Args:
        images: the frame of :func:`classlens.analysis.scan.scan_images`.

    Columns: accuracy, accuracy_low, accuracy_high (95% bootstrap interval), n_images.
    """
    right = (
        images.filter(pl.col("status") == "ok")
        .sort("image")
        .select(pl.col("prediction") == pl.col("label"))
        .collect()
        .to_series()
        .to_numpy()
    )
    low, high = statistics.bootstrap_interval(100.0 * right[:, None], seed=seed)
    return pl.DataFrame(
        {
            "accuracy": [100.0 * right.mean()],
            "accuracy_low": low,
            "accuracy_high": high,
            "n_images": len(right),
        }
    )


def change_rate(
    frame: pl.LazyFrame, *, convention: Convention = "corrected", seed: int = 0
) -> pl.DataFrame:
    """Block change rate (paper §4.2): how many image tokens move towards their class in a block.

    The share of image tokens whose label logit in the residual stream is larger after block b than
    after block b−1, b ≥ 1; chance 0.5. Stores keep float16 logits: two that round to the same
    number count as not risen. ``vilas2023`` leaves out token 0 even where it is a patch.

    Columns: convention, block, change_rate, low, high (95% bootstrap interval), n_images, n_tokens.
    """
    blocks = axis(frame, "block")
    tokens = 0
    shares = []
    for batch in batches(_image_tokens(frame, convention), ["label_logit"]):
        risen = np.diff(batch["label_logit"], axis=1) > 0
        shares.append(risen.mean(axis=2))
        tokens += risen.shape[0] * risen.shape[2]
    share_NB = np.concatenate(shares)
    low, high = statistics.bootstrap_interval(share_NB, seed=seed)
    return pl.DataFrame(
        {
            "convention": convention,
            "block": pl.Series(blocks[1:], dtype=pl.Int16),
            "change_rate": share_NB.mean(0),
            "low": low,
            "high": high,
            "n_images": len(share_NB),
            "n_tokens": tokens,
        }
    )


def context(
    frame: pl.LazyFrame,
    *,
    convention: Convention = "corrected",
    class_fraction: float = 0.5,
    permutations: int = 1000,
    seed: int = 0,
) -> pl.DataFrame:
    """Class-labelled against context tokens, per block of the residual stream (paper §4.2).

    The mean identifiability of class-labelled image tokens less that of the others; tests, further
    arguments and columns are those of :func:`classlens.analysis.class_context.class_context`.

    Args:
        frame: images with a segmentation mask.
    """
    patches = _image_tokens(frame, "corrected")
    return class_context(
        patches,
        axis(frame, "block"),
        (
            (batch["identifiability"], batch["mask_fraction"][:, 0])
            for batch in batches(patches, ["identifiability", "mask_fraction"])
        ),
        convention=convention,
        class_fraction=class_fraction,
        permutations=permutations,
        seed=seed,
    )


@dataclass(frozen=True)
class IdentifiabilityResult(StoreResult):
    """All analyses of paper §4.1–4.2 on one store.

    rate, accuracy, evolution, change_rate, context: frames of the functions of these names, the
    first four with a column ``source`` ("model" or "control") in front; context is the model's and
    empty without masks.
    """

    control: Path | None
    permutations: int
    classes: int
    rate: pl.DataFrame
    accuracy: pl.DataFrame
    evolution: pl.DataFrame
    change_rate: pl.DataFrame
    context: pl.DataFrame


def analyze_identifiability(
    store: str | Path,
    control: str | Path | None = None,
    *,
    convention: Convention = "corrected",
    permutations: int = 1000,
    class_fraction: float = 0.5,
    bin_pairs_to: int | None = None,
    seed: int = 0,
) -> IdentifiabilityResult:
    """All analyses of paper §4.1–4.2 on the committed units of a store.

    Args:
        control: a store of the same images and architecture with random weights.
        permutations: of the ``corrected`` class-against-context test.

    Raises:
        StoreError: a path is no store.
        UsageError: nothing is scored yet, there is no residual stream, tokens were removed, or the
            control has other images, blocks or tokens.
    """
    store = Path(store)
    scored, n_bad = scored_images(store)
    layout = read_layout(store)
    require_streams(store, layout, ["resid"], "identifiability is read in the residual stream")
    if layout.tokens_removed:
        raise UsageError(
            f"{store} holds other tokens of each image, because --intervene removed the rest; "
            "compare it with a store of the whole by `classlens analyze interventions`."
        )
    sources = {"model": store}
    if control is not None:
        control = Path(control)
        remedy = (
            f"extract {control} from the same shards with the same model and options and "
            "`--weights random`."
        )
        axes = (*PAIRED_AXES, "streams", "tokens_removed")
        paired_images(store, control, remedy=remedy, axes=axes)
        sources["control"] = control
    frames = {name: scan(path) for name, path in sources.items()}

    def stacked(results: dict[str, pl.DataFrame]) -> pl.DataFrame:
        return pl.concat(
            [r.select(pl.lit(name).alias("source"), pl.all()) for name, r in results.items()],
            how="diagonal",
        )

    evolutions = {
        name: evolution(
            frame,
            frames.get("control") if name == "model" else None,
            convention=convention,
            bin_pairs_to=bin_pairs_to,
        )
        for name, frame in frames.items()
    }
    return IdentifiabilityResult(
        store=store,
        control=control,
        convention=convention,
        seed=seed,
        permutations=statistics.permutations_of(convention, permutations),
        classes=layout.classes,
        n_images=scored.height,
        n_bad=n_bad,
        rate=stacked(
            {k: rate(frame, convention=convention, seed=seed) for k, frame in frames.items()}
        ),
        accuracy=stacked(
            {k: accuracy(scan_images(path), seed=seed) for k, path in sources.items()}
        ),
        evolution=stacked(evolutions),
        change_rate=stacked(
            {k: change_rate(frame, convention=convention, seed=seed) for k, frame in frames.items()}
        ),
        context=context(
            with_masks(store),
            convention=convention,
            class_fraction=class_fraction,
            permutations=permutations,
            seed=seed,
        ),
    )


def _image_tokens(frame: pl.LazyFrame, convention: Convention) -> pl.LazyFrame:
    """Image tokens of the residual stream, as the convention counts them."""
    tokens = frame.filter((pl.col("stream") == "resid") & (pl.col("kind") == "patch"))
    # Their code drops token 0 as "the CLS token" in every model.
    return tokens.filter(pl.col("token") != 0) if convention == "vilas2023" else tokens
