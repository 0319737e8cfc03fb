"""Published numbers beside ours: verdicts, their table, their frame."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Literal

from classlens.analysis.study.plan import Target

if TYPE_CHECKING:
    import polars as pl
    from rich.table import Table

Verdict = Literal["met", "not met", "not measured"]
VERDICTS: tuple[Verdict, ...] = ("met", "not met", "not measured")


@dataclass(frozen=True)
class Finding:
    """A target and our numbers, None where there is none. reason: why it was not measured."""

    target: Target
    corrected: float | None
    vilas2023: float | None
    verdict: Verdict
    reason: str = ""

    @property
    def difference(self) -> float | None:
        """Ours as their code computes it, minus theirs."""
        return None if self.vilas2023 is None else self.vilas2023 - self.target.value


def judge(target: Target, values: Mapping[str, float], reason: str = "") -> Finding:
    """Whether our number lies within the tolerance of the published one.

    Args:
        values: by convention. ``vilas2023`` is judged: it computes what the published code does.
    """
    ours = values.get("vilas2023")
    verdict: Verdict = "not measured"
    if ours is not None:
        verdict = "met" if abs(ours - target.value) <= target.tolerance else "not met"
    return Finding(target, values.get("corrected"), ours, verdict, reason)


def findings_frame(findings: Sequence[Finding]) -> pl.DataFrame:
    """One row a target.

    Columns: id, run, measure, arguments (JSON), block (null where the measure has none), published,
    corrected, vilas2023, difference (vilas2023 − published), tolerance, verdict ("met", "not met",
    "not measured"), reason (why not measured), tolerance_reason, source.
    """
    import polars as pl

    columns = {
        "id": pl.String, "run": pl.String, "measure": pl.String, "arguments": pl.String,
        "block": pl.Int16, "published": pl.Float64, "corrected": pl.Float64,
        "vilas2023": pl.Float64, "difference": pl.Float64, "tolerance": pl.Float64,
        "verdict": pl.Enum(VERDICTS), "reason": pl.String, "tolerance_reason": pl.String,
        "source": pl.String,
    }  # fmt: skip
    rows = [
        (
            f.target.id, f.target.run, f.target.measure, json.dumps(dict(f.target.arguments)),
            f.target.arguments.get("block"), f.target.value, f.corrected, f.vilas2023,
            f.difference, f.target.tolerance, f.verdict, f.reason, f.target.reason,
            f.target.source,
        )
        for f in findings
    ]  # fmt: skip
    return pl.DataFrame(rows, columns, orient="row")


@dataclass(frozen=True)
class Row:
    """A line of the table: one target, or those of all blocks of a series.

    Numbers of a series are those of the block that lies farthest off, relative to its tolerance.
    """

    id: str
    run: str
    block: str
    finding: Finding
    met: int
    measured: int
    count: int

    @property
    def verdict(self) -> str:
        """In words; of a series, with how many blocks are met."""
        if self.count == 1 or not self.measured:
            return self.finding.verdict
        verdict = "met" if self.met == self.count else "not met"
        return f"{verdict}, {self.met} of {self.count} blocks"


def rows(findings: Sequence[Finding]) -> Iterator[Row]:
    """The findings with the blocks of a series joined, in order."""
    for name, group in groupby(findings, key=lambda finding: finding.target.id):
        members = list(group)
        worst = max(members, key=_off)
        block = worst.target.arguments.get("block")
        yield Row(
            id=name,
            run=worst.target.run,
            block="" if block is None else str(block),
            finding=worst,
            met=sum(f.verdict == "met" for f in members),
            measured=sum(f.verdict != "not measured" for f in members),
            count=len(members),
        )


def _off(finding: Finding) -> float:
    if finding.difference is None:
        return -1.0
    return abs(finding.difference) / (finding.target.tolerance or 1.0)


def number(value: float | None) -> str:
    """Four significant digits; an en dash where there is none."""
    return "–" if value is None else f"{value:.4g}"


def counts(findings: Sequence[Finding]) -> str:
    """How many targets have which verdict, in words."""
    by_verdict = {v: sum(f.verdict == v for f in findings) for v in VERDICTS}
    return ", ".join(f"{count} {verdict}" for verdict, count in by_verdict.items())


def missing(findings: Sequence[Finding]) -> list[str]:
    """Why targets were not measured: a line a reason, with the number of its targets."""
    reasons = Counter(f.reason for f in findings if f.verdict == "not measured")
    return [f"{count} not measured: {reason}" for reason, count in reasons.items()]


def findings_table(title: str, findings: Sequence[Finding]) -> Table:
    """The findings for a terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=title,
        caption=f"{counts(findings)}. Judged: vilas2023, which computes what the published code "
        "does; of a series the block farthest off is shown. Blocks count from 0.",
        box=SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
    )
    for column in ("target", "block", "published", "corrected", "vilas2023", "±", "verdict"):
        table.add_column(column, justify="left" if column in ("target", "verdict") else "right")
    for row in rows(findings):
        finding = row.finding
        table.add_row(
            Text(row.id),
            row.block,
            number(finding.target.value),
            number(finding.corrected),
            number(finding.vilas2023),
            number(finding.target.tolerance),
            Text(row.verdict),
        )
    return table
