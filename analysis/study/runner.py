"""Runs a study: packs, extracts, analyses, and goes on where it stopped.

In the output folder: shards/NAME of what was packed, stores/NAME of each run, results/ (one JSON a
run and analysis, with the fingerprints of its inputs), targets.parquet, claims.parquet,
pages/NAME.html and report.html.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from classlens.analysis.study.claims import ClaimFinding, judge_claim
from classlens.analysis.study.measures import ANALYSES, MEASURES, Reading, Series, Subject
from classlens.analysis.study.plan import (
    CONFIG,
    PACKED,
    Claim,
    Pack,
    Run,
    Step,
    Study,
    Target,
    Term,
)
from classlens.analysis.study.verdicts import Finding, judge
from classlens.extractor.config import ExtractConfig
from classlens.extractor.console import bar, status
from classlens.extractor.errors import ClasslensError, UsageError

CONVENTIONS = ("corrected", "vilas2023")
PRETRAINED = ("pretrained", "random")


@dataclass(frozen=True)
class Outcome:
    """What became of one step. exit_code: of the error that stopped it, else 0."""

    step: str
    state: Literal["done", "failed", "left out"]
    note: str = ""
    exit_code: int = 0


@dataclass(frozen=True)
class StudyResult:
    """outcomes, findings, claims: of all steps, targets and claims, in order."""

    outcomes: tuple[Outcome, ...]
    findings: tuple[Finding, ...]
    claims: tuple[ClaimFinding, ...]
    bad_images: int

    @property
    def exit_code(self) -> int:
        """That of the first failure; 3 where none failed but images could not be scored."""
        failures = [outcome.exit_code for outcome in self.outcomes if outcome.state == "failed"]
        return failures[0] if failures else 3 if self.bad_images else 0


@dataclass(frozen=True)
class Place:
    """Where a study reads and writes, and on what it runs.

    data: what the paths of the study are relative to. dtype: of runs that set none; None suits the
    device.
    """

    data: Path
    out: Path
    device: str
    dtype: Literal["float32", "float16", "bfloat16"] | None = None

    def store(self, run: str) -> Path:
        """The store of a run."""
        return self.out / "stores" / run

    def page(self, run: str) -> Path:
        """The page on a run."""
        return self.out / "pages" / f"{run}.html"

    def shards(self, run: Run, packs: tuple[Pack, ...]) -> list[str]:
        """Shard arguments of a run."""
        return self.shard_arguments(run.shards, packs)

    def shard_arguments(self, shards: Sequence[str], packs: tuple[Pack, ...]) -> list[str]:
        """Shards as a study names them -> as `extract` does."""
        packed = {PACKED + pack.name: str(self.packed(pack)) for pack in packs}
        return [packed.get(shard) or str(self.data / shard) for shard in shards]

    def answers(self, step: str) -> Path:
        """The answers of a perturbation test."""
        return self.out / "results" / f"{step}.parquet"

    def packed(self, pack: Pack) -> Path:
        """The shards of a pack step: those in the data folder where there are some."""
        given = self.data / pack.name
        return given if any(given.glob("*.tar")) else self.out / "shards" / pack.name

    def config(self, run: Run) -> ExtractConfig:
        """The settings of a run's extraction.

        Raises:
            UsageError: the run sets what this classlens cannot do.
        """
        settings = dict(run.settings)
        if missing := sorted(settings.keys() - CONFIG.keys()):
            raise UsageError(f"This classlens cannot extract with {missing[0]}; upgrade it.")
        weights = settings.get("weights", "pretrained")
        if weights.partition(":")[0] not in PRETRAINED:
            settings["weights"] = str(self.data / weights)
        if settings.get("classes") is not None:
            settings["classes"] = str(self.data / settings["classes"])
        dtype = self.dtype or ("float32" if self.device == "cpu" else "float16")
        return ExtractConfig(**{"dtype": dtype, "device": self.device, **settings})


def run_study(
    study: Study,
    place: Place,
    *,
    only: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> StudyResult:
    """Runs what is not done yet, and writes table and report of all that is.

    Args:
        only: the one run or step to work on; targets of others are read from earlier results.
        say: is told a line of each step.

    Raises:
        UsageError: there is no step called ``only``.
    """
    names = [entry.name for entry in (*study.packs, *study.runs, *study.steps)]
    if only is not None and only not in names:
        raise UsageError(f"{study.name} has no step {only!r}; it has {', '.join(names)}.")
    runner = _Runner(study, place, only)
    outcomes = []
    for outcome in runner.outcomes():
        outcomes.append(outcome)
        say(f"{outcome.step}: {outcome.state}" + (f" ({outcome.note})" if outcome.note else ""))
    findings = tuple(judge(target, *runner.measured(target)) for target in study.targets)
    claims = tuple(runner.judged(claim) for claim in study.claims)
    return StudyResult(tuple(outcomes), findings, claims, runner.bad_images)


class _Runner:
    def __init__(self, study: Study, place: Place, only: str | None) -> None:
        self.study, self.place, self.only = study, place, only
        self.failures: dict[str, str] = {}
        self.bad_images = 0

    def outcomes(self) -> Iterator[Outcome]:
        """Takes one step after another; what one step raises does not stop the others."""
        study = self.study
        for pack in study.packs:
            yield self.attempt(pack.name, f"pack {pack.name}", lambda p=pack: self.pack(p))
        for run in study.runs:
            yield self.attempt(run.name, f"extract {run.name}", lambda r=run: self.extract(r))
        for step in study.steps:
            yield self.attempt(step.name, f"{step.kind} {step.name}", lambda s=step: self.step(s))
        for run in study.runs:
            for name in self.analyses(run):
                yield self.attempt(
                    run.name, f"{name} of {run.name}", lambda r=run, n=name: self.analyse(r, n)
                )
        for run in study.runs:
            if run.depends_on is None:
                yield self.attempt(run.name, f"page on {run.name}", lambda r=run: self.page(r))

    def attempt(self, name: str, title: str, work: Callable[[], str]) -> Outcome:
        if self.only is not None and name != self.only:
            return Outcome(title, "left out", f"--only {self.only}")
        if name in self.failures:
            return Outcome(title, "left out", f"an earlier step of {name} failed")
        try:
            return Outcome(title, "done", work())
        except Exception as error:  # the others go on; the command ends with this one's exit code
            code = error.exit_code if isinstance(error, ClasslensError) else 1
            reason = str(error) if code != 1 else f"{type(error).__name__}: {error}"
            self.failures[name] = reason
            return Outcome(title, "failed", reason, code)

    def pack(self, pack: Pack) -> str:
        from classlens.extractor.pack_imagenet_s import pack_imagenet_s

        out = self.place.packed(pack)
        if any(out.glob("*.tar")):
            return f"{out} as it is"
        with bar(f"Packing {pack.name}") as progress:
            draft = out.with_name(f".{out.name}-unfinished")
            shutil.rmtree(draft, ignore_errors=True)
            summary = pack_imagenet_s(
                self.place.data / pack.root,
                draft,
                split=pack.split,
                per_class=pack.per_class,
                progress=progress,
            )
            draft.rename(out)
        return f"{summary.images:,} images of {summary.classes} classes"

    def extract(self, run: Run) -> str:
        from classlens.extractor.prepare import prepare
        from classlens.extractor.run import extract

        config = self.place.config(run)
        shards = self.place.shards(run, self.study.packs)
        read = [*shards, config.weights, *filter(None, [config.classes])]
        inputs = {"config": config.to_json(), "files": _files(read)}
        done = self.kept(run.name, "extract", inputs)
        if done is None or not _complete(self.place.store(run.name)):
            with status(f"Walking the shards and loading {run.name}"):
                prepared = prepare(config, shards)
            with bar(f"Scoring {run.name}") as progress:
                summary = extract(prepared, self.place.store(run.name), progress)
            done = {"images": summary.images, "status": summary.status}
            self.keep(run.name, "extract", inputs, done)
        good = done["status"].get("ok", 0)
        self.bad_images += done["images"] - good
        return f"{good:,} of {done['images']:,} images"

    def step(self, step: Step) -> str:
        store = self.place.store(step.of)
        if not _complete(store):
            raise UsageError(f"{step.of} has not been run.")
        probes = self.probes_of(step)
        inputs = {
            "store": _fingerprint(store),
            "probes": probes and _fingerprint(probes),
            "options": dict(step.options),
            "seed": self.study.seed,
            "classlens": version("classlens"),
        }
        if self.kept(step.name, step.kind, inputs) is None:
            work = self.perturb if step.kind == "perturb" else self.probe
            self.keep(step.name, step.kind, inputs, work(step, store))
        return ""

    def probes_of(self, step: Step) -> Path | None:
        """The store of the probes that a perturbation test ranks by, if it could be made."""
        name = step.options.get("probe")
        store = name and self.place.store(name)
        return store if store and _complete(store) else None

    def perturb(self, step: Step, store: Path) -> dict[str, Any]:
        from classlens.analysis.commands_perturb import run_perturbation
        from classlens.analysis.perturbation import write_result

        results = {}
        for convention in CONVENTIONS:
            options = {**step.options, "probe": self.probes_of(step)}
            if convention == "vilas2023":  # every number of patches, in their areas
                options.pop("steps", None)
            answers, result = run_perturbation(
                store,
                convention=convention,
                device=self.place.device,
                seed=self.study.seed,
                **options,
            )
            if convention == "corrected":
                write_result(self.place.answers(step.name), answers, result)
            results[convention] = result.to_json()
        return results

    def probe(self, step: Step, store: Path) -> dict[str, Any]:
        from classlens.analysis.probes import compare_probe
        from classlens.extractor.probe_run import prepare_probe, probe

        run = self.study.run(step.of)
        options = dict(step.options)
        train = self.place.shard_arguments(options.pop("train"), self.study.packs)
        # A probe has no class embedding: what is projected onto one stays away.
        config = replace(self.place.config(run), reduce=(), per_head=False, certify=False)
        prepared = prepare_probe(config, train, self.place.shards(run, self.study.packs), **options)
        with bar(f"Probing {step.of}") as progress:
            probe(prepared, self.place.store(step.name), progress)
        comparison = compare_probe(store, self.place.store(step.name), seed=self.study.seed)
        return {name: {"comparison": comparison.to_dicts()} for name in CONVENTIONS}

    def analyses(self, run: Run) -> list[str]:
        """The analyses that a run's targets and claims need, and those of its page."""
        terms = [term for claim in self.study.claims for term in claim.terms]
        wanted = (*self.study.targets, *terms)
        measured = (MEASURES[w.measure].analysis for w in wanted if w.run == run.name)
        own = "interventions" if run.perturbed_of else "identifiability"
        return [name for name in dict.fromkeys((own, *measured)) if name in ANALYSES]

    def analyse(self, run: Run, name: str) -> str:
        subject, inputs = self.subject(run)
        if self.kept(run.name, name, inputs) is None:
            with status(f"Analysing {run.name}: {name}"):
                result = {c: ANALYSES[name](subject, c) for c in CONVENTIONS}
            self.keep(run.name, name, inputs, result)
        return ""

    def subject(self, run: Run) -> tuple[Subject, dict[str, Any]]:
        """What the analyses of a run are given, and its fingerprint."""
        control = self.study.control(run.name)
        with_control = control is not None and self.kept(control.name, "extract") is not None
        control_store = self.place.store(control.name) if control and with_control else None
        original = self.place.store(run.perturbed_of) if run.perturbed_of else None
        study, store = self.study, self.place.store(run.name)
        stores = {"store": store, "control": control_store, "original": original}
        inputs = {
            **{name: path and _fingerprint(path) for name, path in stores.items()},
            "seed": study.seed,
            "permutations": study.permutations,
            "classlens": version("classlens"),
        }
        subject = Subject(store, control_store, original, study.seed, study.permutations)
        return subject, inputs

    def page(self, run: Run) -> str:
        from classlens.analysis.report import write_report
        from classlens.analysis.values import agreement_frame

        subject, inputs = self.subject(run)
        tests, probes = self.steps_done(run, "perturb"), self.steps_done(run, "probe")
        perturbed = [
            self.place.store(other.name)
            for other in self.study.runs
            if other.perturbed_of == run.name and self.kept(other.name, "extract") is not None
        ]
        values = self.kept(run.name, "values")
        agreement = values and values["corrected"]["agreement"]
        inputs |= {"steps": [*tests, *probes], "perturbed": [_fingerprint(p) for p in perturbed]}
        inputs |= {"values": agreement}
        page = self.place.page(run.name)
        if self.kept(run.name, "page", inputs) is None or not page.exists():
            with status(f"Drawing {run.name}"):
                write_report(
                    [subject.store],
                    page,
                    subject.control,
                    perturbed=perturbed,
                    perturbations=[self.place.answers(step) for step in tests],
                    probe=self.place.store(probes[0]) if probes else None,
                    values=agreement and agreement_frame(agreement),
                    permutations=subject.permutations,
                    seed=subject.seed,
                )
            self.keep(run.name, "page", inputs, {"page": page.name})
        return str(page)

    def steps_done(self, run: Run, kind: str) -> list[str]:
        """Steps of a kind that have a result of this run."""
        of_run = [s.name for s in self.study.steps if (s.of, s.kind) == (run.name, kind)]
        return [name for name in of_run if self.kept(name, kind) is not None]

    def measured(self, target: Target) -> tuple[dict[str, float], str]:
        """A target's number in each convention, and why there is none."""
        try:
            readings = {c: self.read(target, c) for c in CONVENTIONS}
        except LookupError as error:
            return {}, str(error.args[0])
        return {c: r.value for c, r in readings.items() if isinstance(r, Reading)}, ""

    def judged(self, claim: Claim) -> ClaimFinding:
        """A claim with its verdict in each convention, or why there is none."""
        try:
            judged = {
                c: judge_claim(
                    claim,
                    self.read(claim.of, c),
                    self.read(claim.than, c) if isinstance(claim.than, Term) else claim.than,
                )
                for c in CONVENTIONS
            }
        except LookupError as error:
            return ClaimFinding(claim, {}, str(error.args[0]))
        return ClaimFinding(claim, judged)

    def read(self, wanted: Target | Term, convention: str) -> Reading | Series:
        """What is measured of a run or step.

        Raises:
            LookupError: it is not; says why.
        """
        measure = MEASURES[wanted.measure]
        if wanted.run in self.failures:
            raise LookupError(self.failures[wanted.run])
        results = self.kept(wanted.run, measure.analysis)
        if results is None:
            raise LookupError(f"{wanted.run} has not been run")
        return measure.read(results[convention], **wanted.arguments)

    def kept(self, run: str, step: str, inputs: dict[str, Any] | None = None) -> Any | None:
        """The result of a step that is done, with these inputs where they are given."""
        file = self.place.out / "results" / f"{run}.{step}.json"
        try:
            content = json.loads(file.read_text())
        except (OSError, ValueError):
            return None
        same = inputs is None or content["inputs"] == json.loads(json.dumps(inputs))
        return content["result"] if same else None

    def keep(self, run: str, step: str, inputs: dict[str, Any], result: Any) -> None:
        file = self.place.out / "results" / f"{run}.{step}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_suffix(".unfinished")
        draft.write_text(json.dumps({"inputs": inputs, "result": result}))
        os.replace(draft, file)


def _complete(store: Path) -> bool:
    from classlens.extractor.schema import committed_units, read_layout

    return store.is_dir() and len(committed_units(store)) == read_layout(store).units


def _fingerprint(store: Path) -> str:
    """Of what a store was made from and of how much of it there is."""
    from classlens.extractor.schema import committed_units, read_attributes

    facts = [read_attributes(store)["fingerprint"], committed_units(store)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _files(names: list[str]) -> list[tuple[str, int, int]]:
    """Name, size and time of change of the files, and of the tars in the folders."""
    found = []
    for path in map(Path, names):
        files = sorted(path.glob("*.tar")) if path.is_dir() else [path] if path.is_file() else []
        found += [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return found
