"""The command ``probe``. Heavy modules are imported when it runs, so that ``--help`` is quick."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from classlens.extractor.commands import make_config, model_options, print_summary
from classlens.extractor.console import bar
from classlens.extractor.console import status as spinner

if TYPE_CHECKING:
    from classlens.extractor.probe_run import PreparedProbe


@click.command()
@click.argument("train_shards", nargs=-1, required=True)
@click.option("--test", "test_shards", multiple=True, required=True, metavar="SHARDS",
              help="Tar, folder or brace pattern of the images to score; repeatable.")  # fmt: skip
@model_options
@click.option("--batch-size", type=click.IntRange(1),
              help="[default: 32 on a CPU, 128 on a GPU]")  # fmt: skip
@click.option("--per-class", default=10, show_default=True, type=click.IntRange(1),
              help="Training images of each class, the first ones.")  # fmt: skip
@click.option("--alpha", default=1.0, show_default=True,
              type=click.FloatRange(0, min_open=True), help="Strength of the ridge.")  # fmt: skip
@click.option("--memory", "memory_gb", type=click.FloatRange(0, min_open=True), metavar="GB",
              help="For sums and weights; less memory, more passes.  "
              "[default: half of the machine's, or of what is free on the GPU]")  # fmt: skip
@click.option("--allow-overlap", is_flag=True,
              help="Do not mind keys that are in both sets of shards.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Check the shards and print the plan.")
def probe(
    train_shards: tuple[str, ...],
    test_shards: tuple[str, ...],
    out: Path,
    class_names: Path | None,
    per_class: int,
    alpha: float,
    memory_gb: float | None,
    allow_overlap: bool,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> int | None:
    """Trains a linear probe for every token of every block on TRAIN_SHARDS and scores --test.

    Ridge regression on raw activations, ±1 one-hot targets, one probe for each block, stream and
    token. The store has the arrays of `extract`: the rank of an image's label among the outputs of
    the token's probe, its score, its log-softmax and the top classes, so query, analyze, report
    and verify read it. Put it beside the class-embedding projection with `report --probe`.

    \b
    classlens probe train-shards --test shards --model vit_base_patch16_224 --out probes
    classlens report store --probe probes --out report.html
    """
    from classlens.extractor.probe_run import prepare_probe
    from classlens.extractor.probe_run import probe as run_probe
    from classlens.extractor.summary import summary_json

    config = make_config(**options)
    with spinner("Walking the shards and loading the model"):
        prepared = prepare_probe(
            config,
            train_shards,
            test_shards,
            per_class=per_class,
            alpha=alpha,
            memory_bytes=None if memory_gb is None else int(1e9 * memory_gb),
            allow_overlap=allow_overlap,
            class_names=class_names,
        )
    facts = _plan(prepared, out)
    if dry_run and as_json:
        click.echo(json.dumps(facts))
    else:
        _print_plan(facts, err=as_json)
    if dry_run:
        return None
    with bar("Probing") as progress:
        summary = run_probe(prepared, out, progress)
    if as_json:
        click.echo(json.dumps(asdict(summary) | {"store": summary_json(summary.store)}))
    else:
        print_summary(summary.store)
        if summary.passes:
            click.echo(
                f"training {summary.train_seconds:,.1f} s on {summary.train_images:,} images, "
                f"solving {summary.solve_seconds:,.1f} s, scoring {summary.test_seconds:,.1f} s"
            )
    return 3 if summary.store.bad_images else None


def _plan(prepared: PreparedProbe, out: Path) -> dict[str, Any]:
    counts, plan = prepared.class_images, prepared.plan
    return {
        "store": str(out),
        "train_images": len(prepared.images),
        "classes": len(counts),
        "classes_short": int((counts < prepared.per_class).sum()),
        "classes_without": int((counts == 0).sum()),
        "test_images": prepared.test.plan.manifest.height,
        "probes": plan.probes,
        "train_passes": len(plan.passes),
        "test_passes": len(plan.passes),
        "bytes": plan.bytes_held,
        "memory_bytes": plan.memory_bytes,
        "per_class": prepared.per_class,
    }


def _print_plan(facts: dict[str, Any], err: bool) -> None:
    probes, passes = facts["probes"], facts["train_passes"]
    click.echo(
        f"{probes:,} probes of {facts['classes']:,} classes: {facts['bytes'] / 1e9:,.2f} GB of "
        f"sums at a time, {facts['memory_bytes'] / 1e9:,.2f} GB allowed",
        err=err,
    )
    click.echo(
        f"{passes} x {facts['train_images']:,} training and {passes} x {facts['test_images']:,} "
        "test images to pass",
        err=err,
    )
    if facts["classes_short"]:
        click.echo(
            f"{facts['classes_short']:,} classes have fewer than {facts['per_class']} training "
            f"images, {facts['classes_without']:,} of them none",
            err=err,
        )
