"""The columns of the index: one row a neuron, names written once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import polars as pl

from classlens.analysis.neurons.site.content import Content, NeuronPage

INDEX_VARIABLE = "CLASSLENS_INDEX"


class Table:
    """Rows of the index, gathered page by page.

    Columns that belong to a part which was not computed are left out of :meth:`script`.
    """

    def __init__(self, content: Content) -> None:
        self._content = content
        self._names: dict[str, int] = {}
        self._rows: list[dict[str, Any]] = []

    def add(self, page: NeuronPage) -> None:
        """The row of a page."""
        row: dict[str, Any] = {"block": page.block, "neuron": page.neuron}
        if page.promoted:
            row |= self._scored(
                "promoted", "product", page.promoted[0].name, page.promoted[0].value
            )
        words = {word.kind: word.word for word in page.words}
        if page.exemplars and (label := words.get("exemplar")) is not None:
            count = sum(self._content.pictures[e.picture].label == label for e in page.exemplars)
            row |= self._scored("label", "share", label, count / len(page.exemplars))
        if page.iou:
            row |= self._scored("detected", "iou", page.iou[0].name, page.iou[0].value)
        if (text := words.get("clip")) is not None:
            row["clip"] = self._name(text)
        if len(page.words) > 1:
            row["agreeing"] = page.agreeing
        self._rows.append(row)

    def frame(self) -> pl.DataFrame:
        """Columns block, neuron, iou, agreeing: null where a part was not computed."""
        schema = {"block": pl.Int16, "neuron": pl.Int32, "iou": pl.Float64, "agreeing": pl.Int8}
        columns = {name: [row.get(name) for row in self._rows] for name in schema}
        return pl.DataFrame(columns, schema=schema)

    def script(self) -> str:
        """A script that sets one global variable to names and columns."""
        columns = list(dict.fromkeys(name for row in self._rows for name in row))
        value: Mapping[str, Any] = {
            "names": list(self._names),
            "columns": {name: [row.get(name) for row in self._rows] for name in columns},
        }
        return f"const {INDEX_VARIABLE} = {json.dumps(value, separators=(',', ':'))};\n"

    def _scored(self, key: str, measure: str, name: str, value: float) -> dict[str, Any]:
        return {key: self._name(name), measure: float(f"{value:.4g}")}

    def _name(self, name: str) -> int:
        return self._names.setdefault(name, len(self._names))
