"""Everything an extraction needs before its first image, and what its store says of it."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from classlens.extractor.config import ExtractConfig
from classlens.extractor.engine import choose_forward, choose_impl
from classlens.extractor.errors import UsageError
from classlens.extractor.interventions import make_intervention, require_masks, token_removal
from classlens.extractor.jpeg import decoder_facts
from classlens.extractor.models import Subject, load_subject
from classlens.extractor.plan import Plan, expand_shards, make_plan, read_member
from classlens.extractor.reducers.attribution import require_attribution
from classlens.extractor.schema import (
    FORMAT_VERSION,
    UNITS_FILE,
    Layout,
    all_arrays,
    read_attributes,
)
from classlens.extractor.shards import Decoder
from classlens.extractor.store import Tables, check_fingerprint, unit_classes
from classlens.extractor.value_vectors import require_key_neurons, require_value_vectors

IMAGES_COMPARED = 8  # with PIL, before the run


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

    def image_decoder(self) -> Decoder:
        """How the shards' samples become pixels."""
        return Decoder(
            name=self.config.decoder,
            geometry=self.subject.geometry,
            grid=self.subject.grid,
            classes=self.layout.classes,
            max_pixels=self.config.max_pixels,
            masks=self.layout.masks,
            removal=token_removal(self.config, self.subject),
        )

    @property
    def raw_bytes_per_image(self) -> int:
        """Bytes an image takes in the store before compression."""
        return sum(
            int(np.prod(spec.shape(self.layout)[1:])) * np.dtype(spec.dtype).itemsize
            for spec in all_arrays(self.layout)
            if spec.axes[0] == "image"
        )

    @property
    def raw_bytes_per_unit(self) -> int:
        """Bytes that what is added up over a unit's images takes before compression."""
        return sum(
            int(np.prod(spec.shape(self.layout)[1:])) * np.dtype(spec.dtype).itemsize
            for spec in all_arrays(self.layout)
            if spec.axes[0] == "unit"
        )


def prepare(
    config: ExtractConfig, shards: Sequence[str], class_names: Path | None = None
) -> Prepared:
    """Plans the shards and loads the model; writes nothing.

    Raises:
        ShardError: a shard is missing or damaged. ModelError: the model cannot be used.
        UsageError: settings do not fit the model or the shards, or a file of classes is unusable.
    """
    plan = make_plan(expand_shards(shards))
    require_masks(config, plan.units)
    subject = load_subject(config)
    if "memories" in config.reduce:
        require_value_vectors(subject, config.model)
    neurons = "neurons" in config.reduce
    mlp_width = require_key_neurons(subject, config.model, "neurons") if neurons else 0
    make_intervention(config, subject)
    if "attribution" in config.reduce:
        require_attribution(subject, config.model)
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
        certified=config.certify,
        heads=subject.heads,
        reducers=config.reduce,
        tokens_removed=config.removes_tokens,
        per_head=config.per_head,
        mlp_width=mlp_width,
        slots=most_classes(plan, subject.space.num_classes) if neurons else 0,
    )
    if config.topk > layout.classes:
        raise UsageError(f"--topk is {config.topk}, the model has {layout.classes} classes.")
    first = (
        read_member(plan.units[row["unit"]].path, row["offset"], row["size"])
        for row in plan.manifest.head(IMAGES_COMPARED).iter_rows(named=True)
    )
    decoder = decoder_facts(config.decoder, first, config.max_pixels)
    return Prepared(config, plan, subject, layout, named_classes(subject, class_names), decoder)


def prepare_again(store: str | Path, *, device: str | None = None) -> Prepared:
    """What an extraction was prepared with, from its store: the same images, model and settings.

    Args:
        device: to run on; the extraction's own by default. On another one, settings that only
            concern speed are left to it.

    Raises:
        StoreError: there is no store. ShardError: its shards are gone or have changed.
        ConfigMismatchError: model, weights or classlens are no longer those of the store.
    """
    attributes_then = read_attributes(store)
    config = ExtractConfig.from_json(attributes_then["config"])
    units = pl.read_parquet(Path(store) / UNITS_FILE)
    shards = units["shard"].unique(maintain_order=True).to_list()
    prepared = prepare(config.on(device or config.device), shards)
    check_fingerprint(Path(store), attributes_then, attributes(prepared))
    return prepared


def most_classes(plan: Plan, classes: int) -> int:
    """The most classes that the images of a unit have, at least one."""
    units = plan.manifest.partition_by("unit")
    return max(1, *(len(unit_classes(rows, classes)) for rows in units))


def tables(prepared: Prepared) -> Tables:
    """The store's tables: manifest, units, classes."""
    names = prepared.class_names
    classes = pl.DataFrame(
        {"class": range(len(names)), "name": names}, schema={"class": pl.Int32, "name": pl.String}
    )
    return Tables(prepared.plan.manifest, prepared.plan.units_table(), classes)


def attributes(prepared: Prepared) -> dict[str, Any]:
    """What is saved with the store: config, fingerprint, class file, versions, decoder, device."""
    config, geometry = prepared.config, prepared.subject.geometry.to_json()
    classes = prepared.subject.classes
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
            "classes_sha256": classes and classes.sha256,
            "pixels": geometry,
        },
        "class_file": None
        if classes is None
        else {"name": classes.path.name, "source": classes.source},
        "versions": versions,
        "decoder": prepared.decoder,
        "device": _device_name(config.device),
        "forward": choose_forward(config, prepared.subject, prepared.plan.manifest.height),
        "impl": choose_impl(config, prepared.plan.manifest.height),
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


def named_classes(subject: Subject, file: Path | None) -> tuple[str, ...]:
    if file is None:
        return subject.class_names
    if subject.classes is not None:
        raise UsageError(
            "--class-names cannot be given with --classes, whose file names its classes; write the "
            "names into that file."
        )
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
