"""``neurons synthesize``. Heavy modules are imported when it runs, so that ``--help`` is quick."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from classlens.extractor.console import bar
from classlens.extractor.console import status as spinner
from classlens.extractor.errors import UsageError

if TYPE_CHECKING:
    import polars as pl
    from rich.table import Table

    from classlens.analysis.neurons.synthesis.objectives import Target
    from classlens.analysis.neurons.synthesis.targets import Selection
    from classlens.extractor.models import Subject

VARIANTS = ("top1", "topk", "top1-diverse", "topk-diverse")
DIVERSE_IMAGES = 3


@click.command()
@click.argument("source")
@click.option("--weights", help="Of a model: pretrained | random[:SEED] | FILE  "
              "[default: pretrained]")  # fmt: skip
@click.option("--model-arg", "model_args", multiple=True, metavar="KEY=VALUE",
              help="Of a model: passed to timm.create_model; repeatable.")  # fmt: skip
@click.option("--out", required=True, type=click.Path(path_type=Path, file_okay=False),
              help="Folder of images, table and sheets; a killed run goes on in it.")  # fmt: skip
@click.option("--variant", "variants", multiple=True, type=click.Choice(VARIANTS),
              default=("top1",), help="Repeatable  [default: top1]")  # fmt: skip
@click.option("--classes", metavar="3,17", help="Only these classes  [default: all]")
@click.option("--neurons", metavar="10:56,11:2",
              help="These neurons in place of classes' neurons; top1 variants only.")  # fmt: skip
@click.option("--select", type=click.Choice(["alignment", "probability"]), default="alignment",
              show_default=True,
              help="A class's neurons: by E·v, or by softmax of head(norm(v)).")  # fmt: skip
@click.option("--keys", default=5, show_default=True, type=click.IntRange(1),
              help="k of topk.")  # fmt: skip
@click.option("--tokens", type=click.Choice(["patches", "cls", "all"]), default="patches",
              show_default=True, help="Whose coefficients are averaged.")  # fmt: skip
@click.option("--after-gelu", is_flag=True, help="Raise GELU(h) in place of h.")
@click.option("--images", type=click.IntRange(1),
              help=f"Of each target  [default: 1; diverse: {DIVERSE_IMAGES}]")  # fmt: skip
@click.option("--diversity", default=1.0, show_default=True,
              type=click.FloatRange(0, min_open=True),
              help="Weight of the diversity term.")  # fmt: skip
@click.option("--steps", default="250,500,750", show_default=True,
              help="Save and classify after these steps.")  # fmt: skip
@click.option("--size", type=click.IntRange(8),
              help="Shorter side of the images, pixels  [default: the model's input]")  # fmt: skip
@click.option("--strength", default=1.0, show_default=True, type=click.FloatRange(0, 4),
              help="Of the transforms; 1 is the report's.")  # fmt: skip
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32",
              show_default=True, help="Of the model's passes; bfloat16 is quick on CPUs with "
              "AMX or AVX512_BF16 and on GPUs.")  # fmt: skip
@click.option("--batch-size", default=32, show_default=True, type=click.IntRange(1),
              help="Images at a time; changes nothing but rounding.")  # fmt: skip
@click.option("--device", help="cpu, cuda, cuda:1 …  [default: the GPU if there is one]")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**32 - 1))
@click.option("--json", "as_json", is_flag=True, help="Print the rates as JSON.")
def synthesize(source: str, out: Path, as_json: bool, **options: Any) -> None:
    """Images that key neurons answer to most, and what the model takes them for.

    SOURCE is a store, or a timm model. For each class, the value vector that is most predictive of
    it over all blocks is found, and gradient ascent looks for the image that its key answers to
    most: the mean of the coefficient before the GELU, over patches. The image is a spectrum with
    decorrelated colours, and every step sees it padded, jittered, scaled and rotated at random.

    \b
    top1          the key of the most predictive value vector
    topk          the mean over the keys of the --keys most predictive ones
    …-diverse     several images a class, their features pushed apart

    Classes often share a value vector; their top1 images then show the same, and the model can
    take them for one of these classes only. `--select probability` shares fewer.

    \b
    classlens neurons synthesize store --out images
    classlens neurons synthesize vit_base_patch16_224 --classes 3,17 --dtype bfloat16 --out images
    """
    from classlens.analysis.neurons.synthesis.rates import rates

    results = run_synthesis(source, out, **options)
    with spinner("Drawing the sheets"):
        sheets = _write_sheets(out, results)
    if as_json:
        click.echo(json.dumps(rates(results).to_dicts()))
        return
    _print(results)
    click.echo(f"images and {out / 'results.parquet'}; sheets: {', '.join(map(str, sheets))}")


def run_synthesis(
    source: str,
    out: Path,
    *,
    weights: str | None = None,
    model_args: Sequence[str] = (),
    variants: Sequence[str] = ("top1",),
    classes: str | None = None,
    neurons: str | None = None,
    select: Selection = "alignment",
    keys: int = 5,
    tokens: str = "patches",
    after_gelu: bool = False,
    images: int | None = None,
    diversity: float = 1.0,
    steps: str = "250,500,750",
    size: int | None = None,
    strength: float = 1.0,
    dtype: str = "float32",
    batch_size: int = 32,
    device: str | None = None,
    seed: int = 0,
) -> pl.DataFrame:
    """Makes the images, as the command's options say, and returns the rows of these variants."""
    import polars as pl
    import torch

    from classlens.analysis.neurons.options import chosen_subject
    from classlens.analysis.neurons.subject import model_name
    from classlens.analysis.neurons.synthesis.folder import Folder
    from classlens.analysis.neurons.synthesis.run import synthesize
    from classlens.analysis.neurons.synthesis.synthesize import Ascent
    from classlens.analysis.neurons.synthesis.targets import class_targets, neuron_targets
    from classlens.analysis.neurons.synthesis.transforms import REPORT

    variants = tuple(dict.fromkeys(variants))
    looks = numbers(steps, "--steps", least=1)
    chosen = None if neurons is None else parse_neurons(neurons)
    if chosen is not None and (classes is not None or any("topk" in v for v in variants)):
        raise UsageError("--neurons names single keys; leave out --classes and topk variants.")
    with spinner("Loading the model, ranking its value vectors"):
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        subject = chosen_subject(source, weights, tuple(model_args), None)
        name = model_name(source)
        _require_cls(subject, name, tokens)
        wanted = numbers(classes or f"0-{subject.space.num_classes - 1}", "--classes")

        def targets(kept: int) -> list[Target]:
            if chosen is not None:
                return neuron_targets(subject, chosen, select)
            return class_targets(subject, wanted, kept, select)

        plan = {v: targets(keys if v.startswith("topk") else 1) for v in variants}
    settings = {
        "model": name,
        "weights_sha256": subject.weights_sha256,
        "select": select,
        "keys": keys,
        "tokens": tokens,
        "after_gelu": after_gelu,
        "images": images,
        "diversity": diversity,
        "steps": looks,
        "size": _size(subject, size),
        "strength": strength,
        "dtype": dtype,
        "seed": seed,
    }
    folder = Folder(out, settings)
    with bar("Ascending (image steps)") as progress:
        ascents = {
            variant: Ascent(
                size=_size(subject, size),
                steps=tuple(looks),
                images=images or (DIVERSE_IMAGES if variant.endswith("diverse") else 1),
                diversity=diversity if variant.endswith("diverse") else 0.0,
                tokens=tokens,
                after_activation=after_gelu,
                recipe=REPORT.times(strength),
                dtype=dtype,
                seed=seed,
            )
            for variant in variants
        }
        left = {v: [t for t in plan[v] if t.name not in folder.finished(v)] for v in variants}
        progress.started(sum(len(left[v]) * ascents[v].images * looks[-1] for v in variants))
        for variant in variants:
            synthesize(
                subject,
                variant,
                left[variant],
                ascents[variant],
                folder,
                batch_size=batch_size,
                device=device,
                progress=lambda done: progress.advanced(done, scored=True),
            )
    return folder.results.filter(pl.col("variant").is_in(variants))


