"""The commands ``pack``, ``extract``, ``info``, ``status`` and ``verify``.

torch and zarr are imported inside the functions, so that ``--help`` is quick.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from classlens.extractor.console import bar
from classlens.extractor.console import status as spinner
from classlens.extractor.errors import UsageError
from classlens.extractor.schema import INTERVENTIONS, REDUCERS

if TYPE_CHECKING:
    from classlens.extractor.config import ExtractConfig
    from classlens.extractor.prepare import Prepared
    from classlens.extractor.summary import Summary

FOLDER = click.Path(path_type=Path, file_okay=False)
EXISTING_FOLDER = click.Path(path_type=Path, exists=True, file_okay=False)
EXISTING_FILE = click.Path(path_type=Path, exists=True, dir_okay=False)
RESIZE_HELP = "Shrink pictures to this short side (JPEG, quality 95); default: copy the bytes."
PER_CLASS_HELP = "Take the first N images of each class, in sorted order; skip smaller classes."


@click.group()
def pack() -> None:
    """Images and masks -> tar shards that `extract` reads.

    Picture bytes are copied, and encoded anew only with --resize. Each image becomes KEY.jpg,
    KEY.cls, KEY.json and, where there is one, KEY.mask.png (webdataset layout). ImageNet shards in
    the common jpg + cls layout need no packing.
    """


@pack.command("imagenet-s")
@click.argument("root", type=EXISTING_FOLDER)
@click.argument("out", type=FOLDER)
@click.option("--split", default="validation", show_default=True, help="train, validation or test.")
@click.option("--per-class", type=click.IntRange(1), help=PER_CLASS_HELP + " The paper takes 5.")
@click.option("--shard-images", default=512, show_default=True, help="Images in one tar.")
@click.option("--resize", type=click.IntRange(1), metavar="N", help=RESIZE_HELP)
@click.option("--categories", type=EXISTING_FILE, help="ImageNetS_categories_im919.txt.")
@click.option("--synset-mapping", type=EXISTING_FILE, help="LOC_synset_mapping.txt.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def pack_imagenet_s_command(root: Path, out: Path, as_json: bool, **options: Any) -> None:
    """ImageNet-S, in its official tree, with segmentation masks.

    \b
    classlens pack imagenet-s ImageNetS919 shards --split validation --per-class 5
    """
    from classlens.extractor.pack_imagenet_s import pack_imagenet_s

    with bar("Packing") as progress:
        summary = pack_imagenet_s(root, out, progress=progress, **options)
    _report_pack(summary, as_json)


@pack.command("imagefolder")
@click.argument("root", type=EXISTING_FOLDER)
@click.argument("out", type=FOLDER)
@click.option("--shard-images", default=512, show_default=True, help="Images in one tar.")
@click.option("--resize", type=click.IntRange(1), metavar="N", help=RESIZE_HELP)
@click.option(
    "--class-names",
    type=EXISTING_FILE,
    help="Lines 'FOLDER NAME' in class order; default: sorted folders.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def pack_imagefolder_command(root: Path, out: Path, as_json: bool, **options: Any) -> None:
    """One folder of pictures a class.

    \b
    classlens pack imagefolder PHOTOS shards
    """
    from classlens.extractor.pack import pack_imagefolder

    with bar("Packing") as progress:
        summary = pack_imagefolder(root, out, progress=progress, **options)
    _report_pack(summary, as_json)


def model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of ``extract`` and ``probe`` that say what is read by which model, and how."""
    options = (
        click.option("--model", required=True, help="A timm ViT, e.g. vit_base_patch16_224."),
        click.option("--out", required=True, type=FOLDER,
                     help="The store; an unfinished one is resumed."),
        click.option("--weights", default="pretrained", show_default=True,
                     help="pretrained | random[:SEED] | FILE (safetensors or state dict)."),
        click.option("--model-arg", "model_args", multiple=True, metavar="KEY=VALUE",
                     help="Passed to timm.create_model, e.g. img_size=384; repeatable."),
        click.option("--geometry", type=click.Choice(["timm", "squash"]), default="timm",
                     show_default=True,
                     help="timm: the model's own resize and crop. squash: resize without crop, "
                     "mean = std = 0.5, as the paper's code."),
        click.option("--streams", default="resid,attn,mlp", show_default=True,
                     help="Which of resid, mid, attn, mlp to score."),
        click.option("--topk", default=1, show_default=True,
                     help="Top classes kept for each token."),
        click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]),
                     help="Of the forward pass  [default: float32 on CPU, float16 on GPU]"),
        click.option("--device", help="cpu, cuda, cuda:1 …  [default: the GPU if there is one]"),
        click.option("--class-names", type=EXISTING_FILE,
                     help="One class name a line, in class order."),
        click.option("--json", "as_json", is_flag=True,
                     help="Print the summary as JSON on stdout."),
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


