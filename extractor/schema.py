"""What a store holds: array names, shapes, dtypes, chunks, tables and the format version.

Axis names: ``image`` (position on the image axis; a unit fills ``unit_images`` consecutive places,
its last ones may be padding), ``block`` (0-based), ``stream``, ``token`` (prefix tokens first, then
patches row by row), ``patch`` (image tokens only). Arrays that add up the images of a unit have the
axis ``unit`` in the image's place: ``neuron`` (a key-value pair of a block's MLP), ``code`` (of an
activation, see `classlens.extractor.codes`), ``exemplar``, ``slot`` (a class of the unit's images;
which one stands in an array beside).

This module imports neither torch nor zarr.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, Literal

from classlens.extractor.errors import StoreError

FORMAT_VERSION = 1

STREAMS = ("resid", "mid", "attn", "mlp")
REDUCERS = ("memories", "attribution", "neurons")
"""What `extract --reduce` adds to the ranks."""
EXEMPLARS = 15
"""Images kept of every neuron, those of its largest activation (MILAN)."""
CODES = 256
MEAN_UNIT = 2.0**-16
"""Of the mean activation of an image, so that sums over images are whole numbers."""
PATCH_AREA = 255
"""The area of a patch, in the unit of `images/mask_fraction`."""
CHUNK_NEURONS = 256
"""The most neurons of a chunk, so that a page on one neuron need not read all of its block."""
KNOCKOUTS = ("self-only", "no-cls", "no-cls-renormalised")
REMOVALS = ("drop-context", "drop-class")
INTERVENTIONS = (*KNOCKOUTS, *REMOVALS)
"""What `extract --intervene` does to attention; see `classlens.extractor.interventions`."""
RELEVANCE_METHODS = ("class-embedding", "chefer", "rollout", "random")
"""What ranks an image's patches in the perturbation test."""
SUBLAYERS = ("attn", "mlp")
MEMORY_FLAGS = (
    "agreement",
    "agreement_control",
    "agreement_text",
    "agreement_text_control",
    "composed",
)
"""Bits of ``memories/flags``, the lowest first; see `classlens.extractor.reducers.memories`."""
MEMORY_FLAGS_PATH = "memories/flags"
INVALID_FLAGS = 255
"""In place of the flags where activations are not finite."""
TOKEN_KINDS = ("cls", "dist", "register", "patch")

MANIFEST_FILE = "manifest.parquet"
UNITS_FILE = "units.parquet"
CLASSES_FILE = "classes.parquet"
LEDGER_DIR = "_ledger"
STAGING_DIR = "_staging"


class Status(IntEnum):
    """What became of a planned image. Only ``OK`` images have scores."""

    OK = 0
    UNDECODABLE = 1
    """The image's bytes are not a readable picture (damaged or truncated)."""
    TOO_LARGE = 2
    """The picture has more pixels than ``max_pixels``."""
    LABEL_INVALID = 3
    """The label is missing, not a number, or not in [0, C)."""
    MASK_MISSING = 4
    """Other images of the shard have a segmentation mask, this one has none."""
    MASK_UNDECODABLE = 5
    """The segmentation mask is not a readable PNG, or its size is not the image's."""
    NONFINITE = 6
    """Activations overflowed or were NaN in the chosen dtype."""
    NO_TOKENS = 7
    """Token removal leaves no image token, and the model predicts from those."""
    ABSENT = 255
    """Padding behind the last image of a unit; never a planned image."""


