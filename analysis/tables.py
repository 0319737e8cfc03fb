"""Tables on a terminal. rich is imported when one is made, so that ``--help`` is quick."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def plain_table(title: str, caption: str, columns: list[str]) -> Table:
    """An empty table; the first column is aligned to the left, the others to the right."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, caption=caption, box=SIMPLE_HEAD, pad_edge=False,
                  title_justify="left", caption_justify="left")  # fmt: skip
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table
