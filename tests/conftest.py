"""Fixtures for all tests."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from samples import Sample, sample, write_tar

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores; read when torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def make_shards(tmp_path: Path) -> Callable[..., list[Path]]:
    """Writes ``counts[i]`` good samples into ``shard-i.tar``; ``change`` may edit the samples."""

    def make(
        counts: Sequence[int] = (7, 5),
        *,
        mask: bool = True,
        change: Callable[[list[Sample]], None] = lambda samples: None,
    ) -> list[Path]:
        folder = tmp_path / "shards"
        folder.mkdir(exist_ok=True)
        samples = [sample(i, mask=mask) for i in range(sum(counts))]
        change(samples)
        paths, start = [], 0
        for i, count in enumerate(counts):
            paths.append(write_tar(folder / f"shard-{i}.tar", samples[start : start + count]))
            start += count
        return paths

    return make
