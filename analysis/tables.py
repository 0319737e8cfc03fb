"""Tables of the group ``analyze``, and its options. Heavy modules are imported when it runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from classlens.extractor.console import status

if TYPE_CHECKING:
    import polars as pl
    from rich.table import Table

    from classlens.analysis.frames import Convention
    from classlens.analysis.result import StoreResult

    Result = TypeVar("Result", bound=StoreResult)

FOLDER = click.Path(path_type=Path, exists=True, file_okay=False)

store_argument = click.argument("store", type=FOLDER)
convention_option = click.option(
    "--convention",
    type=click.Choice(["corrected", "vilas2023", "both"]),
    default="corrected",
    show_default=True,
    help="What the paper means, or what its published code computes.",
)
seed_option = click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")


def permutations_option(test: str) -> Callable[[Any], Any]:
    """``--permutations``, of the test that is named."""
    return click.option(
        "--permutations",
        default=1000,
        show_default=True,
        type=click.IntRange(1),
        help=f"Shuffles of the {test} (vilas2023: always 300).",
    )


def analyse_and_show(
    analyse: Callable[[Convention], Result],
    tables: Callable[[Result], Iterable[Table | str]],
    convention: str,
    as_json: bool,
) -> None:
    """Runs an analysis in the wanted conventions, and prints its tables and notes, or JSON."""
    from classlens.analysis.frames import CONVENTIONS

    wanted: list[Convention] = [name for name in CONVENTIONS if convention in (name, "both")]
    with status("Analysing"):
        results = [analyse(name) for name in wanted]
    if as_json:
        click.echo(json.dumps({result.convention: result.to_json() for result in results}))
        return
    from rich.console import Console

    console = Console()
    for result in results:
        for part in tables(result):
            console.print(part)
            console.print()


def new_table(title: str, caption: str, columns: Sequence[str]) -> Table:
    """An empty table; its first column is aligned left, the others right."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, caption=caption, box=SIMPLE_HEAD, title_justify="left",
                  caption_justify="left")  # fmt: skip
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table


def with_interval(row: dict[str, Any], name: str, digits: str) -> str:
    """A number and its interval, such as ``0.70 [0.65, 0.75]``, in Rich's markup.

    Args:
        name: of the number's column; the ends are in ``low`` and ``high``.
    """
    value, low, high = (format(row[column], digits) for column in (name, "low", "high"))
    return f"{value} \\[{low}, {high}]"


def p_or_q(rows: pl.DataFrame) -> tuple[str, str]:
    """How a test's result is called, and its column: q-values where there are any."""
    return ("p", "p_value") if rows["q_value"].is_null().all() else ("q", "q_value")


def context_table(result: Any, rows: pl.DataFrame, title: str, measure: str) -> Table:
    """Class-labelled against context tokens.

    Args:
        result: names convention and number of permutations.
        rows: of :func:`classlens.analysis.class_context.class_context`, not empty.
        measure: what Δ is a difference of.
    """
    name, column = p_or_q(rows)
    first = rows.row(0, named=True)
    how = "within images" if result.convention == "corrected" else "pooled over images"
    table = new_table(
        f"{title} ({result.convention})",
        f"no difference: Δ = 0; {first['n_images']:,} images, {first['n_class']:,} class and "
        f"{first['n_context']:,} context tokens; {name}: class ahead, {result.permutations:,} "
        f"shuffles {how}; [ ]: 95% bootstrap interval",
        ["block", f"Δ {measure}", "Δ shuffled", name],
    )
    for row in rows.iter_rows(named=True):
        table.add_row(
            str(row["block"]),
            with_interval(row, "delta", "+.4f"),
            f"{row['null']:+.4f}",
            f"{row[column]:.4f}",
        )
    return table
