"""One self-contained HTML page on some stores: tables, figures of paper §4, pictures.

Nothing in it is fetched: styles, script, charts (static SVG) and pictures stand inline, and the
page's content security policy forbids any request.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import polars as pl
from markupsafe import Markup

from classlens.analysis import plot_style, plots
from classlens.analysis.class_context import with_masks
from classlens.analysis.colors import DIVERGING
from classlens.analysis.identifiability import (
    IdentifiabilityResult,
    analyze_identifiability,
    context,
    rate,
)
from classlens.analysis.perturbation import NOTE as PERTURBATION_NOTE
from classlens.analysis.plots_memories import class_value_chart
from classlens.analysis.report.attribution import (
    RelevancePicture,
    perturbation_figure,
    relevance_pictures,
)
from classlens.analysis.report.interventions import interventions_section
from classlens.analysis.report.memories import MemorySection, memory_section
from classlens.analysis.report.pictures import Picture, make_pictures
from classlens.analysis.report.probes import ProbePart, make_probe_part, stores_probed
from classlens.analysis.report.templates import asset, environment
from classlens.analysis.report.writing import Writing, make_writing
from classlens.analysis.scan import scan, scan_images
from classlens.extractor.config import intervention_text
from classlens.extractor.errors import ShardError, UsageError
from classlens.extractor.schema import Layout, read_attributes

PACKAGE = "classlens.analysis.report"


@dataclass(frozen=True)
class Section:
    """What the page says of one store.

    aspect: height over width of the pixels that the patches cover. facts: name and value of what
    was done to get the store. result: of the ``corrected`` convention. rates: of both conventions,
    a row for model and control each. charts: SVG by name. blocks: rows of the table behind the
    figures. writing: what attention and MLP do, its charts among the charts. relevance: attribution
    laid on pictures, of a store that has it. missing_pictures: why there are no pictures, else
    empty. memories: None where the store holds none. probe: None where there is no probe store of
    this model.
    """

    name: str
    layout: Layout
    aspect: float
    facts: dict[str, str]
    result: IdentifiabilityResult
    rates: pl.DataFrame
    charts: dict[str, Markup]
    blocks: list[dict[str, Any]]
    writing: Writing
    pictures: list[Picture]
    relevance: list[RelevancePicture]
    missing_pictures: str
    memories: MemorySection | None
    probe: ProbePart | None


def write_report(
    stores: Sequence[str | Path],
    out: str | Path,
    control: str | Path | None = None,
    *,
    perturbed: Sequence[str | Path] = (),
    perturbations: Sequence[Path] = (),
    probe: str | Path | None = None,
    values: pl.DataFrame | None = None,
    n_images: int = 12,
    permutations: int = 1000,
    seed: int = 0,
) -> Path:
    """Writes the page and returns its path.

    Args:
        control: a store of the same images with random weights, compared with every store.
        perturbed: stores of the same images and model extracted with ``--intervene``; then there is
            one store.
        perturbations: files of `classlens perturb`.
        probe: a store of linear probes, set beside the stores of the same weights.
        values: class-value agreement of the model, of `analysis.values`; then there is one store.
        n_images: pictures shown of each store, 0 for none.

    Raises:
        StoreError: a path is no store. UsageError: no stores, nothing scored, the control, the
            probe or a perturbed store does not fit, or a file is no result of `classlens perturb`.
    """
    paths = [Path(store) for store in stores]
    if not paths:
        raise UsageError("No stores given; name at least one folder of `classlens extract`.")
    if len(paths) > 1 and (perturbed or values is not None):
        option = "--perturbed stores belong" if perturbed else "--values belongs"
        raise UsageError(f"{option} to one model; report on one store.")
    interventions = None
    if perturbed:
        interventions = interventions_section(paths[0], [Path(p) for p in perturbed], seed=seed)
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    probed = [] if probe is None else stores_probed(paths, Path(probe))
    sections = []
    for path, name in zip(paths, names, strict=True):
        result = analyze_identifiability(path, control, permutations=permutations, seed=seed)
        probes = (
            make_probe_part(path, name, Path(probe), seed) if probe and path in probed else None
        )
        sections.append(_section(name, result, n_images, probes, values))
    rates = pl.concat(section.rates for section in sections)
    of_corrected = rates.filter(pl.col("convention") == "corrected")
    template = environment(PACKAGE).get_template("template.html")
    page = template.render(
        sections=sections,
        rates=rates.to_dicts(),
        rate_chart=_figure(
            plots.rate_chart(of_corrected),
            "Bar chart of the class identifiability rates; the numbers are in the table above.",
        ),
        perturbations=[perturbation_figure(path) for path in perturbations],
        perturbation_note=PERTURBATION_NOTE,
        control=control and Path(control).name,
        interventions=interventions,
        permutations=permutations,
        level=plot_style.LEVEL,
        scale=DIVERGING,
        style=Markup(asset(PACKAGE, "style.css")),
        script=Markup(asset(PACKAGE, "script.js")),
        version=version("classlens"),
    )
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    return out


def _section(
    name: str,
    result: IdentifiabilityResult,
    n_images: int,
    probe: ProbePart | None,
    values: pl.DataFrame | None,
) -> Section:
    store = result.store
    attributes = read_attributes(store)
    layout = Layout.from_json(attributes["layout"])
    charts = {
        "evolution": _figure(
            plots.evolution_chart(result.evolution),
            f"Line charts of mean identifiability over the blocks of {name}; the numbers of the "
            "residual stream are in the table below.",
        ),
    }
    if not result.change_rate.is_empty():
        charts["change_rate"] = _figure(
            plots.change_rate_chart(result.change_rate),
            f"Line chart of the block change rate of {name}; the numbers are in the table below.",
        )
    if not result.context.is_empty():
        charts["context"] = _figure(
            plots.context_chart(result.context),
            f"Class-minus-context difference over the blocks of {name}; the numbers are in the "
            "table below.",
        )
    if values is not None:
        charts["class_value"] = _figure(
            class_value_chart(values),
            f"Line charts of class-value agreement over the blocks of {name}, which "
            "`classlens analyze values` prints.",
        )
    writing = make_writing(store, name, permutations=result.permutations, seed=result.seed)
    charts |= {key: _figure(chart, text) for key, (chart, text) in writing.charts.items()}
    pictures, relevance, missing = [], [], ""
    if n_images:
        try:
            pictures = make_pictures(store, n_images)
            relevance = relevance_pictures(store, n_images)
        except ShardError as error:
            missing = str(error)
    return Section(
        name=name,
        layout=layout,
        aspect=_aspect(attributes["geometry"]["input_size"], layout.grid),
        facts=store_facts(store, attributes, layout),
        result=result,
        rates=_rates(name, result),
        charts=charts,
        blocks=_block_rows(result),
        writing=writing,
        pictures=pictures,
        relevance=relevance,
        missing_pictures=missing,
        memories=memory_section(store, name, permutations=result.permutations, seed=result.seed),
        probe=probe,
    )


def store_facts(store: Path, attributes: dict[str, Any], layout: Layout) -> dict[str, str]:
    """Rows of the table on how a store was made."""
    config, geometry = attributes["config"], attributes["geometry"]
    units = pl.read_parquet(store / "units.parquet")
    shards = sorted({Path(shard) for shard in units["shard"]})
    statuses = Counter(scan_images(store).select("status").collect()["status"].to_list())
    bad = ", ".join(f"{n:,} {name}" for name, n in sorted(statuses.items()) if name != "ok")
    kinds = Counter(layout.prefix_kinds)
    prefix = ", ".join(f"{n} {kind}" for kind, n in kinds.items()) or "none"
    size = "×".join(map(str, geometry["input_size"]))
    packages = ("classlens", "torch", "timm", "python")
    return {
        "Model": " ".join([config["model"], *_pairs(config["model_args"])]),
        "Weights": Path(config["weights"]).name,
        "Weights' SHA-256": attributes["fingerprint"]["weights_sha256"][:16] + "…",
        "Data": f"{len(shards)} shards in {shards[0].parent.name}/, "
        f"{'with' if layout.masks else 'without'} segmentation masks",
        "Images scored": f"{statuses['ok']:,}",
        "Images not scored": bad or "0",
        "Geometry": f"{config['geometry']}: {size} pixels, crop {geometry['crop_pct']:g} "
        f"{geometry['crop_mode']}, {geometry['interpolation']}",
        "Numerics": f"{config['dtype']} on {attributes['device']}",
        "Axes": f"{layout.blocks} blocks; {', '.join(layout.streams)}; "
        f"{layout.grid[0]}×{layout.grid[1]} image tokens, prefix tokens: {prefix}",
        "Classes": f"{layout.classes:,}" + _of_file(attributes.get("class_file")),
        "Projection of sublayers": config["convention"],
        "Intervention": intervention_text(config),
        "Ranks by": _ranks_by(attributes),
        "Versions": ", ".join(f"{p} {attributes['versions'][p]}" for p in packages),
    }


def _of_file(class_file: dict[str, str] | None) -> str:
    if class_file is None:
        return ""
    source = f" ({class_file['source']})" if class_file["source"] else ""
    return f" of {class_file['name']}{source}"


def _ranks_by(attributes: dict[str, Any]) -> str:
    if "probe" not in attributes:
        return "class embedding"
    probe = attributes["probe"]
    return f"linear probes, α = {probe['alpha']:g}, {probe['train_images']:,} training images"


def _aspect(input_size: Sequence[int], grid: Sequence[int]) -> float:
    height, width = (side // count * count for side, count in zip(input_size, grid, strict=True))
    return height / width


def _pairs(arguments: dict[str, Any]) -> Iterable[str]:
    return (f"{name}={value}" for name, value in arguments.items())


def _rates(name: str, result: IdentifiabilityResult) -> pl.DataFrame:
    """The rates of model and control in both conventions, with accuracy, chance and a name."""
    stores = {"model": result.store}
    if result.control is not None:
        stores["control"] = result.control
    published = [
        rate(scan(path), convention="vilas2023", seed=result.seed).with_columns(
            source=pl.lit(source)
        )
        for source, path in stores.items()
    ]
    is_model = pl.col("source") == "model"
    names = pl.when(is_model).then(pl.lit(name)).otherwise(pl.lit(f"{name}, random weights"))
    return (
        pl.concat([result.rate, *published], how="diagonal")
        .join(result.accuracy.drop("n_images"), on="source")
        .with_columns(name=names, chance=pl.lit(100 / result.classes))
        .sort(pl.col("source") == "control", "convention")
    )


def _block_rows(result: IdentifiabilityResult) -> list[dict[str, Any]]:
    """The numbers behind the figures, residual stream, one row a block."""
    resid = result.evolution.filter(pl.col("stream") == "resid")
    table = resid.select("block").unique()
    for source in ("model", "control"):
        of_source = pl.col("source") == source
        for group in ("cls", "patch"):
            part = resid.filter(of_source & (pl.col("group") == group))
            values = part.select("block", pl.col("mean").alias(f"{source}_{group}"))
            table = _beside(table, values)
        part = result.change_rate.filter(of_source)
        values = part.select("block", pl.col("change_rate").alias(f"{source}_change_rate"))
        table = _beside(table, values)
    table = _beside(table, result.context)
    published = context(with_masks(result.store), convention="vilas2023", seed=result.seed)
    p_values = published.select("block", vilas2023_p="p_value")
    return _beside(table, p_values).sort("block").to_dicts()


def _beside(table: pl.DataFrame, values: pl.DataFrame) -> pl.DataFrame:
    """Joins by block; an analysis that found nothing has an untyped block column."""
    values = values.with_columns(pl.col("block").cast(table.schema["block"]))
    return table.join(values, on="block", how="left")


def _figure(chart: Any, description: str) -> Markup:
    return Markup(plot_style.to_svg(chart, description))
