"""The picture page: some images with the identifiability of each image token laid on them.

The heat map of a block is one pixel a patch; the page stretches it over the part of the model's
input that the patches cover, so patch and picture line up.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from PIL import Image

from classlens.analysis.colors import DIVERGING, in_colors
from classlens.analysis.frames import batches
from classlens.analysis.scan import scan, scan_images
from classlens.extractor.schema import CLASSES_FILE, Layout, read_attributes


@dataclass(frozen=True)
class Picture:
    """One image of the picture page.

    photo: the model's input as a data URI. heat: for each stream a data URI whose rows are the
    grid's and whose columns are those of all blocks side by side. identified: for each stream and
    block the SVG path of the tokens with rank 0, in patch units. outline: SVG path around the
    class-labelled patches, empty without a mask. shares: residual stream's share of image tokens
    with rank 0, in %, by block.
    """

    key: str
    label: str
    prediction: str
    right: bool
    photo: str
    heat: dict[str, str]
    identified: dict[str, list[str]]
    outline: str
    shares: list[float]


def choose_images(images: pl.DataFrame, count: int) -> list[int]:
    """Positions of some scored images, spread over the classes; a third of them wrongly predicted.

    Args:
        images: scored rows of ``scan_images``.
    """
    in_order = images.sort("label", "image")
    is_right = in_order["prediction"] == in_order["label"]
    right = in_order.filter(is_right)["image"].to_numpy()
    wrong = in_order.filter(~is_right)["image"].to_numpy()
    few_wrong = min(len(wrong), count // 3)
    take_right = min(len(right), count - few_wrong)
    take_wrong = min(len(wrong), count - take_right)
    return [
        int(images[round(place)])
        for images, taken in ((right, take_right), (wrong, take_wrong))
        for place in np.linspace(0, len(images) - 1, taken)
    ]


def make_pictures(store: Path, count: int, class_fraction: float = 0.5) -> list[Picture]:
    """The pictures of a store, right predictions first.

    Raises:
        ShardError: the shards are gone or changed.
    """
    attributes = read_attributes(store)
    layout = Layout.from_json(attributes["layout"])
    names = pl.read_parquet(store / CLASSES_FILE).sort("class")["name"]
    rows = scan_images(store).filter(pl.col("status") == "ok").collect()
    chosen = choose_images(rows, count)
    r_NSB, rank_NSB, mask_N = _tokens(store, layout, chosen)
    pictures = []
    for image in chosen:
        row = rows.row(by_predicate=pl.col("image") == image, named=True)
        place = sorted(chosen).index(image)
        r, rank, mask_fraction = r_NSB[place], rank_NSB[place], mask_N[place]
        pictures.append(
            Picture(
                key=row["key"],
                label=names[row["label"]],
                prediction=names[row["prediction"]],
                right=row["label"] == row["prediction"],
                photo=photo_uri(read_pixels(attributes["geometry"], row), layout.grid),
                heat={s: heat_uri(r[i]) for i, s in enumerate(layout.streams)},
                identified={
                    s: [_dots(block == 0) for block in rank[i]]
                    for i, s in enumerate(layout.streams)
                },
                outline=_outline(mask_fraction >= class_fraction),
                shares=(100 * (rank[layout.streams.index("resid")] == 0).mean((1, 2))).tolist(),
            )
        )
    return pictures


def read_pixels(geometry: Mapping[str, Any], row: Mapping[str, Any]) -> np.ndarray:
    """The model's input for a row of ``scan_images``, uint8 [H, W, 3], read from its shard.

    Raises:
        ShardError: the shard is gone or too short.
    """
    from classlens.extractor.geometry import Geometry
    from classlens.extractor.plan import read_member

    data = read_member(row["shard"], row["offset"], row["size"])
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    return np.asarray(Geometry.from_json(geometry).crop(picture))


def _tokens(
    store: Path, layout: Layout, images: list[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Identifiability and rank [N, S, B, rows, columns], mask fraction [N, rows, columns] (NaN
    without masks), images ascending."""
    patches = scan(store, images=images).filter(pl.col("kind") == "patch")
    columns = ("identifiability", "rank", "mask_fraction")
    of_streams = [
        next(batches(patches.filter(pl.col("stream") == stream), columns, nulls=True))
        for stream in layout.streams
    ]
    shape = (len(images), len(layout.streams), layout.blocks, *layout.grid)
    r, rank, mask = (np.stack([s[c] for s in of_streams], axis=1).reshape(shape) for c in columns)
    return r, rank, mask[:, 0, 0]


def photo_uri(pixels: np.ndarray, grid: tuple[int, int]) -> str:
    """The part of the input that the patches cover, as a JPEG data URI."""
    buffer = io.BytesIO()
    Image.fromarray(covered(pixels, grid)).save(buffer, "JPEG", quality=90)
    return _data_uri("image/jpeg", buffer.getvalue())


def covered(pixels: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """The part of a picture [H, W, 3] that whole patches cover."""
    height, width = (side // count * count for side, count in zip(pixels.shape, grid, strict=False))
    return pixels[:height, :width]


def heat_uri(r: np.ndarray) -> str:
    """Identifiability [B, rows, columns] in colour, blocks side by side, as a PNG data URI."""
    buffer = io.BytesIO()
    Image.fromarray(in_colors(np.concatenate(list(r), axis=1), DIVERGING)).save(buffer, "PNG")
    return _data_uri("image/png", buffer.getvalue())


def _dots(identified: np.ndarray) -> str:
    """A zero-length stroke in the middle of each patch that is True, [rows, columns]."""
    return "".join(f"M{x}.5 {y}.5h0" for y, x in np.argwhere(identified))


def _outline(inside: np.ndarray) -> str:
    """The border between patches that are True and the others or the picture's edge."""
    padded = np.pad(inside, 1)
    upright = padded[1:-1, 1:] != padded[1:-1, :-1]
    level = padded[1:, 1:-1] != padded[:-1, 1:-1]
    return "".join(
        [f"M{x} {y}v1" for y, x in np.argwhere(upright)]
        + [f"M{x} {y}h1" for y, x in np.argwhere(level)]
    )


def _data_uri(media_type: str, data: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"
