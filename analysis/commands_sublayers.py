"""The command ``analyze sublayers``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from classlens.analysis.tables import (
    analyse_and_show,
    context_table,
    convention_option,
    json_option,
    new_table,
    p_or_q,
    permutations_option,
    seed_option,
    store_argument,
    with_interval,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    import polars as pl
    from rich.table import Table

    from classlens.analysis.sublayers import SublayersResult

BASELINES = {"resid": "resid of the block before", "mid": "mid"}


@click.command()
@store_argument
@convention_option
@permutations_option("tests")
@seed_option
@json_option
def sublayers(store: Path, convention: str, permutations: int, seed: int, as_json: bool) -> None:
    """What attention and MLP do to the label's logit (paper §4.3).

    How often they raise it, whether more in class-labelled than in context tokens (where the store
    has masks), and how far the CLS token is ahead in images that the model gets right. The
    corrected rates of the MLP need a store with the stream mid.

    \b
    classlens extract shards --model MODEL --streams resid,mid,attn,mlp --out store
    classlens analyze sublayers store
    """
    from classlens.analysis.sublayers import analyze_sublayers

    analyse_and_show(
        lambda name: analyze_sublayers(
            store, convention=name, permutations=permutations, seed=seed
        ),
        _tables,
        convention,
        as_json,
    )


def _tables(result: SublayersResult) -> Iterator[Table | str]:
    for _, rows in result.change_rate.group_by("sublayer", maintain_order=True):
        yield _change_table(result, rows)
    yield from result.missing.values()
    for (sublayer,), rows in result.context.group_by("sublayer", maintain_order=True):
        title = f"Class-labelled against context tokens, change by {sublayer}"
        yield context_table(result, rows, title, "logit change")
    for _, rows in result.correct_minus_wrong.group_by("stream", maintain_order=True):
        yield _correct_table(result, rows)


def _change_table(result: SublayersResult, rows: pl.DataFrame) -> Table:
    import polars as pl

    first = rows.row(0, named=True)
    groups = rows["group"].unique(maintain_order=True).to_list()
    bad = f", {result.n_bad:,} not scored" if result.n_bad else ""
    table = new_table(
        f"{result.store.name}: change rate of {first['sublayer']} ({result.convention})",
        f"share of tokens whose label logit is larger in {first['sublayer']} than in "
        f"{BASELINES[first['baseline']]}; chance 0.5; {result.n_images:,} images{bad}; "
        "[ ]: 95% bootstrap interval",
        ["block", *({"cls": "CLS", "patch": "image tokens"}[group] for group in groups)],
    )
    for (block,), of_block in rows.group_by("block", maintain_order=True):
        cells = (
            with_interval(
                of_block.row(by_predicate=pl.col("group") == group, named=True),
                "change_rate",
                ".3f",
            )
            for group in groups
        )
        table.add_row(str(block), *cells)
    return table


def _correct_table(result: SublayersResult, rows: pl.DataFrame) -> Table:
    name, column = p_or_q(rows)
    first = rows.row(0, named=True)
    table = new_table(
        f"CLS token, correct minus wrong images, {first['stream']} ({result.convention})",
        f"no difference: Δ = 0; {first['n_correct']:,} correct and {first['n_wrong']:,} wrong "
        f"images; {name}: correct ahead, {result.permutations:,} shuffles of images; "
        "[ ]: 95% bootstrap interval",
        ["block", "Δ identifiability", name],
    )
    for row in rows.iter_rows(named=True):
        delta = with_interval(row, "delta", "+.4f")
        table.add_row(str(row["block"]), delta, f"{row[column]:.4f}")
    return table