@dataclass(frozen=True)
class Layout:
    """The axes of one store, saved in its attributes.

    images: length of the image axis, padding included. unit_images: places a unit fills on it.
    blocks: L. streams: names, in the order of the stream axis. token_kinds: kind of each prefix
    token. grid: patch rows and columns. classes: C. topk: number of ``top*`` arrays. masks: whether
    ``images/mask_fraction`` exists. certified: whether every rank is proven exact, and
    ``scores/recomputed`` exists. heads: attention heads H of a block. reducers: which of
    ``REDUCERS`` fill arrays besides the ranks. tokens_removed: whether the scores of some image
    tokens are fill values, because an intervention removed them. per_head: whether the attribution
    keeps each head. mlp_width: neurons F of a block, where neurons are accumulated. slots: the most
    classes that a unit's images have, where neurons are accumulated.
    """

    images: int
    unit_images: int
    blocks: int
    streams: tuple[str, ...]
    prefix_kinds: tuple[str, ...]
    grid: tuple[int, int]
    classes: int
    topk: int
    masks: bool
    certified: bool = False
    heads: int = 0
    reducers: tuple[str, ...] = ()
    tokens_removed: bool = False
    per_head: bool = False
    mlp_width: int = 0
    slots: int = 0

    @property
    def prefix(self) -> int:
        """Number of prefix tokens P."""
        return len(self.prefix_kinds)

    @property
    def patches(self) -> int:
        """Number of image tokens G."""
        return self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        """Number of tokens T = P + G."""
        return self.prefix + self.patches

    @property
    def units(self) -> int:
        """Number of units on the image axis."""
        return self.images // self.unit_images

    def axis(self, name: str) -> int:
        """Length of an axis by its name."""
        return {
            "image": self.images,
            "block": self.blocks,
            "stream": len(self.streams),
            "token": self.tokens,
            "patch": self.patches,
            "head": self.heads,
            "sublayer": len(SUBLAYERS),
            "unit": self.units,
            "neuron": self.mlp_width,
            "code": CODES,
            "exemplar": EXEMPLARS,
            "slot": self.slots,
        }[name]

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready mapping; :meth:`from_json` reads it back."""
        return asdict(self)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Layout:
        """The layout saved by :meth:`to_json`."""
        fields = dict(value)
        for name in ("streams", "prefix_kinds", "grid", "reducers"):
            fields[name] = tuple(fields[name])
        return Layout(**fields)


@dataclass(frozen=True)
class ArraySpec:
    """One Zarr array: its path in the store, dtype, axes and fill value."""

    path: str
    dtype: Literal["uint8", "uint16", "uint32", "int32", "int64", "float16", "float32"]
    axes: tuple[str, ...]
    fill: int | float

    def shape(self, layout: Layout) -> tuple[int, ...]:
        """Shape of the whole array."""
        return tuple(layout.axis(a) for a in self.axes)

    def shard(self, layout: Layout) -> tuple[int, ...]:
        """Shape of one shard: the images of one unit, or the unit, and everything else whole."""
        places = 1 if self.axes[0] == "unit" else layout.unit_images
        return (places, *self.shape(layout)[1:])

    def chunk(self, layout: Layout) -> tuple[int, ...]:
        """Shape of one chunk: one block and stream, sublayer or head of the unit's images; or some
        neurons of one block."""
        single = {"block", "stream", "sublayer", "head"}
        return tuple(
            1 if axis in single else _divisor(length) if axis == "neuron" else length
            for axis, length in zip(self.axes, self.shard(layout), strict=True)
        )


def _divisor(neurons: int) -> int:
    return max(n for n in range(1, CHUNK_NEURONS + 1) if neurons % n == 0)


def class_dtype(classes: int) -> Literal["uint16", "uint32"]:
    """Integer dtype of ranks and class indices; its largest value is kept free as the fill."""
    return "uint16" if classes <= 65_535 else "uint32"


def score_arrays(layout: Layout) -> tuple[ArraySpec, ...]:
    """The arrays of the ranks reducer, [image, block, stream, token] (definitions: paper §4.1)."""
    axes = ("image", "block", "stream", "token")
    integer = class_dtype(layout.classes)
    fill = 65_535 if integer == "uint16" else 4_294_967_295
    arrays = [
        ArraySpec("scores/rank", integer, axes, fill),
        ArraySpec("scores/label_logit", "float16", axes, float("nan")),
        ArraySpec("scores/label_logprob", "float16", axes, float("nan")),
        *(ArraySpec(f"scores/top{i + 1}", integer, axes, fill) for i in range(layout.topk)),
    ]
    if layout.certified:  # how many tokens of all streams took comparisons in float64
        arrays.append(ArraySpec("scores/recomputed", "uint32", ("image", "block"), 0))
    return tuple(arrays)


def memory_arrays(layout: Layout) -> tuple[ArraySpec, ...]:
    """The array of the memories reducer: the bits ``MEMORY_FLAGS`` (definitions: paper §4.3)."""
    axes = ("image", "block", "sublayer", "token")
    return (ArraySpec(MEMORY_FLAGS_PATH, "uint8", axes, INVALID_FLAGS),)


def attribution_arrays(layout: Layout) -> tuple[ArraySpec, ...]:
    """The arrays of the attribution reducer (paper §5).

    A relevance is what ``relevance`` or ``head_relevance`` holds, times 2^exponent of its image and
    block: gradients are too small for float16 as they are.
    """
    arrays = [
        ArraySpec("attribution/relevance", "float16", ("image", "block", "patch"), float("nan")),
        ArraySpec("attribution/exponent", "int32", ("image", "block"), 0),
    ]
    if layout.per_head:
        axes = ("image", "block", "head", "patch")
        arrays.append(ArraySpec("attribution/head_relevance", "float16", axes, float("nan")))
    return tuple(arrays)


def neuron_arrays(layout: Layout) -> tuple[ArraySpec, ...]:
    """The arrays of the neurons reducer; see `classlens.extractor.reducers.neurons`.

    ``class_sums`` are in units of 2^-16. Exemplars of a neuron stand in no order; where a unit has
    fewer images, the places behind have value −∞ and image −1.
    """
    exemplar = ("unit", "block", "neuron", "exemplar")
    classes, class_images = slot_arrays("neurons")
    return (
        classes,
        class_images,
        ArraySpec("neurons/class_sums", "int64", ("unit", "block", "slot", "neuron"), 0),
        ArraySpec("neurons/histogram", "uint32", ("unit", "block", "neuron", "code"), 0),
        ArraySpec("neurons/exemplar_value", "float32", exemplar, float("-inf")),
        ArraySpec("neurons/exemplar_image", "int32", exemplar, -1),
        ArraySpec("neurons/exemplar_codes", "uint8", (*exemplar, "patch"), 0),
    )


def dissection_arrays(layout: Layout) -> tuple[ArraySpec, ...]:
    """The arrays of Network Dissection; see `classlens.extractor.reducers.dissection`.

    Areas are in units of 1/255 of a patch.
    """
    return (
        *slot_arrays("dissection"),
        ArraySpec("dissection/class_area", "uint32", ("unit", "slot"), 0),
        ArraySpec("dissection/active_area", "uint32", ("unit", "block", "neuron"), 0),
        ArraySpec("dissection/intersection", "uint32", ("unit", "block", "slot", "neuron"), 0),
    )


def slot_arrays(name: str) -> tuple[ArraySpec, ArraySpec]:
    """The class of each slot of a unit, −1 in those left over, and the images that were counted."""
    return (
        ArraySpec(f"{name}/classes", "int32", ("unit", "slot"), -1),
        ArraySpec(f"{name}/class_images", "uint32", ("unit", "slot"), 0),
    )


def image_arrays(layout: Layout) -> tuple[ArraySpec, ...]:
    """The arrays with one row per image."""
    arrays = [
        ArraySpec("images/label", "int32", ("image",), -1),
        ArraySpec("images/prediction", "int32", ("image",), -1),
        ArraySpec("images/status", "uint8", ("image",), int(Status.ABSENT)),
    ]
    if layout.masks:
        arrays.append(ArraySpec("images/mask_fraction", "uint8", ("image", "patch"), 0))
    return tuple(arrays)


def all_arrays(layout: Layout) -> tuple[ArraySpec, ...]:
    """Every array of a store."""
    reduced = {
        "memories": memory_arrays,
        "attribution": attribution_arrays,
        "neurons": neuron_arrays,
        "dissection": dissection_arrays,
    }
    return (
        *image_arrays(layout),
        *(score_arrays(layout) if layout.streams else ()),
        *(spec for name in layout.reducers for spec in reduced[name](layout)),
    )


def shard_file(spec: ArraySpec, unit: int) -> str:
    """Path, relative to the store, of the file that holds a unit's part of an array."""
    return "/".join([spec.path, "c", str(unit), *("0" for _ in spec.axes[1:])])


