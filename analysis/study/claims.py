"""Claims of a paper, judged by our numbers.

Checks, of numbers or of all blocks of a run:

- ``greater``: of > factor · than. Of all blocks: in more than half of them, each with its own. A
  number is undecided where its 95 % interval has factor · than, itself a number, inside.
- ``rises``: the mean of the middle third of the blocks is above that of the first, and that of the
  last third above that of the middle.
- ``peaks late``: the block with the largest number is in the last third of the model's blocks.

``corrected`` is judged, what the paper means; what its published code computes is judged beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from classlens.analysis.study.measures import Reading, Series
from classlens.analysis.study.plan import Claim
from classlens.analysis.study.verdicts import number

if TYPE_CHECKING:
    import polars as pl
    from rich.table import Table

ClaimVerdict = Literal["holds", "contradicted", "undecided", "not measured"]
CLAIM_VERDICTS: tuple[ClaimVerdict, ...] = ("holds", "contradicted", "undecided", "not measured")
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Judged:
    """A verdict in one convention, and the numbers that it rests on, in words."""

    verdict: ClaimVerdict
    numbers: str


@dataclass(frozen=True)
class ClaimFinding:
    """A claim, judged in each convention that was measured. reason: why it was not."""

    claim: Claim
    judged: Mapping[str, Judged]
    reason: str = ""

    @property
    def verdict(self) -> ClaimVerdict:
        """That of ``corrected``."""
        return self.judged["corrected"].verdict if self.judged else "not measured"

    @property
    def numbers(self) -> str:
        """Those of ``corrected``, and of vilas2023 where it is judged otherwise; or why none."""
        if not self.judged:
            return self.reason
        ours, theirs = self.judged["corrected"], self.judged["vilas2023"]
        numbers = f"{self.claim.of.measure.replace('_', ' ')}: {ours.numbers}"
        if ours.verdict == theirs.verdict:
            return numbers
        return f"{numbers}. As vilas2023, {theirs.verdict}: {theirs.numbers}"

    @property
    def contradiction(self) -> str:
        """A plain sentence where the claim is contradicted; else nothing."""
        if self.verdict != "contradicted":
            return ""
        claim = self.claim
        where = f" ({claim.source})" if claim.source else ""
        said = f"The paper{where}: {claim.says.rstrip('.')}. Not so here: {self.numbers}."
        return f"{said} {claim.contradicted}".rstrip()


def judge_claim(
    claim: Claim, of: Reading | Series, than: Reading | Series | float | None = None
) -> Judged:
    """Whether numbers bear a claim out.

    Args:
        than: for ``greater`` only.

    Raises:
        LookupError: there are too few blocks for the check.
    """
    if claim.check == "greater":
        assert than is not None, "a claim of more says than what"
        if isinstance(of, Reading) and not isinstance(than, Mapping):
            return _greater(of, than, claim.factor)
        return _greater_in_blocks(of, than, claim.factor)
    assert not isinstance(of, Reading), "the parser asks for all blocks"
    return _rises(of) if claim.check == "rises" else _peaks_late(of)


def _greater(of: Reading, than: Reading | float, factor: float) -> Judged:
    bound = factor * (than.value if isinstance(than, Reading) else than)
    numbers = f"{_shown(of)} against {_shown(than)}{_asked(factor)}"
    inside = of.low is not None and of.high is not None and of.low <= bound <= of.high
    if inside and not isinstance(than, Reading):
        return Judged("undecided", numbers)
    return Judged("holds" if of.value > bound else "contradicted", numbers)


def _greater_in_blocks(
    of: Reading | Series, than: Reading | Series | float, factor: float
) -> Judged:
    series = [side for side in (of, than) if isinstance(side, Mapping)]
    blocks = [block for block in series[0] if all(block in side for side in series)]
    if not blocks:
        raise LookupError("there is no block with both numbers")

    def value(side: Reading | Series | float, block: int) -> float:
        reading = side[block] if isinstance(side, Mapping) else side
        return reading.value if isinstance(reading, Reading) else reading

    held = [block for block in blocks if value(of, block) > factor * value(than, block)]
    means = [sum(value(side, b) for b in blocks) / len(blocks) for side in (of, than)]
    numbers = f"in {len(held)} of {len(blocks)} blocks"
    if others := [str(block) for block in blocks if block not in held]:
        numbers += f", not in {', '.join(others)}" if len(others) < len(blocks) else ""
    numbers += f"; mean {number(means[0])} against {number(means[1])}{_asked(factor)}"
    if not isinstance(than, Mapping) and isinstance(of, Mapping):
        numbers += _significant([of[block] for block in blocks])
    return Judged("holds" if 2 * len(held) > len(blocks) else "contradicted", numbers)


def _rises(series: Series) -> Judged:
    blocks, count = list(series), len(series)
    if count < 3:
        raise LookupError("thirds of the blocks need three blocks")
    cuts = [round(third * count / 3) for third in range(4)]
    parts = [blocks[i:j] for i, j in pairwise(cuts)]
    first, middle, last = (sum(series[b].value for b in part) / len(part) for part in parts)
    numbers = (
        f"means of the thirds of the blocks {number(first)}, {number(middle)}, {number(last)}; "
        f"last block {_shown(series[blocks[-1]])}"
    )
    return Judged("holds" if first < middle < last else "contradicted", numbers)


def _peaks_late(series: Series) -> Judged:
    count = max(series) + 1
    late = -(-2 * count // 3)
    peak = max(series, key=lambda block: series[block].value)
    numbers = (
        f"largest, {_shown(series[peak])}, in block {peak} of 0 to {count - 1}; the last third "
        f"begins with block {late}"
    )
    return Judged("holds" if peak >= late else "contradicted", numbers)


def _shown(side: Reading | float) -> str:
    if not isinstance(side, Reading):
        return number(side)
    shown = number(side.value)
    if side.low is not None and side.high is not None:
        shown += f" [{number(side.low)}, {number(side.high)}]"
    return shown


def _asked(factor: float) -> str:
    return "" if factor == 1 else f" (asked: above {number(factor)} times that)"


def _significant(readings: Sequence[Reading]) -> str:
    """In how many blocks the analysis' own test is significant, where it has one."""
    p_values = [reading.p for reading in readings if reading.p is not None]
    if not p_values:
        return ""
    below = sum(p < SIGNIFICANT for p in p_values)
    return f"; p < {SIGNIFICANT} in {below} of {len(p_values)} blocks"


