"""How a benchmark's result is printed and kept: one JSON object, or a table to read."""

from __future__ import annotations

import json
from typing import Any

import click


def print_result(result: dict[str, Any], as_json: bool) -> None:
    """Prints ``{"benchmark", "machine", "rows"}`` as one line of JSON, or as a table.

    A row's lists and dicts are for the JSON alone.
    """
    if as_json:
        click.echo(json.dumps(result))
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    rows = [
        {k: v for k, v in row.items() if not isinstance(v, list | dict)} for row in result["rows"]
    ]
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [
        [name.replace("_", " "), *(_text(row.get(name, "")) for row in rows)] for name in names
    ]
    if len(rows) < len(names):  # a row would not fit the screen: a column each
        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_column(no_wrap=True)
        for _ in rows:
            table.add_column(overflow="fold")
    else:
        table = Table(box=SIMPLE_HEAD)
        headings, *lines = zip(*lines, strict=True)
        for heading in headings:
            table.add_column(heading, overflow="fold")
    for line in lines:
        table.add_row(*line)
    Console().print(table)
    click.echo("  ".join(f"{name} {value}" for name, value in result["machine"].items()))


def _text(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
