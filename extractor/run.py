"""The loop: tar shards in, store out."""

from __future__ import annotations

import platform
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import polars as pl
import torch

from classlens.extractor.config import ExtractConfig
from classlens.extractor.errors import ModelError, UsageError
from classlens.extractor.jpeg import decoder_facts
from classlens.extractor.models import Subject, load_subject
from classlens.extractor.pipeline import Batch, Pipeline
from classlens.extractor.plan import Plan, expand_shards, make_plan, read_member
from classlens.extractor.reducers.ranks import RanksReducer
from classlens.extractor.schema import FORMAT_VERSION, Layout, Status, all_arrays
from classlens.extractor.scorer import DTYPES, Scorer
from classlens.extractor.shards import Decoded, Decoder
from classlens.extractor.stages import StageTimes
from classlens.extractor.store import StagedUnit, Store, Tables
from classlens.extractor.summary import Summary, summarise
from classlens.extractor.transfer import Transfer
from classlens.kernels.label_margins import margins_pay

IMAGES_COMPARED = 8  # with PIL, before the run


class Progress(Protocol):
    """What a run tells whoever watches it."""

    def started(self, images: int) -> None:
        """The plan is made: that many images in all."""
        ...

    def advanced(self, images: int, *, scored: bool) -> None:
        """So many more images are done; ``scored`` is False for those of an earlier run."""
        ...


class Silent:
    """A progress nobody watches."""

    def started(self, images: int) -> None: ...

    def advanced(self, images: int, *, scored: bool) -> None: ...


@dataclass(frozen=True)
class Prepared:
    """Everything an extraction needs before its first image.

    decoder: which decoder, and how far from PIL on the first images; see ``decoder_facts``.
    """

    config: ExtractConfig
    plan: Plan
    subject: Subject
    layout: Layout
    class_names: tuple[str, ...]
    decoder: dict[str, Any]

    @property
    def raw_bytes_per_image(self) -> int:
        """Bytes an image takes in the store before compression."""
        return sum(
            int(np.prod(spec.shape(self.layout)[1:])) * np.dtype(spec.dtype).itemsize
            for spec in all_arrays(self.layout)
        )


def prepare(
    config: ExtractConfig, shards: Sequence[str], class_names: Path | None = None
) -> Prepared:
    """Plans the shards and loads the model; writes nothing.

    Raises:
        ShardError: a shard is missing or damaged. ModelError: the model cannot be used.
    """
    plan = make_plan(expand_shards(shards))
    subject = load_subject(config)
    layout = Layout(
        images=len(plan.units) * plan.unit_images,
        unit_images=plan.unit_images,
        blocks=subject.blocks,
        streams=config.streams,
        prefix_kinds=subject.prefix_kinds,
        grid=subject.grid,
        classes=subject.space.num_classes,
        topk=config.topk,
        masks=any(unit.masks for unit in plan.units),
    )
    if config.topk > layout.classes:
        raise UsageError(f"--topk is {config.topk}, the model has {layout.classes} classes.")
    first = (
        read_member(plan.units[row["unit"]].path, row["offset"], row["size"])
        for row in plan.manifest.head(IMAGES_COMPARED).iter_rows(named=True)
    )
    decoder = decoder_facts(config.decoder, first, config.max_pixels)
    return Prepared(config, plan, subject, layout, _names(subject, class_names), decoder)


def extract(prepared: Prepared, out: Path, progress: Progress | None = None) -> Summary:
    """Scores every planned image that the store at ``out`` does not hold yet.

    Raises:
        ConfigMismatchError: the store was made with another configuration.
        ShardError: a shard changed since it was planned.
    """
    progress = progress or Silent()
    config, plan = prepared.config, prepared.plan
    store = Store.open_or_create(out, prepared.layout, _tables(prepared), _attributes(prepared))
    scorer, transfer = make_scorer(prepared), Transfer(config.device)
    times = StageTimes(config.decoding_threads)
    pipeline = Pipeline(
        store, plan.units, _decoder(prepared), transfer, times, batch_size=config.batch_size
    )
    progress.started(plan.manifest.height)
    started_s, scored = time.perf_counter(), 0
    with pipeline:
        for batch, results in score_batches(pipeline.batches(), scorer, transfer, times):
            if batch.staged is None:  # committed before, or with another process
                progress.advanced(batch.unit.images, scored=False)
                continue
            with times.busy("stage"):
                stage_results(batch.images, results, batch.staged, prepared.layout.classes)
            progress.advanced(len(batch.images), scored=True)
            scored += len(batch.images)
            if batch.ends_unit:
                pipeline.commit(batch)
    store.finish()
    return summarise(plan, out, scored, time.perf_counter() - started_s, times)


