"""JPEG bytes -> RGB pictures: by simplejpeg where its pixels are PIL's, by PIL everywhere else."""

from __future__ import annotations

import io
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

DECODERS = {"simplejpeg": "simplejpeg", "pil": "pillow"}  # by name: the package

_FORMATS = {"JPEG", "MPO"}  # MPO: several JPEGs in one file, of which PIL too takes the first
_MODES = {"RGB", "L"}  # simplejpeg rounds CMYK otherwise than PIL


def to_rgb(data: bytes, opened: Image.Image, decoder: str) -> Image.Image:
    """The RGB picture of a file; its EXIF orientation is not applied.

    Args:
        data: the whole file.
        opened: what ``PIL.Image.open`` made of it, not loaded yet.
        decoder: a key of ``DECODERS``.

    Raises:
        whatever PIL raises on damaged bytes.
    """
    if decoder == "simplejpeg" and opened.format in _FORMATS and opened.mode in _MODES:
        try:
            # Strict: every warning of libjpeg raises, so a damaged file gets PIL's own verdict.
            return Image.fromarray(simplejpeg.decode_jpeg(data, "RGB", strict=True))
        except ValueError:
            pass
    return opened.convert("RGB")


def decoder_facts(decoder: str, files: Iterable[bytes], max_pixels: int) -> dict[str, Any]:
    """Which decoder it is, and how far its pixels are from PIL's on these files.

    Args:
        max_pixels: larger pictures are passed over, as are unreadable ones.

    Returns:
        ``name``, ``version``, ``images_compared``, ``max_abs_difference`` (0–255) and
        ``mean_abs_difference`` (over all samples of all pictures).
    """
    compared = largest = total = samples = 0
    for data in files:
        try:
            opened = Image.open(io.BytesIO(data))
            if opened.width * opened.height > max_pixels:
                continue
            ours = np.asarray(to_rgb(data, opened, decoder), np.int16)
            theirs = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.int16)
        except Exception:  # Pillow raises almost anything; the run reports the image itself
            continue
        difference = np.abs(ours - theirs)
        compared += 1
        largest = max(largest, int(difference.max()))
        total += int(difference.sum())
        samples += difference.size
    return {
        "name": decoder,
        "version": version(DECODERS[decoder]),
        "images_compared": compared,
        "max_abs_difference": largest,
        "mean_abs_difference": total / samples if samples else 0.0,
    }
