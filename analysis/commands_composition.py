"""The command ``analyze composition``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from classlens.analysis.tables import (
    analyse_and_show,
    convention_option,
    json_option,
    new_table,
    seed_option,
    store_argument,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    import polars as pl
    from rich.table import Table

    from classlens.analysis.composition import CompositionResult

GROUPS = {"all": "all tokens", "cls": "CLS", "patch": "image tokens"}
SPLITS = {
    "overlapping": "prev, attn, mlp: same top class as the residual stream before, attention, MLP, "
    "so a row may pass 100",
    "exclusive": "each token once: several = the same as two or three of them; a row sums to 100",
}
COMP = {
    "corrected": "comp: as none of them",
    "vilas2023": "comp: not as prev or attn (as published)",
}


@click.command()
@store_argument
@convention_option
@seed_option
@json_option
def composition(store: Path, convention: str, seed: int, as_json: bool) -> None:
    """Where a token's top class comes from, block by block (paper §4.3).

    From the residual stream before the block, from what attention or the MLP adds, or from none of
    them. In % of tokens, as overlapping categories and as a split that sums to 100.

    \b
    classlens analyze composition store --convention both
    """
    from classlens.analysis.composition import analyze_composition

    analyse_and_show(
        lambda name: analyze_composition(store, convention=name, seed=seed),
        _tables,
        convention,
        as_json,
    )


def _tables(result: CompositionResult) -> Iterator[Table]:
    for _, rows in result.composition.group_by("split", "group", maintain_order=True):
        yield _table(result, rows)


def _table(result: CompositionResult, rows: pl.DataFrame) -> Table:
    first = rows.row(0, named=True)
    sources = rows["source"].unique(maintain_order=True).to_list()
    bad = f", {result.n_bad:,} not scored" if result.n_bad else ""
    table = new_table(
        f"{result.store.name}: top class of {GROUPS[first['group']]}, {first['split']} "
        f"({result.convention})",
        f"% of {first['n_tokens']:,} tokens of {result.n_images:,} images{bad}; "
        f"{SPLITS[first['split']]}; {COMP[result.convention]}; ±: half the 95% bootstrap interval",
        ["block", *sources],
    )
    for (block,), of_block in rows.group_by("block", maintain_order=True):
        cells = (
            f"{row['percent']:.1f} ±{(row['high'] - row['low']) / 2:.1f}"
            for row in of_block.iter_rows(named=True)
        )
        table.add_row(str(block), *cells)
    return table