@click.command()
@click.argument("shards", nargs=-1, required=True)
@model_options
@click.option("--convention", type=click.Choice(["corrected", "vilas2023"]), default="corrected",
              show_default=True,
              help="vilas2023 projects attention and MLP outputs of GAP models through their "
              "block's norm first.")  # fmt: skip
@click.option("--reduce", multiple=True, type=click.Choice(REDUCERS),
              help="What to keep besides the ranks; repeatable.")  # fmt: skip
@click.option("--classes", type=click.Path(exists=True, dir_okay=False), metavar="FILE",
              help="Class embeddings in place of the model's own classes: safetensors with "
              "'embeddings' [classes, width of the head], such as CLIP's of texts; labels count "
              "its rows.")  # fmt: skip
@click.option("--intervene", type=click.Choice(INTERVENTIONS),
              help="Score a changed model: image tokens attend to themselves only, or not to CLS; "
              "or those of context or class are removed (needs masks).")  # fmt: skip
@click.option("--blocks", "intervene_blocks", metavar="BLOCKS",
              help="Where attention is knocked out, e.g. 0-5,8  [default: all]")  # fmt: skip
@click.option("--class-fraction", default=0.5, show_default=True, metavar="F",
              help="drop-…: a patch is class when its mask covers this share.")  # fmt: skip
@click.option("--per-head", is_flag=True, help="Keep the attribution of each head too.")
@click.option("--batch-size", type=click.IntRange(1),
              help="[default: 32 on a CPU; what a GPU has memory for, up to 512]")  # fmt: skip
@click.option("--certify", is_flag=True,
              help="Prove every rank equal to that of exact arithmetic, or mend it.")  # fmt: skip
@click.option("--compile/--no-compile", default=None,
              help="Have torch.compile fuse the forward pass and the reductions; a CPU needs a C++ "
              "compiler. CPUs with AMX or AVX-512 take kernels made for them instead, unless "
              "--no-compile.  [default: on a CPU, from 3,000 images]")  # fmt: skip
@click.option("--cuda-graph", is_flag=True, help="Launch each batch on a GPU as one graph.")
@click.option("--decoder", type=click.Choice(["simplejpeg", "pil"]), default="simplejpeg",
              show_default=True,
              help="Of JPEGs; how far its pixels are from PIL's is stored.")  # fmt: skip
@click.option("--decode-threads", type=click.IntRange(1),
              help="[default: suits the machine; 1 on a small CPU]")  # fmt: skip
@click.option("--max-pixels", default=100_000_000, show_default=True,
              help="Larger pictures are not decoded.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Check the shards and print what would be done.")
