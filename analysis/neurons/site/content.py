"""What the site says of a model's neurons, in plain values: no store, no model, no HTML.

A part that was not computed is None; one that was computed and found nothing is empty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl

from classlens.analysis.neurons.localisation import Localisation


@dataclass(frozen=True)
class Scored:
    """A class by its name, and a number."""

    name: str
    value: float


@dataclass(frozen=True)
class Exemplar:
    """An image on which a neuron is most active.

    picture: its place in ``Content.pictures``. value: the neuron's largest activation on it. mask:
    bool [rows, columns], where the activation is above the neuron's threshold.
    """

    picture: int
    value: float
    mask: np.ndarray


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

    file: a PNG. target: the class for whose sake it was made. series: of one series are the images
    that show one ascent after more and more steps. predicted: the class that the model sees in it.
    """

    file: Path
    series: str
    steps: int
    target: str
    predicted: str


@dataclass(frozen=True)
class NeuronPage:
    """Everything its page says of neuron ``block:neuron``. Classes are in falling order.

    promoted: E·v_j. words: see ``words.WORDS``. agreeing: how many pairs of words are the same
    class. exemplars: most active first. threshold: activations from it on are inside the masks.
    averages: mean activation over the images of a class. iou: of the thresholded activation with
    the classes' segmentation masks. synthesised: in the order they are shown.
    """

    block: int
    neuron: int
    promoted: tuple[Scored, ...]
    words: tuple[Word, ...]
    agreeing: int
    exemplars: tuple[Exemplar, ...] | None = None
    threshold: float | None = None
    averages: tuple[Scored, ...] | None = None
    iou: tuple[Scored, ...] | None = None
    synthesised: tuple[Synthesised, ...] | None = None

    @property
    def name(self) -> str:
        """``block:neuron``."""
        return f"{self.block}:{self.neuron}"


PARTS = ("exemplars", "averages", "iou", "clip", "synthesised")
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
    threshold the masks of exemplars have. iou_quantile: the same in dissection, None without. grid:
    patch rows and columns. aspect: height over width of what the patches cover. neurons: of each
    block those with a page, ascending. missing: for each of ``PARTS`` that was not computed, a
    sentence that says which command adds it; commands stand between backticks. pages: the pages of
    a block, in the order of ``neurons``. pictures: in the order in which the sheets have them.
    pixels: uint8 [height, width, 3] of each picture, in order. top_blocks: of
    ``alignment.block_distribution``. localisation: by its question, ``within_images`` or
    ``over_data_set``; empty where it was not given.
    """

    title: str
    facts: Mapping[str, str]
    quantile: float
    iou_quantile: float | None
    grid: tuple[int, int]
    aspect: float
    neurons: Mapping[int, Sequence[int]]
    missing: Mapping[str, str]
    pages: Callable[[int], Iterator[NeuronPage]]
    pictures: Sequence[Picture]
    pixels: Callable[[], Iterator[np.ndarray]]
    top_blocks: pl.DataFrame
    localisation: Mapping[str, Localisation] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Number of pages."""
        return sum(map(len, self.neurons.values()))
