"""Input geometry: the resize and crop that image and mask both undergo, and the token grid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image
from timm.data.transforms_factory import transforms_imagenet_eval
from torchvision.transforms import Compose

MASK_CODE_BASE = 256  # ImageNet-S masks: id = R + 256·G


@dataclass(frozen=True)
class Geometry:
    """A model's evaluation transform, without the tensor conversion.

    input_size: (H, W) in pixels. crop_pct, crop_mode, interpolation: as in timm's data config.
    mean, std: per channel, on [0, 1] pixels.
    """

    input_size: tuple[int, int]
    crop_pct: float
    crop_mode: str
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @staticmethod
    def timm(config: Mapping[str, Any], input_size: tuple[int, int]) -> Geometry:
        """The model's own evaluation geometry.

        Args:
            config: timm's resolved data config.
            input_size: (H, W) the model takes; the data config still names the pretrained size for
                a model made at another ``img_size``.
        """
        return Geometry(
            input_size=input_size,
            crop_pct=float(config["crop_pct"]),
            crop_mode=config["crop_mode"],
            interpolation=config["interpolation"],
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
        )

    @staticmethod
    def squash(input_size: tuple[int, int]) -> Geometry:
        """Bilinear resize to H×W without a crop, mean = std = 0.5, as the paper's code."""
        half = (0.5, 0.5, 0.5)
        return Geometry(input_size, 1.0, "squash", "bilinear", half, half)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready mapping; :meth:`from_json` reads it back."""
        return asdict(self)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Geometry:
        """The geometry saved by :meth:`to_json`."""
        height, width = value["input_size"]
        return Geometry(
            input_size=(height, width),
            crop_pct=value["crop_pct"],
            crop_mode=value["crop_mode"],
            interpolation=value["interpolation"],
            mean=tuple(value["mean"]),
            std=tuple(value["std"]),
        )

    def crop(self, image: Image.Image) -> Image.Image:
        """The RGB picture the model sees, [H, W] pixels, before normalisation."""
        return self._image_transform(image)

    def resized_pixels(self, size: tuple[int, int]) -> int:
        """Pixels between resize and crop, for a picture of this (width, height)."""
        height, width = (side / self.crop_pct for side in self.input_size)
        if self.crop_mode != "center":  # the longer side fits, or both are squashed
            return round(height * width)
        scale = max(width / size[0], height / size[1])
        return round(size[0] * scale * size[1] * scale)

    def mask_coverage(self, mask: Image.Image, grid: tuple[int, int]) -> np.ndarray:
        """Covered share of each patch, after exactly the image's resize and crop.

        Args:
            mask: mode "L", 255 where the class is, 0 elsewhere; the image's size.
            grid: patch rows and columns.

        Returns:
            uint8 [rows·columns], 255 = wholly covered.
        """
        covered = np.asarray(self._mask_transform(mask), dtype=np.float32)
        rows, columns = grid
        height, width = self.input_size[0] // rows, self.input_size[1] // columns
        patches = covered[: rows * height, : columns * width].reshape(rows, height, columns, width)
        return np.rint(patches.mean(axis=(1, 3))).astype(np.uint8).reshape(-1)

    @cached_property
    def _image_transform(self) -> Compose:
        return self._transform(self.interpolation, self.mean)

    @cached_property
    def _mask_transform(self) -> Compose:
        # One channel of background where "border" pads; bilinear is an area average when shrinking.
        return self._transform("bilinear", (0.0,))

    def _transform(self, interpolation: str, mean: tuple[float, ...]) -> Compose:
        whole = transforms_imagenet_eval(
            img_size=self.input_size,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
            interpolation=interpolation,
            mean=mean,
            normalize=False,
        )
        return Compose(whole.transforms[:-1])  # all but the conversion to a tensor


def class_pixels(mask: Image.Image, mask_id: int | None) -> Image.Image:
    """255 where an ImageNet-S mask shows the class, 0 elsewhere (mode "L").

    Args:
        mask: RGB picture, id = R + 256·G; 0 is other, 1000 is ignore.
        mask_id: the image's class id; None takes every id that is neither other nor ignore.
    """
    rgb = np.asarray(mask.convert("RGB"), dtype=np.uint16)
    ids = rgb[..., 0] + MASK_CODE_BASE * rgb[..., 1]
    hit = (ids == mask_id) if mask_id is not None else (ids != 0) & (ids != 1000)
    return Image.fromarray(np.where(hit, np.uint8(255), np.uint8(0)))
