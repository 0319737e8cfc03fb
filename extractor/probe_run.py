"""Linear probes over a data set: training passes, test passes, and a store of the ranks."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import polars as pl
import torch

from classlens.extractor import ledger
from classlens.extractor.config import ExtractConfig
from classlens.extractor.engine import CPU_BATCH, Engine, choose_forward
from classlens.extractor.errors import UsageError
from classlens.extractor.pictures import read_pictures
from classlens.extractor.plan import Plan, Unit, expand_shards, make_plan
from classlens.extractor.prepare import Prepared, attributes, prepare, tables
from classlens.extractor.probe import ProbePlan, SitePart, Statistics, plan_probes
from classlens.extractor.reducers.probe import ProbeReducer, result_dtypes
from classlens.extractor.run import Progress, Silent, fill
from classlens.extractor.schema import Layout
from classlens.extractor.scorer import DTYPES, Scorer
from classlens.extractor.stages import StageTimes
from classlens.extractor.store import Store
from classlens.extractor.summary import Summary, summarise

CONVENTION = "corrected"  # activations as the model adds them, no norm before them
GPU_BATCH = 128
MEMORY_SHARE = 0.5
"""Of the device's memory, for sums and weights; the rest is the model's, and other users'."""


@dataclass(frozen=True)
class PreparedProbe:
    """Everything a probe run needs before its first image.

    train, test: the same model on other shards. images: places of the training images on the image
    axis of train. class_images: planned training images of each class, int64 [C].
    """

    train: Prepared
    test: Prepared
    images: tuple[int, ...]
    class_images: np.ndarray
    per_class: int
    alpha: float
    plan: ProbePlan

    def attributes(self) -> dict[str, Any]:
        """What is saved with the store: an extraction's, and the section ``probe``."""
        rows = self.train.plan.manifest.filter(pl.col("image").is_in(self.images))
        digest = hashlib.sha256()
        for row in rows.select("key", "size", "label").iter_rows():
            digest.update(json.dumps(row).encode())
        probe = {
            "alpha": self.alpha,
            "per_class": self.per_class,
            "train_images": len(self.images),
            "train_sha256": digest.hexdigest(),
        }
        common = attributes(self.test)
        fingerprint = common["fingerprint"] | {"probe": probe}
        return common | {"fingerprint": fingerprint, "probe": probe, "impl": "ridge probes"}


@dataclass(frozen=True)
class ProbeSummary:
    """What a probe run did.

    store: of the last test pass and the store as it is. train_images: that could be read, in each
    pass; 0 when nothing was left to do. The seconds are sums over the passes.
    """

    store: Summary
    passes: int
    train_images: int
    train_seconds: float
    solve_seconds: float
    test_seconds: float


def prepare_probe(
    config: ExtractConfig,
    train_shards: Sequence[str],
    test_shards: Sequence[str],
    *,
    per_class: int = 10,
    alpha: float = 1.0,
    memory_bytes: int | None = None,
    allow_overlap: bool = False,
    class_names: Path | None = None,
) -> PreparedProbe:
    """Plans both sets of shards and the passes, and loads the model; writes nothing.

    Args:
        per_class: the first images of each class, in the order of the plan, are trained on; a class
            that has fewer gives all it has.
        memory_bytes: for sums and weights; None takes half of the device's memory.
        allow_overlap: do not mind training keys among the test keys.

    Raises:
        ShardError, ModelError: see `prepare`. UsageError: there is an intervention, no training
            image has a usable label, a training image is among the test images, or the memory does
            not hold one probe.
    """
    if config.intervene is not None:
        raise UsageError(
            f"Probes are of the model as it is, without --intervene {config.intervene}; probe the "
            "run that is not perturbed."
        )
    train_plan = make_plan(expand_shards(train_shards))
    test = prepare(config, test_shards, class_names)
    chosen = choose_training_images(train_plan, per_class, test.layout.classes)
    if not allow_overlap:
        _check_overlap(chosen, test.plan)
    # A training image needs no mask, and must not fail for want of one.
    train = replace(test, plan=train_plan, layout=replace(test.layout, masks=False))
    memory = available_memory(config.device) if memory_bytes is None else memory_bytes
    return PreparedProbe(
        train=train,
        test=test,
        images=tuple(chosen["image"]),
        class_images=np.bincount(chosen["label"], minlength=test.layout.classes),
        per_class=per_class,
        alpha=alpha,
        plan=plan_probes(test.layout, test.subject.model.embed_dim, memory),
    )


def choose_training_images(plan: Plan, per_class: int, classes: int) -> pl.DataFrame:
    """The rows of the manifest to train on: the first ``per_class`` images of each class.

    Raises:
        UsageError: there is none.
    """
    labelled = plan.manifest.filter(pl.col("label").is_between(0, classes - 1)).sort("image")
    chosen = labelled.group_by("label", maintain_order=True).head(per_class).sort("image")
    if chosen.is_empty():
        raise UsageError(
            f"No training image has a label in 0 to {classes - 1}; name shards with `cls` members "
            "that fit the model."
        )
    return chosen


