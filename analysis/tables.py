"""Tables on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


def plain_table(title: str, caption: str, columns: Sequence[str]) -> Table:
    """An empty table; its first column is text, the others are numbers."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, caption=caption, box=SIMPLE_HEAD, title_justify="left",
                  caption_justify="left")  # fmt: skip
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table


def with_interval(row: Mapping[str, Any], name: str, form: str) -> str:
    """A number of a row with its interval, from the columns NAME, NAME_low and NAME_high."""
    value, low, high = (format(row[f"{name}{end}"], form) for end in ("", "_low", "_high"))
    return f"{value} \\[{low}, {high}]"
