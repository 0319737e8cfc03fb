"""The command ``study``. Heavy modules are imported when it runs, so that ``--help`` is quick."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Callable

    from classlens.analysis.study.plan import Study

FOLDER = click.Path(path_type=Path, file_okay=False)


def study_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options that `study` and `reproduce` share."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print targets and claims as JSON."),
        click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]),
                     help="Of runs that set none  [default: float32 on CPU, float16 on GPU]"),
        click.option("--device", help="[default: the GPU if there is one]"),
        click.option("--only", metavar="NAME", help="Work on this run or step alone."),
        click.option("--out", required=True, type=FOLDER, help="Everything made goes here."),
    ):  # fmt: skip
        function = option(function)
    return function


@click.command()
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--data", type=click.Path(path_type=Path, exists=True, file_okay=False),
              help="What its paths are relative to  [default: the folder of FILE]")  # fmt: skip
@study_options
def study(file: Path, data: Path | None, **options: Any) -> int:
    """Runs a study: many extractions, their analyses, published numbers and claims beside ours.

    FILE lists runs, each with the options of `extract`; targets: numbers to be met within a
    tolerance; and claims: what a paper says, with a check. What is done is skipped, so the same
    command goes on where it stopped; a run that fails does not stop the others. Ends with tables,
    targets.parquet, claims.parquet and report.html in --out.

    \b
    [study]
    name = "mine"
    shards = ["shards"]
    [[run]]
    name = "b16"
    model = "vit_base_patch16_224"
    [[run]]
    name = "b16-random"
    control_of = "b16"
    weights = "random:0"
    [[target]]
    id = "rate of B/16"
    run = "b16"
    measure = "identifiability_rate"
    value = 67.04
    tolerance = 2
    [[claim]]
    id = "far above chance"
    says = "Trained weights identify the class, random ones do not"
    check = "greater"
    of = { run = "b16", measure = "identifiability_rate" }
    than = { run = "b16-random", measure = "identifiability_rate" }
    factor = 10
    \b
    classlens study mine.toml --out mine
    """
    from classlens.analysis.study.parse import load_study

    return run(load_study(file), data or file.parent, **options)


def run(
    study: Study,
    data: Path,
    *,
    out: Path,
    only: str | None,
    device: str | None,
    dtype: Any,
    as_json: bool,
) -> int:
    """Runs a study, prints its table, writes its page; the exit code."""
    import torch

    from classlens.analysis.study.claims import claims_frame, claims_table
    from classlens.analysis.study.page import write_page
    from classlens.analysis.study.runner import Place, run_study
    from classlens.analysis.study.verdicts import findings_frame, findings_table, missing

    place = Place(data, out, device or ("cuda" if torch.cuda.is_available() else "cpu"), dtype)
    result = run_study(study, place, only=only, say=lambda line: click.echo(line, err=as_json))
    frame = findings_frame(result.findings)
    out.mkdir(parents=True, exist_ok=True)
    claims = claims_frame(result.claims)
    frame.write_parquet(out / "targets.parquet")
    claims.write_parquet(out / "claims.parquet")
    models = [run.name for run in study.runs if run.depends_on is None]
    pages = {name: place.page(name) for name in models}
    page = write_page(study, result, out / "report.html", pages)
    if as_json:
        click.echo(json.dumps({"targets": frame.to_dicts(), "claims": claims.to_dicts()}))
    else:
        from rich.console import Console

        console = Console()
        console.print(findings_table(study.title, result.findings))
        for line in missing(result.findings):
            click.echo(line)
        if result.claims:
            console.print(claims_table(result.claims))
        for claim in result.claims:
            if claim.contradiction:
                click.echo(f"contradicted: {claim.contradiction}")
        click.echo(page)
    failed = [outcome for outcome in result.outcomes if outcome.state == "failed"]
    for outcome in failed:
        click.echo(f"failed: {outcome.step}: {outcome.note}", err=True)
    return result.exit_code
