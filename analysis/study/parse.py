"""A study file: TOML -> `Study`, or one sentence on what is wrong where.

    [study]                 name; shards: tars, folders or patterns that every run reads
    [[pack]]                a data set still to be packed: name, root, split, per_class
    [[run]]                 name, and any field of `ExtractConfig`; becomes the store stores/NAME
    [[perturb]] [[probe]]   name, of (a run), and options
    [[target]]              id, run, measure and its arguments, value, tolerance, source, reason
    [[claim]]               id, says, check, of, than, …; see `analysis.study.parse_claims`

A run with ``control_of`` or ``perturbed_of`` takes the settings of the run it names, and its own on
top. ``values`` with ``first_block`` in place of ``value`` makes a target of each block (0-based);
``runs = { RUN = value, … }`` in place of ``run`` and ``value`` one of each run, called "id, RUN".
Paths are relative to the data folder. ``shards = ["pack:NAME"]`` reads what a pack step wrote.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

from classlens.analysis.study.measures import MEASURES
from classlens.analysis.study.parse_claims import FIELDS, REQUIRED, parse_claim
from classlens.analysis.study.plan import (
    CONFIG,
    PACKED,
    SETTINGS,
    Claim,
    Pack,
    Run,
    Step,
    Study,
    Target,
)
from classlens.extractor.config import ExtractConfig
from classlens.extractor.errors import UsageError

NAME = re.compile(r"[\w.+-]+")
Entry = TypeVar("Entry")


def load_study(path: Path) -> Study:
    """Reads a study file.

    Raises:
        UsageError: it cannot be read or is no valid study; names line, entry and field.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The study {path} cannot be read ({error}); give a TOML file.") from error
    return parse_study(text, path.name)


