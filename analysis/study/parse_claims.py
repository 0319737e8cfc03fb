"""The tables [[claim]] of a study file.

They have the fields

    id, says, source        the paper's sentence, and where it stands
    check                   "greater", "rises" or "peaks late"; see `analysis.study.claims`
    of                      { run, measure, and its arguments }; without block or pick of all blocks
    than, factor            of ``greater``: such a table or a number, and how many times of it
    run or runs             of ``of`` and ``than`` where they name none; runs makes a claim of each
    contradicted            a sentence to add where the claim does not hold
"""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import Any, NoReturn

from classlens.analysis.study.measures import MEASURES
from classlens.analysis.study.plan import Check, Claim, Term

FIELDS = {
    "id": str, "says": str, "source": str, "check": Check, "of": dict, "than": object,
    "factor": float, "run": str, "runs": list[str], "contradicted": str,
}  # fmt: skip
REQUIRED = ("id", "says", "check", "of")

Refuse = Callable[[str], NoReturn]


def parse_claim(entry: dict[str, Any], names: Set[str], refuse: Refuse) -> list[Claim]:
    """The claims of a table whose fields are known and of the right types.

    Args:
        names: of runs and steps. refuse: raises UsageError with a problem and its place.
    """
    check, than = entry["check"], entry.get("than")
    if (check == "greater") != ("than" in entry):
        refuse("takes than with the check greater, and with no other")
    if "factor" in entry and (check != "greater" or entry["factor"] <= 0):
        refuse("factor is above 0, and of the check greater")
    if {"run", "runs"} <= entry.keys() or entry.get("runs") == []:
        refuse("takes run, or runs with at least one")
    claims = []
    for run in entry.get("runs", [entry.get("run")]):
        of = _term("of", entry["of"], run, names, refuse)
        if check != "greater" and _chosen(of):
            refuse(f"of must be of all blocks for the check {check}; leave out its block or pick")
        other: Term | float | None
        if isinstance(than, dict):
            other = _term("than", than, run, names, refuse)
        elif than is None or (isinstance(than, int | float) and not isinstance(than, bool)):
            other = than
        else:
            refuse(f"than = {than!r} does not fit; give a number or {{ run, measure, … }}")
        claims.append(
            Claim(
                id=f"{entry['id']}, {run}" if "runs" in entry else entry["id"],
                says=entry["says"],
                check=check,
                of=of,
                than=other,
                factor=float(entry.get("factor", 1)),
                source=entry.get("source", ""),
                contradicted=entry.get("contradicted", ""),
            )
        )
    return claims


def _term(
    key: str, entry: dict[str, Any], run: str | None, names: Set[str], refuse: Refuse
) -> Term:
    arguments = {"run": run, **entry}
    run, name = arguments.pop("run"), arguments.pop("measure", None)
    measure = MEASURES.get(str(name))
    if measure is None:
        refuse(f"{key}.measure is {name!r}, which is unknown; known are {', '.join(MEASURES)}")
    if not isinstance(run, str) or run not in names:
        refuse(f"{key}.run is {run!r}, which is no run or step")
    if unknown := [one for one in arguments if one not in measure.arguments]:
        refuse(f"{key}.{unknown[0]} is unknown; {name} takes {', '.join(measure.arguments)}")
    if lacking := set(measure.required) - arguments.keys() - {measure.choose}:
        refuse(f"{key} lacks {min(lacking)}, which its measure takes")
    return Term(run, name, arguments)


def _chosen(term: Term) -> bool:
    """Whether one number is measured, and not one of each block."""
    choose = MEASURES[term.measure].choose
    return choose is None or choose in term.arguments
