"""``classlens reproduce``: studies that ship with the package, run on the user's data."""

from __future__ import annotations

import shutil
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import click

from classlens.analysis.commands_study import study_options
from classlens.extractor.errors import UsageError

STUDIES = ("vilas2023",)


@click.command()
@click.argument("name", metavar="STUDY", type=click.Choice(STUDIES))
@click.option("--data", type=click.Path(path_type=Path, exists=True, file_okay=False),
              help="Folder with the data sets and checkpoints of the study.")  # fmt: skip
@click.option("--models", metavar="NAMES", help="Only these, with what belongs to them: a,b,c.")
@click.option("--demo", is_flag=True, help="The same kinds of runs on the demo's data and model.")
@study_options
def reproduce(
    name: str, data: Path | None, models: str | None, demo: bool, out: Path, **options: Any
) -> int:
    """Repeats a published study and sets its numbers beside those measured here.

    vilas2023 is the paper that classlens follows: 7 models, controls with random weights, attention
    knockouts, token removals, perturbation tests and a linear probe. --data holds ImageNetS919/
    (the official tree), cifar100/ (tars of 500 test images, 224 pixels or larger), and
    checkpoints/ with the two models that timm lacks: vit_cifar_16.pth and deit_ensemble_16.pth.
    What is missing is reported and the rest is run.

    \b
    classlens reproduce vilas2023 --demo --out demo-study
    classlens reproduce vilas2023 --data DATA --out study --models vit_b_32,vit_b_16
    """
    from classlens.analysis.commands_study import run
    from classlens.analysis.study.parse import load_study

    if demo and (data or models):
        raise UsageError("--demo brings its own data and model; leave out --data and --models.")
    if not demo and data is None:
        raise UsageError("Name the folder of the data sets with --data, or try --demo first.")
    with as_file(files("classlens.analysis.study") / f"{'demo' if demo else name}.toml") as file:
        study = load_study(file)
    if models:
        study = study.limited_to(tuple(models.split(",")))
    return run(study, data or demo_data(out / "data"), out=out, **options)


def demo_data(out: Path) -> Path:
    """The folder, with the demo's shards and weights in it."""
    from classlens.bench.demo.command import draw_shards
    from classlens.bench.demo.model_card import WEIGHTS
    from classlens.extractor.console import bar

    if not (out / "shards").exists():
        with bar("Drawing images") as progress:
            draw_shards(out / "shards", progress)
    if not (out / "train-shards").exists():
        with bar("Drawing training images") as progress:
            draw_shards(out / "train-shards", progress, split="train", per_class=10)
    if not (out / WEIGHTS.name).exists():
        shutil.copyfile(WEIGHTS, out / WEIGHTS.name)
    return out
