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
    console = Console()
    if len(rows) == 1:
        for name, value in rows[0].items():
            click.echo(f"{name:<34} {_text(value)}")
    else:
        columns = list(dict.fromkeys(name for row in rows for name in row))
        table = Table(box=SIMPLE_HEAD)
        for name in columns:
            table.add_column(name.replace("_", " "), overflow="fold")
        for row in rows:
            table.add_row(*(_text(row.get(name, "")) for name in columns))
        console.print(table)
    click.echo("  ".join(f"{name} {value}" for name, value in result["machine"].items()))


def _text(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
