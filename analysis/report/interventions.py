"""The report's section on interventions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
from markupsafe import Markup

from classlens.analysis.interventions import analyze_interventions
from classlens.analysis.plot_style import to_svg
from classlens.analysis.plots_interventions import (
    intervention_blocks_chart,
    intervention_rates_chart,
)


def interventions_section(store: Path, perturbed: Sequence[Path], *, seed: int) -> dict[str, Any]:
    """What ``interventions.html`` shows of a store and of perturbed ones.

    Raises:
        UsageError: a perturbed store does not pair with the store.
    """
    result = analyze_interventions(store, perturbed, seed=seed)
    rows = [
        {"name": name, "measure": measure, "intervention": part["intervention"][0]}
        | {row["source"]: row for row in part.iter_rows(named=True)}
        for (name, measure), part in result.rates.group_by("name", "measure", maintain_order=True)
    ]
    of_patches = result.blocks.filter(pl.col("group") == "patch")
    sizes = of_patches.unique("name", maintain_order=True).select("name", "n_images", "n_tokens")
    return {
        "store": store.name,
        "chance": 100 / result.classes,
        "rows": rows,
        "sizes": "; ".join(
            f"{name}: {images:,} images, {tokens:,} image tokens"
            for name, images, tokens in sizes.iter_rows()
        ),
        "rates": Markup(
            to_svg(
                intervention_rates_chart(result.rates),
                "Dot chart of rates and accuracy with and without each intervention; the numbers "
                "are in the table above.",
            )
        ),
        "blocks": Markup(
            to_svg(
                intervention_blocks_chart(result.blocks),
                "Line charts of mean identifiability over the blocks with and without each "
                "intervention; `classlens analyze interventions` prints the numbers.",
            )
        ),
    }
