"""The heat-maps of an image as one picture: a row a block, the report's panels and further neurons.

Each heat-map has its own range of colours, from its least to its largest activation, which stand
below it; the picture under it is grey, so that all hue is the heat-map's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from classlens.analysis.colors import SEQUENTIAL, in_colors
from classlens.analysis.neurons.heatmap import PERCENTILE, HeatMaps

PANEL, GAP, GROUP_GAP = 168, 10, 26
MARGIN, LABEL, CAPTION, HEADER, TITLE, LEGEND = 24, 92, 42, 50, 44, 48
INK, FAINT, PAPER = "#222222", "#6B6B6B", "#FFFFFF"
HEAT_SHARE = 0.6
"""How much of an overlay is the heat-map's colour."""
OUTSIDE = 0.22
"""Brightness of a picture outside a mask."""


class Panel(NamedTuple):
    """One picture of a row, and the two lines below it."""

    pixels: np.ndarray
    caption: str = ""
    detail: str = ""


def draw(maps: HeatMaps, title: str, captions: Sequence[Sequence[str]]) -> Image.Image:
    """The figure, RGB.

    Args:
        captions: of each block and neuron, such as its name.
    """
    headers = list(_headers(maps))
    groups = _groups(headers)
    lefts, right = [], MARGIN + LABEL
    for group in groups:
        right += GROUP_GAP if group else 0
        lefts.append(right)
        right += PANEL + GAP
    height, width = maps.pixels.shape[:2]
    panel_height = round(PANEL * height / width)
    row_height = panel_height + CAPTION
    top = MARGIN + TITLE + HEADER
    size = (right - GAP + MARGIN, top + len(maps.blocks) * row_height + LEGEND + MARGIN // 2)
    figure = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(figure)
    pen.text((MARGIN, MARGIN), title, INK, _font(24))
    for left, header in zip(lefts, headers, strict=True):
        pen.multiline_text((left, top - HEADER + 6), header, INK, _font(16), spacing=3)
    for row, block in enumerate(maps.blocks):
        y = top + row * row_height
        pen.text((MARGIN, y + panel_height // 2), f"block {block}", INK, _font(18), anchor="lm")
        for left, panel in zip(lefts, _panels(maps, row, captions[row]), strict=True):
            picture = Image.fromarray(panel.pixels)
            figure.paste(picture.resize((PANEL, panel_height), Image.Resampling.BICUBIC), (left, y))
            pen.text((left, y + panel_height + 3), panel.caption, INK, _font(14))
            pen.text((left, y + panel_height + 20), panel.detail, FAINT, _font(13))
    _legend(figure, lefts[0], size[1] - LEGEND)
    return figure


def overlay(pixels: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """A heat-map [H, W] in colour over the grey picture, uint8 [H, W, 3]."""
    span = np.ptp(heat)
    colors = in_colors((heat - heat.min()) / (span if span else 1.0), SEQUENTIAL)
    grey = np.asarray(Image.fromarray(pixels).convert("L"))[..., None]
    return np.rint(HEAT_SHARE * colors + (1 - HEAT_SHARE) * grey).astype(np.uint8)


def spotlight(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A picture that is dark outside a mask, uint8 [H, W, 3]."""
    return np.rint(pixels * np.where(mask, 1.0, OUTSIDE)[..., None]).astype(np.uint8)


def _headers(maps: HeatMaps) -> Iterator[str]:
    above = f"above its {PERCENTILE:.0f}th\npercentile"
    yield from ("image", "top neuron" if maps.neurons.shape[1] > 1 else "neuron", above)
    if len(maps.blocks) > 1:
        yield from ("mean of top neurons\nof the blocks so far", above)
    yield from (f"{place + 1}. neuron" for place in range(1, maps.neurons.shape[1]))


def _groups(headers: Sequence[str]) -> list[bool]:
    """Whether a wider gap stands before each column."""
    return [header.startswith(("mean", "2.")) for header in headers]


def _panels(maps: HeatMaps, row: int, captions: Sequence[str]) -> Iterator[Panel]:
    """In the order of the headers."""

    def heat(values: np.ndarray, caption: str) -> Panel:
        extent = f"{values.min():+.2f} … {values.max():+.2f}"
        return Panel(overlay(maps.pixels, values), caption, extent)

    yield Panel(maps.pixels)
    yield heat(maps.heat[row, 0], captions[0])
    yield Panel(spotlight(maps.pixels, maps.mask[row, 0]))
    if len(maps.blocks) > 1:
        blocks = "block 0" if row == 0 else f"blocks 0 to {maps.blocks[row]}"
        yield heat(maps.mean_heat[row], blocks)
        yield Panel(spotlight(maps.pixels, maps.mean_mask[row]))
    for place in range(1, len(captions)):
        yield heat(maps.heat[row, place], captions[place])


def _legend(figure: Image.Image, left: int, top: int) -> None:
    pen, length, thickness = ImageDraw.Draw(figure), 220, 14
    scale = in_colors(np.linspace(0, 1, length)[None], SEQUENTIAL)
    bar = Image.fromarray(scale.repeat(thickness, axis=0))
    pen.text((left, top), "least", FAINT, _font(14))
    figure.paste(bar, (left + 44, top + 2))
    text = "largest activation of each panel, before the activation function"
    pen.text((left + 44 + length + 10, top), text, FAINT, _font(14))


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
