"""``pack --resize``: smaller pictures, which decode faster, and what that costs in pixels."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from classlens.extractor.plan import IMAGE_EXTENSIONS, JSON_EXTENSION, MASK_EXTENSION

JPEG_QUALITY = 95  # with full chroma resolution
IMAGES_COMPARED = 32


@dataclass(frozen=True)
class ResizeLoss:
    """What resizing did to the pictures.

    short_side: in pixels. resized: number of pictures made smaller. images_compared: how many of
    them were brought to 224 × 224 pixels (bicubic, central 90 %, as most ViTs take them) with and
    without the resize. mean_abs_difference, max_abs_difference: between the two, 0–255, over all
    samples of those pictures.
    """

    short_side: int
    resized: int
    images_compared: int
    mean_abs_difference: float
    max_abs_difference: int


class Resizer:
    """Makes the pictures of samples smaller, and measures the loss on some of them.

    Pictures whose short side is longer than ``short_side`` become JPEGs with that short side
    (bicubic over the covered area, quality 95); their masks are resized by nearest neighbour and
    their json says ``"resized": short_side``. All else is copied: smaller pictures, and samples
    whose picture or mask cannot be read or whose sizes differ, which `extract` reports.
    """

    def __init__(self, short_side: int, images: int) -> None:
        """images: how many samples there will be; those compared are spread over them."""
        self._short_side = short_side
        self._every = max(1, images // IMAGES_COMPARED)
        self._seen = self._resized = self._compared = 0
        self._sum, self._largest = 0.0, 0

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        """The sample with a smaller picture and mask, or the same sample."""
        self._seen += 1
        extension = next(e for e in IMAGE_EXTENSIONS if e in sample)
        try:
            image = Image.open(io.BytesIO(sample[extension])).convert("RGB")
            mask = None
            if MASK_EXTENSION in sample:
                mask = Image.open(io.BytesIO(sample[MASK_EXTENSION])).convert("RGB")
        except Exception:  # Pillow raises almost anything; the run reports the image itself
            return sample
        scale = self._short_side / min(image.size)
        if scale >= 1 or (mask is not None and mask.size != image.size):
            return sample
        size = (round(image.width * scale), round(image.height * scale))
        small = io.BytesIO()
        image.resize(size, Image.Resampling.BICUBIC).save(
            small, "JPEG", quality=JPEG_QUALITY, subsampling=0
        )
        self._resized += 1
        if (self._seen - 1) % self._every == 0:
            self._compare(image, Image.open(small).convert("RGB"))
        record = json.loads(sample[JSON_EXTENSION]) | {"resized": self._short_side}
        result = {name: data for name, data in sample.items() if name != extension}
        result |= {"jpg": small.getvalue(), JSON_EXTENSION: json.dumps(record).encode()}
        if mask is not None:
            small_mask = io.BytesIO()
            mask.resize(size, Image.Resampling.NEAREST).save(small_mask, "PNG")
            result[MASK_EXTENSION] = small_mask.getvalue()
        return result

    def loss(self) -> ResizeLoss:
        """What was done so far."""
        mean = self._sum / self._compared if self._compared else 0.0
        return ResizeLoss(
            self._short_side, self._resized, self._compared, round(mean, 3), self._largest
        )

    def _compare(self, image: Image.Image, small: Image.Image) -> None:
        whole, resized = (np.asarray(_model_input(i), np.int16) for i in (image, small))
        difference = np.abs(whole - resized)
        self._compared += 1
        self._sum += float(difference.mean())
        self._largest = max(self._largest, int(difference.max()))


def _model_input(image: Image.Image) -> Image.Image:
    from classlens.extractor.geometry import Geometry  # takes seconds: imports torch

    zero, one = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return Geometry((224, 224), 0.9, "center", "bicubic", zero, one).crop(image)
