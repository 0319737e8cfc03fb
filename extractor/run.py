"""The loop: tar shards in, store out."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import polars as pl
import torch

from classlens.extractor.config import ExtractConfig
from classlens.extractor.errors import ModelError, UsageError
from classlens.extractor.models import Subject, load_subject
from classlens.extractor.plan import Plan, expand_shards, make_plan
from classlens.extractor.reducers.ranks import RanksReducer
from classlens.extractor.schema import FORMAT_VERSION, Layout, Status, all_arrays, committed_units
from classlens.extractor.scorer import DTYPES, Scorer
from classlens.extractor.shards import Decoded, Decoder, decode_unit
from classlens.extractor.store import StagedUnit, Store, Tables, status_totals
from classlens.kernels.label_margins import margins_pay

T = TypeVar("T")


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
class Summary:
    """What a run did. images: planned in all; scored and seconds: in this run only."""

    store: str
    units: int
    units_committed: int
    images: int
    scored: int
    seconds: float
    images_per_s: float
    bytes_per_image: float
    status: dict[str, int] = field(default_factory=dict)

    @property
    def bad_images(self) -> int:
        """Images of the store that could not be scored."""
        return sum(n for name, n in self.status.items() if name != "ok")


@dataclass(frozen=True)
class Prepared:
    """Everything an extraction needs before its first image."""

    config: ExtractConfig
    plan: Plan
    subject: Subject
    layout: Layout
    class_names: tuple[str, ...]

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
    return Prepared(config, plan, subject, layout, _names(subject, class_names))


def extract(prepared: Prepared, out: Path, progress: Progress | None = None) -> Summary:
    """Scores every planned image that the store at ``out`` does not hold yet.

    Raises:
        ConfigMismatchError: the store was made with another configuration.
    """
    progress = progress or Silent()
    config, plan, subject = prepared.config, prepared.plan, prepared.subject
    store = Store.open_or_create(out, prepared.layout, _tables(prepared), _attributes(prepared))
    scorer = make_scorer(prepared)
    decoder = Decoder(
        subject.geometry,
        subject.grid,
        prepared.layout.classes,
        config.max_pixels,
        prepared.layout.masks,
    )
    progress.started(plan.manifest.height)
    started_s, scored = time.perf_counter(), 0
    with ThreadPoolExecutor(config.decode_threads) as pool:
        for unit in plan.units:
            with store.stage(unit.index) as staged:
                if staged is None:
                    progress.advanced(unit.images, scored=False)
                    continue
                rows = store.unit_rows(unit.index)
                images = decode_unit(unit, rows, decoder, pool, ahead=2 * config.batch_size)
                for batch in batched(images, config.batch_size):
                    score_batch(batch, scorer, staged, prepared.layout.classes)
                    progress.advanced(len(batch), scored=True)
                    scored += len(batch)
    store.finish()
    return summarise(prepared, out, scored, time.perf_counter() - started_s)


def score_batch(batch: list[Decoded], scorer: Scorer, staged: StagedUnit, classes: int) -> None:
    """Scores the good images of a batch; the bad ones keep their status and the fill values."""
    for image in batch:
        place = np.array([image.position])
        staged.put("images/label", place, np.array([image.label]))
        staged.put("images/status", place, np.array([image.status]))
        if image.mask_fraction is not None:
            staged.put("images/mask_fraction", place, image.mask_fraction[None])
    good = [image for image in batch if image.status is Status.OK]
    if not good:
        return
    pixels = torch.from_numpy(np.stack([image.pixels for image in good]))
    labels = torch.tensor([image.label for image in good])
    arrays = {path: value.numpy() for path, value in scorer.score(pixels, labels).items()}
    places = np.array([image.position for image in good])
    finite = (arrays["scores/rank"] < classes).all(axis=(1, 2, 3))
    for path, values in arrays.items():
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
    reducers = [RanksReducer(space, config.streams, config.topk, margins)]
    return Scorer(
        subject, reducers, dtype=dtype, device=config.device, convention=config.convention
    )


def summarise(prepared: Prepared, out: Path, scored: int, seconds: float) -> Summary:
    """The state of the store and the figures of this run."""
    committed = committed_units(out)
    held = sum(prepared.plan.units[u].images for u in committed)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    return Summary(
        store=str(out),
        units=len(prepared.plan.units),
        units_committed=len(committed),
        images=prepared.plan.manifest.height,
        scored=scored,
        seconds=round(seconds, 3),
        images_per_s=round(scored / seconds, 2) if scored else 0.0,
        bytes_per_image=round(size / held, 1) if held else 0.0,
        status=dict(status_totals(out)),
    )


def batched(items: Iterator[T], size: int) -> Iterator[list[T]]:
    """Consecutive lists of ``size`` items, the last one shorter."""
    while batch := list(islice(items, size)):
        yield batch


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


def summary_json(summary: Summary) -> dict[str, Any]:
    """The summary for ``--json``."""
    return asdict(summary) | {"bad_images": summary.bad_images}
