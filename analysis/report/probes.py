"""The part of the page that sets linear probes beside the class embedding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
from markupsafe import Markup

from classlens.analysis.plot_style import to_svg
from classlens.analysis.plots_probes import probe_chart
from classlens.analysis.probes import check_probe, compare_probe, same_weights
from classlens.extractor.schema import read_attributes


@dataclass(frozen=True)
class ProbePart:
    """Linear probes beside the class embedding of one store.

    name: of the probe store. facts: alpha, per_class, train_images. n_images: that both stores have
    scored. blocks: rows of the table behind the figure, residual stream.
    """

    name: str
    facts: dict[str, Any]
    n_images: int
    chart: Markup
    blocks: list[dict[str, Any]]


def stores_probed(stores: Sequence[Path], probe: Path) -> list[Path]:
    """Those of the stores whose weights the probe store probes; at least one.

    Raises:
        UsageError: there is none.
    """
    of_probe = read_attributes(probe)
    probed = []
    for store in stores:
        attributes = read_attributes(store)
        if "probe" not in attributes and same_weights(attributes, of_probe):
            probed.append(store)
    check_probe((probed or stores)[0], probe)
    return probed


def make_probe_part(store: Path, name: str, probe: Path, seed: int) -> ProbePart:
    """The comparison of a store, called ``name`` on the page, with its probes.

    Raises:
        UsageError: they do not pair.
    """
    comparison = compare_probe(store, probe, seed=seed)
    description = (
        f"Line charts of mean identifiability over the blocks of {name} by class-embedding "
        "projection and by linear probe; the numbers of the residual stream are in the table below."
    )
    resid = comparison.filter(pl.col("stream") == "resid")
    blocks = [
        {"block": block}
        | {f"{row['source']}_{row['group']}": row for row in rows.iter_rows(named=True)}
        for (block,), rows in resid.group_by("block", maintain_order=True)
    ]
    return ProbePart(
        name=probe.name,
        facts=read_attributes(probe)["probe"],
        n_images=comparison["n_images"][0],
        chart=Markup(to_svg(probe_chart(comparison), description)),
        blocks=blocks,
    )
