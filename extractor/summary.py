"""What a run did: the state of its store, its speed, and the stage that held it back."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from classlens.extractor.prepare import Prepared
from classlens.extractor.schema import STAGING_DIR, committed_units
from classlens.extractor.stages import StageTimes
from classlens.extractor.store import status_totals


@dataclass(frozen=True)
class Summary:
    """What a run did.

    images: planned in all; scored, seconds and stages: in this run only. stages: busy seconds, see
    ``StageTimes``; those of ``decode`` are summed over decode_threads. held_back_by: the stage to
    make faster; empty when nothing was scored. recomputed_share: of the store's ranks, those that
    took comparisons in float64; None where ranks are not certified.
    """

    store: str
    units: int
    units_committed: int
    images: int
    scored: int
    seconds: float
    images_per_s: float
    bytes_per_image: float
    status: dict[str, int] = field(default_factory=dict)
    stages: dict[str, float] = field(default_factory=dict)
    decode_threads: int = 1
    held_back_by: str = ""
    recomputed_share: float | None = None

    @property
    def bad_images(self) -> int:
        """Images of the store that could not be scored."""
        return sum(n for name, n in self.status.items() if name != "ok")


def summarise(
    prepared: Prepared, out: Path, scored: int, seconds: float, times: StageTimes
) -> Summary:
    """The state of the store and the figures of this run."""
    plan, status = prepared.plan, dict(status_totals(out))
    committed = committed_units(out)
    held = sum(plan.units[u].images for u in committed)
    size = store_bytes(out)
    return Summary(
        store=str(out),
        units=len(plan.units),
        units_committed=len(committed),
        images=plan.manifest.height,
        scored=scored,
        seconds=round(seconds, 3),
        images_per_s=round(scored / seconds, 2) if scored else 0.0,
        bytes_per_image=round(size / held, 1) if held else 0.0,
        status=status,
        stages=times.seconds(),
        decode_threads=times.decode_threads,
        held_back_by=times.held_back_by() if scored else "",
        recomputed_share=_recomputed_share(prepared, out, status.get("ok", 0)),
    )


def store_bytes(out: Path) -> int:
    """Bytes of all files of a store, without what is being staged by this or another process."""
    total = 0
    for folder, folders, files in os.walk(out):
        folders[:] = [name for name in folders if name != STAGING_DIR]
        total += sum(Path(folder, name).stat().st_size for name in files)
    return total


def summary_json(summary: Summary) -> dict[str, Any]:
    """The summary for ``--json``."""
    return asdict(summary) | {"bad_images": summary.bad_images}


def _recomputed_share(prepared: Prepared, out: Path, scored: int) -> float | None:
    layout = prepared.layout
    if not layout.certified or not scored:
        return None
    counts = np.asarray(zarr.open_array(str(out / "scores/recomputed"), mode="r")[...])
    ranks = scored * layout.blocks * len(layout.streams) * layout.tokens
    return round(int(counts.sum()) / ranks, 6)
