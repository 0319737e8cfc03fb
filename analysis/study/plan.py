"""What a study is: runs, steps, targets and claims, as frozen dataclasses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_type_hints

from classlens.extractor.config import ExtractConfig
from classlens.extractor.errors import UsageError

PACKED = "pack:"
CONFIG = get_type_hints(ExtractConfig)
SETTINGS = {"intervene": str, "class_fraction": float} | CONFIG
"""What a run may set. A setting that `ExtractConfig` lacks fails its run, and no other."""


@dataclass(frozen=True)
class Pack:
    """An ImageNet-S tree to be packed; see `classlens.extractor.pack_imagenet_s`.

    root: of the tree, in the data folder. A folder NAME of tars there is taken as it is instead.
    """

    name: str
    root: str
    split: str = "validation"
    per_class: int | None = None


@dataclass(frozen=True)
class Run:
    """One store. shards: of the study where the run names none. settings: of `ExtractConfig`."""

    name: str
    shards: tuple[str, ...]
    settings: Mapping[str, Any]
    control_of: str | None = None
    perturbed_of: str | None = None

    @property
    def depends_on(self) -> str | None:
        """The run that this one is the control or a perturbation of."""
        return self.control_of or self.perturbed_of


@dataclass(frozen=True)
class Step:
    """A perturbation test or a linear probe of a run."""

    name: str
    kind: Literal["perturb", "probe"]
    of: str
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Target:
    """A published number.

    measure: a name of `MEASURES`. arguments: of the measure. value: as published. tolerance: how
    far ours may lie from it, and reason: why so far. source: where it stands.
    """

    id: str
    run: str
    measure: str
    value: float
    tolerance: float
    source: str = ""
    reason: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Term:
    """What a claim is about: a measure of a run or step, of all blocks unless arguments choose."""

    run: str
    measure: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


Check = Literal["greater", "rises", "peaks late"]


@dataclass(frozen=True)
class Claim:
    """What a paper says, and how it is checked; see `classlens.analysis.study.claims`.

    says: a sentence. source: where it stands. of, than, factor: ``greater`` asks for of > factor ·
    than; the other checks take ``of`` alone. contradicted: what to add where it does not hold.
    """

    id: str
    says: str
    check: Check
    of: Term
    than: Term | float | None = None
    factor: float = 1.0
    source: str = ""
    contradicted: str = ""

    @property
    def terms(self) -> tuple[Term, ...]:
        """What is measured for it."""
        return (self.of, self.than) if isinstance(self.than, Term) else (self.of,)


@dataclass(frozen=True)
class Study:
    """A whole study, its references checked. seed, permutations: of its tests."""

    name: str
    title: str
    packs: tuple[Pack, ...]
    runs: tuple[Run, ...]
    steps: tuple[Step, ...]
    targets: tuple[Target, ...]
    claims: tuple[Claim, ...] = ()
    seed: int = 0
    permutations: int = 1000

    def run(self, name: str) -> Run:
        """The run of this name."""
        return next(run for run in self.runs if run.name == name)

    def control(self, name: str) -> Run | None:
        """The control of a run, if there is one."""
        return next((run for run in self.runs if run.control_of == name), None)

    def limited_to(self, models: tuple[str, ...]) -> Study:
        """The study of some runs, with their controls, perturbations, steps, targets and claims.

        Raises:
            UsageError: there is no such run.
        """
        names = [run.name for run in self.runs if run.depends_on is None]
        if unknown := [name for name in models if name not in names]:
            raise UsageError(f"{self.name} has no model {unknown[0]!r}; it has {', '.join(names)}.")
        kept = tuple(run for run in self.runs if {run.name, run.depends_on} & set(models))
        kept_names = {run.name for run in kept}
        steps = tuple(step for step in self.steps if step.of in kept_names)
        packs = {shard.removeprefix(PACKED) for run in kept for shard in run.shards}
        packs |= {s.removeprefix(PACKED) for step in steps for s in step.options.get("train", ())}
        kept_names |= {step.name for step in steps}
        return replace(
            self,
            packs=tuple(pack for pack in self.packs if pack.name in packs),
            runs=kept,
            steps=steps,
            targets=tuple(target for target in self.targets if target.run in kept_names),
            claims=tuple(c for c in self.claims if kept_names.issuperset(t.run for t in c.terms)),
        )
