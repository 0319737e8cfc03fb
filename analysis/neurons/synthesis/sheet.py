"""All images of a variant on one sheet; those that the model takes for another class framed red."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from classlens.analysis.neurons.synthesis.rates import rates

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

SIDE, FRAME, GAP, MARGIN, LINE = 112, 4, 12, 24, 17
PAPER, INK, RED, PALE = "#FFFFFF", "#222222", "#C8102E", "#DDDDDD"


def contact_sheet(folder: Path, rows: pl.DataFrame, columns: int | None = None) -> Image:
    """A picture of the images of one variant after one number of steps.

    Args:
        rows: of `folder.SCHEMA`, in the order they are shown. columns: 10 when None, 25 for more
            than 250 images.
    """
    from PIL import Image, ImageDraw, ImageFont

    columns = columns or (25 if rows.height > 250 else 10)
    columns = min(columns, rows.height)
    width, height = SIDE + 2 * FRAME + GAP, SIDE + 2 * FRAME + 2 * LINE + GAP
    head = MARGIN + 3 * LINE
    size = (
        max(2 * MARGIN + columns * width - GAP, 640),
        head + MARGIN + -(-rows.height // columns) * height,
    )
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    title, plain = (ImageFont.load_default(points) for points in (20, 13))
    first, second = _titles(rows)
    draw.text((MARGIN, MARGIN - 6), first, INK, title)
    draw.text((MARGIN, MARGIN + 24), second, INK, plain)
    for place, row in enumerate(rows.iter_rows(named=True)):
        left, top = MARGIN + place % columns * width, head + place // columns * height
        right = row["predicted"] == row["label"]
        box = (left, top, left + SIDE + 2 * FRAME - 1, top + SIDE + 2 * FRAME - 1)
        draw.rectangle(box, PALE if right else RED)
        with Image.open(folder / row["file"]) as picture:
            shown = picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        sheet.paste(shown, (left + FRAME, top + FRAME))
        line = top + SIDE + 2 * FRAME + 1
        draw.text((left, line), _fitted(draw, _caption(row), plain), INK, plain)
        if not right:
            taken = _fitted(draw, f"taken for {_short(row['predicted_name'])}", plain)
            draw.text((left, line + LINE - 2), taken, RED, plain)
    return sheet


def _titles(rows: pl.DataFrame) -> tuple[str, str]:
    rate = rates(rows).row(0, named=True)
    return (
        f"{rate['variant']}, {rate['steps']:,} steps",
        f"{rate['right']:,} of {rate['images']:,} images taken for their class: "
        f"{rate['share']:.1%} (95% interval {rate['low']:.1%} to {rate['high']:.1%}). "
        "Framed red: taken for another.",
    )


def _caption(row: dict[str, Any]) -> str:
    name = _short(row["name"])
    return name if row["target"].startswith("class") else f"{row['keys']} · {name}"


def _short(name: str) -> str:
    return name.partition(",")[0]


def _fitted(draw: ImageDraw, text: str, font: Any) -> str:
    """The text, cut to the width of an image."""
    limit = SIDE + 2 * FRAME
    if draw.textlength(text, font) <= limit:
        return text
    while text and draw.textlength(text + "…", font) > limit:
        text = text[:-1]
    return text + "…"
