"""Pictures, samples and shards small enough to read."""

import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image


@dataclass
class Sample:
    """Members of one key, in the order they are written."""

    key: str
    members: dict[str, bytes] = field(default_factory=dict)


def picture(seed: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """A smooth random RGB picture; size is (width, height)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, form: str = "JPEG") -> bytes:
    """The bytes of a picture file."""
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def mask_png(seed: int, mask_id: int, size: tuple[int, int] = (48, 40)) -> bytes:
    """An ImageNet-S mask: a box of ``mask_id`` in front of 0, with a margin of 1000 (ignore)."""
    ids = np.zeros((size[1], size[0]), np.uint16)
    left, top = np.random.default_rng(seed).integers(2, 12, 2)
    ids[top - 2 : top + 24, left - 2 : left + 24] = 1000
    ids[top : top + 22, left : left + 22] = mask_id
    rgb = np.stack([ids % 256, ids // 256, np.zeros_like(ids)], axis=-1).astype(np.uint8)
    return encoded(Image.fromarray(rgb), "PNG")


def sample(index: int, *, classes: int = 10, mask: bool = True, key: str | None = None) -> Sample:
    """A complete sample with the label ``index % classes``."""
    label = index % classes
    members = {
        "jpg": encoded(picture(index)),
        "cls": str(label).encode(),
        "json": json.dumps({"mask_id": label + 300}).encode(),
    }
    if mask:
        members["mask.png"] = mask_png(index, label + 300)
    return Sample(key or f"image{index:04d}", members)


def write_tar(path: Path, samples: Sequence[Sample]) -> Path:
    """A tar with the samples' members one after another."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for one in samples:
            for extension, data in one.members.items():
                info = tarfile.TarInfo(f"{one.key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path
