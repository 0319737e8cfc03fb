"""Linear probes beside the class-embedding projection, token by token, over the same images.

Shape letters: N images, B blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl

from classlens.analysis import statistics
from classlens.analysis.evolution import GROUPS
from classlens.analysis.frames import axis
from classlens.analysis.pairing import paired_images
from classlens.analysis.scan import scan
from classlens.extractor.errors import UsageError
from classlens.extractor.schema import read_attributes

MEASURES = {"mean": "identifiability", "rate": "rank0"}


def compare_probe(store: str | Path, probe_store: str | Path, *, seed: int = 0) -> pl.DataFrame:
    """Identifiability per block under a class-embedding projection and under linear probes.

    Over the images that both stores have scored and the streams that both hold. Intervals are 95%
    bootstrap intervals over images, with the same resamples for both.

    Args:
        store: of ``classlens extract``. probe_store: of ``classlens probe``, its test images those
            of the store.

    Columns: source ("projection" or "probe"), stream, group ("cls" or "patch"), block, mean, low,
    high (r, mean over the tokens of an image, then over images), rate, rate_low, rate_high (tokens
    with rank 0, in %), n_images, n_tokens (in each image).

    Raises:
        StoreError: a path is no store. UsageError: see `check_probe`.
    """
    store, probe_store = Path(store), Path(probe_store)
    check_probe(store, probe_store)
    frames = {"projection": scan(store), "probe": scan(probe_store)}
    common = [
        s for s in axis(frames["projection"], "stream") if s in axis(frames["probe"], "stream")
    ]
    parts = []
    for stream in common:
        per_image = {
            source: _per_image(frame.filter(pl.col("stream") == stream))
            for source, frame in frames.items()
        }
        both = per_image["projection"].join(per_image["probe"], on="image", how="semi")["image"]
        both = both.unique().implode()
        parts += [
            part.select(pl.lit(source).alias("source"), pl.lit(stream).alias("stream"), pl.all())
            for source, values in per_image.items()
            for part in _intervals(values.filter(pl.col("image").is_in(both)), seed)
        ]
    return pl.concat(parts)


def check_probe(store: Path, probe_store: Path) -> pl.DataFrame:
    """The images (image, key) of both stores, one of linear probes on the other's model and images.

    Raises:
        UsageError: it is not.
    """
    attributes, of_probe = read_attributes(store), read_attributes(probe_store)
    for path, facts, wanted in ((probe_store, of_probe, True), (store, attributes, False)):
        if ("probe" in facts) != wanted:
            made, remedy = ("probe", "extract") if not wanted else ("extract", "probe")
            raise UsageError(
                f"{path} was made by `classlens {made}`; name one that `classlens {remedy}` made."
            )
    remedy = f"run `classlens probe` with the model of {store} and its shards as --test."
    if not same_weights(attributes, of_probe):
        raise UsageError(f"{probe_store} probes other weights than those of {store}; {remedy}")
    return paired_images(store, probe_store, remedy=remedy)


def same_weights(attributes: dict[str, Any], others: dict[str, Any]) -> bool:
    """Whether two stores are of the same weights, by their attributes."""
    weights, theirs = (a["fingerprint"]["weights_sha256"] for a in (attributes, others))
    return weights == theirs


def _per_image(frame: pl.LazyFrame) -> pl.DataFrame:
    """Means over the tokens of one stream: image, group, block, identifiability, rank0, tokens."""
    return (
        frame.with_columns(group=pl.col("kind").cast(pl.String))
        .filter(pl.col("group").is_in(GROUPS))
        .group_by("image", "group", "block")
        .agg(
            pl.col("identifiability").mean(),
            rank0=100 * (pl.col("rank") == 0).mean(),
            tokens=pl.len(),
        )
        .sort("group", "image", "block")
        .collect(engine="streaming")
    )


def _intervals(per_image: pl.DataFrame, seed: int) -> Iterator[pl.DataFrame]:
    """A frame for each group, a row for each block."""
    for (group,), rows in per_image.group_by("group", maintain_order=True):
        blocks = rows["block"].unique().sort()
        columns: dict[str, Any] = {"group": group, "block": blocks}
        for name, measure in MEASURES.items():
            values_NB = rows[measure].to_numpy().reshape(-1, len(blocks))
            low, high = statistics.bootstrap_interval(values_NB, seed=seed)
            prefix = "" if name == "mean" else f"{name}_"
            columns |= {name: values_NB.mean(0), f"{prefix}low": low, f"{prefix}high": high}
        n_images = rows.height // len(blocks)
        yield pl.DataFrame(columns | {"n_images": n_images, "n_tokens": rows["tokens"][0]})
