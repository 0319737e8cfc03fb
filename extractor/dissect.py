"""The second pass of Network Dissection, over the images of a store."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import zarr

from classlens.extractor.engine import CPU_BATCH, Engine, choose_forward
from classlens.extractor.errors import UsageError
from classlens.extractor.interventions import make_intervention
from classlens.extractor.prepare import Prepared, attributes, most_classes, tables
from classlens.extractor.reducers.dissection import DissectionAccumulator
from classlens.extractor.run import Progress, Silent, fill
from classlens.extractor.schema import Status, committed_units
from classlens.extractor.scorer import DTYPES, Scorer
from classlens.extractor.store import Store
from classlens.extractor.summary import Summary

GPU_BATCH = 128


def require_dissection(prepared: Prepared, store: Path) -> None:
    """Checks that the first pass is whole, and that there are masks.

    Args:
        store: of the first pass; prepared: again from it.

    Raises:
        UsageError: it has no neurons or no masks, or units of it are missing.
    """
    layout = prepared.layout
    if "neurons" not in layout.reducers:
        raise UsageError(
            f"{store} accumulates no neurons; extract a store with `--reduce neurons` first."
        )
    if not layout.masks:
        raise UsageError(
            f"The images of {store} have no segmentation masks, which dissection compares neurons "
            "with; pack and extract a data set that has them."
        )
    done = len(committed_units(store))
    if done < layout.units:
        raise UsageError(
            f"{done} of {layout.units} units of {store} are extracted, and thresholds need all; "
            "run the same `classlens extract` command again first."
        )


def dissect(
    prepared: Prepared,
    store: Path,
    thresholds: np.ndarray,
    quantile: float,
    out: Path,
    progress: Progress | None = None,
) -> Summary:
    """Adds up the areas of every unit that the dissection at ``out`` does not hold yet.

    Args:
        prepared: again from ``store``, the first pass's. thresholds: float32 [L, F], the smallest
        activation of each neuron that is above its quantile.

    Raises:
        UsageError: as of `require_dissection`. ConfigMismatchError: ``out`` was made with another
        configuration or thresholds. ShardError: a shard changed since it was planned.
    """
    require_dissection(prepared, store)
    progress = progress or Silent()
    config = prepared.config
    facts = {
        "quantile": quantile,
        "thresholds_sha256": hashlib.sha256(thresholds.astype("<f4").tobytes()).hexdigest(),
    }
    layout = replace(
        prepared.layout,
        streams=(),
        topk=0,
        certified=False,
        reducers=("dissection",),
        per_head=False,
        slots=most_classes(prepared.plan, prepared.layout.classes),
    )
    dissected = replace(prepared, layout=layout)
    common = attributes(dissected)
    saved = common | {
        "fingerprint": common["fingerprint"] | {"dissection": facts},
        "dissection": facts,
        "impl": "network dissection",
    }
    statuses = np.asarray(zarr.open_array(str(store / "images/status"), mode="r")[...])
    scorer = Scorer(
        prepared.subject,
        [],
        dtype=DTYPES[config.dtype],
        device=config.device,
        convention=config.convention,
        forward=choose_forward(config, prepared.subject, prepared.plan.manifest.height),
        intervention=make_intervention(config, prepared.subject),
        accumulator=DissectionAccumulator(
            prefix=layout.prefix,
            patches=layout.patches,
            thresholds=torch.from_numpy(thresholds).to(config.device),
            counted=statuses == Status.OK,
        ),
    )
    batch_size = config.batch_size or (CPU_BATCH if config.on_cpu else GPU_BATCH)
    target = Store.open_or_create(out, layout, tables(dissected), saved)
    progress.started(prepared.plan.manifest.height)
    return fill(target, dissected, prepared.plan.units, Engine(scorer, batch_size), progress)
