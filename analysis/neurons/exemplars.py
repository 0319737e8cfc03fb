"""Exemplars of every neuron, and quantiles of its activation (MILAN; definitions §7).

A neuron's exemplars are the 15 images of largest activation over patches, ties to the lower place
on the image axis. Of each is kept the grid of codes of its patches (`classlens.extractor.codes`);
the mask is where the code is above that of the neuron's 0.99 quantile.

Quantiles come from a histogram of codes: of all patches where an image has up to 64, else of 32 of
them, drawn for each image alike for all neurons. Their error has two parts, see :func:`thresholds`.

Shape letters: L blocks, F neurons of a block, G patches, X = 15 exemplars.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from math import ceil, exp, log
from pathlib import Path

import numpy as np
import polars as pl

from classlens.analysis.neurons.accumulated import Accumulated
from classlens.extractor.codes import lower_edges
from classlens.extractor.errors import UsageError
from classlens.extractor.schema import CODES, EXEMPLARS, MANIFEST_FILE

EXEMPLAR_QUANTILE = 0.99
"""Of the mask of an exemplar (MILAN)."""

Progress = Callable[[int, int], None]


def exemplars(
    store: str | Path, block: int | None = None, progress: Progress | None = None
) -> pl.DataFrame:
    """The exemplars of every neuron.

    Columns: block Int16, neuron Int32, place Int8 (0 is the largest), image Int32 (on the store's
    image axis), key String, label Int32, value Float32 (the largest activation over the image's
    patches); ordered by block, neuron, place.

    Args:
        block: of this block alone. progress: called with (blocks done, blocks).

    Raises:
        StoreError: there is no store, or it is damaged. UsageError: it has no exemplars.
    """
    found = Accumulated.open(store, "neurons")
    blocks = range(found.layout.blocks) if block is None else [checked_block(found, block)]
    frames = []
    for done, b in enumerate(blocks):
        values_FX, images_FX, _ = _merged(found, b)
        f, x = np.nonzero(images_FX >= 0)
        frames.append(
            pl.DataFrame(
                {
                    "block": np.full(len(f), b, np.int16),
                    "neuron": f.astype(np.int32),
                    "place": x.astype(np.int8),
                    "image": images_FX[f, x],
                    "value": values_FX[f, x],
                }
            )
        )
        if progress is not None:
            progress(done + 1, len(blocks))
    manifest = pl.read_parquet(Path(store) / MANIFEST_FILE).select(
        pl.col("image").cast(pl.Int32), "key", "label"
    )
    joined = pl.concat(frames).join(manifest, on="image", how="left", maintain_order="left")
    return joined.select("block", "neuron", "place", "image", "key", "label", "value")


def exemplar_codes(store: str | Path, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The exemplars of the neurons of one block with the codes of their patches.

    Returns:
        values float32 [F, X], largest first; images int32 [F, X], places on the image axis; codes
        uint8 [F, X, G]. With fewer than 15 images the last values are −∞ and their images −1.

    Raises:
        StoreError, UsageError: as :func:`exemplars`; or there is no such block.
    """
    found = Accumulated.open(store, "neurons")
    values_FX, images_FX, origin_FX = _merged(found, checked_block(found, block))
    codes_FXG = np.zeros((*values_FX.shape, found.layout.patches), np.uint8)
    for unit in found.units:
        f, x = np.nonzero((origin_FX // EXEMPLARS == unit) & (images_FX >= 0))
        if len(f):
            of_unit = found.part(unit, "neurons/exemplar_codes", block)
            codes_FXG[f, x] = of_unit[f, origin_FX[f, x] % EXEMPLARS]
    return values_FX, images_FX, codes_FXG


def thresholds(
    store: str | Path, quantile: float, progress: Progress | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The code of each neuron's quantile over images and patches, and the threshold it stands for.

    The quantile is the k-th smallest of n counted activations, k = ⌈quantile · n⌉. "Above the
    threshold" is ``code > codes``, which is the same as ``activation >= values``. Of the counted
    activations at most a share 1 − quantile is above, and the quantile lies below the threshold by
    no more than the width of its code: (|v| + 1/8) / 16. Where patches are sampled, the share of
    all activations that is above differs from that of the counted ones by no more than
    :func:`rank_error` says.

    Returns:
        codes uint8 [L, F]; values float32 [L, F], the smallest activation above, ∞ for code 255,
        which has none above.

    Raises:
        StoreError: there is no store, or it is damaged. UsageError: it has no histograms, no image
        in them, or the quantile is not in (0, 1).
    """
    if not 0 < quantile < 1:
        raise UsageError(f"The quantile is {quantile}; give one between 0 and 1.")
    found = Accumulated.open(store, "neurons")
    blocks = found.layout.blocks
    codes_LF = np.empty((blocks, found.layout.mlp_width), np.uint8)
    for block in range(blocks):
        codes_LF[block] = quantile_codes(found.total("neurons/histogram", block), quantile)
        if progress is not None:
            progress(block + 1, blocks)
    return codes_LF, np.append(lower_edges(), np.float32(np.inf))[codes_LF.astype(int) + 1]


def histogram(store: str | Path, block: int) -> np.ndarray:
    """How many activations of each neuron of a block have each code, int64 [F, 256]; errors as of
    :func:`exemplars`."""
    found = Accumulated.open(store, "neurons")
    return found.total("neurons/histogram", checked_block(found, block))


def quantile_codes(histogram_FC: np.ndarray, quantile: float) -> np.ndarray:
    """The code of the k-th smallest of the n activations of each histogram, uint8 [F].

    k is ⌈quantile · n⌉, of the decimal number that the quantile is written as.

    Raises:
        UsageError: nothing was counted.
    """
    cumulative_FC = histogram_FC.cumsum(axis=1)
    counted = int(cumulative_FC[0, -1])
    if not counted:
        raise UsageError("No image could be scored, so there are no quantiles.")
    place = ceil(Fraction(str(quantile)) * counted)
    codes_F = (cumulative_FC < place).sum(axis=1)
    assert codes_F.max() < CODES
    return codes_F.astype(np.uint8)


def rank_error(samples: int, quantile: float, failure: float = 1e-6) -> float:
    """How far the share above a threshold may lie from that of the sampled patches.

    Patches are drawn without replacement within each image. The number of those drawn that lie
    above a value is then no wider spread than that of independent draws with the mean of their
    probabilities (Hoeffding 1963, theorems 1 and 4): with a share p = 1 − quantile above among all
    patches, the share among n samples exceeds p + ε with a probability of at most
    exp(−n · KL(p + ε ‖ p)), and falls short likewise.

    Args:
        samples: n, images × patches drawn of each. failure: the probability to stay below, for one
            neuron; divide it by the number of neurons to hold for all at once.

    Returns:
        ε, a share of patches.
    """
    p = 1 - quantile

    def bound(share: float) -> float:
        terms = [a * log(a / b) for a, b in ((share, p), (1 - share, 1 - p)) if a > 0]
        return exp(-samples * sum(terms))

    low, high = 0.0, quantile
    for _ in range(60):
        middle = (low + high) / 2
        beyond = bound(p + middle) + (bound(p - middle) if middle <= p else 0.0)
        low, high = (middle, high) if beyond > failure else (low, middle)
    return high


def masks(codes: np.ndarray, threshold_codes: np.ndarray) -> np.ndarray:
    """Where an activation is above its neuron's threshold, bool of the shape of ``codes``.

    Args:
        codes: uint8 [F, X, G]. threshold_codes: uint8 [F], of one block of :func:`thresholds`.
    """
    return codes > threshold_codes[:, None, None]


def checked_block(found: Accumulated, block: int) -> int:
    """The block.

    Raises:
        UsageError: there is no such block.
    """
    if not 0 <= block < found.layout.blocks:
        raise UsageError(f"There is no block {block}; give 0 to {found.layout.blocks - 1}.")
    return block


def _merged(found: Accumulated, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values and images of a block's exemplars, [F, X], and unit · 15 + place where they stand."""
    shape = (found.layout.mlp_width, EXEMPLARS)
    values = np.full(shape, -np.inf, np.float32)
    images = np.full(shape, -1, np.int32)
    origin = np.zeros(shape, np.int64)
    for unit in found.units:
        theirs = np.broadcast_to(unit * EXEMPLARS + np.arange(EXEMPLARS), shape)
        both = [
            np.concatenate(pair, axis=1)
            for pair in (
                (values, found.part(unit, "neurons/exemplar_value", block)),
                (images, found.part(unit, "neurons/exemplar_image", block)),
                (origin, theirs),
            )
        ]
        order = np.lexsort((both[1], -both[0]), axis=1)[:, :EXEMPLARS]
        values, images, origin = (np.take_along_axis(part, order, axis=1) for part in both)
    return values, images, origin
