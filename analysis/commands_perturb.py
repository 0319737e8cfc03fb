"""The command ``perturb``. Heavy modules are imported when it runs, so that ``--help`` is quick."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from classlens.extractor.console import bar
from classlens.extractor.console import status as spinner
from classlens.extractor.errors import UsageError
from classlens.extractor.schema import RELEVANCE_METHODS

if TYPE_CHECKING:
    from collections.abc import Sequence

    import polars as pl
    from rich.table import Table

    from classlens.analysis.perturbation import PerturbationResult
    from classlens.extractor.prepare import Prepared

BATCH_IMAGES = 32
BETTER = {"negative": "more is better", "positive": "less is better"}


@click.command()
@click.argument("store", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--method", "methods", multiple=True, type=click.Choice(RELEVANCE_METHODS),
              help="Repeatable  [default: all; linear-probe with --probe only]")  # fmt: skip
@click.option("--probe", type=click.Path(path_type=Path, exists=True, file_okay=False),
              help="Store of `classlens probe` on the same images, for linear-probe.")  # fmt: skip
@click.option("--out", required=True, type=click.Path(path_type=Path, dir_okay=False),
              help=".parquet: every answer of every image. .json: curves and areas.")  # fmt: skip
@click.option("--convention", type=click.Choice(["corrected", "vilas2023"]), default="corrected",
              show_default=True,
              help="Of loss and area; vilas2023 as the paper's published code.")  # fmt: skip
@click.option("--blocks", metavar="0,3,5-7",
              help="Whose class-embedding and linear-probe relevance is summed  "
              "[default: all]")  # fmt: skip
@click.option("--images", type=click.IntRange(1), metavar="N",
              help="Only N images, evenly spread  [default: all]")  # fmt: skip
@click.option("--steps", type=click.IntRange(1),
              help="Even steps of the kept share  [default: every number of up to 64 patches, else "
              "25 steps; vilas2023: every number]")  # fmt: skip
@click.option("--batch-size", type=click.IntRange(1), default=BATCH_IMAGES, show_default=True)
@click.option("--device", help="cpu, cuda, cuda:1 …  [default: the GPU if there is one]")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0),
              help="Of the random relevance and the intervals.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print curves and areas as JSON.")
def perturb(store: Path, out: Path, as_json: bool, **options: Any) -> None:
    """The perturbation test (paper §5) on the images of STORE.

    A method ranks an image's patches by their relevance for its label. The negative test keeps only
    the n most relevant, the positive test only the n least relevant, for n from none to all, and
    looks how often the prediction is still right. Tokens are really dropped, behind the position
    embedding. Model and images are those of STORE, whose shards must still be there.

    \b
    class-embedding  gradient of the class-embedding loss of every block's attention
    chefer           relevance propagation (Chefer et al.); needs a backward pass
    rollout          attention rollout, (mean over heads + identity) / 2; knows no label
    linear-probe     how well linear probes of a token, block by block, identify the class
    random           chance

    Areas under the curves: `corrected` takes the trapezoid rule from 0 to 100 % over the accuracy
    with all patches; `vilas2023` takes sum / (largest · G) over 1 … G − 1 of the G patches. On the
    authors' own numbers Chefer's relevance is ahead of theirs in both tests.

    \b
    classlens perturb STORE --images 500 --probe PROBES --out perturbation.parquet
    classlens report STORE --perturbation perturbation.parquet --out report.html
    """
    from classlens.analysis.perturbation import require_suffix, write_result

    require_suffix(out)
    answers, result = run_perturbation(store, **options)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_result(out, answers, result)
    if as_json:
        click.echo(json.dumps(result.to_json()))
        return
    _print(result)
    click.echo(f"written to {out}")


def run_perturbation(
    store: Path,
    *,
    methods: Sequence[str] | None = None,
    probe: Path | None = None,
    convention: str = "corrected",
    blocks: str | None = None,
    images: int | None = None,
    steps: int | None = None,
    batch_size: int = BATCH_IMAGES,
    device: str | None = None,
    seed: int = 0,
) -> tuple[pl.DataFrame, PerturbationResult]:
    """The perturbation test on a store, as the command's options say: every answer, the summary."""
    import torch

    from classlens.analysis.perturbation import summarise
    from classlens.extractor import perturb as test
    from classlens.extractor.prepare import prepare_again
    from classlens.extractor.relevance import make_methods

    methods = _methods(methods, probe)
    if convention == "vilas2023" and steps is not None:
        raise UsageError("--convention vilas2023 keeps every number of patches; leave out --steps.")
    chosen = spread_images(store, images, probe)
    with spinner("Walking the shards and loading the model"):
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        prepared = prepare_again(store, device=device)
        scorer = test.make_perturbed(prepared)
    patches = prepared.layout.patches
    wanted = parse_blocks(blocks, prepared.layout.blocks)
    ranked = make_methods(
        prepared,
        scorer,
        methods,
        store=store if _holds(prepared, convention) else None,
        probes=probe,
        convention=convention,
        blocks=wanted,
        seed=seed,
    )
    counts = test.kept_counts(patches, patches if convention == "vilas2023" else steps)
    with bar("Perturbing") as progress:
        answers = test.perturb(
            prepared, scorer, ranked, chosen, counts, batch_size=batch_size, progress=progress
        )
    facts = {
        "store": store.name,
        "model": prepared.config.model,
        "convention": convention,
        "blocks": "all" if wanted is None else ",".join(map(str, wanted)),
        "seed": seed,
    }
    return answers, summarise(answers, facts)


