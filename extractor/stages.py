"""How long each stage of a run was busy, and which of them held it back."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

STAGES = ("read", "decode", "wait", "score", "stage", "commit")


class StageTimes:
    """Busy seconds by stage, counted from any thread.

    ``read``: members out of the tars. ``decode``: decoding, resize and crop, summed over its
    threads. ``wait``: the scoring thread's idle time, for images or for the last commits.
    ``score``: forward pass and projection. ``stage``: results into the arrays of their unit.
    ``commit``: compressing, reading back, hashing and syncing a unit.
    """

    def __init__(self, decode_threads: int) -> None:
        self.decode_threads = decode_threads
        self._seconds: dict[str, float] = dict.fromkeys(STAGES, 0.0)
        self._lock = threading.Lock()

    @contextmanager
    def busy(self, stage: str) -> Iterator[None]:
        """Counts the time of its block for a stage."""
        started_s = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self._seconds[stage] += time.perf_counter() - started_s

    def seconds(self) -> dict[str, float]:
        """Busy seconds by stage, rounded to milliseconds."""
        return {stage: round(seconds, 3) for stage, seconds in self._seconds.items()}

    def held_back_by(self) -> str:
        """The stage whose threads had the least time to spare.

        Scoring and staging share one thread: they count together, under the longer one's name.
        """
        busy = self._seconds
        load = {
            "read": busy["read"],
            "decode": busy["decode"] / self.decode_threads,
            "commit": busy["commit"],
            max("score", "stage", key=busy.__getitem__): busy["score"] + busy["stage"],
        }
        return max(load, key=load.__getitem__)
