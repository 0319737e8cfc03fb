"""Progress on stderr, shared by all commands."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def status(text: str) -> Iterator[None]:
    """A spinner while something of unknown length happens."""
    with Console(stderr=True).status(text):
        yield


@contextmanager
def bar(text: str) -> Iterator[Bar]:
    """A progress bar with rate and time left."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield Bar(progress, text)


class Bar:
    """One bar. Call it with (done, total), or hand it to `run.extract` as its progress."""

    def __init__(self, progress: Progress, text: str) -> None:
        self._progress = progress
        self._task = progress.add_task(text, total=None, rate="")
        self._done, self._total, self._earlier = 0, 0, 0

    def __call__(self, done: int, total: int) -> None:
        self._done, self._total = done, total
        elapsed_s = self._progress.tasks[0].elapsed
        rate = (done - self._earlier) / elapsed_s if elapsed_s else 0.0
        self._progress.update(self._task, completed=done, total=total, rate=f"{rate:,.1f}/s")

    def started(self, images: int) -> None:
        """The number of images is known."""
        self(0, images)

    def advanced(self, images: int, *, scored: bool) -> None:
        """More images are done; those of an earlier run do not count for the rate."""
        self._earlier += 0 if scored else images
        self(self._done + images, self._total)
