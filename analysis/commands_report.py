"""The command ``report``. Heavy modules are imported when it runs, so that ``--help`` is quick."""

from __future__ import annotations

from pathlib import Path

import click

from classlens.extractor.console import status

FOLDER = click.Path(path_type=Path, exists=True, file_okay=False)


@click.command()
@click.argument("stores", nargs=-1, required=True, type=FOLDER)
@click.option("--out", required=True, type=click.Path(path_type=Path, dir_okay=False))
@click.option("--control", type=FOLDER, help="Store of the same images with random weights.")
@click.option("--perturbed", multiple=True, type=FOLDER,
              help="Store of the same images and model with --intervene; repeatable.")  # fmt: skip
@click.option("--perturbation", "perturbations", multiple=True,
              type=click.Path(path_type=Path, exists=True, dir_okay=False),
              help="File of `classlens perturb`; repeatable.")  # fmt: skip
@click.option("--probe", type=FOLDER, help="Store that `classlens probe` made of the same images.")
@click.option("--values", type=click.Path(path_type=Path, exists=True, dir_okay=False),
              help="What `classlens analyze values --json` printed of the model.")  # fmt: skip
@click.option("--images", default=12, show_default=True, type=click.IntRange(0),
              help="Pictures shown of each store.")  # fmt: skip
@click.option("--permutations", default=1000, show_default=True, type=click.IntRange(1),
              help="Shuffles of the class-against-context test.")  # fmt: skip
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
def report(
    stores: tuple[Path, ...],
    out: Path,
    control: Path | None,
    perturbed: tuple[Path, ...],
    perturbations: tuple[Path, ...],
    probe: Path | None,
    values: Path | None,
    images: int,
    permutations: int,
    seed: int,
) -> None:
    """One self-contained HTML page on STORES, readable offline.

    Identifiability rates, their evolution over the blocks, change rates, class against context
    tokens, and some images with the identifiability of their tokens laid on them; memories and
    attribution, of stores that have them; with --perturbed what interventions on the model do, with
    --perturbation the curves of perturbation tests, with --probe linear probes beside the class
    embedding, with --values the class-value agreement of the model's weights.

    \b
    classlens report store --control control --out report.html
    """
    from classlens.analysis.report import write_report
    from classlens.analysis.values import read_agreement

    agreement = None if values is None else read_agreement(values)
    with status("Analysing and drawing"):
        write_report(
            stores,
            out,
            control,
            perturbed=perturbed,
            perturbations=perturbations,
            probe=probe,
            values=agreement,
            n_images=images,
            permutations=permutations,
            seed=seed,
        )
    click.echo(out)