def claim_counts(findings: Sequence[ClaimFinding]) -> str:
    """How many claims have which verdict, in words."""
    counts = {v: sum(f.verdict == v for f in findings) for v in CLAIM_VERDICTS}
    words = {"holds": "hold"}
    return ", ".join(f"{n} {words.get(v, v)}" for v, n in counts.items() if n)


def claims_frame(findings: Sequence[ClaimFinding]) -> pl.DataFrame:
    """One row a claim.

    Columns: id, says, source, check, verdict (of ``corrected``), numbers, verdict_vilas2023,
    numbers_vilas2023 (null where not measured), reason (why not measured), contradiction (a plain
    sentence where it is contradicted).
    """
    import polars as pl

    verdict = pl.Enum(CLAIM_VERDICTS)
    columns: dict[str, Any] = {
        "id": pl.String, "says": pl.String, "source": pl.String, "check": pl.String,
        "verdict": verdict, "numbers": pl.String, "verdict_vilas2023": verdict,
        "numbers_vilas2023": pl.String, "reason": pl.String, "contradiction": pl.String,
    }  # fmt: skip
    rows = []
    for f in findings:
        ours, theirs = (f.judged.get(convention) for convention in ("corrected", "vilas2023"))
        rows.append(
            (
                f.claim.id, f.claim.says, f.claim.source, f.claim.check, f.verdict,
                ours and ours.numbers, theirs.verdict if theirs else "not measured",
                theirs and theirs.numbers, f.reason, f.contradiction,
            )
        )  # fmt: skip
    return pl.DataFrame(rows, columns, orient="row")


def claims_table(findings: Sequence[ClaimFinding]) -> Table:
    """The claims for a terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title="What the paper says, and what was found here",
        caption=f"{claim_counts(findings)}. Judged: corrected, what the paper means; [ ]: 95% "
        "interval; blocks count from 0.",
        box=SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
    )
    for column in ("claim", "verdict", "numbers"):
        table.add_column(column, ratio={"claim": 3, "numbers": 4}.get(column))
    for finding in findings:
        source = f" ({finding.claim.source})" if finding.claim.source else ""
        table.add_row(
            Text(finding.claim.says + source), Text(finding.verdict), Text(finding.numbers)
        )
    return table
