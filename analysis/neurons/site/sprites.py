"""Pictures as thumbnails, many to a file.

Each picture is on one sheet once, however many pages show it. A sheet is small, because a browser
decodes all of it for one picture; pictures of a class are neighbours, so that a page of a neuron
that likes one class needs few of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 112
"""Width of a thumbnail in pixels: JPEG's blocks of 16 do not reach over its edge."""
BLOCK = 16
COLUMNS = 8
PER_SHEET = COLUMNS * COLUMNS
QUALITY = 82


@dataclass(frozen=True)
class Sheets:
    """Where pictures stand. height: of a thumbnail, in pixels; its width is ``SIDE``."""

    height: int

    @staticmethod
    def of(aspect: float) -> Sheets:
        """For pictures of this height over width, rounded to whole JPEG blocks."""
        return Sheets(max(BLOCK, round(SIDE * aspect / BLOCK) * BLOCK))

    def file(self, picture: int) -> str:
        """The sheet with this picture, relative to the site."""
        return f"sprites/{picture // PER_SHEET:05d}.jpg"

    def corner(self, picture: int) -> tuple[int, int]:
        """Left and top edge of the picture on its sheet, in pixels."""
        row, column = divmod(picture % PER_SHEET, COLUMNS)
        return column * SIDE, row * self.height

    def write(self, pixels: Iterable[np.ndarray], out: Path) -> int:
        """Writes the sheets into the site ``out``; returns how many pictures there were.

        Args:
            pixels: uint8 [H, W, 3], in the order of their numbers.
        """
        (out / "sprites").mkdir(exist_ok=True)
        count = 0
        left = iter(pixels)
        while group := list(islice(left, PER_SHEET)):
            rows = -(-len(group) // COLUMNS)
            sheet = Image.new("RGB", (COLUMNS * SIDE, rows * self.height))
            first = count
            for picture in group:
                thumbnail = Image.fromarray(picture).resize(
                    (SIDE, self.height), Image.Resampling.LANCZOS
                )
                sheet.paste(thumbnail, self.corner(count))
                count += 1
            sheet.save(out / self.file(first), "JPEG", quality=QUALITY, subsampling=2)
        return count
