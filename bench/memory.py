"""``classlens bench memory``: resident memory of an extraction over very many images."""

from __future__ import annotations

import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click

MODEL = "vit_tiny_patch16_224"
MODEL_ARGS = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 48,
    "depth": 2,
    "num_heads": 3,
    "num_classes": 1000,
}
UNIT_IMAGES = 250
SAMPLES = 50


@click.command()
@click.option("--images", default=100_000, show_default=True, type=click.IntRange(2 * UNIT_IMAGES),
              help="In units of 250.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def memory(images: int, as_json: bool) -> None:
    """Whether an extraction's memory grows with the data set: resident memory along one run.

    A shard of 250 photographs of 500 x 375 pixels is given many names, and a small model (32
    pixels, 2 blocks) scores it under each, in a process of its own. Linux only. Before anything is
    printed, every image must have been scored and the store be whole.
    """
    from classlens.bench.machine import machine_facts
    from classlens.bench.result import print_result
    from classlens.extractor.console import status as spinner

    with (
        tempfile.TemporaryDirectory() as folder,
        spinner("Extracting"),
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process,
    ):
        shards = repeat_shard(Path(folder) / "shards", images // UNIT_IMAGES)
        row = process.submit(measure, shards, Path(folder) / "store").result()
    print_result({"benchmark": "memory", "machine": machine_facts(), "rows": [row]}, as_json)


def repeat_shard(out: Path, times: int) -> Path:
    """One shard of ``UNIT_IMAGES`` photographs under that many names; returns the folder."""
    from classlens.bench.photographs import write_photographs

    write_photographs(out, UNIT_IMAGES, UNIT_IMAGES)
    (shard,) = out.glob("*.tar")
    for copy in range(1, times):
        # Not a symbolic link: the plan takes two of those to one file for a mistake.
        os.link(shard, out / f"copy-{copy:06d}.tar")
    return out


def measure(shards: Path, store: Path) -> dict[str, Any]:
    """One row: the resident memory of this process while it extracts ``shards``, in MiB.

    ``planned_mib``: with the plan made and the model loaded, before the first image.
    ``growth_bytes_per_image``: slope of a straight line through all samples after 10 % of the run.

    Raises:
        AssertionError: an image was not scored, or the store is not whole.
    """
    from classlens.extractor.config import ExtractConfig
    from classlens.extractor.prepare import prepare
    from classlens.extractor.run import extract
    from classlens.extractor.store import verify

    config = ExtractConfig(model=MODEL, model_args=MODEL_ARGS, weights="random:0")
    prepared = prepare(config, [str(shards)])
    planned_mib = resident_mib("VmRSS")
    trajectory = Trajectory()
    summary = extract(prepared, store, trajectory)
    peak_mib = resident_mib("VmHWM")
    if summary.status != {"ok": summary.images} or verify(store):
        raise AssertionError(f"the store is not whole: {summary.status}")
    return {
        "images": summary.images,
        "planned_mib": planned_mib,
        "mib_at_10_percent": trajectory.at(0.1),
        "mib_at_50_percent": trajectory.at(0.5),
        "mib_at_100_percent": trajectory.at(1.0),
        "peak_mib": peak_mib,
        "growth_bytes_per_image": round(trajectory.slope() * 2**20, 1),
        "images_per_s": summary.images_per_s,
        "trajectory": [{"images": images, "mib": mib} for images, mib in trajectory.samples],
    }


class Trajectory:
    """A progress that notes the resident memory each time another part of the images is done.

    done: images so far. samples: (images done, MiB), about ``SAMPLES`` of them for any run.
    """

    def __init__(self) -> None:
        self.samples: list[tuple[int, float]] = []
        self.done = self._images = 0

    def started(self, images: int) -> None:
        """That many images in all."""
        self._images = images

    def advanced(self, images: int, *, scored: bool) -> None:
        """So many more images are done."""
        before = self.done * SAMPLES // self._images
        self.done += images
        if self.done * SAMPLES // self._images > before:
            self.samples.append((self.done, resident_mib("VmRSS")))

    def at(self, share: float) -> float:
        """MiB when that share of the images was done."""
        return next(mib for images, mib in self.samples if images >= share * self._images)

    def slope(self) -> float:
        """MiB an image, by least squares over the samples after the first tenth of the images."""
        import numpy as np

        settled = [s for s in self.samples if s[0] >= 0.1 * self._images]
        images, mib = np.array(settled).T
        return float(np.polyfit(images - images.mean(), mib, 1)[0])


def resident_mib(field: str) -> float:
    """``VmRSS``, the resident memory of this process, or ``VmHWM``, its highest so far, in MiB.

    Raises:
        UsageError: the system is no Linux.
    """
    from classlens.extractor.errors import UsageError

    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError as error:
        raise UsageError("Resident memory is read from /proc; measure on Linux.") from error
    kib = next(line.split()[1] for line in lines if line.startswith(f"{field}:"))
    return round(int(kib) / 1024, 1)
