"""What scores on this machine: implementation, compilation, batch size."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from classlens.extractor.batch_size import largest_batch
from classlens.extractor.captured import CapturedScorer
from classlens.extractor.config import ExtractConfig
from classlens.extractor.errors import ModelError
from classlens.extractor.fused_blocks import fusable
from classlens.extractor.interventions import make_intervention
from classlens.extractor.models import Subject
from classlens.extractor.reducers.attribution import AttributionReducer
from classlens.extractor.reducers.memories import MemoriesReducer
from classlens.extractor.reducers.neurons import NeuronsAccumulator
from classlens.extractor.reducers.protocol import Reducer, Targets
from classlens.extractor.reducers.ranks import RanksReducer
from classlens.extractor.scorer import DTYPES, Forward, Scorer
from classlens.kernels.certify import Certifier
from classlens.kernels.class_scores import Impl
from classlens.kernels.class_space import ClassSpace
from classlens.kernels.cpu_bfloat16 import native_bfloat16
from classlens.kernels.reductions import compiler_found
from classlens.kernels.tiles import UNITS, Units, units_found

if TYPE_CHECKING:
    from classlens.extractor.prepare import Prepared

CPU_BATCH, LARGEST_GPU_BATCH = 32, 512
# Of <malloc.h>; and the largest number that mallopt takes.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, KEPT_BYTES = -1, -3, 2**31 - 1
# Compiling takes a CPU about a minute, which fewer images do not give back.
COMPILE_FROM_IMAGES = 3000


@dataclass(frozen=True)
class Engine:
    """scorer: has ``score(pixels, targets)`` for up to batch_size images."""

    scorer: Scorer | CapturedScorer
    batch_size: int


def make_engine(prepared: Prepared) -> Engine:
    """The scorer on the configured device, and how many images it is to be given at once.

    Raises:
        ModelError: the class space does not fit the dtype, or not one image fits the device.
    """
    config = prepared.config
    if config.on_cpu:
        keep_freed_memory()
    scorer = make_scorer(prepared)
    batch_size = config.batch_size
    if batch_size is None:
        batch_size = CPU_BATCH if config.on_cpu else _largest_batch(scorer, prepared)
    if config.cuda_graph:
        input_size = prepared.subject.geometry.input_size
        return Engine(CapturedScorer(scorer, batch_size, input_size), batch_size)
    return Engine(scorer, batch_size)


def keep_freed_memory() -> None:
    """Has glibc keep the memory of freed tensors for the next ones, for the life of the process.

    Blocks of more than 32 MiB it would give back to the system at once, which hands out zeroed
    pages anew for each activation. Without effect where the C library is another.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for threshold in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            mallopt(threshold, KEPT_BYTES)


def make_scorer(prepared: Prepared) -> Scorer:
    """The model with its reducers, on the configured device in the configured dtype.

    Raises:
        ModelError: the class space does not fit the dtype, or is too wide to certify; or the
            intervention does not fit the model.
    """
    config, subject = prepared.config, prepared.subject
    dtype = DTYPES[config.dtype]
    compile = _compiles(config, prepared.plan.manifest.height)
    # A CPU rounds no further than it must: its products are quick in float32 and, where it has the
    # instructions, bfloat16.
    rounds = not config.on_cpu or (_multiplies_bfloat16(config) and not config.certify)
    multiplied = dtype if rounds else torch.float32
    try:
        space = subject.space.to(dtype=multiplied, device=config.device)
        certifier = (
            Certifier(subject.space, space, dtype, compile=compile) if config.certify else None
        )
    except ValueError as error:
        raise ModelError(f"{config.model} cannot be scored in {config.dtype}: {error}") from error
    impl = choose_impl(config, prepared.plan.manifest.height)
    ranks = RanksReducer(
        space,
        config.streams,
        config.topk,
        impl=impl,
        certifier=certifier,
    )
    reducers: list[Reducer] = [ranks]
    if "memories" in config.reduce:
        reducers.append(memories_reducer(prepared, space, impl))
    if "attribution" in config.reduce:
        reducers.append(attribution_reducer(prepared))
    sums_impl = "avx512" if impl in UNITS and dtype == torch.bfloat16 else "torch"
    neurons = NeuronsAccumulator(len(subject.prefix_kinds), sums_impl)
    return Scorer(
        subject,
        reducers,
        dtype=dtype,
        device=config.device,
        convention=config.convention,
        forward=choose_forward(config, subject, prepared.plan.manifest.height),
        intervention=make_intervention(config, subject),
        accumulator=neurons if "neurons" in config.reduce else None,
    )


def memories_reducer(prepared: Prepared, space: ClassSpace, impl: Impl) -> MemoriesReducer:
    """Memories of the model, before its weights are cast; the ranks have found the top classes."""
    config, subject = prepared.config, prepared.subject
    return MemoriesReducer.of(
        subject.model,
        subject.embedding(),
        space,
        streams=config.streams if config.topk else (),
        impl=impl,
    )


def attribution_reducer(prepared: Prepared) -> AttributionReducer:
    """Attribution as the configuration wants it. Gradients take float32 whatever the dtype."""
    config, subject = prepared.config, prepared.subject
    space = subject.space.to(dtype=torch.float32, device=config.device)
    return AttributionReducer(subject.model, space, config.convention, config.per_head)


def choose_impl(config: ExtractConfig, images: int) -> Impl:
    """Which implementation of class scoring a run of so many images takes.

    The fused kernels, unless ranks are certified, which needs the logits: Triton's on a GPU, that
    for a CPU with AMX or AVX-512, whose source takes a second or two to compile. Else chunked
    products, their reductions compiled where that pays.
    """
    if not config.certify:
        if not config.on_cpu:
            return "triton"
        if units := _units(config):
            return units
    return "compiled" if _compiles(config, images) else "torch"


def choose_forward(config: ExtractConfig, subject: Subject, images: int) -> Forward:
    """How a run of so many images runs the model's blocks.

    By the fused kernel on a CPU with AMX or AVX-512, if it knows such blocks; else compiled where
    that pays.
    """
    if (units := _units(config)) and fusable(subject.model):
        return units
    return "compiled" if _compiles(config, images) else "eager"


def _units(config: ExtractConfig) -> Units | None:
    """The registers that multiply in the fused kernels for CPUs, where these are taken."""
    if not config.on_cpu or config.compile is False:
        return None
    return units_found(DTYPES[config.dtype])


def _compiles(config: ExtractConfig, images: int) -> bool:
    if config.compile is not None:
        return config.compile
    return (
        config.on_cpu
        and images >= COMPILE_FROM_IMAGES
        and compiler_found(torch.device(config.device))
    )


def _multiplies_bfloat16(config: ExtractConfig) -> bool:
    return config.dtype == "bfloat16" and native_bfloat16()


def _largest_batch(scorer: Scorer, prepared: Prepared) -> int:
    input_size, patches = prepared.subject.geometry.input_size, prepared.layout.patches

    def score(count: int) -> None:
        pixels = torch.zeros((count, *input_size, 3), dtype=torch.uint8, device=scorer.device)
        zeros = torch.zeros(count, dtype=torch.int64, device=scorer.device)
        kept = torch.ones((count, patches), dtype=torch.bool, device=scorer.device)
        removes = prepared.config.removes_tokens
        scorer.score(pixels, Targets(zeros, zeros, kept if removes else None, keys=zeros))
        torch.cuda.synchronize(scorer.device)

    return largest_batch(score, LARGEST_GPU_BATCH)