def score_batches(
    batches: Iterable[Batch], scorer: Scorer, transfer: Transfer, times: StageTimes
) -> Iterator[tuple[Batch, dict[str, np.ndarray]]]:
    """Each batch with the arrays of its good images, by path.

    On a GPU the next batch is launched before the results of one are waited for.
    """
    launched: deque[tuple[Batch, Callable[[], dict[str, np.ndarray]]]] = deque()

    def arrived() -> tuple[Batch, dict[str, np.ndarray]]:
        batch, results = launched.popleft()
        with times.busy("score"):
            return batch, results()

    for batch in batches:
        with times.busy("score"):
            launched.append((batch, launch(batch, scorer, transfer)))
        if len(launched) > transfer.ahead:
            yield arrived()
    while launched:
        yield arrived()


def launch(batch: Batch, scorer: Scorer, transfer: Transfer) -> Callable[[], dict[str, np.ndarray]]:
    """Starts scoring the good images of a batch; the function returned waits for the results."""
    images = batch.images
    good = [place for place, image in enumerate(images) if image.status is Status.OK]
    if not good:
        return dict
    pixels = batch.pixels if len(good) == len(images) else batch.pixels[good]
    labels = torch.tensor([images[place].label for place in good])
    scored = scorer.score(transfer.to_device(pixels), transfer.to_device(labels))
    return transfer.to_host(scored)


def stage_results(
    images: Sequence[Decoded], results: Mapping[str, np.ndarray], staged: StagedUnit, classes: int
) -> None:
    """Puts a batch into its unit; bad images keep their status and the fill values.

    Args:
        results: arrays of the good images, by path; empty when there is none.
    """
    for image in images:
        place = np.array([image.position])
        staged.put("images/label", place, np.array([image.label]))
        staged.put("images/status", place, np.array([image.status]))
        if image.mask_fraction is not None:
            staged.put("images/mask_fraction", place, image.mask_fraction[None])
    if not results:
        return
    places = np.array([image.position for image in images if image.status is Status.OK])
    finite = (results["scores/rank"] < classes).all(axis=(1, 2, 3))
    for path, values in results.items():
        staged.put(path, places[finite], values[finite])
    staged.put("images/status", places[~finite], np.full((~finite).sum(), Status.NONFINITE))


def make_scorer(prepared: Prepared) -> Scorer:
    """The model with its reducers, on the configured device in the configured dtype.

    Raises:
        ModelError: the class space does not fit the dtype.
    """
    config, subject = prepared.config, prepared.subject
    dtype = DTYPES[config.dtype]
    on_cpu = config.device == "cpu"
    try:  # a CPU takes the weights in float32, and rounds no further than it must
        space = subject.space.to(dtype=torch.float32 if on_cpu else dtype, device=config.device)
    except ValueError as error:
        raise ModelError(f"{config.model} cannot be scored in {config.dtype}: {error}") from error
    margins = on_cpu and dtype == torch.bfloat16 and margins_pay()
    reducers = [RanksReducer(space, config.streams, config.topk, margins=margins)]
    return Scorer(
        subject, reducers, dtype=dtype, device=config.device, convention=config.convention
    )


def _decoder(prepared: Prepared) -> Decoder:
    config, subject, layout = prepared.config, prepared.subject, prepared.layout
    return Decoder(
        name=config.decoder,
        geometry=subject.geometry,
        grid=subject.grid,
        classes=layout.classes,
        max_pixels=config.max_pixels,
        masks=layout.masks,
    )


def _tables(prepared: Prepared) -> Tables:
    names = prepared.class_names
    classes = pl.DataFrame(
        {"class": range(len(names)), "name": names}, schema={"class": pl.Int32, "name": pl.String}
    )
    return Tables(prepared.plan.manifest, prepared.plan.units_table(), classes)


def _attributes(prepared: Prepared) -> dict[str, Any]:
    config, geometry = prepared.config, prepared.subject.geometry.to_json()
    packages = ("classlens", "torch", "timm", "triton", "webdataset", "zarr", "numpy", "pillow")
    versions = {name: _version(name) for name in packages} | {"python": platform.python_version()}
    return {
        "config": config.to_json(),
        "geometry": geometry,
        "fingerprint": config.content()
        | {
            "format": FORMAT_VERSION,
            "classlens": versions["classlens"],
            "images": prepared.plan.fingerprint(),
            "weights_sha256": prepared.subject.weights_sha256,
            "pixels": geometry,
        },
        "versions": versions,
        "decoder": prepared.decoder,
        "device": _device_name(config.device),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # triton off Linux; ourselves when run from a bare folder
        return "not installed"


def _device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{device} ({platform.machine()}, {torch.get_num_threads()} threads)"


def _names(subject: Subject, file: Path | None) -> tuple[str, ...]:
    if file is None:
        return subject.class_names
    try:
        names = tuple(file.read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--class-names {file} cannot be read ({error}).") from error
    if len(names) != subject.space.num_classes:
        raise UsageError(
            f"--class-names {file} has {len(names)} lines, the model has "
            f"{subject.space.num_classes} classes; give one name a line, in class order."
        )
    return names
