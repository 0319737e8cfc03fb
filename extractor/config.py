"""The settings of one extraction: a frozen dataclass that is saved into the store."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from classlens.extractor.errors import UsageError
from classlens.extractor.schema import INTERVENTIONS, REDUCERS, REMOVALS, STREAMS

DTYPES = ("float32", "float16", "bfloat16")
INTERVENTION_FIELDS = frozenset({"intervene", "intervene_blocks", "class_fraction"})
SPEED_FIELDS = frozenset({"batch_size", "decode_threads", "compile", "cuda_graph"})
"""What only decides how fast a device works; not part of what is stored."""


@dataclass(frozen=True)
class ExtractConfig:
    """What to extract, from what, with what.

    model: a timm name. model_args: keyword arguments of ``timm.create_model``. weights:
    ``pretrained``, ``random[:seed]`` or a file. classes: a file of class embeddings that stand in
    for the model's own, see `classlens.extractor.class_file`. geometry: ``timm`` (the model's own)
    or ``squash`` (the paper's code). dtype: of the forward pass and the projection. streams: see
    the definitions of ``resid``, ``mid``, ``attn``, ``mlp``. topk: top classes kept of a token.
    reduce: what is kept besides the ranks, see ``REDUCERS``. per_head: keep the attribution of each
    head too. convention: ``corrected``, or ``vilas2023``, which passes attention and MLP outputs of
    GAP models through their block's norm first, and attributes a loss that takes the softmax twice.
    max_pixels: larger pictures are not decoded. decoder: of JPEGs; part of the content, so that a
    store never mixes two. decode_threads: None suits the machine, see :attr:`decoding_threads`.
    certify: prove or mend every rank, see `classlens.kernels.certify`. batch_size: None finds one
    by trial on a GPU, and is 32 on a CPU. compile: what torch.compile can fuse; None where it pays;
    False leaves out the C++ kernels too. cuda_graph: launch a batch as one. intervene: one of
    ``INTERVENTIONS``. intervene_blocks: blocks of an attention knockout; all when None.
    class_fraction: for token removal, share of a patch that makes it class-labelled.
    """

    model: str
    model_args: dict[str, Any] = field(default_factory=dict)
    weights: str = "pretrained"
    classes: str | None = None
    geometry: Literal["timm", "squash"] = "timm"
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    streams: tuple[str, ...] = ("resid", "attn", "mlp")
    topk: int = 1
    reduce: tuple[str, ...] = ()
    per_head: bool = False
    convention: Literal["corrected", "vilas2023"] = "corrected"
    max_pixels: int = 100_000_000
    decoder: Literal["simplejpeg", "pil"] = "simplejpeg"
    device: str = "cpu"
    batch_size: int | None = None
    decode_threads: int | None = None
    certify: bool = False
    compile: bool | None = None
    cuda_graph: bool = False
    intervene: str | None = None
    intervene_blocks: tuple[int, ...] | None = None
    class_fraction: float = 0.5

    def __post_init__(self) -> None:
        unknown = [s for s in self.streams if s not in STREAMS]
        if unknown or not self.streams or len(set(self.streams)) != len(self.streams):
            raise UsageError(
                f"--streams takes a comma-separated choice of {', '.join(STREAMS)}, each once; "
                f"got {','.join(self.streams) or 'nothing'}."
            )
        unknown = [name for name in self.reduce if name not in REDUCERS]
        if unknown or len(set(self.reduce)) != len(self.reduce):
            raise UsageError(
                f"--reduce takes {' or '.join(REDUCERS)}, each once; got {', '.join(self.reduce)}."
            )
        if self.per_head and "attribution" not in self.reduce:
            raise UsageError("--per-head is for the attribution; add --reduce attribution.")
        if self.topk < 0:
            raise UsageError(f"--topk is {self.topk}; give 0 or more.")
        if self.batch_size is not None and self.batch_size < 1:
            raise UsageError(f"--batch-size is {self.batch_size}; give 1 or more.")
        if self.decode_threads is not None and self.decode_threads < 1:
            raise UsageError(f"--decode-threads is {self.decode_threads}; give 1 or more.")
        if self.cuda_graph and (self.on_cpu or self.certify):
            raise UsageError("--cuda-graph is for a GPU and ranks that are not certified.")
        if self.cuda_graph and "neurons" in self.reduce:
            raise UsageError(
                "--cuda-graph is for results of fixed shape, which --reduce neurons has not; leave "
                "one of them out."
            )
        self._check_intervention()

    def _check_intervention(self) -> None:
        if self.intervene is not None and self.intervene not in INTERVENTIONS:
            raise UsageError(
                f"--intervene takes one of {', '.join(INTERVENTIONS)}; got {self.intervene}."
            )
        if self.intervene_blocks is not None and (
            self.intervene is None or self.removes_tokens or not self.intervene_blocks
        ):
            raise UsageError(
                "--blocks says in which blocks an attention knockout acts (--intervene self-only, "
                "no-cls or no-cls-renormalised); tokens are removed from all blocks."
            )
        if not 0 < self.class_fraction <= 1:
            raise UsageError(f"--class-fraction is {self.class_fraction}; give 0 < f <= 1.")
        if self.class_fraction != 0.5 and not self.removes_tokens:
            raise UsageError(
                f"--class-fraction is for token removal; add --intervene {' or '.join(REMOVALS)}."
            )
        if self.removes_tokens and (self.reduce or self.cuda_graph):
            raise UsageError(
                f"--intervene {self.intervene} scores other tokens of each image, which "
                "--reduce and --cuda-graph are not made for; leave those out."
            )

    @property
    def removes_tokens(self) -> bool:
        """Whether the intervention removes image tokens."""
        return self.intervene in REMOVALS

    @property
    def on_cpu(self) -> bool:
        """Whether the device is a CPU."""
        return self.device == "cpu"

    @property
    def decoding_threads(self) -> int:
        """Threads that decode.

        A core decodes far more images than a CPU scores in the same time, and takes its share from
        the products of all cores: one thread for every eight cores, at least one. A GPU wants every
        core but the two that read and score, up to sixteen; beyond that the interpreter's lock is
        the limit.
        """
        if self.decode_threads is not None:
            return self.decode_threads
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        cores = cores or 1
        return max(1, cores // 8 if self.on_cpu else min(16, cores - 2))

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready mapping of all fields."""
        return asdict(self)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> ExtractConfig:
        """The config saved by :meth:`to_json`."""
        fields = dict(value)
        for name in ("streams", "reduce"):
            fields[name] = tuple(fields[name])
        if fields.get("intervene_blocks") is not None:
            fields["intervene_blocks"] = tuple(fields["intervene_blocks"])
        return ExtractConfig(**fields)

    def on(self, device: str) -> ExtractConfig:
        """The same content on a device; on another one, what is set for speed falls to defaults."""
        if device == self.device:
            return self
        kept: dict[str, Any] = {k: v for k, v in vars(self).items() if k not in SPEED_FIELDS}
        kept["device"] = device
        return ExtractConfig(**kept)

    def content(self) -> dict[str, Any]:
        """The fields that decide which numbers are stored; the rest only decide how fast.

        Of weights and classes it is the content that decides, and not the place.
        """
        left_out = {"device", "weights", "classes"} | SPEED_FIELDS
        if self.intervene is None:
            left_out |= INTERVENTION_FIELDS
        return {k: v for k, v in self.to_json().items() if k not in left_out}


def parse_blocks(text: str) -> tuple[int, ...]:
    """Blocks by numbers and ranges, such as ``0-5,8``, ascending.

    Raises:
        UsageError: the text is something else.
    """
    blocks: set[int] = set()
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d{1,4})(?:-(\d{1,4}))?\s*", part, re.ASCII)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if first > last:
            raise UsageError(f"--blocks takes 0-based blocks such as 0-5,8; got {text!r}.")
        blocks.update(range(first, last + 1))
    return tuple(sorted(blocks))


def intervention_text(config: Mapping[str, Any]) -> str:
    """The intervention of a saved config in words: ``no``, ``no-cls in blocks 0, 1``, …"""
    kind = config.get("intervene")
    if kind is None:
        return "no"
    if kind in REMOVALS:
        return f"{kind}, class fraction {config['class_fraction']:g}"
    blocks = config["intervene_blocks"]
    return f"{kind} in " + (
        "all blocks" if blocks is None else f"blocks {', '.join(map(str, blocks))}"
    )
