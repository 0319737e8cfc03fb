"""``classlens bench extract``: images/s of an extraction beside the bare forward, in one run."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from classlens.extractor.run import Prepared

PICTURE_SIZE = (500, 375)  # the usual ImageNet photograph


@click.group()
def bench() -> None:
    """Measures throughput on this machine."""


@bench.command()
@click.option("--model", default="vit_base_patch16_224", show_default=True, help="A timm name.")
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), default="bfloat16",
              show_default=True)  # fmt: skip
@click.option("--device", default="cpu", show_default=True)
@click.option("--images", default=32, show_default=True, type=click.IntRange(2))
@click.option("--batch-size", default=16, show_default=True, type=click.IntRange(1))
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1),
              help="Each round times forward, scoring and extraction in turn.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON row.")
def extract(
    model: str, dtype: str, device: str, images: int, batch_size: int, rounds: int, as_json: bool
) -> None:
    """Bare forward, scoring in memory, and `extract` from JPEG tars to a store.

    Random weights, generated photographs of 500 x 375 pixels, three streams, rank + logit +
    log-probability + top-1. Before anything is timed, the store is verified and its ranks are
    compared with those scored in memory.
    """
    from classlens.extractor.config import ExtractConfig
    from classlens.extractor.console import status as spinner
    from classlens.extractor.run import prepare

    with tempfile.TemporaryDirectory() as folder, spinner("Measuring"):
        shards = write_photographs(Path(folder) / "shards", images, batch_size)
        config = ExtractConfig(
            model=model,
            weights="random:0",
            dtype=dtype,  # pyright: ignore[reportArgumentType]
            device=device,
            batch_size=batch_size,
        )
        row = measure(prepare(config, [str(shards)]), Path(folder), rounds)
    if as_json:
        click.echo(json.dumps(row))
        return
    for name, value in row.items():
        click.echo(f"{name:<34} {value}")


def measure(prepared: Prepared, folder: Path, rounds: int) -> dict[str, Any]:
    """Medians over the rounds, the three in turn so that a drifting machine hits them alike."""
    import torch

    from classlens.extractor.run import extract as run_extract
    from classlens.extractor.run import make_scorer
    from classlens.extractor.store import verify
    from classlens.kernels.class_scores import resolve_impl
    from classlens.kernels.cost import class_scores_cost, vit_forward_cost

    count, batch = prepared.plan.manifest.height, prepared.config.batch_size
    scorer = make_scorer(prepared)
    height, width = prepared.subject.geometry.input_size
    pixels = torch.randint(0, 256, (batch, height, width, 3), dtype=torch.uint8)
    labels = torch.arange(batch) % prepared.layout.classes
    stores = iter(folder / f"store{i}" for i in range(rounds + 1))

    @torch.inference_mode()
    def forward() -> None:
        for _ in range(0, count, batch):
            scorer.model(scorer.images(pixels)).float().sum().item()

    def scored() -> None:
        for _ in range(0, count, batch):
            scorer.score(pixels, labels)

    def end_to_end() -> None:
        run_extract(prepared, next(stores))

    end_to_end()
    if verify(folder / "store0"):
        raise AssertionError("the store that was to be timed is not whole")
    seconds = {name: [] for name in ("forward", "scored", "extract")}
    for _ in range(rounds):
        for name, task in (("forward", forward), ("scored", scored), ("extract", end_to_end)):
            seconds[name].append(_seconds(task))
    rate = {name: count / statistics.median(values) for name, values in seconds.items()}
    layout = prepared.layout
    model = prepared.subject.model
    forward_flops = vit_forward_cost(
        images=1,
        image_size=height,
        patch_size=height // layout.grid[0],
        prefix_tokens=layout.prefix,
        depth=layout.blocks,
        width=model.embed_dim,
        mlp_width=model.blocks[0].mlp.fc1.out_features,  # pyright: ignore
        classes=layout.classes,
    ).flops
    scoring_flops = class_scores_cost(
        images=1,
        tokens=len(layout.streams) * layout.blocks * layout.tokens,
        width=model.embed_dim,
        classes=layout.classes,
    ).flops
    size = sum(f.stat().st_size for f in (folder / "store0").rglob("*") if f.is_file())
    return {
        "model": prepared.config.model,
        "dtype": prepared.config.dtype,
        "device": prepared.config.device,
        "impl": resolve_impl(torch.empty(0, device=prepared.config.device), "auto"),
        "images": count,
        "batch_size": batch,
        "rounds": rounds,
        "forward_images_per_s": round(rate["forward"], 3),
        "scored_images_per_s": round(rate["scored"], 3),
        "extract_images_per_s": round(rate["extract"], 3),
        "scored_of_forward": round(rate["scored"] / rate["forward"], 3),
        "extract_of_forward": round(rate["extract"] / rate["forward"], 3),
        "extract_of_forward_at_equal_flops": round(
            forward_flops / (forward_flops + scoring_flops), 3
        ),
        "seconds": {k: [round(s, 3) for s in values] for k, values in seconds.items()},
        "bytes_per_image": round(size / count),
        **_machine(),
    }


def write_photographs(out: Path, count: int, per_shard: int) -> Path:
    """Tar shards of smooth random JPEGs with detail, labels 0, 1, …; returns the folder."""
    import io

    import numpy as np
    from PIL import Image

    from classlens.extractor.pack import write_shards

    def photograph(index: int) -> dict[str, Any]:
        rng = np.random.default_rng([index, 0])
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize(PICTURE_SIZE, Image.Resampling.BICUBIC), np.int16)
        grain = rng.normal(0, 12, smooth.shape)
        buffer = io.BytesIO()
        Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8)).save(buffer, "JPEG")
        label = str(index % 1000).encode()
        return {"__key__": f"{index:06d}", "jpg": buffer.getvalue(), "cls": label}

    write_shards(out, (photograph(i) for i in range(count)), count, per_shard, ["-"], None)
    return out


def _seconds(task: Callable[[], None]) -> float:
    started_s = time.perf_counter()
    task()
    return time.perf_counter() - started_s


def _machine() -> dict[str, Any]:
    import torch

    from classlens.kernels.label_margins import margins_pay

    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    capabilities = torch.cpu.get_capabilities()
    return {
        "cpu": capabilities.get("cpu_name") or platform.processor(),
        "native_bfloat16": margins_pay(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit or "unknown",
    }
