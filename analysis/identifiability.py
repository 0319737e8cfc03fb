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
from typing import Any

import numpy as np
import polars as pl

from classlens.analysis import statistics
from classlens.analysis.evolution import evolution
from classlens.analysis.frames import Convention, axis, batches
from classlens.analysis.pairs import check_pair
from classlens.analysis.scan import scan, scan_images
from classlens.extractor.errors import UsageError
from classlens.extractor.schema import UNITS_FILE, read_layout

VILAS2023_PERMUTATIONS = 300


def rate(
    frame: pl.LazyFrame, *, convention: Convention = "corrected", seed: int = 0
) -> pl.DataFrame:
    """Class identifiability rate (paper §4.1), one row; percentages with 95% bootstrap intervals.

    ``rate``: per image the share of image tokens with rank 0 in the last block's residual stream,
    mean over images, in %. ``images``: share of images with at least one such token, in %.
    ``vilas2023`` leaves out token 0 even where it is a patch (models without CLS).

    Columns: convention, rate, rate_low, rate_high, images, images_low, images_high, n_images,
    n_tokens (image tokens counted in each image).
    """
    tokens = _image_tokens(frame, convention).filter(pl.col("block") == axis(frame, "block")[-1])
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

    Δ = mean identifiability of class-labelled image tokens − that of the others, over the tokens of
    all images of the frame. ``corrected``: labels shuffled within images, p = (1+#)/(1+n),
    Benjamini–Hochberg q-values over blocks. ``vilas2023``: 300 shuffles pooled over images,
    p = #{Δ < Δ_perm}/300, no q-values. One-sided: small p says that class tokens are ahead. Mask
    fractions are the store's in both; their squashed masks need ``extract --geometry squash``.

    Args:
        frame: images with a segmentation mask.
        class_fraction: a patch is class-labelled when its mask covers at least this share.
        permutations: of the ``corrected`` test.

    Columns: convention, block, delta, low, high (95% bootstrap interval over images), null (mean Δ
    over all shuffles: what differences between images alone bring about), p_value, q_value,
    n_images, n_class, n_context (tokens). No rows where one kind of token is missing.
    """
    patches = _image_tokens(frame, "corrected")
    is_class = pl.col("mask_fraction") >= class_fraction
    counts = (
        patches.filter(pl.col("block") == axis(frame, "block")[0])
        .group_by("image")
        .agg(class_tokens=is_class.sum(), tokens=pl.len())
        .sort("image")
        .collect(engine="streaming")
    )
    n_class = int(counts["class_tokens"].sum())
    n_context = int(counts["tokens"].sum()) - n_class
    blocks = axis(frame, "block") if n_class and n_context else []
    columns: dict[str, Any] = dict.fromkeys(
        ["delta", "low", "high", "null", "p_value", "q_value"], np.empty(0)
    )
    if blocks:
        pooled = convention == "vilas2023"
        test = statistics.ClassContextTest(
            counts["class_tokens"].to_numpy(),
            counts["tokens"].item(0),
            pooled=pooled,
            permutations=VILAS2023_PERMUTATIONS if pooled else permutations,
            seed=seed,
        )
        for batch in batches(patches, ["identifiability", "mask_fraction"]):
            test.add(batch["identifiability"], batch["mask_fraction"][:, 0] >= class_fraction)
        p_values = test.p_values()
        columns["delta"], columns["null"] = test.delta(), test.delta_when_shuffled()
        columns["low"], columns["high"] = test.interval()
        columns["p_value"] = p_values
        columns["q_value"] = [None] * len(blocks)
        if not pooled:
            columns["q_value"] = statistics.benjamini_hochberg(p_values)
    return pl.DataFrame(
        {
            "convention": pl.Series([convention] * len(blocks), dtype=pl.String),
            "block": pl.Series(blocks, dtype=pl.Int16),
            **{name: pl.Series(values, dtype=pl.Float64) for name, values in columns.items()},
            "n_images": pl.Series([counts.height] * len(blocks), dtype=pl.Int64),
            "n_class": pl.Series([n_class] * len(blocks), dtype=pl.Int64),
            "n_context": pl.Series([n_context] * len(blocks), dtype=pl.Int64),
        }
    )


def with_masks(store: str | Path) -> pl.LazyFrame:
    """The scanned images of a store that have a segmentation mask; all of them where none has."""
    units = pl.read_parquet(Path(store) / UNITS_FILE)
    if units["masks"].all() or not units["masks"].any():
        return scan(store)
    images = scan_images(store).select("image", "unit").collect()
    masked = images.join(units.filter("masks"), on="unit", how="semi")
    return scan(store, images=masked["image"].to_list())


@dataclass(frozen=True)
class IdentifiabilityResult:
    """All analyses of paper §4.1–4.2 on one store.

    rate, accuracy, evolution, change_rate, context: frames of the functions of these names, the
    first four with a column ``source`` ("model" or "control") in front; context is the model's and
    empty without masks. n_images: scored images. n_bad: images that could not be scored.
    """

    store: Path
    control: Path | None
    convention: Convention
    seed: int
    permutations: int
    classes: int
    n_images: int
    n_bad: int
    rate: pl.DataFrame
    accuracy: pl.DataFrame
    evolution: pl.DataFrame
    change_rate: pl.DataFrame
    context: pl.DataFrame

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready mapping: settings and counts, and each frame as a list of rows."""

        def plain(value: Any) -> Any:
            if isinstance(value, pl.DataFrame):
                return value.to_dicts()
            return str(value) if isinstance(value, Path) else value

        return {name: plain(value) for name, value in vars(self).items()}


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
        UsageError: nothing is scored yet, there is no residual stream, or the control has other
            images, blocks or tokens.
    """
    store = Path(store)
    images = scan_images(store).select("image", "key", "status").collect()
    scored = images.filter(pl.col("status") == "ok")
    if scored.is_empty():
        raise UsageError(f"{store} has no scored image yet; run `classlens extract` to its end.")
    layout = read_layout(store)
    if "resid" not in layout.streams:
        raise UsageError(
            f"{store} holds {', '.join(layout.streams)} only, and identifiability is read in the "
            "residual stream; extract a store with `--streams` that include resid."
        )
    sources = {"model": store}
    if control is not None:
        control = Path(control)
        fields = ("blocks", "prefix_kinds", "grid", "classes", "streams")
        remedy = (
            f"extract {control} from the same shards with the same model and options and "
            "`--weights random`."
        )
        check_pair(store, control, fields, remedy)
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
        permutations=VILAS2023_PERMUTATIONS if convention == "vilas2023" else permutations,
        classes=layout.classes,
        n_images=scored.height,
        n_bad=images.height - scored.height,
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
