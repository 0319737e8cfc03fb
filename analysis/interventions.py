"""A model with an intervention beside the same model without (paper §4.2).

Stores are paired image by image, and both are read over the same tokens: the image tokens that the
intervention leaves. ``convention`` is ``corrected`` (just that) or ``vilas2023``: the published
code counts the prefix tokens of the perturbed model too, pools the tokens of all images of the
unperturbed one, and leaves out its token 0 even where that is a patch.

Memory: one batch of images of both stores is held at a time, and a few numbers of every image.

Shape letters: N images, n images of one batch, B blocks, T tokens, K columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from classlens.analysis import statistics
from classlens.analysis.frames import Convention, axis, batches
from classlens.analysis.pairing import paired_images
from classlens.analysis.scan import scan, scan_images
from classlens.extractor.config import intervention_text
from classlens.extractor.errors import UsageError
from classlens.extractor.schema import Layout, read_attributes

SOURCES = ("unperturbed", "perturbed", "difference")
MEASURES = ("rate", "images", "accuracy")
# Of the fingerprint; the rest decides neither pixels nor activations.
SAME = ("model", "model_args", "weights_sha256", "geometry", "pixels", "decoder", "dtype", "images")


@dataclass(frozen=True)
class InterventionsResult:
    """Interventions on one store's model.

    rates: long, in %: name (of the perturbed store), intervention, convention, measure ("rate":
    mean over images of the share of tokens with rank 0, last block's residual stream; "images":
    share of images with such a token; "accuracy": of the model's own prediction), source
    ("unperturbed", "perturbed", "difference": perturbed − unperturbed), value, low, high (95 %
    bootstrap interval over images, both stores resampled alike), n_images, n_tokens (counted in
    all images; null for accuracy and differences). An image that lost all its image tokens counts
    for the accuracy alone, and in ``vilas2023`` for the perturbed rate by its prefix tokens.

    blocks: name, intervention, group ("cls", "patch"), block, source, mean (identifiability in the
    residual stream, over the tokens of all images), low, high, n_images, n_tokens.
    """

    store: Path
    perturbed: tuple[Path, ...]
    convention: Convention
    seed: int
    classes: int
    rates: pl.DataFrame
    blocks: pl.DataFrame

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready mapping: settings, and each frame as a list of rows."""
        return {
            "store": str(self.store),
            "perturbed": [str(path) for path in self.perturbed],
            "convention": self.convention,
            "seed": self.seed,
            "classes": self.classes,
            "rates": self.rates.to_dicts(),
            "blocks": self.blocks.to_dicts(),
        }


@dataclass(frozen=True)
class TokenSums:
    """What is kept of every image, one row each: of both stores over the same tokens.

    hits, counted: [N, 2], tokens with rank 0 and tokens counted in the last block, unperturbed and
    perturbed, as the convention counts them. r: by group and source [N, B], the sums of
    identifiability over the group's tokens. tokens: by group [N], their number.
    """

    hits: np.ndarray
    counted: np.ndarray
    r: dict[str, dict[str, np.ndarray]]
    tokens: dict[str, np.ndarray]


def analyze_interventions(
    store: str | Path,
    perturbed: Sequence[str | Path],
    *,
    convention: Convention = "corrected",
    seed: int = 0,
) -> InterventionsResult:
    """Compares a store with stores of the same model and images, extracted with ``--intervene``.

    Raises:
        StoreError: a path is no store.
        UsageError: none is perturbed, or one does not pair with the store.
    """
    store, paths = Path(store), tuple(Path(path) for path in perturbed)
    if not paths:
        raise UsageError("No perturbed stores given; extract one with --intervene and name it.")
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    attributes = read_attributes(store)
    if attributes["config"].get("intervene") is not None:
        raise UsageError(
            f"{store} is itself extracted with --intervene; name the store of the model as it is "
            "first."
        )
    layout = Layout.from_json(attributes["layout"])
    rates, blocks = [], []
    for path, name in zip(paths, names, strict=True):
        images = _paired(store, attributes, path)
        config = read_attributes(path)["config"]
        sums = _token_sums(store, path, layout, images, convention)
        if not sums.counted.any(0).all():
            raise UsageError(
                f"{path} has no image token left in any image, so there is nothing to compare; "
                "choose another --class-fraction."
            )
        text = pl.lit(intervention_text(config)).alias("intervention")
        front = (pl.lit(name).alias("name"), text)
        rate = _rates(sums, _right(store, path, images), convention, seed)
        rates.append(rate.select(*front, pl.lit(convention).alias("convention"), pl.all()))
        blocks.append(_blocks(sums, axis(scan(path), "block"), seed).select(*front, pl.all()))
    return InterventionsResult(
        store, paths, convention, seed, layout.classes, pl.concat(rates), pl.concat(blocks)
    )


def _paired(store: Path, attributes: dict[str, Any], perturbed: Path) -> np.ndarray:
    """Places of the images scored in both stores; raises UsageError unless they pair."""
    theirs = read_attributes(perturbed)
    if theirs["config"].get("intervene") is None:
        raise UsageError(
            f"{perturbed} is a store of the model as it is; extract one with --intervene."
        )
    for path, found in ((store, attributes), (perturbed, theirs)):
        if "resid" not in found["layout"]["streams"]:
            raise UsageError(
                f"{path} lacks the residual stream; extract it with `--streams` that include resid."
            )
    remedy = (
        f"extract {perturbed} from the same shards with the same model and options and --intervene."
    )
    ours, theirs = attributes["fingerprint"], theirs["fingerprint"]
    if differing := [name for name in SAME if ours.get(name) != theirs.get(name)]:
        raise UsageError(f"{perturbed} differs from {store} in {', '.join(differing)}; {remedy}")
    return paired_images(store, perturbed, remedy=remedy)["image"].to_numpy()


def _token_sums(
    store: Path,
    perturbed: Path,
    layout: Layout,
    images: np.ndarray,
    convention: Convention,
) -> TokenSums:
    frames = (
        scan(path, images=images).filter(pl.col("stream") == "resid") for path in (store, perturbed)
    )
    groups = {"patch": np.arange(layout.prefix, layout.tokens)}
    if "cls" in layout.prefix_kinds:
        groups = {"cls": np.array([layout.prefix_kinds.index("cls")])} | groups
    is_image_T = np.arange(layout.tokens) >= layout.prefix
    published = convention == "vilas2023"
    # Their code drops token 0 as "the CLS token" in every model.
    own_T = is_image_T & (np.arange(layout.tokens) > 0) if published else is_image_T
    hits, counted = [], []
    tokens = {group: [] for group in groups}
    sums = {group: {source: [] for source in SOURCES[:2]} for group in groups}
    pairs = zip(*(batches(frame, ["rank"], nulls=True) for frame in frames), strict=True)
    for ours, theirs in pairs:
        rank_nBT, changed_nBT = ours["rank"], theirs["rank"]
        there_nT = ~np.isnan(changed_nBT[:, -1].astype(float))
        own_nT = there_nT & own_T
        changed_nT = there_nT if published else own_nT
        hits.append(
            np.column_stack(
                [
                    ((rank_nBT[:, -1] == 0) & own_nT).sum(1),
                    ((changed_nBT[:, -1] == 0) & changed_nT).sum(1),
                ]
            )
        )
        counted.append(np.column_stack([own_nT.sum(1), changed_nT.sum(1)]))
        for group, places in groups.items():
            there_nG = there_nT[:, places]
            tokens[group].append(there_nG.sum(1))
            for source, rank in (("unperturbed", rank_nBT), ("perturbed", changed_nBT)):
                r_nBG = np.where(there_nG[:, None], 1 - rank[:, :, places] / layout.classes, 0)
                sums[group][source].append(r_nBG.sum(2))
    return TokenSums(
        hits=np.concatenate(hits).astype(float),
        counted=np.concatenate(counted).astype(float),
        r={g: {s: np.concatenate(parts) for s, parts in of.items()} for g, of in sums.items()},
        tokens={group: np.concatenate(parts) for group, parts in tokens.items()},
    )


def _right(store: Path, perturbed: Path, images: np.ndarray) -> np.ndarray:
    """Whether the model's own prediction is right, [N, 2]: unperturbed, perturbed."""
    wanted = pl.DataFrame({"image": images.astype(np.int32)})
    right = [
        scan_images(path)
        .join(wanted.lazy(), on="image", how="semi")
        .sort("image")
        .select(pl.col("prediction") == pl.col("label"))
        .collect()
        .to_series()
        .to_numpy()
        for path in (store, perturbed)
    ]
    return np.column_stack(right)


def _rates(
    sums: TokenSums, right_N2: np.ndarray, convention: Convention, seed: int
) -> pl.DataFrame:
    """measure, source, value, low, high, n_images, n_tokens; see :class:`InterventionsResult`."""
    has_tokens_N2 = sums.counted > 0
    share_N2 = np.divide(sums.hits, sums.counted, out=np.zeros_like(sums.hits), where=has_tokens_N2)
    rate, of_rate = share_N2, has_tokens_N2.astype(float)
    if convention == "vilas2023":  # tokens pooled over images, but not those of the changed model
        rate = np.column_stack([sums.hits[:, 0], share_N2[:, 1]])
        of_rate = np.column_stack([sums.counted[:, 0], of_rate[:, 1]])
    columns = [rate, sums.hits > 0, right_N2], [of_rate, has_tokens_N2, np.ones_like(right_N2)]
    columns_NK = np.column_stack([np.column_stack(part).astype(float) for part in columns])

    def percent(means_RK: np.ndarray) -> np.ndarray:
        """[resamples, measures, sources]"""
        above, below = np.split(means_RK, 2, axis=1)
        with np.errstate(invalid="ignore"):  # a resample may hold no image with tokens
            return 100 * _with_difference((above / below).reshape(-1, len(MEASURES), 2), axis=2)

    low, high = statistics.bootstrap_interval(columns_NK, percent, seed=seed)
    [value] = percent(columns_NK.mean(0, keepdims=True))
    n_images = has_tokens_N2.sum(0).tolist()
    n_both = int(has_tokens_N2.all(1).sum())
    n_tokens = [int(n) for n in sums.counted.sum(0)]
    counts = {
        "rate": ([*n_images, n_both], [*n_tokens, None]),
        "images": ([*n_images, n_both], [*n_tokens, None]),
        "accuracy": ([len(right_N2)] * 3, [None] * 3),
    }
    return pl.DataFrame(
        {
            "measure": np.repeat(MEASURES, len(SOURCES)),
            "source": SOURCES * len(MEASURES),
            "value": value.ravel(),
            "low": low.ravel(),
            "high": high.ravel(),
            "n_images": [n for measure in MEASURES for n in counts[measure][0]],
            "n_tokens": [n for measure in MEASURES for n in counts[measure][1]],
        },
        schema_overrides={"n_images": pl.Int64, "n_tokens": pl.Int64},
    )


def _blocks(sums: TokenSums, blocks: list[int], seed: int) -> pl.DataFrame:
    """group, block, source, mean, low, high, n_images, n_tokens."""
    frames = []
    for group, of_source in sums.r.items():
        tokens_N = sums.tokens[group]
        columns_NK = np.column_stack([*of_source.values(), tokens_N])

        def means(means_RK: np.ndarray) -> np.ndarray:
            """[resamples, blocks, sources]"""
            with np.errstate(invalid="ignore"):
                mean_RK = means_RK[:, :-1] / means_RK[:, -1:]
            return _with_difference(np.stack(np.split(mean_RK, 2, axis=1), axis=2), axis=2)

        low, high = statistics.bootstrap_interval(columns_NK, means, seed=seed)
        [mean] = means(columns_NK.mean(0, keepdims=True))
        frames.append(
            pl.DataFrame(
                {
                    "group": group,
                    "block": pl.Series(np.repeat(blocks, len(SOURCES)), dtype=pl.Int16),
                    "source": SOURCES * len(blocks),
                    "mean": mean.ravel(),
                    "low": low.ravel(),
                    "high": high.ravel(),
                    "n_images": int((tokens_N > 0).sum()),
                    "n_tokens": int(tokens_N.sum()),
                }
            )
        )
    return pl.concat(frames)


def _with_difference(pairs: np.ndarray, axis: int) -> np.ndarray:
    """Unperturbed and perturbed values along an axis, and behind them perturbed − unperturbed."""
    return np.concatenate([pairs, np.diff(pairs, axis=axis)], axis=axis)
