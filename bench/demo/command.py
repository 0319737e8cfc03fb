"""``classlens demo``: the whole path on images and a model that ship with the package."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import click

from classlens.extractor.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from classlens.bench.demo.prints_data import Split
    from classlens.extractor.config import ExtractConfig

IMAGES_PER_CLASS = 5
SHARD_IMAGES = 100
JPEG_QUALITY = 95
# What the model was trained on: no resize, no crop, its own normalisation.
CROP_PCT = 1.0


@click.command()
@click.option(
    "--out",
    default="classlens-demo",
    show_default=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for shards, stores and report.",
)
def demo(out: Path) -> None:
    """The whole path on data that ships with it: shards, extraction, query, report.

    Draws labelled images (printed cloths over photographs, with segmentation masks), scores
    every token of a small trained Vision Transformer and of the same model with random weights,
    verifies both stores, prints how identifiability rises over the blocks, and writes report.html.
    Run again, it resumes what is unfinished.
    """
    from classlens.analysis import scan
    from classlens.analysis.report import write_report
    from classlens.bench.demo.model_card import WEIGHTS
    from classlens.extractor.console import bar
    from classlens.extractor.console import status as spinner
    from classlens.extractor.prepare import prepare
    from classlens.extractor.run import extract

    shards = out / "shards"
    if not shards.exists():
        with bar("Drawing images") as progress:
            draw_shards(shards, progress)
    stores = {"model": str(WEIGHTS), "random-weights": "random:0"}
    for name, weights in stores.items():
        with spinner(f"Planning the shards, loading {name}"):
            prepared = prepare(demo_config(weights), [str(shards)], shards / "classes.txt")
        with bar(f"Scoring {name}") as progress:
            summary = extract(prepared, out / name, progress)
        verify_store(out / name)
        click.echo(
            f"{out / name}: {summary.images} images, {summary.bytes_per_image / 1e3:.1f} kB each, "
            "verified"
        )
    print_evolution({name: scan(out / name) for name in stores})
    with spinner("Writing the report"):
        page = write_report([out / "model"], out / "report.html", out / "random-weights")
    click.echo(f"\nOpen {page} in a browser. Ask further questions:")
    click.echo(
        f'  classlens query {out / "model"} "SELECT block, AVG(identifiability) AS mean '
        "FROM scores WHERE stream = 'attn' AND kind = 'patch' GROUP BY block ORDER BY block\""
    )


def demo_config(weights: str) -> ExtractConfig:
    """How the demo model is extracted, with these weights (a file, or ``random:SEED``)."""
    from classlens.bench.demo.model_card import MEAN, MODEL_ARGS, MODEL_NAME, STD
    from classlens.extractor.config import ExtractConfig

    overlay = {"mean": MEAN, "std": STD, "crop_pct": CROP_PCT}
    return ExtractConfig(
        model=MODEL_NAME,
        model_args={**MODEL_ARGS, "pretrained_cfg_overlay": overlay},
        weights=weights,
        batch_size=50,
    )


def draw_shards(
    out: Path,
    progress: Callable[[int, int], None] | None = None,
    *,
    split: Split = "test",
    per_class: int = IMAGES_PER_CLASS,
) -> None:
    """Writes images of a split as tar shards with masks, the same bytes every time.

    Raises:
        UsageError: the folder cannot be written.
    """
    from classlens.bench.demo.prints_data import CLASS_NAMES
    from classlens.extractor.pack import write_shards

    classes = len(CLASS_NAMES)
    total = classes * per_class
    samples = (_sample(split, i % classes, i // classes) for i in range(total))
    draft = out.with_name(f".{out.name}-unfinished")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
    except OSError as error:
        raise UsageError(f"{out} cannot be written ({error}); choose another --out.") from error
    write_shards(draft, samples, total, SHARD_IMAGES, CLASS_NAMES, progress)
    draft.rename(out)


def verify_store(store: Path) -> None:
    """Checks a store as ``classlens verify`` does.

    Raises:
        StoreError: something is wrong with it.
    """
    from classlens.extractor.errors import StoreError
    from classlens.extractor.store import verify

    if found := verify(store):
        raise StoreError(f"{store} is damaged ({found[0]}); delete it and run the demo again.")


def print_evolution(scores: dict) -> None:
    """Prints mean identifiability of image tokens by block and stream, one row a block."""
    import polars as pl
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title="Mean class identifiability of image tokens (chance 0.5)",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    table.add_column("block", justify="right")
    means = {}
    for name, frame in scores.items():
        grouped = (
            frame.filter(pl.col("kind") == "patch")
            .group_by("block", pl.col("stream").cast(pl.String))
            .agg(pl.col("identifiability").mean())
            .collect()
        )
        means[name] = {(b, s): value for b, s, value in grouped.iter_rows()}
    streams = sorted({stream for _, stream in means["model"]}, key=["resid", "attn", "mlp"].index)
    for stream in streams:
        for name in scores:
            table.add_column(f"{stream}\n{name.removesuffix('-weights')}", justify="right")
    for block in sorted({block for block, _ in means["model"]}):
        cells = [f"{means[name][block, stream]:.3f}" for stream in streams for name in scores]
        table.add_row(str(block), *cells)
    Console().print(table)


def _sample(split: Split, label: int, seed: int) -> dict[str, str | bytes]:
    import numpy as np

    from classlens.bench.demo.prints_data import CLASS_NAMES, draw

    pixels, mask = draw(split, label, seed)
    mask_id = label + 1
    ids = np.zeros((*mask.shape, 3), np.uint8)
    ids[mask, 0] = mask_id
    return {
        "__key__": f"{split}-{CLASS_NAMES[label]}-{seed}",
        "jpg": _encoded(pixels, "JPEG", quality=JPEG_QUALITY),
        "cls": str(label).encode(),
        "json": json.dumps({"mask_id": mask_id}).encode(),
        "mask.png": _encoded(ids, "PNG"),
    }


def _encoded(pixels, form: str, **options) -> bytes:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, **options)
    return buffer.getvalue()
