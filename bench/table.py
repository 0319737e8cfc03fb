"""``classlens bench table``: the README's tables, made from the results that are committed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from classlens.extractor.errors import UsageError

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
NO_RESULTS = "No results are committed yet."

# By benchmark, in the README's order: column of a row -> (heading, format). Columns that no row of
# a result has are left out.
TABLES: dict[str, dict[str, tuple[str, str]]] = {
    "extract": {
        "model": ("model", ""),
        "dtype": ("dtype", ""),
        "forward": ("forward pass", ""),
        "impl": ("scoring", ""),
        "certify": ("certified", ""),
        "reduce": ("besides ranks", ""),
        "forward_images_per_s": ("bare forward, images/s", ",.2f"),
        "scored_images_per_s": ("scored in memory, images/s", ",.2f"),
        "extract_images_per_s": ("JPEG tars to store, images/s", ",.2f"),
        "scored_of_forward": ("scored / forward", ".2f"),
        "floor_of_forward": ("the same at equal efficiency", ".2f"),
        "extract_of_scored": ("tars to store / scored", ".2f"),
        "forward_share_of_peak": ("forward, share of GEMM peak", ".0%"),
        "scored_share_of_peak": ("scored, share of GEMM peak", ".0%"),
        "cost_of_ranks": ("time, times ranks alone", ".2f"),
        "held_back_by": ("held back by", ""),
    },
    "kernels": {
        "impl": ("impl", ""),
        "model": ("model", ""),
        "classes": ("classes", ",d"),
        "dtype": ("dtype", ""),
        "images": ("images", ",d"),
        "seconds": ("s", ".4g"),
        "tflops": ("TFLOP/s", ",.2f"),
        "share_of_peak": ("share of GEMM peak", ".0%"),
        "extra_mib": ("extra memory, MiB", ",.0f"),
    },
    "rivals": {
        "rival": ("extractor", ""),
        "dtype": ("dtype", ""),
        "images_per_s": ("images/s", ",.2f"),
        "times_authors": ("times the authors'", ",.3g"),
        "share_of_peak": ("share of GEMM peak", ".0%"),
        "bytes_per_image": ("bytes an image", ",d"),
        "equal_ranks": ("ranks equal to the authors'", ".2%"),
        "in_bracket": ("authors' ranks in our bracket", ".2%"),
    },
    "fidelity": {
        "model": ("model", ""),
        "dtype": ("dtype", ""),
        "stream": ("stream", ""),
        "kind": ("token", ""),
        "equal_ranks": ("equal ranks", ".3%"),
        "forward_equal_ranks": ("equal, forward alone", ".3%"),
        "scoring_equal_ranks": ("equal, scoring alone", ".3%"),
        "identifiability_change": ("mean change of identifiability", ".1e"),
        "rank_change_max": ("largest change of rank", ",d"),
        "rank0_agreement": ("agreement on rank 0", ".3%"),
    },
    "certify": {
        "dtype": ("dtype", ""),
        "width": ("width", ",d"),
        "classes": ("classes", ",d"),
        "rows": ("hostile rows", ",d"),
        "wrong": ("wrong ranks", ",d"),
        "recomputed_share": ("recomputed", ".2%"),
        "ordinary_recomputed_share": ("recomputed of ordinary rows", ".2%"),
        "ordinary_cost": ("time of these, times plain", ".2f"),
    },
    "attribution": {
        "way": ("way", ""),
        "model": ("model", ""),
        "images": ("images", ",d"),
        "seconds": ("s", ",.4g"),
        "of_forward": ("times the forward", ",.4g"),
        "times_closed_form": ("times the closed form", ",.4g"),
        "attribution_seconds": ("attribution alone, s", ",.4g"),
        "attribution_times_closed_form": ("times the closed form", ",.4g"),
        "extrapolated_from": ("extrapolated from", ""),
    },
    "query": {
        "query": ("question", ""),
        "images": ("images", ",d"),
        "rows": ("rows it concerns", ",d"),
        "store_s": ("store, s", ".3f"),
        "parquet_s": ("long Parquet, s", ".3f"),
        "parquet_of_store": ("Parquet / store", ".2f"),
        "store_bytes": ("store, bytes", ",d"),
        "parquet_bytes": ("Parquet, bytes", ",d"),
    },
    "memory": {
        "images": ("images", ",d"),
        "mib_at_10_percent": ("resident at 10 %, MiB", ",.0f"),
        "mib_at_50_percent": ("at 50 %", ",.0f"),
        "mib_at_100_percent": ("at the end", ",.0f"),
        "peak_mib": ("peak, MiB", ",.0f"),
        "growth_bytes_per_image": ("growth, bytes an image", ",.0f"),
        "images_per_s": ("images/s", ",.2f"),
    },
}
COMMIT = {"commit": ("commit", "")}  # of rows whose commits differ


@click.command()
@click.option("--results", default="bench/results", show_default=True,
              type=click.Path(path_type=Path, file_okay=False),
              help="Folder of what the benchmarks printed with --json.")  # fmt: skip
@click.option("--readme", default="README.md", show_default=True,
              type=click.Path(path_type=Path, dir_okay=False, exists=True))  # fmt: skip
@click.option("--check", is_flag=True, help="Write nothing; exit 1 if it is not current.")
@click.pass_context
def table(context: click.Context, results: Path, readme: Path, check: bool) -> None:
    """Rewrites the README's tables from the committed results.

    What stands between `<!-- bench:begin -->` and `<!-- bench:end -->` is replaced by a table for
    each benchmark and machine. For a checkout of classlens.
    """
    text = readme.read_text(encoding="utf-8")
    current = with_tables(text, read_results(results))
    if text == current:
        return
    if check:
        click.echo(f"{readme} is not current; run `classlens bench table`.", err=True)
        context.exit(1)
    readme.write_text(current, encoding="utf-8")


def read_results(folder: Path) -> list[dict[str, Any]]:
    """All ``*.json`` of a folder, in the order of ``TABLES``, then of their names.

    Raises:
        UsageError: one of them is not what a benchmark prints with ``--json``.
    """
    results = []
    for path in sorted(folder.glob("*.json")):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UsageError(f"{path} is no JSON ({error}); write it anew.") from error
        if (
            not isinstance(result, dict)
            or result.keys() != {"benchmark", "machine", "rows"}
            or result["benchmark"] not in TABLES
        ):
            raise UsageError(
                f"{path} is not what `classlens bench` prints with --json; give one object with "
                f"machine, rows, and as benchmark one of {', '.join(TABLES)}."
            )
        results.append(result)
    order = list(TABLES)
    return sorted(results, key=lambda result: order.index(result["benchmark"]))


def with_tables(text: str, results: list[dict[str, Any]]) -> str:
    """A text with the part between the two marks replaced by the tables of the results.

    Raises:
        UsageError: the marks are not there, once each and in this order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in before + after:
        raise UsageError(f"The README needs {BEGIN} and behind it {END}, once each; put them in.")
    blocks = [markdown(result) for result in by_machine(results)] or [NO_RESULTS]
    return "\n\n".join([before + BEGIN, *blocks, END + after])