def ledger_file(unit: int) -> str:
    """Path, relative to the store, of the marker that says a unit is committed."""
    return f"{LEDGER_DIR}/{unit:06d}.json"


def committed_units(store: Path) -> list[int]:
    """Units whose commit marker exists, ascending. Only these may be read."""
    return sorted(int(p.stem) for p in (store / LEDGER_DIR).glob("*.json"))


def read_attributes(store: str | Path) -> dict[str, Any]:
    """The ``classlens`` attributes of a store: format, layout, config, fingerprint, versions, …

    Raises:
        StoreError: there is no store at this path, or its format is a newer one.
    """
    path = Path(store) / "zarr.json"
    try:
        attributes = json.loads(path.read_text())["attributes"]["classlens"]
    except (OSError, KeyError, ValueError) as error:
        raise StoreError(
            f"{store} is not a classlens store ({type(error).__name__} on its zarr.json); "
            "give the folder that `classlens extract --out` wrote."
        ) from error
    if attributes["format"] > FORMAT_VERSION:
        raise StoreError(
            f"{store} has store format {attributes['format']}, this classlens reads up to "
            f"{FORMAT_VERSION}; upgrade classlens."
        )
    return attributes


def read_layout(store: str | Path) -> Layout:
    """The layout of a store (see :func:`read_attributes` for errors)."""
    return Layout.from_json(read_attributes(store)["layout"])