def available_memory(device: str) -> int:
    """Half of the memory of the machine, or of what is free on the GPU, in bytes."""
    if device.startswith("cuda"):
        return int(MEMORY_SHARE * torch.cuda.mem_get_info(device)[0])
    return int(MEMORY_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def probe(prepared: PreparedProbe, out: Path, progress: Progress | None = None) -> ProbeSummary:
    """Trains all probes and scores every planned test image that the store does not hold yet.

    Each pass trains its probes on the training images and scores the test images by them. What all
    passes but the last find waits in an unnamed file beside the store; in the last, units are
    completed and committed one by one. A killed run that is started again repeats the passes for
    the units that are not committed.

    Raises:
        ConfigMismatchError: the store was made with another configuration. ShardError: a shard
            changed since it was planned. ModelError: activations of a training image overflow.
    """
    progress = progress or Silent()
    test, passes = prepared.test, prepared.plan.passes
    layout, config = test.layout, test.config
    store = Store.open_or_create(out, layout, tables(test), prepared.attributes())
    units = _units_left(store, test.plan)
    images_left = sum(unit.images for unit in units)
    batch_size = config.batch_size or (CPU_BATCH if config.on_cpu else GPU_BATCH)
    progress.started(len(passes) * (len(prepared.images) + images_left) if units else 0)
    seconds = {"train": 0.0, "solve": 0.0, "test": 0.0}
    train_images, summary = 0, summarise(test, out, 0, 0.0, StageTimes(config.decoding_threads))

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        started_s = time.perf_counter()
        yield
        seconds[name] += time.perf_counter() - started_s

    with tempfile.TemporaryFile(dir=out.parent) as file:
        earlier = _result_arrays(file, layout) if units and len(passes) > 1 else {}
        for place, parts in enumerate(passes if units else ()):
            with timed("train"):
                statistics = train(prepared, parts, batch_size, progress)
            with timed("solve"):
                train_images = int(statistics.class_images.sum())
                probes = statistics.solve(prepared.alpha)
            reducer = ProbeReducer(probes, layout.streams, layout.tokens, layout.topk, earlier)
            scorer = _scorer(test, [reducer])
            with timed("test"):
                if place + 1 < len(passes):
                    _score_into(earlier, scorer, reducer, test, units, batch_size, progress)
                else:
                    summary = fill(store, test, units, Engine(scorer, batch_size), progress)
    store.finish()
    return ProbeSummary(
        store=summary,
        passes=len(passes) if units else 0,
        train_images=train_images,
        **{f"{name}_seconds": round(value, 3) for name, value in seconds.items()},
    )


@torch.inference_mode()
def train(
    prepared: PreparedProbe, parts: Sequence[SitePart], batch_size: int, progress: Progress
) -> Statistics:
    """The sums of one pass over the training images; the model stops behind the last part.

    Raises:
        ShardError: a shard changed since it was planned. UsageError: no training image can be read.
    """
    test = prepared.test
    scorer = _scorer(test, [])
    width, classes = test.subject.model.embed_dim, test.layout.classes
    statistics = Statistics(parts, width, classes, scorer.device)
    streams = frozenset(part.stream for part in parts)
    seen = 0
    for pictures in read_pictures(prepared.train, batch_size, prepared.images):
        labels = pictures.targets.labels.to(scorer.device)
        statistics.count(labels)
        for block, sites in scorer.walk(pictures.pixels, wanted=streams):
            statistics.add(block, sites, labels)
            if block == statistics.last_block:
                break
        seen += len(labels)
        progress.advanced(len(labels), scored=True)
    if not seen:
        raise UsageError("No training image can be read; name other shards to train on.")
    progress.advanced(len(prepared.images) - seen, scored=True)
    return statistics


@torch.inference_mode()
def _score_into(
    earlier: Mapping[str, np.ndarray],
    scorer: Scorer,
    reducer: ProbeReducer,
    test: Prepared,
    units: Sequence[Unit],
    batch_size: int,
    progress: Progress,
) -> None:
    """Adds what the probes of this pass find to what earlier passes left."""
    wanted = test.plan.manifest.filter(pl.col("unit").is_in([unit.index for unit in units]))
    places = wanted["image"].to_list()
    seen = 0
    for pictures in read_pictures(test, batch_size, places):
        images = pictures.targets.images.numpy()
        reduce = reducer.for_batch(pictures.targets.to(scorer.device))
        for block, sites in scorer.walk(pictures.pixels, wanted=reducer.sites):
            if block in reducer.probes.by_block:
                for path, values in reduce(block, sites).items():
                    earlier[path][images, block] = values.cpu().numpy()
            if block == reducer.probes.last_block:
                break
        seen += len(images)
        progress.advanced(len(images), scored=True)
    progress.advanced(len(places) - seen, scored=True)


def _scorer(prepared: Prepared, reducers: Sequence[ProbeReducer]) -> Scorer:
    config = prepared.config
    return Scorer(
        prepared.subject,
        reducers,
        dtype=DTYPES[config.dtype],
        device=config.device,
        convention=CONVENTION,
        forward=choose_forward(config, prepared.subject, prepared.plan.manifest.height),
    )


def _result_arrays(file: IO[bytes], layout: Layout) -> dict[str, np.ndarray]:
    """The arrays of a `ProbeReducer` for all images, [images, L, S, T], one after another."""
    shape = (layout.images, layout.blocks, len(layout.streams), layout.tokens)
    arrays, offset = {}, 0
    for path, dtype in result_dtypes(layout.topk).items():
        kind = np.int32 if dtype == torch.int32 else np.float32
        arrays[path] = np.memmap(file, kind, "w+", offset, shape)
        offset += arrays[path].nbytes
    return arrays


def _units_left(store: Store, plan: Plan) -> list[Unit]:
    """The units that are neither committed nor with another process."""
    left = []
    for unit in plan.units:
        with ledger.lease(store.path, unit.index) as staging:
            if staging is not None:
                left.append(unit)
    return left


def _check_overlap(chosen: pl.DataFrame, test: Plan) -> None:
    shared = chosen.join(test.manifest, on="key", how="semi")
    if not shared.is_empty():
        raise UsageError(
            f"{shared.height:,} training images are among the test images by their keys, the first "
            f"is {shared['key'][0]}; name other shards, or add --allow-overlap if they are other "
            "pictures of the same names."
        )