def numbers(text: str, option: str, least: int = 0) -> list[int]:
    """``0,3,5-7`` -> [0, 3, 5, 6, 7], ascending.

    Raises:
        UsageError: it is no such list, or a number is below ``least``.
    """
    found: set[int] = set()
    try:
        for part in text.split(","):
            first, dash, last = part.partition("-")
            found |= set(range(int(first), int(last if dash else first) + 1))
    except ValueError:
        found = set()
    if not found or min(found) < least:
        raise UsageError(f"{option} takes numbers from {least} and ranges, 3,5-7; got {text!r}.")
    return sorted(found)


def parse_neurons(text: str) -> list[tuple[int, int]]:
    """``10:56,11:2`` -> [(10, 56), (11, 2)], each once.

    Raises:
        UsageError: it is no such list.
    """
    parts = [part.strip().split(":") for part in text.split(",")]
    if not all(len(part) == 2 and all(n.isdecimal() for n in part) for part in parts):
        raise UsageError(f"--neurons takes BLOCK:INDEX, as 10:56,11:2; got {text!r}.")
    return list(dict.fromkeys((int(block), int(j)) for block, j in parts))


def _require_cls(subject: Subject, name: str, tokens: str) -> None:
    if tokens == "cls" and "cls" not in subject.prefix_kinds:
        raise UsageError(f"{name} has no CLS token; leave out --tokens cls.")