def extract(
    shards: tuple[str, ...],
    out: Path,
    class_names: Path | None,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> int | None:
    """Scores every token of every block of the images in SHARDS and writes a store.

    SHARDS are tar files, folders of them, or brace patterns. The store holds for each token the
    rank of the image's label among all classes, its logit and log-probability, and the top
    classes. A killed run goes on where it stopped when the same command is given again; several
    may work on one store at once. Images that cannot be scored are counted and the exit code is 3.

    \b
    classlens extract 'shards/shard-{000000..000024}.tar' --model vit_base_patch16_224 --out store
    classlens extract shards --model deit3_small_patch16_224 --weights random:0 --out control
    classlens extract shards --model vit_base_patch16_clip_224.openai --classes texts.safetensors \\
        --out clip
    """
    from classlens.extractor.prepare import prepare
    from classlens.extractor.run import extract as run_extract
    from classlens.extractor.summary import summary_json

    config = make_config(**options)
    with spinner("Walking the shards and loading the model"):
        prepared = prepare(config, shards, class_names)
    if dry_run:
        _print_plan(prepared, out, as_json)
        return None
    with bar("Scoring") as progress:
        summary = run_extract(prepared, out, progress)
    if as_json:
        click.echo(json.dumps(summary_json(summary)))
    else:
        print_summary(summary)
        _print_faster(config)
    return 3 if summary.bad_images else None


@click.command()
@click.argument("store", type=EXISTING_FOLDER)
@click.option("--json", "as_json", is_flag=True, help="All attributes as JSON.")
def info(store: Path, as_json: bool) -> None:
    """What a store holds and how it was made."""
    from classlens.extractor.config import intervention_text
    from classlens.extractor.schema import Layout, all_arrays, read_attributes

    attributes = read_attributes(store)
    if as_json:
        click.echo(json.dumps(attributes))
        return
    layout, config = Layout.from_json(attributes["layout"]), attributes["config"]
    decoder = attributes["decoder"]
    rows = {
        "model": f"{config['model']}, weights {config['weights']}",
        "numerics": f"{config['dtype']} on {attributes['device']}",
        "forward": attributes["forward"],
        "scoring": attributes["impl"] + (", certified" if config["certify"] else ""),
        "decoder": f"{decoder['name']} {decoder['version']}, at most "
        f"{decoder['max_abs_difference']} of 255 from PIL on {decoder['images_compared']} images",
        "geometry": f"{config['geometry']}, {_shape(attributes['geometry']['input_size'])} pixels",
        "convention": config["convention"],
        "intervened": intervention_text(config),
        "blocks": layout.blocks,
        "streams": ", ".join(layout.streams) or "none",
        "tokens": ", ".join((*layout.prefix_kinds, f"{_shape(layout.grid)} patches")),
        "classes": _classes(layout.classes, attributes.get("class_file")),
        "masks": "yes" if layout.masks else "no",
        "versions": ", ".join(f"{k} {v}" for k, v in attributes["versions"].items()),
    }
    if "probe" in attributes:
        probe = attributes["probe"]
        rows["scoring"] += f", alpha {probe['alpha']:g}, {probe['train_images']:,} training images"
    for name, value in rows.items():
        click.echo(f"{name:<11} {value}")
    click.echo("arrays")
    for spec in all_arrays(layout):
        axes = ", ".join(f"{a} {n}" for a, n in zip(spec.axes, spec.shape(layout), strict=True))
        click.echo(f"  {spec.path:<23} {spec.dtype:<8} [{axes}]")


@click.command()
@click.argument("store", type=EXISTING_FOLDER)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(store: Path, as_json: bool) -> None:
    """How far an extraction is, and what became of its images."""
    from classlens.extractor.schema import committed_units, read_layout
    from classlens.extractor.store import status_totals

    layout, done, totals = read_layout(store), committed_units(store), status_totals(store)
    if as_json:
        facts = {"units": layout.units, "units_committed": len(done), "status": totals}
        click.echo(json.dumps(facts))
        return
    click.echo(f"{len(done)} of {layout.units} units committed")
    for name, count in totals.items():
        click.echo(f"{count:>9,} images {name}")
    if len(done) < layout.units:
        click.echo("The same command as before goes on with the rest.")


@click.command()
@click.argument("store", type=EXISTING_FOLDER)
@click.option("--repair", is_flag=True, help="Forget damaged units, so that `extract` redoes them.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def verify(store: Path, repair: bool, as_json: bool) -> None:
    """Checks every byte of a store against its hashes and every image for its row.

    Finds flipped bits, missing shards, missing rows and units not extracted yet. Exit code 6 if
    anything is found.
    """
    from classlens.extractor.errors import StoreError
    from classlens.extractor.schema import read_layout
    from classlens.extractor.store import verify as run_verify

    with bar("Verifying") as progress:
        progress(0, read_layout(store).units)
        found = run_verify(store, repair=repair, progress=progress)
    if as_json:
        click.echo(json.dumps([vars(damage) for damage in found]))
    for damage in found if not as_json else []:
        where = "store" if damage.unit is None else f"unit {damage.unit}"
        click.echo(f"{where}: {damage.file} {damage.problem}")
    if found:
        remedy = "run the same `extract` again" if repair else "run `classlens verify --repair`"
        raise StoreError(f"{store}: {len(found)} findings; {remedy}.")
    click.echo(f"{store} is whole.", err=as_json)


def make_config(
    streams: str,
    model_args: tuple[str, ...],
    dtype: str | None,
    device: str | None,
    intervene_blocks: str | None = None,
    **rest: Any,
) -> ExtractConfig:
    """The settings that the options of a command stand for."""
    import torch

    from classlens.extractor.config import ExtractConfig, parse_blocks

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return ExtractConfig(
        streams=tuple(name for name in streams.split(",") if name),
        model_args=dict(parse_model_arg(argument) for argument in model_args),
        intervene_blocks=None if intervene_blocks is None else parse_blocks(intervene_blocks),
        dtype=dtype or ("float32" if device == "cpu" else "float16"),  # pyright: ignore
        device=device,
        **rest,
    )


def parse_model_arg(argument: str) -> tuple[str, Any]:
    """KEY=VALUE -> (KEY, VALUE), the value read as JSON where it is JSON.

    Raises:
        UsageError: there is no "=".
    """
    name, separator, text = argument.partition("=")
    if not separator:
        raise UsageError(f"--model-arg takes KEY=VALUE, got {argument!r}.")
    try:
        return name, json.loads(text)
    except ValueError:
        return name, {"True": True, "False": False, "None": None}.get(text, text)


def _print_plan(prepared: Prepared, out: Path, as_json: bool) -> None:
    plan = prepared.plan
    facts = {
        "store": str(out),
        "units": len(plan.units),
        "images": plan.manifest.height,
        "with_masks": prepared.layout.masks,
        "shard_bytes": sum(unit.stop - unit.start for unit in plan.units),
        "store_bytes_before_compression": plan.manifest.height * prepared.raw_bytes_per_image
        + len(plan.units) * prepared.raw_bytes_per_unit,
    }
    if as_json:
        click.echo(json.dumps(facts))
        return
    click.echo(f"{facts['units']:,} units, {facts['images']:,} images", nl=False)
    click.echo(" with masks" if facts["with_masks"] else " without masks")
    click.echo(f"{facts['shard_bytes'] / 1e6:,.1f} MB of images to read")
    of_unit = f", {prepared.raw_bytes_per_unit / 1e6:,.1f} MB a unit"
    click.echo(
        f"{facts['store_bytes_before_compression'] / 1e6:,.1f} MB of scores before compression "
        f"({prepared.raw_bytes_per_image / 1e3:,.1f} kB an image"
        f"{of_unit if prepared.raw_bytes_per_unit else ''}); the store is smaller"
    )


def print_summary(summary: Summary) -> None:
    """What a run did, in words."""
    good = summary.status.get("ok", 0)
    click.echo(
        f"{summary.store}: {good:,} of {summary.images:,} images scored, "
        f"{summary.bytes_per_image / 1e3:.1f} kB an image"
    )
    if summary.scored:
        click.echo(
            f"this run: {summary.scored:,} images, {summary.images_per_s:.1f} images/s, "
            f"held back by {summary.held_back_by}"
        )
        busy = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in summary.stages.items())
        click.echo(f"busy seconds: {busy}; threads that decode: {summary.decode_threads}")
    if summary.recomputed_share is not None:
        click.echo(f"every rank is certified; {summary.recomputed_share:.2%} took float64")
    for name, count in summary.status.items():
        if name != "ok":
            click.echo(f"not scored: {count:,} {name} (see the table `images`, column status)")
    left = summary.units - summary.units_committed
    if left:
        click.echo(f"{left} units are with other processes; `classlens status` shows when done")


def _print_faster(config: ExtractConfig) -> None:
    """What this CPU would do faster, if there is something."""
    from classlens.extractor.scorer import DTYPES
    from classlens.kernels import cpp, tiles
    from classlens.kernels.cpu_bfloat16 import bfloat16_speedup, native_bfloat16

    if not config.on_cpu:
        return
    if config.dtype == "float32" and native_bfloat16():
        times = bfloat16_speedup(fused=config.compile is not False)
        click.echo(
            f"this CPU multiplies bfloat16 {times:.1f} times as fast: --dtype bfloat16, which is "
            "less exact (`classlens bench fidelity` says by how much)"
        )
    fused = any(tiles.has_units(units, DTYPES[config.dtype]) for units in tiles.UNITS)
    if fused and cpp.compiler() is None:
        click.echo(
            "this CPU scores up to twice as fast by kernels that need a C++ compiler: install g++, "
            "or `pip install 'classlens[compiler]'`"
        )


def _report_pack(summary: Any, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(asdict(summary), default=str))
        return
    click.echo(
        f"{summary.out}: {summary.images:,} images of {summary.classes} classes in "
        f"{summary.shards} shards, {summary.masks:,} with a mask"
    )
    if summary.resize is not None:
        loss = summary.resize
        click.echo(
            f"{loss.resized:,} images resized to a short side of {loss.short_side} pixels; at "
            f"224 × 224 pixels {loss.images_compared} of them differ from the unresized by "
            f"{loss.mean_abs_difference:.2f} on average, {loss.max_abs_difference} at most (of 255)"
        )
    if 0 < summary.masks < summary.images:
        lacking = summary.images - summary.masks
        click.echo(f"{lacking:,} images lack a mask; they are not scored where others have one")
    for left_out, reason in (
        (summary.too_few, "fewer images than --per-class"),
        (summary.merged, "two ImageNet-1k classes merged into one, so the label is not known"),
    ):
        if left_out:
            click.echo(f"{len(left_out)} classes left out ({reason}): {', '.join(left_out)}")


def _classes(count: int, file: dict[str, str] | None) -> str:
    if file is None:
        return f"{count:,}"
    source = f" ({file['source']})" if file["source"] else ""
    return f"{count:,} of {file['name']}{source}"


def _shape(sizes: Any) -> str:
    return "×".join(str(size) for size in sizes)
