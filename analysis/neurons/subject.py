"""The model whose neurons are looked at: by its name, or the one that a store was made with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from classlens.analysis.values import load_model
from classlens.extractor.config import ExtractConfig
from classlens.extractor.errors import ConfigMismatchError, UsageError
from classlens.extractor.schema import CLASSES_FILE, read_attributes

if TYPE_CHECKING:
    from classlens.extractor.models import Subject


def open_subject(
    source: str,
    *,
    weights: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    class_names: Path | None = None,
) -> Subject:
    """A model with key neurons, in float32 on the CPU.

    Args:
        source: a timm name; or the folder of a store, which names model, weights and classes.
        weights: ``pretrained`` when None. class_names: a file with one name a line.

    Raises:
        UsageError: a store and settings of a model are given; or the names do not fit.
        StoreError: the folder is no store. ModelError: as `load_model`.
        ConfigMismatchError: the weights are no longer those of the store.
    """
    from classlens.extractor.prepare import named_classes

    if not Path(source).is_dir():
        subject = load_model(source, weights or "pretrained", dict(model_args or {}))
        return replace(subject, class_names=named_classes(subject, class_names))
    if weights is not None or model_args or class_names is not None:
        raise UsageError(
            f"{source} is a store, which names its model itself; leave out --weights, --model-arg "
            "and --class-names."
        )
    return subject_of_store(Path(source))


def model_name(source: str) -> str:
    """The timm name of a model, or of the one that a store was made with."""
    if not Path(source).is_dir():
        return source
    return read_attributes(source)["config"]["model"]


def subject_of_store(store: Path) -> Subject:
    """The model that a store was made with, with the store's class names; see `open_subject`."""
    import polars as pl

    from classlens.extractor.models import load_subject
    from classlens.extractor.value_vectors import require_value_vectors

    attributes = read_attributes(store)
    config = ExtractConfig.from_json(attributes["config"])
    subject = load_subject(config)
    if subject.weights_sha256 != attributes["fingerprint"]["weights_sha256"]:
        raise ConfigMismatchError(
            f"The weights {config.weights} are no longer those that {store} was extracted with; "
            "restore them, or name the model in place of the store."
        )
    require_value_vectors(subject, config.model)
    names = pl.read_parquet(store / CLASSES_FILE).sort("class")["name"]
    return replace(subject, class_names=tuple(names))


def neuron_count(subject: Subject) -> int:
    """Number F of neurons of a block."""
    from torch import nn

    layer = subject.model.blocks[0].get_submodule("mlp.fc2")
    assert isinstance(layer, nn.Linear)
    return layer.in_features


def find_class(names: tuple[str, ...], text: str) -> int:
    """The class of an index, a name, or one of a name's comma-separated parts; case is ignored.

    Raises:
        UsageError: no class or several are called so; names some that are like it.
    """
    import difflib

    if text.isdecimal() and int(text) < len(names):
        return int(text)
    wanted = text.strip().casefold()
    parts = [{name.casefold(), *(p.strip() for p in name.casefold().split(","))} for name in names]
    found = [c for c, called in enumerate(parts) if wanted in called]
    whole = [c for c in found if names[c].casefold() == wanted]
    if len(found) == 1 or len(whole) == 1:
        return (found if len(found) == 1 else whole)[0]
    if found:
        choices = ", ".join(f"{c} ({names[c]})" for c in found[:5])
        raise UsageError(f"--class {text} is the name of several; give a number: {choices}.")
    near = difflib.get_close_matches(wanted, [name.casefold() for name in names], cutoff=0.5)
    hint = f"; like it: {' · '.join(near)}" if near else ""
    raise UsageError(f"There is no class {text!r}; give 0 to {len(names) - 1} or a name{hint}.")