def parse_blocks(text: str | None, blocks: int) -> list[int] | None:
    """``0,3,5-7`` -> [0, 3, 5, 6, 7], ascending; None for None.

    Raises:
        UsageError: it is no such list, or names a block that the model has not.
    """
    if text is None:
        return None
    found = set()
    try:
        for part in text.split(","):
            first, dash, last = part.partition("-")
            found |= set(range(int(first), int(last if dash else first) + 1))
    except ValueError as error:
        raise UsageError(f"--blocks takes numbers and ranges, 0,3,5-7; got {text!r}.") from error
    if not found or min(found) < 0 or max(found) >= blocks:
        raise UsageError(f"--blocks is {text}; the model has the blocks 0-{blocks - 1}.")
    return sorted(found)


def _holds(prepared: Prepared, convention: str) -> bool:
    """Whether the store's own attribution is of this convention."""
    config = prepared.config
    return "attribution" in config.reduce and config.convention == convention


def _methods(asked: Sequence[str] | None, probe: Path | None) -> tuple[str, ...]:
    """The methods asked for; of all, those that have what they need."""
    if asked:
        methods = tuple(dict.fromkeys(asked))
    else:
        methods = tuple(m for m in RELEVANCE_METHODS if m != "linear-probe" or probe is not None)
    if ("linear-probe" in methods) != (probe is not None):
        raise UsageError(
            "--method linear-probe and --probe need each other; name the store that `classlens "
            "probe` made of the same images, or leave both out."
        )
    return methods


def spread_images(store: Path, count: int | None, probe: Path | None = None) -> list[int]:
    """Places of ``count`` images that are scored, by the probes too if there are any, evenly
    spread; of all when None.

    Raises:
        UsageError: no image is scored; or the probes are not of this store.
    """
    import numpy as np

    from classlens.analysis.probes import check_probe
    from classlens.analysis.result import scored_images

    images = scored_images(store)[0] if probe is None else check_probe(store, probe)
    scored = images["image"].to_numpy()
    if count is None or count >= len(scored):
        return scored.tolist()
    return scored[np.rint(np.linspace(0, len(scored) - 1, count)).astype(int)].tolist()


def _print(result: PerturbationResult) -> None:
    from rich.console import Console

    from classlens.analysis.perturbation import NOTE

    console = Console()
    for table in (_area_table(result), _difference_table(result)):
        if table.row_count:
            console.print(table)
    console.print(NOTE, soft_wrap=True, highlight=False)


def _area_table(result: PerturbationResult) -> Table:
    import polars as pl

    table = _table(
        f"Perturbation test, {result.facts['store']}: {result.n_images:,} images of "
        f"{result.n_patches} patches ({result.facts['convention']})",
        "area under accuracy over the kept share; [ ]: 95% bootstrap interval over images",
    )
    table.add_column("relevance")
    tests = result.auc["test"].unique(maintain_order=True).to_list()
    for test in tests:
        table.add_column(f"{test} test\n{BETTER[test]}", justify="right")
    for (method,), rows in result.auc.group_by("method", maintain_order=True):
        of_test = [rows.row(by_predicate=pl.col("test") == test, named=True) for test in tests]
        table.add_row(str(method), *(_shown(row, "auc", "") for row in of_test))
    return table


def _difference_table(result: PerturbationResult) -> Table:
    import polars as pl

    table = _table("Differences of the areas", "on the same images; [ ]: 95% bootstrap interval")
    table.add_column("first − second")
    tests = result.auc["test"].unique(maintain_order=True).to_list()
    for test in tests:
        table.add_column(f"{test} test", justify="right", no_wrap=True)
    pairs = result.differences.group_by("first", "second", maintain_order=True)
    for (first, second), rows in pairs:
        of_test = [rows.row(by_predicate=pl.col("test") == test, named=True) for test in tests]
        shown = (_shown(row, "difference", "+") for row in of_test)
        table.add_row(f"{first} − {second}", *shown)
    return table


def _shown(row: dict[str, Any], name: str, sign: str) -> str:
    value, low, high = (format(row[key], f"{sign}.3f") for key in (name, "low", "high"))
    return f"{value} \\[{low}, {high}]"


def _table(title: str, caption: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    return Table(title=title, caption=caption, box=SIMPLE_HEAD, title_justify="left",
                 caption_justify="left")  # fmt: skip