def parse_study(text: str, file: str) -> Study:
    """A study from the text of its file, whose name is for messages.

    Raises:
        UsageError: as `load_study`.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{file} is no valid TOML ({error}); mend that line.") from error
    return _Parser(text, file, document).study()


STEP_OPTIONS: dict[str, dict[str, Any]] = {
    "perturb": {"methods": list[str], "images": int, "steps": int, "probe": str},
    "probe": {"train": list[str], "per_class": int, "alpha": float},
}
"""What `classlens perturb` and `classlens probe` are given besides their store."""


class _Parser:
    """One document; knows where its entries stand."""

    def __init__(self, text: str, file: str, document: dict[str, Any]) -> None:
        self.file, self.document = file, document
        self.lines: dict[tuple[str, int], int] = {}
        counts: dict[str, int] = {}
        for number, line in enumerate(text.splitlines(), start=1):
            if header := re.match(r"\s*\[{1,2}\s*(\w+)\s*\]{1,2}", line):
                place = counts.get(header[1], 0)
                counts[header[1]] = place + 1
                self.lines[header[1], place] = number

    def study(self) -> Study:
        tables = ("study", "pack", "run", "perturb", "probe", "target", "claim")
        for name in self.document:
            if name not in tables:
                self.refuse(name, 0, f"unknown table; a study has {', '.join(tables)}")
        head = self.document.get("study")
        if not isinstance(head, dict):
            self.refuse("study", 0, "missing; begin with [study] and a name")
        known = {"name": str, "title": str, "shards": list[str], "seed": int, "permutations": int}
        self.check("study", 0, head, known, required=("name",))
        packs = tuple(self.entries("pack", self.pack))
        runs = self.runs(tuple(head.get("shards", ())), {pack.name for pack in packs})
        names = {run.name for run in runs}
        probes = tuple(self.entries("probe", lambda i, e: self.step("probe", i, e, names)))
        tests = tuple(self.entries("perturb", lambda i, e: self.step("perturb", i, e, names)))
        of_probe = {probe.name: probe.of for probe in probes}
        for place, test in enumerate(tests):
            used = test.options.get("probe")
            if used is not None and of_probe.get(used) != test.of:
                self.refuse("perturb", place, f"has probe {used!r}, which is no [[probe]] of "
                            f"{test.of!r}")  # fmt: skip
        steps = (*probes, *tests)  # a test may rank by probes
        self.unique("step", [step.name for step in steps])
        known_names = names | {step.name for step in steps}
        targets = self.entries("target", lambda i, e: self.targets(i, e, known_names))
        claims = self.entries("claim", lambda i, e: self.claims(i, e, known_names))
        return Study(
            name=head["name"],
            title=head.get("title", head["name"]),
            packs=packs,
            runs=tuple(runs),
            steps=steps,
            targets=tuple(chain.from_iterable(targets)),
            claims=tuple(chain.from_iterable(claims)),
            seed=head.get("seed", 0),
            permutations=head.get("permutations", 1000),
        )

    def entries(self, table: str, make: Callable[[int, dict[str, Any]], Entry]) -> Iterator[Entry]:
        """What ``make`` makes of each [[table]]."""
        found = self.document.get(table, [])
        if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
            self.refuse(table, 0, f"must be written [[{table}]], one for each")
        names = [entry.get("id" if table in ("target", "claim") else "name") for entry in found]
        self.unique(table, names)
        for place, entry in enumerate(found):
            yield make(place, entry)

    def pack(self, place: int, entry: dict[str, Any]) -> Pack:
        known = {"name": str, "root": str, "split": str, "per_class": int}
        self.check("pack", place, entry, known, required=("name", "root"))
        return Pack(**entry)

    def runs(self, shards: tuple[str, ...], packs: set[str]) -> list[Run]:
        made: dict[str, Run] = {}

        def make(place: int, entry: dict[str, Any]) -> Run:
            own = {"name": str, "shards": list[str], "control_of": str, "perturbed_of": str}
            self.check("run", place, entry, own | SETTINGS, required=("name",))
            origin = [entry[key] for key in ("control_of", "perturbed_of") if key in entry]
            if len(origin) > 1:
                self.refuse("run", place, "has both control_of and perturbed_of; leave one out")
            if origin and origin[0] not in made:
                self.refuse("run", place, f"refers to {origin[0]!r}, which is no run before it")
            based = made[origin[0]] if origin else None
            settings = {**(based.settings if based else {}), **_settings(entry)}
            if "model" not in settings:
                self.refuse("run", place, "has no model; name one of timm's")
            try:
                ExtractConfig(**{key: settings[key] for key in settings if key in CONFIG})
            except UsageError as error:
                self.refuse("run", place, f"has settings that do not fit: {error}")
            read = tuple(entry.get("shards", based.shards if based else shards))
            if not read:
                self.refuse("run", place, "has no shards; give them here or in [study]")
            for shard in read:
                if shard.startswith(PACKED) and shard.removeprefix(PACKED) not in packs:
                    self.refuse("run", place, f"reads {shard!r}, which no [[pack]] is called")
            run = Run(
                entry["name"], read, settings, entry.get("control_of"), entry.get("perturbed_of")
            )
            made[run.name] = run
            return run

        runs = list(self.entries("run", make))
        if not runs:
            self.refuse("run", 0, "missing; a study needs at least one [[run]]")
        return runs

    def step(
        self, kind: Literal["perturb", "probe"], place: int, entry: dict[str, Any], runs: set[str]
    ) -> Step:
        options = {key: value for key, value in entry.items() if key not in ("name", "of")}
        known = {"name": str, "of": str} | STEP_OPTIONS[kind]
        required = ("name", "of", "train") if kind == "probe" else ("name", "of")
        self.check(kind, place, entry, known, required)
        if entry["of"] not in runs:
            self.refuse(kind, place, f"is of {entry['of']!r}, which is no run")
        if entry["name"] in runs:
            self.refuse(kind, place, f"is called {entry['name']!r} as a run is; rename it")
        return Step(entry["name"], kind, entry["of"], options)

    def targets(self, place: int, entry: dict[str, Any], names: set[str]) -> list[Target]:
        own = {
            "id": str, "run": str, "measure": str, "value": float, "values": list[float],
            "runs": dict, "first_block": int, "tolerance": float, "source": str, "reason": str,
        }  # fmt: skip
        measure = MEASURES.get(str(entry.get("measure")))
        if measure is None:
            self.refuse("target", place, f"has no known measure; known are {', '.join(MEASURES)}")
        taken = dict.fromkeys(measure.arguments, object)
        self.check("target", place, entry, own | taken, ("id", "measure", "tolerance"))
        given = {"value", "values", "runs"} & entry.keys()
        if len(given) != 1 or ("runs" in given) == ("run" in entry):
            self.refuse(
                "target", place, "needs run with value or values, or runs = { RUN = value }"
            )
        if "runs" in entry:
            by_run = {f"{entry['id']}, {run}": (run, value) for run, value in entry["runs"].items()}
        else:
            by_run = {entry["id"]: (entry["run"], entry[given.pop()])}
        arguments = {key: entry[key] for key in measure.arguments if key in entry}
        targets = []
        for name, (run, value) in by_run.items():
            if run not in names:
                self.refuse("target", place, f"is of {run!r}, which is no run or step")
            values = value if isinstance(value, list) else [value]
            if not values or not all(_fits(one, float) for one in values):
                self.refuse("target", place, f"has {value!r}, which is no number")
            series = isinstance(value, list)
            if series and ("first_block" not in entry or measure.choose != "block"):
                self.refuse("target", place, "has values of blocks, but no first_block, or a "
                            "measure without block")  # fmt: skip
            lacking = set(measure.required) - arguments.keys() - ({"block"} if series else set())
            if lacking:
                self.refuse("target", place, f"lacks {min(lacking)}, which its measure takes")
            targets += [
                Target(
                    id=name,
                    run=run,
                    measure=entry["measure"],
                    value=float(one),
                    tolerance=float(entry["tolerance"]),
                    source=entry.get("source", ""),
                    reason=entry.get("reason", ""),
                    arguments=arguments | ({"block": entry["first_block"] + i} if series else {}),
                )
                for i, one in enumerate(values)
            ]
        return targets

    def claims(self, place: int, entry: dict[str, Any], names: set[str]) -> list[Claim]:
        self.check("claim", place, entry, FIELDS, REQUIRED)
        return parse_claim(entry, names, lambda problem: self.refuse("claim", place, problem))

    def check(
        self,
        table: str,
        place: int,
        entry: dict[str, Any],
        known: Mapping[str, Any],
        required: tuple[str, ...],
    ) -> None:
        """Refuses unknown, missing and mistyped fields."""
        for key, value in entry.items():
            if key not in known:
                self.refuse(table, place, f"unknown field {key!r}; known are {', '.join(known)}")
            if not _fits(value, known[key]):
                self.refuse(table, place, f"{key} = {value!r} does not fit; {_wanted(known[key])}")
        for key in required:
            if key not in entry:
                self.refuse(table, place, f"lacks {key}")
        if "name" in entry and not NAME.fullmatch(entry["name"]):
            self.refuse(table, place, f"name {entry['name']!r} names files; give letters, digits, "
                        "and . _ + -")  # fmt: skip

    def unique(self, table: str, names: list[Any]) -> None:
        for place, name in enumerate(names):
            if name is not None and name in names[:place]:
                self.refuse(table, place, f"{name!r} is taken already; names are unique")

    def refuse(self, table: str, place: int, problem: str) -> NoReturn:
        """Raises UsageError with the place of an entry."""
        line = self.lines.get((table, place))
        where = f"{self.file}, line {line}" if line else self.file
        raise UsageError(f"{where}, [{table}]: {problem}.")


def _settings(entry: dict[str, Any]) -> dict[str, Any]:
    """Fields of `ExtractConfig`, lists as the tuples that it takes."""
    return {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in entry.items()
        if key in SETTINGS
    }


def _fits(value: Any, kind: Any) -> bool:
    origin, arguments = get_origin(kind) or kind, get_args(kind)
    if origin is Literal:
        return value in arguments
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in arguments)
    if origin in (list, tuple):
        return isinstance(value, list) and all(_fits(one, arguments[0]) for one in value)
    if isinstance(value, bool):
        return origin in (bool, object)
    return isinstance(value, int | float if origin is float else origin)


def _wanted(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "give " + " or ".join(map(repr, get_args(kind)))
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
    return f"give {names.get(kind, 'a list or table, as the documentation of the field says')}"
