"""From a store, and what was computed of its neurons besides, to the content of the site.

Of one block at a time are held: alignment, class averages and overlaps [C, F], codes [F, X, G].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from classlens.analysis.neurons.alignment import block_distribution, largest, top_neurons
from classlens.analysis.neurons.class_means import block_class_means
from classlens.analysis.neurons.dissection import areas
from classlens.analysis.neurons.exemplars import (
    EXEMPLAR_QUANTILE,
    exemplar_codes,
    exemplars,
    masks,
    thresholds,
)
from classlens.analysis.neurons.heatmap import covered
from classlens.analysis.neurons.site.content import (
    Content,
    Exemplar,
    NeuronPage,
    Picture,
    Scored,
    Word,
)
from classlens.analysis.neurons.site.sources import (
    MISSING,
    Sources,
    dissection_quantile,
    read_clip_words,
    read_localisation,
    read_synthesised,
)
from classlens.analysis.neurons.subject import subject_of_store
from classlens.analysis.neurons.words import exemplar_words, join_words, promoted_words
from classlens.analysis.report.page import store_facts
from classlens.analysis.report.pictures import read_pixels
from classlens.analysis.scan import scan_images
from classlens.extractor.schema import Layout, read_attributes

if TYPE_CHECKING:
    from classlens.extractor.models import Subject

TOP = 8
"""Classes in each table of a page."""
READ_AHEAD = 64

Neurons = Mapping[int, Sequence[int]]


def every_neuron(subject: Subject) -> Neurons:
    """The neurons of each block of a model."""
    blocks = enumerate(subject.model.blocks)
    return {b: range(block.mlp.fc2.in_features) for b, block in blocks}  # pyright: ignore


def gather(sources: Sources, chosen: Callable[[Subject], Neurons] = every_neuron) -> Content:
    """The content of a site; its pages are made when they are asked for.

    Args:
        chosen: of each block of the model the neurons that get a page, ascending.

    Raises:
        StoreError: a source is missing or damaged. UsageError: a source is something else.
        ConfigMismatchError: the dissection is of another model, or the weights have changed.
    """
    return _Gathered(sources, chosen).content()


class _Gathered:
    """The sources, open. Letters as in the modules that read them."""

    def __init__(self, sources: Sources, chosen: Callable[[Subject], Neurons]) -> None:
        self.sources = sources
        self.attributes = read_attributes(sources.store)
        self.layout = Layout.from_json(self.attributes["layout"])
        self.subject = subject_of_store(sources.store)
        self.names = self.subject.class_names
        self.neurons = chosen(self.subject)
        self.images = scan_images(sources.store).filter(pl.col("status") == "ok").collect()
        self.accumulates = "neurons" in self.layout.reducers
        self.label_I = np.full(self.layout.images, -1, np.int32)
        self.label_I[self.images["image"].to_numpy()] = self.images["label"].to_numpy()
        self.place_I = np.full(self.layout.images, -1, np.int32)  # among the pictures
        self.rows = self._pictured()
        self.place_I[self.rows["image"].to_numpy()] = np.arange(self.rows.height)
        if self.accumulates:
            self.codes_LF, self.thresholds_LF = thresholds(sources.store, EXEMPLAR_QUANTILE)
        self.clip = None if sources.words is None else read_clip_words(sources.words)
        self.synthesised = (
            None if sources.synthesis is None else read_synthesised(sources.synthesis)
        )
        self.iou_quantile = (
            None
            if sources.dissection is None
            else dissection_quantile(sources.store, sources.dissection)
        )

    def content(self) -> Content:
        given = {
            "exemplars": self.accumulates,
            "averages": self.accumulates,
            "iou": self.sources.dissection is not None,
            "clip": self.clip is not None,
            "synthesised": self.synthesised is not None,
        }
        height, width = self.attributes["geometry"]["input_size"]
        rows, columns = self.layout.grid
        localisation = self.sources.localisation
        return Content(
            title=self.attributes["config"]["model"],
            facts=self._facts(),
            quantile=EXEMPLAR_QUANTILE,
            iou_quantile=self.iou_quantile,
            grid=self.layout.grid,
            aspect=(height // rows * rows) / (width // columns * columns),
            neurons=self.neurons,
            missing={part: MISSING[part] for part, there in given.items() if not there},
            pages=self.pages,
            pictures=[
                Picture(image, key, self.names[label])
                for image, key, label in self.rows.select("image", "key", "label").iter_rows()
            ],
            pixels=self.pixels,
            top_blocks=block_distribution(top_neurons(self.subject, 1)),
            localisation={} if localisation is None else read_localisation(localisation),
        )

    def _facts(self) -> dict[str, str]:
        sources = self.sources
        given = {
            "Dissection": sources.dissection,
            "Words by CLIP": sources.words if self.clip is not None else None,
            "Synthesised images": sources.synthesis,
            "Localisation": sources.localisation,
        }
        return store_facts(sources.store, self.attributes, self.layout) | {
            "Pages": f"{sum(map(len, self.neurons.values())):,} neurons",
            **{name: path.name for name, path in given.items() if path is not None},
        }

    def pages(self, block: int) -> Iterator[NeuronPage]:
        """The pages of a block."""
        store, dissection = self.sources.store, self.sources.dissection
        words = [promoted_words(self.subject, block, min(TOP, len(self.names)))]
        shown, averages, overlaps = None, None, None
        if self.accumulates:
            shown, of_labels = self._exemplars(block)
            words.append(of_labels)
            means = block_class_means(store, block)
            averages = self._top(means.classes, means.means[:, 0])
        if dissection is not None:
            found = areas(dissection, block)
            overlaps = self._top(found.classes, found.iou())
        if self.clip is not None:
            words.append(self.clip.filter(pl.col("block") == block))
        rows = join_words(*words).to_dicts()
        for j in self.neurons[block]:
            row = rows[j]
            promoted = zip(row["promoted"], row["alignments"], strict=True)
            yield NeuronPage(
                block=block,
                neuron=j,
                promoted=tuple(Scored(self.names[c], value) for c, value in promoted),
                words=words_of(row),
                agreeing=row["agreeing"],
                exemplars=None if shown is None else shown[j],
                threshold=float(self.thresholds_LF[block, j]) if self.accumulates else None,
                averages=None if averages is None else averages[j],
                iou=None if overlaps is None else overlaps[j],
                synthesised=(
                    None if self.synthesised is None else self.synthesised.get((block, j), ())
                ),
            )

    def _exemplars(self, block: int) -> tuple[dict[int, tuple[Exemplar, ...]], pl.DataFrame]:
        """The exemplars of the neurons with a page, and the words of all of them."""
        values_FX, images_FX, codes_FXG = exemplar_codes(self.sources.store, block)
        masks_FXG = masks(codes_FXG, self.codes_LF[block])
        labels_FX = np.where(images_FX >= 0, self.label_I[images_FX], -1)
        frequency_C = np.bincount(self.images["label"], minlength=len(self.names))
        grid = self.layout.grid
        shown = {
            j: tuple(
                Exemplar(int(self.place_I[image]), float(value), mask_G.reshape(grid))
                for value, image, mask_G in zip(
                    values_FX[j], images_FX[j], masks_FXG[j], strict=True
                )
                if image >= 0
            )
            for j in self.neurons[block]
        }
        return shown, exemplar_words(block, labels_FX, frequency_C, self.names)

    def pixels(self) -> Iterator[np.ndarray]:
        """The pictures, in order; errors as of `read_pixels`."""
        geometry = self.attributes["geometry"]

        def read(row: dict[str, Any]) -> np.ndarray:
            return covered(read_pixels(geometry, row), self.layout.grid)

        with ThreadPoolExecutor() as pool:
            for part in self.rows.iter_slices(READ_AHEAD):
                yield from pool.map(read, part.to_dicts())

    def _pictured(self) -> pl.DataFrame:
        """Rows of the images that some page shows, those of a class together."""
        if not self.accumulates:
            return self.images.clear()
        found = np.zeros(self.layout.images, bool)
        for block, neurons in self.neurons.items():
            of_block = exemplars(self.sources.store, block)
            found[of_block.filter(pl.col("neuron").is_in(neurons))["image"].to_numpy()] = True
        return self.images.filter(found[self.images["image"].to_numpy()]).sort("label", "image")

    def _top(self, classes_K: np.ndarray, values_KF: np.ndarray) -> list[tuple[Scored, ...]]:
        """The classes of the largest values of each neuron."""
        values_FK = np.ascontiguousarray(values_KF.T, np.float64)
        best_FT = largest(values_FK, min(TOP, len(classes_K)))
        kept_FT = np.take_along_axis(values_FK, best_FT, axis=1)
        return [
            tuple(Scored(self.names[c], v) for c, v in zip(classes, values, strict=True))
            for classes, values in zip(classes_K[best_FT].tolist(), kept_FT.tolist(), strict=True)
        ]


def words_of(row: Mapping[str, Any]) -> tuple[Word, ...]:
    """The words of a row of ``words.join_words``, with what speaks for them."""
    words = [Word("promoted", row["promoted_word"], f"E·v = {row['alignments'][0]:.3f}")]
    if "exemplar_word" in row:
        count, total = row["n_exemplars"] * (row["exemplar_share"] or 0), row["n_exemplars"]
        chance = row["exemplar_p"] or 1.0
        strength = (
            f"{count:.0f} of {total}; chance gives as many of some label with p = {chance:.1g}"
        )
        words.append(Word("exemplar", row["exemplar_word"], strength))
    if row.get("clip_word") is not None:
        words.append(Word("clip", row["clip_word"], f"score {row['clip_score']:.3f}"))
    return tuple(words)
