"""The loop: tar shards in, store out."""

from __future__ import annotations

import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from classlens.extractor.captured import CapturedScorer
from classlens.extractor.engine import Engine, make_engine
from classlens.extractor.pipeline import Batch, Pipeline
from classlens.extractor.plan import Unit
from classlens.extractor.prepare import Prepared, attributes, tables
from classlens.extractor.reducers.protocol import Accumulator, Targets, UnitPart, split_results
from classlens.extractor.schema import (
    INVALID_FLAGS,
    MEMORY_FLAGS_PATH,
    Layout,
    Status,
    score_arrays,
)
from classlens.extractor.scorer import Scorer
from classlens.extractor.shards import Decoded, kept_tokens
from classlens.extractor.stages import StageTimes
from classlens.extractor.store import StagedUnit, Store
from classlens.extractor.summary import Summary, summarise
from classlens.extractor.transfer import Transfer


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


def extract(prepared: Prepared, out: Path, progress: Progress | None = None) -> Summary:
    """Scores every planned image that the store at ``out`` does not hold yet.

    Raises:
        ConfigMismatchError: the store was made with another configuration.
        ShardError: a shard changed since it was planned.
    """
    progress = progress or Silent()
    store = Store.open_or_create(out, prepared.layout, tables(prepared), attributes(prepared))
    engine = make_engine(prepared)
    progress.started(prepared.plan.manifest.height)
    return fill(store, prepared, prepared.plan.units, engine, progress)


def fill(
    store: Store, prepared: Prepared, units: Sequence[Unit], engine: Engine, progress: Progress
) -> Summary:
    """Scores the images of those of the units that the store does not hold yet.

    Raises:
        ShardError: a shard changed since it was planned.
    """
    transfer = Transfer(prepared.config.device)
    times = StageTimes(prepared.config.decoding_threads)
    pipeline = Pipeline(
        store, units, prepared.image_decoder(), transfer, times, batch_size=engine.batch_size
    )
    scorer, accumulator = engine.scorer, engine.scorer.accumulator
    started_s, scored = time.perf_counter(), 0
    with pipeline:
        for batch, results in score_batches(pipeline.batches(), scorer, transfer, times):
            if batch.staged is None:  # committed before, or with another process
                progress.advanced(batch.unit.images, scored=False)
                continue
            with times.busy("stage"):
                stage_results(batch.images, results, batch.staged, prepared.layout, accumulator)
            if accumulator is not None:
                accumulate(batch, results, scorer, transfer, times, prepared.layout)
            progress.advanced(len(batch.images), scored=True)
            scored += len(batch.images)
            if batch.ends_unit:
                pipeline.commit(batch)
    store.finish()
    return summarise(prepared, store.path, scored, time.perf_counter() - started_s, times)


def score_batches(
    batches: Iterable[Batch], scorer: Scorer | CapturedScorer, transfer: Transfer, times: StageTimes
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


def launch(
    batch: Batch, scorer: Scorer | CapturedScorer, transfer: Transfer
) -> Callable[[], dict[str, np.ndarray]]:
    """Starts scoring the good images of a batch; the function returned waits for the results."""
    images, staged = batch.images, batch.staged
    good = [place for place, image in enumerate(images) if image.status is Status.OK]
    if not good:
        return dict
    kept = kept_tokens([images[place] for place in good])
    pixels = batch.pixels if len(good) == len(images) else batch.pixels[good]
    known = {
        "labels": torch.tensor([images[place].label for place in good]),
        "images": torch.tensor([batch.first_image + images[place].position for place in good]),
    }
    if kept is not None:
        known["kept"] = torch.from_numpy(kept)
    if scorer.accumulator is not None:
        assert staged is not None
        known["keys"] = torch.tensor([zlib.crc32(batch.keys[place].encode()) for place in good])
        known |= scorer.accumulator.known([images[place] for place in good], staged.arrays)
    targets = Targets(**{name: transfer.to_device(values) for name, values in known.items()})
    scored = scorer.score(transfer.to_device(pixels), targets)
    return transfer.to_host(scored)


def stage_results(
    images: Sequence[Decoded],
    results: Mapping[str, np.ndarray],
    staged: StagedUnit,
    layout: Layout,
    accumulator: Accumulator | None = None,
) -> None:
    """Puts a batch into its unit; bad images keep their status and the fill values, and so do
    tokens that were removed. Images whose activations are not finite get that status.

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
    good = [image for image in images if image.status is Status.OK]
    places = np.array([image.position for image in good])
    rows, found = split_results(results)
    finite = np.ones(len(good), bool)
    kept = kept_tokens(good)
    there = np.array(True)
    if kept is not None:
        there = np.pad(kept, ((0, 0), (layout.prefix, 0)), constant_values=True)[:, None, None]
        rows |= {
            spec.path: np.where(there, rows[spec.path], np.array(spec.fill, spec.dtype))
            for spec in score_arrays(layout)
            if "token" in spec.axes
        }
    if "scores/rank" in rows:
        finite &= ((results["scores/rank"] < layout.classes) | ~there).all(axis=(1, 2, 3))
    if MEMORY_FLAGS_PATH in rows:
        finite &= (rows[MEMORY_FLAGS_PATH] != INVALID_FLAGS).all(axis=(1, 2, 3))
    if accumulator is not None:
        finite &= accumulator.finite(found, staged.first_image + places)
    for path, values in rows.items():
        staged.put(path, places[finite], values[finite])
    staged.put("images/status", places[~finite], np.full((~finite).sum(), Status.NONFINITE))
    for image, is_finite in zip(good, finite, strict=True):
        image.status = Status.OK if is_finite else Status.NONFINITE


def accumulate(
    batch: Batch,
    results: dict[str, np.ndarray],
    scorer: Scorer | CapturedScorer,
    transfer: Transfer,
    times: StageTimes,
    layout: Layout,
) -> None:
    """Adds what was found in a staged batch to its unit; bad images leave no trace in it."""
    staged, accumulator = batch.staged, scorer.accumulator
    assert staged is not None
    assert accumulator is not None
    while results:
        good = [image for image in batch.images if image.status is Status.OK]
        if len(good) == len(results["images/prediction"]):
            break
        # What the others added within the batch cannot be taken out of it again.
        with times.busy("score"):
            results = launch(batch, scorer, transfer)()
        stage_results(batch.images, results, staged, layout, accumulator)
    else:
        return
    masks = [image.mask_fraction for image in good]
    part = UnitPart(
        arrays=staged.arrays,
        places=staged.first_image + np.array([image.position for image in good]),
        slots=np.searchsorted(staged.classes, [image.label for image in good]),
        masked=np.array([mask is not None for mask in masks]),
        class_area=np.array([0 if mask is None else int(mask.sum()) for mask in masks]),
    )
    with times.busy("stage"):
        accumulator.merge(split_results(results)[1], part)
