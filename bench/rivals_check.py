"""What the authors' extractor reads and writes, and how far its ranks agree with ours.

Shape letters: N images, L blocks, S streams, T tokens, D width, H × W pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import polars as pl
    from torch import Tensor

    from classlens.extractor.prepare import Prepared

STREAMS = {"resid": "hs", "attn": "hs-attn", "mlp": "hs-mlp"}  # our names and theirs
CLASSES = 1000
# Images, streams, tokens or labels that are mixed up leave a few ranks in a hundred equal; rounding
# in float32 moves fewer than that.
LEAST_EQUAL_RANKS = 0.5


def write_data_set(folder: Path, prepared: Prepared) -> pl.Series:
    """Lays the planned images out as the authors' data set class expects ImageNet-S.

    Returns:
        the images in its order, class by class, as positions on our image axis.
    """
    import polars as pl

    from classlens.extractor.plan import read_member

    root = folder / "ImageNetS919"
    rows = prepared.plan.manifest.sort("label", "image")
    for label, key, unit, offset, size in rows.select(
        "label", "key", "unit", "offset", "size"
    ).iter_rows():
        file = root / "validation" / _imagenet_id(label) / f"{key}.JPEG"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(read_member(prepared.plan.units[unit].path, offset, size))
    rows.select(
        pl.col("label").map_elements(_imagenet_id, pl.String).alias("imagenet_id"),
        pl.col("label").alias("index"),
        pl.format("class {}", "label").alias("cat"),
        pl.format("{}.JPEG", "key").alias("img_name"),
        pl.int_range(pl.len()).over("label").alias("img_index"),
    ).write_csv(root / "validation_stim_info.csv")
    synsets = "".join(f"{_imagenet_id(c)} class {c}\n" for c in range(CLASSES))
    (root / "LOC_synset_mapping.txt").write_text(synsets)
    return rows["image"]


def _imagenet_id(label: int) -> str:
    return f"n{label:08d}"


def read_reference_ranks(out: Path, model: str, order: pl.Series) -> np.ndarray:
    """The authors' ranks int64 [N, L, S, T], in the order of our image axis.

    Args:
        out: the folder their extractor wrote to.
        order: what `write_data_set` returned.
    """
    import numpy as np
    import torch

    classes = sorted(f for f in (out / "results" / "class_embed" / model).iterdir() if f.is_dir())
    blocks = len(list(classes[0].glob("pos_hs_*.pt")))
    ranks_LSNT = np.stack(
        [
            np.stack(
                [
                    np.concatenate(
                        [
                            torch.load(c / f"pos_{theirs}_{b}.pt", weights_only=True).numpy()
                            for c in classes
                        ]
                    )
                    for theirs in STREAMS.values()
                ]
            )
            for b in range(blocks)
        ]
    )
    return ranks_LSNT.transpose(2, 0, 1, 3)[order.arg_sort().to_numpy()]


def read_reference_pixels(file: Path, order: pl.Series) -> np.ndarray:
    """The images as their model sees them, float32 [N, 3, H, W], in the order of our image axis."""
    import numpy as np

    return np.load(file)[order.arg_sort().to_numpy()]


def check(
    prepared: Prepared, store: Path, their_ranks: np.ndarray, their_pixels: np.ndarray
) -> dict[str, float | int]:
    """How far the authors' ranks [N, L, S, T] agree with those of a store.

    Returns:
        see `compare`.

    Raises:
        AssertionError: the pixels differ, a rank of ours lies outside the bracket, or fewer than
            half of the ranks are equal in float32.
    """
    import numpy as np
    import zarr

    from classlens.bench.fidelity import read_pictures
    from classlens.extractor.store import verify

    if verify(store):
        raise AssertionError("the store that was to be compared is not whole")
    pixels, labels = read_pictures(prepared, len(their_ranks))
    difference = check_pixels(pixels.numpy(), their_pixels)
    ranks = np.asarray(zarr.open_array(str(store / "scores/rank"), mode="r")[...])
    brackets = rank_brackets(prepared, pixels, labels)
    found = compare(ranks.astype(np.int64), their_ranks, *brackets, prepared.layout.classes)
    if prepared.config.dtype == "float32" and found["equal_ranks"] < LEAST_EQUAL_RANKS:
        raise AssertionError(f"only {found['equal_ranks']:.1%} of the ranks equal the authors'")
    return {**found, "pixel_change_max": difference}


def check_pixels(ours: np.ndarray, theirs: np.ndarray) -> float:
    """How far the authors' normalised images lie at most from the exact normalisation of ours.

    Args:
        ours: uint8 [N, H, W, 3]. theirs: float32 [N, 3, H, W], (pixel / 255 − 0.5) / 0.5.

    Raises:
        AssertionError: they do not come from the same 8-bit pixels.
    """
    import numpy as np

    ours = ours.transpose(0, 3, 1, 2)
    differ = np.rint((theirs.astype(np.float64) + 1) * 127.5) != ours
    if differ.any():
        raise AssertionError(f"{differ.mean():.2%} of the pixels differ from the authors'")
    return float(np.abs(theirs - (ours / 127.5 - 1)).max())


def rank_brackets(
    prepared: Prepared, pixels: Tensor, labels: Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest rank each token may have, int32 [N, L, S, T], about our activations."""
    import numpy as np
    import torch

    from classlens.extractor.engine import choose_impl, make_scorer
    from classlens.kernels.bounds import rank_bracket

    config = prepared.config
    scorer, space = make_scorer(prepared), prepared.subject.space
    low, high = [], []
    # Another batch size, or an eager walk beside a compiled one, would round in another way.
    size = config.batch_size
    for batch, batch_labels in zip(pixels.split(size), labels.split(size), strict=True):
        brackets_L = []
        with torch.inference_mode():
            for _, sites in scorer.walk(batch):
                x_NSTD = torch.stack([sites[s] for s in config.streams], dim=1)
                bracket = rank_bracket(
                    x_NSTD.flatten(1, 2),
                    space,
                    batch_labels,
                    scorer.dtype,
                    split=choose_impl(config, len(pixels)) == "amx",
                )
                brackets_L.append([bound.view(x_NSTD.shape[:3]) for bound in bracket])
        low.append(torch.stack([bound for bound, _ in brackets_L], dim=1).numpy())
        high.append(torch.stack([bound for _, bound in brackets_L], dim=1).numpy())
    return np.concatenate(low), np.concatenate(high)


def compare(
    ours: np.ndarray, theirs: np.ndarray, low: np.ndarray, high: np.ndarray, classes: int
) -> dict[str, float | int]:
    """Shares of equal ranks, all arrays of the same shape.

    Returns:
        what `classlens.bench.fidelity.agreement` does, and ``in_bracket``: the share of
        theirs between ``low`` and ``high``; ``ranks``: the number of ranks.

    Raises:
        AssertionError: the shapes differ, or one of ours lies outside its bracket.
    """
    from classlens.bench.fidelity import agreement

    if ours.shape != theirs.shape:
        raise AssertionError(f"ranks of shape {ours.shape}, the authors' {theirs.shape}")
    outside = ~((low <= ours) & (ours <= high))
    if outside.any():
        raise AssertionError(f"{outside.sum()} ranks of ours lie outside their bracket")
    return {
        "ranks": ours.size,
        **agreement(theirs, ours, classes),
        "in_bracket": float(((low <= theirs) & (theirs <= high)).mean()),
    }
