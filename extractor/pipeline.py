"""The stages around the scoring: a reader, decode threads and a writer, each bounded.

The reader runs two batches ahead of the scoring; the writer commits one unit while the next is
scored. Memory holds that many batches and two units, whatever the size of the data set.
"""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from threading import Semaphore, Thread
from typing import Self

import torch
from torch import Tensor

from classlens.extractor.plan import Unit
from classlens.extractor.shards import Decoded, Decoder, Planned, decode, planned_images
from classlens.extractor.stages import StageTimes
from classlens.extractor.store import StagedUnit, Store
from classlens.extractor.transfer import Transfer

BATCHES_AHEAD = 2
WRITERS = 1  # units are then committed in their order
UNITS_IN_MEMORY = WRITERS + 1


@dataclass(frozen=True)
class Batch:
    """Consecutive images of one unit.

    staged: the unit's arrays; None, and no images, where the unit is committed already or another
    process has it. first_image: the unit's first place on the image axis. pixels: uint8
    [N, H, W, 3]; undefined for images whose status is not OK. decoding: one for each image.
    ends_unit: whether the unit's last image is in it. keys: of the images.
    """

    unit: Unit
    staged: StagedUnit | None
    first_image: int
    pixels: Tensor
    decoding: Sequence[Future[Decoded]]
    ends_unit: bool
    keys: Sequence[str] = ()

    @property
    def images(self) -> list[Decoded]:
        """What became of each image; waits for the decoding, and raises what it raised."""
        return [image.result() for image in self.decoding]


class Pipeline:
    """Reader, decode threads and writer of one run, alive inside its ``with`` block.

    An error in any of the threads is raised in the block's own. However the block ends, no thread
    outlives it, commits under way are completed, and units not handed to :meth:`commit` are given
    up.
    """

    def __init__(
        self,
        store: Store,
        units: Sequence[Unit],
        decoder: Decoder,
        transfer: Transfer,
        times: StageTimes,
        *,
        batch_size: int,
    ) -> None:
        self._store, self._units, self._decoder = store, units, decoder
        self._transfer, self._times, self._batch_size = transfer, times, batch_size
        self._reader = Thread(target=self._run_reader, name="classlens-read")
        self._decoders = ThreadPoolExecutor(times.decode_threads, "classlens-decode")
        self._writer = ThreadPoolExecutor(WRITERS, "classlens-write")
        self._read: queue.SimpleQueue[Batch | BaseException | None] = queue.SimpleQueue()
        self._room, self._places = Semaphore(BATCHES_AHEAD), Semaphore(UNITS_IN_MEMORY)
        self._leases: dict[int, AbstractContextManager[StagedUnit | None]] = {}
        self._commits: list[Future[None]] = []
        self._closed = False

    def __enter__(self) -> Self:
        self._reader.start()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._closed = True
        self._room.release()
        self._places.release()
        self._reader.join()
        self._decoders.shutdown(cancel_futures=True)
        with self._times.busy("wait"):
            self._writer.shutdown()
        for lease in self._leases.values():  # an end without an error would commit them
            lease.__exit__(GeneratorExit, GeneratorExit(), None)
        if error is None:
            self._raise_writer_error()

    def batches(self) -> Iterator[Batch]:
        """The batches of all units in order, decoded."""
        while True:
            with self._times.busy("wait"):
                batch = self._read.get()
                if isinstance(batch, Batch):
                    wait(batch.decoding)
            self._raise_writer_error()
            if batch is None:
                return
            if isinstance(batch, BaseException):
                raise batch
            self._room.release()
            yield batch

    def commit(self, batch: Batch) -> None:
        """Hands a batch's unit, now complete, to the writer."""
        self._commits.append(self._writer.submit(self._commit, batch.unit.index))

    def _commit(self, unit: int) -> None:
        try:
            with self._times.busy("commit"):
                self._leases.pop(unit).__exit__(None, None, None)
        finally:  # also after an error, which the reader must not wait for
            self._places.release()

    def _raise_writer_error(self) -> None:
        while self._commits and self._commits[0].done():
            self._commits.pop(0).result()

    def _run_reader(self) -> None:
        try:
            for unit in self._units:
                self._places.acquire()
                if self._closed:
                    return
                self._read_unit(unit)
            self._read.put(None)
        except BaseException as error:  # raised again where the batches are asked for
            self._read.put(error)

    def _read_unit(self, unit: Unit) -> None:
        first_image = unit.index * self._store.layout.unit_images
        lease = self._store.stage(unit.index)
        staged = lease.__enter__()
        if staged is None:
            lease.__exit__(None, None, None)
            self._places.release()
            self._room.acquire()
            self._read.put(
                Batch(unit, None, first_image, torch.empty(0, dtype=torch.uint8), [], True)
            )
            return
        self._leases[unit.index] = lease
        images = planned_images(unit, self._store.unit_rows(unit.index))
        for start in range(0, unit.images, self._batch_size):
            self._room.acquire()
            if self._closed:
                return
            with self._times.busy("read"):
                part = list(islice(images, self._batch_size))
            pixels = self._transfer.host_pixels(len(part), *self._decoder.geometry.input_size)
            decoding = [
                self._decoders.submit(self._decode, image, pixels[place])
                for place, image in enumerate(part)
            ]
            ends = start + len(part) == unit.images
            keys = [image.row["key"] for image in part]
            self._read.put(Batch(unit, staged, first_image, pixels, decoding, ends, keys))

    def _decode(self, image: Planned, pixels: Tensor) -> Decoded:
        with self._times.busy("decode"):
            return decode(image, self._decoder, pixels.numpy())
