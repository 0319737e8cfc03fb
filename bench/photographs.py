"""Generated photographs in tar shards: what the benchmarks read in the place of a data set."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

PICTURE_SIZE = (500, 375)  # the usual ImageNet photograph


def write_photographs(out: Path, count: int, per_shard: int, classes: int = 1000) -> Path:
    """Tar shards of smooth random JPEGs with grain, labels 0, 1, …; returns the folder.

    Pictures of 500 x 375 pixels take about 100 kB, as ImageNet's do.
    """
    from classlens.extractor.pack import write_shards

    samples = (_sample(index, classes) for index in range(count))
    write_shards(out, samples, count, per_shard, ["-"], None)
    return out


def _sample(index: int, classes: int) -> dict[str, Any]:
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng([index, 0])
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize(PICTURE_SIZE, Image.Resampling.BICUBIC), np.int16)
    grain = rng.normal(0, 12, smooth.shape)
    buffer = io.BytesIO()
    Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8)).save(buffer, "JPEG")
    label = str(index % classes).encode()
    return {"__key__": f"{index:06d}", "jpg": buffer.getvalue(), "cls": label}