def _size(subject: Subject, shorter: int | None) -> tuple[int, int]:
    """Rows and columns of the images: the model's input, or of its shape."""
    rows, columns = subject.geometry.input_size
    if shorter is None:
        return rows, columns
    scale = shorter / min(rows, columns)
    return round(rows * scale), round(columns * scale)


def _write_sheets(out: Path, results: pl.DataFrame) -> list[Path]:
    from classlens.analysis.neurons.synthesis.sheet import contact_sheet

    written = []
    for (variant, steps), rows in results.group_by("variant", "steps", maintain_order=True):
        file = out / f"{variant}-{steps}.png"
        contact_sheet(out, rows).save(file)
        written.append(file)
    return written


def _print(results: pl.DataFrame) -> None:
    from rich.console import Console

    console = Console()
    console.print(_rate_table(results))
    console.print(_strongest_table(results))


def _rate_table(results: pl.DataFrame) -> Table:
    from classlens.analysis.neurons.synthesis.rates import rates

    table = _table(
        "What the model takes the images for, untransformed",
        "n: images; re-classified: % taken for the target's class [95% Wilson interval]; coeff.: "
        "mean over keys and patches, before the GELU; alike: Gram similarity of a target's images; "
        "s: seconds an image",
    )
    for header in (
        "variant",
        "steps",
        "n",
        "re-classified",
        "top 5",
        "coeff.",
        "alike",
        "s",
    ):
        table.add_column(header, justify="left" if header == "variant" else "right", no_wrap=True)
    for row in rates(results).iter_rows(named=True):
        alike = row["similarity"]
        table.add_row(
            row["variant"],
            f"{row['steps']:,}",
            f"{row['images']:,}",
            f"{100 * row['share']:.0f} \\[{100 * row['low']:.0f}, {100 * row['high']:.0f}]",
            f"{row['top5']:.0%}",
            f"{row['activation']:.2f}",
            "" if alike is None else f"{alike:.3f}",
            f"{row['seconds']:.1f}",
        )
    return table


def _strongest_table(results: pl.DataFrame) -> Table:
    import polars as pl

    from classlens.analysis.neurons.synthesis.rates import strongest

    table = _table("Largest mean coefficients at the last step", "")
    for header in ("variant", "class", "keys", "coefficient", "taken for"):
        table.add_column(header, justify="right" if header == "coefficient" else "left")
    for variant in results["variant"].unique(maintain_order=True):
        for row in strongest(results.filter(pl.col("image") == 0), variant, 5).iter_rows(
            named=True
        ):
            first, *more = row["keys"].split(" ")
            table.add_row(
                row["variant"],
                row["name"],
                first + (f" and {len(more)} more" if more else ""),
                f"{row['activation']:.2f}",
                row["predicted_name"],
            )
    return table


def _table(title: str, caption: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    return Table(title=title, caption=caption, box=SIMPLE_HEAD, title_justify="left",
                 caption_justify="left")  # fmt: skip