def by_machine(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results of one benchmark on one machine as one result, whose rows name their commits if these
    differ."""
    alike: dict[tuple, list[dict[str, Any]]] = {}
    for result in results:
        machine = {name: fact for name, fact in result["machine"].items() if name != "commit"}
        alike.setdefault((result["benchmark"], *machine.items()), []).append(result)
    merged = []
    for (benchmark, *facts), group in alike.items():
        commits = [{"commit": result["machine"].get("commit")} for result in group]
        differ = any(commit != commits[0] for commit in commits)
        rows = [
            row | commit if differ else row
            for result, commit in zip(group, commits, strict=True)
            for row in result["rows"]
        ]
        machine = dict(facts) if differ else group[0]["machine"]
        merged.append({"benchmark": benchmark, "machine": machine, "rows": rows})
    return merged


def markdown(result: Mapping[str, Any]) -> str:
    """A line on benchmark and machine, and a table of the result's rows."""
    facts = dict(result["machine"])
    processor = facts.pop("processor")
    conditions = ", ".join(f"{name.replace('_', ' ')} {_cell(v, '')}" for name, v in facts.items())
    rows = result["rows"]
    columns = {
        name: column
        for name, column in (TABLES[result["benchmark"]] | COMMIT).items()
        if any(name in row for row in rows)
    }
    lines = [
        [heading for heading, _ in columns.values()],
        ["---:" if form else "---" for _, form in columns.values()],
        *([_cell(row.get(name), form) for name, (_, form) in columns.items()] for row in rows),
    ]
    caption = f"`classlens bench {result['benchmark']}` on {processor} ({conditions}):"
    return "\n".join([caption, "", *(f"| {' | '.join(line)} |" for line in lines)])


def _cell(value: Any, form: str) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return format(value, form)
