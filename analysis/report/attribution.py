"""The attribution on the page: relevance laid on pictures, and the curves of perturbation tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from markupsafe import Markup

from classlens.analysis.perturbation import PerturbationResult, read_result
from classlens.analysis.plot_style import to_svg
from classlens.analysis.plots_attribution import perturbation_chart
from classlens.analysis.report.pictures import choose_images, heat_uri, photo_uri, read_pixels
from classlens.analysis.scan import scan_attribution, scan_images
from classlens.extractor.schema import CLASSES_FILE, Layout, read_attributes

MOST_PICTURES = 6


@dataclass(frozen=True)
class RelevancePicture:
    """One image with its relevance maps.

    photo: the model's input as a data URI. heat: a data URI of the map summed over blocks, and
    right of it those of the blocks. texts: what is written under each map.
    """

    key: str
    label: str
    prediction: str
    right: bool
    photo: str
    heat: str
    texts: list[str]


@dataclass(frozen=True)
class PerturbationFigure:
    """A perturbation test and its curves as SVG."""

    result: PerturbationResult
    chart: Markup


def relevance_pictures(store: Path, count: int) -> list[RelevancePicture]:
    """Some images of a store, at most six, those of the picture page; none without attribution.

    Raises:
        ShardError: the shards are gone or changed.
    """
    attributes = read_attributes(store)
    layout = Layout.from_json(attributes["layout"])
    if "attribution" not in layout.reducers:
        return []
    names = pl.read_parquet(store / CLASSES_FILE).sort("class")["name"]
    rows = scan_images(store).filter(pl.col("status") == "ok").collect()
    chosen = choose_images(rows, min(count, MOST_PICTURES))
    maps = scan_attribution(store, images=chosen).sort("image", "block", "row", "col").collect()
    shape = (len(chosen), layout.blocks, *layout.grid)
    maps_NBrc = maps["relevance"].to_numpy().reshape(shape).astype(np.float64)
    pictures = []
    for image in chosen:
        row = rows.row(by_predicate=pl.col("image") == image, named=True)
        blocks = maps_NBrc[sorted(chosen).index(image)]
        pixels = read_pixels(attributes["geometry"], row)
        pictures.append(
            RelevancePicture(
                key=row["key"],
                label=names[row["label"]],
                prediction=names[row["prediction"]],
                right=row["label"] == row["prediction"],
                photo=photo_uri(pixels, layout.grid),
                heat=heat_uri(centred(np.stack([blocks.sum(axis=0), *blocks]))),
                texts=["all blocks", *shares(blocks)],
            )
        )
    return pictures


def centred(maps: np.ndarray) -> np.ndarray:
    """Maps [M, rows, columns] onto [0, 1], each by its own largest size; 0 becomes 1/2."""
    largest = np.abs(maps).max(axis=(1, 2), keepdims=True)
    return 0.5 + 0.5 * maps / np.where(largest > 0, largest, 1)


def shares(blocks: np.ndarray) -> list[str]:
    """Number of each block, and its share of the sizes of all values, [B, rows, columns]."""
    sizes = np.abs(blocks).sum(axis=(1, 2))
    percent = 100 * sizes / (sizes.sum() or 1)
    return [f"{block} · {value:.0f}%" for block, value in enumerate(percent)]


def perturbation_figure(path: Path) -> PerturbationFigure:
    """The figure of one file of `classlens perturb`.

    Raises:
        UsageError: it is none.
    """
    result = read_result(path)
    description = (
        "Accuracy over the share of image tokens kept, for each method; the areas are in the "
        "legend and their differences in the table below."
    )
    return PerturbationFigure(result, Markup(to_svg(perturbation_chart(result), description)))
