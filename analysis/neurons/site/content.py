"""What the site says of a model's neurons, in plain values: no store, no model, no HTML.

A part that was not computed is None; one that was computed and found nothing is empty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

DETECTOR_IOU = 0.04
"""A neuron detects its best class when their IoU is above (Network Dissection)."""


@dataclass(frozen=True)
class Scored:
    """A class by its name, and a number."""

    name: str
    value: float


@dataclass(frozen=True)
class Exemplar:
    """An image on which a neuron is most active.

    picture: its place in ``Content.pictures``. value: the neuron's largest activation on it. mask:
    bool [rows, columns], where the activation is above the neuron's threshold; None without a
    threshold.
    """

    picture: int
    value: float
    mask: np.ndarray | None


@dataclass(frozen=True)
class Word:
    """What a neuron is called by one of ``words.WORDS``.

    word: None where there is none. strength: how well it holds, in words.
    """

    kind: str
    word: str | None
    strength: str


@dataclass(frozen=True)
class Synthesised:
    """An image made to excite a neuron.

    file: a PNG. target: the class for whose sake. predicted: the class that the model sees in it.
    """

    file: Path
    variant: str
    steps: int
    target: str
    predicted: str


@dataclass(frozen=True)
class NeuronPage:
    """Everything its page says of neuron ``block:neuron``. Classes are in falling order.

    promoted: E·v_j. averages: mean activation over the images of a class. exemplars: most active
    first. threshold: activations above are inside the masks. iou: of the thresholded activation
    with the classes' segmentation masks. agreeing: how many pairs of its words are the same class.
    """

    block: int
    neuron: int
    promoted: tuple[Scored, ...] | None = None
    averages: tuple[Scored, ...] | None = None
    exemplars: tuple[Exemplar, ...] | None = None
    threshold: float | None = None
    iou: tuple[Scored, ...] | None = None
    words: tuple[Word, ...] | None = None
    agreeing: int | None = None
    synthesised: tuple[Synthesised, ...] | None = None

    @property
    def name(self) -> str:
        """``block:neuron``."""
        return f"{self.block}:{self.neuron}"


PARTS = ("promoted", "exemplars", "averages", "iou", "words", "clip", "synthesised")
"""What may not have been computed: fields of `NeuronPage`, and ``clip`` among its words."""


@dataclass(frozen=True)
class Picture:
    """An image of the data set that some page shows: place on the image axis, key, label's name."""

    image: int
    key: str
    label: str


@dataclass(frozen=True)
class Content:
    """Everything the site shows; the pages are made one block at a time.

    title: the model's name. facts: name and value of how the numbers came about. quantile: whose
    threshold the masks of exemplars have; iou_quantile: the same in dissection. grid: patch rows
    and columns. aspect: height over width of what the patches cover. neurons: of each block those
    with a page, ascending. missing: for each of ``PARTS`` that was not computed, a sentence that
    says which command adds it; commands stand between backticks. pages: the pages of a block, in
    the order of ``neurons``. pictures: in the order in which the sheets have them. pixels: uint8
    [height, width, 3] of each picture, in order. top_blocks: columns block, classes (how many have
    their top key neuron there). localisation: how well neurons localise, see `overview`; None where
    it was not given.
    """

    title: str
    facts: Mapping[str, str]
    quantile: float
    iou_quantile: float
    grid: tuple[int, int]
    aspect: float
    neurons: Mapping[int, Sequence[int]]
    missing: Mapping[str, str]
    pages: Callable[[int], Iterator[NeuronPage]]
    pictures: Sequence[Picture]
    pixels: Callable[[], Iterator[np.ndarray]]
    top_blocks: pl.DataFrame | None = None
    localisation: pl.DataFrame | None = None

    @property
    def total(self) -> int:
        """Number of pages."""
        return sum(map(len, self.neurons.values()))
