"""The page of a study: claims, published numbers beside ours, figures of both, what was run."""

from __future__ import annotations

import re
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import polars as pl
from markupsafe import Markup

from classlens.analysis.plot_style import to_svg
from classlens.analysis.study import chart
from classlens.analysis.study.claims import claim_counts
from classlens.analysis.study.plan import Study
from classlens.analysis.study.runner import StudyResult
from classlens.analysis.study.verdicts import counts, findings_frame, number, rows


def write_page(study: Study, result: StudyResult, out: Path, pages: dict[str, Path]) -> Path:
    """Writes the self-contained page of a study and returns its path.

    Args:
        pages: of the single runs, by name; linked where they exist.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = lambda value: _minus(number(value))
    environment.filters["minus"] = _minus
    findings = result.findings
    frame = findings_frame(findings)
    links = {
        name: page.relative_to(out.parent).as_posix()
        for name, page in pages.items()
        if page.exists()
    }
    page = environment.from_string(_asset("classlens.analysis.study", "template.html")).render(
        study=study,
        outcomes=result.outcomes,
        claims=result.claims,
        claim_counts=claim_counts(result.claims),
        rows=list(rows(findings)),
        counts=counts(findings),
        charts=_charts(frame),
        pages=links,
        style=Markup(_asset("classlens.analysis.report", "style.css")),
        version=version("classlens"),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    return out


def _charts(frame: pl.DataFrame) -> dict[str, Markup]:
    measured = frame.filter(pl.col("verdict") != "not measured")
    single = measured["id"].is_unique()
    charts: dict[str, Any] = {}
    if single.any():
        text = "Differences of single numbers in tolerances; the numbers are in the table."
        charts["differences"] = Markup(to_svg(chart.differences_chart(frame), text))
    if not single.all():
        text = "Published and measured numbers of every block; targets.parquet has them."
        charts["series"] = Markup(to_svg(chart.series_chart(frame), text))
    return charts


def _minus(text: str) -> str:
    """With a proper sign before negative numbers."""
    return re.sub(r"-(?=[\d.])", "−", text)


def _asset(package: str, name: str) -> str:
    return files(package).joinpath(name).read_text(encoding="utf-8")
