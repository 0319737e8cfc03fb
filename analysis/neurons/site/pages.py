"""Writes the site: an index, an overview, a page on each neuron, sheets of pictures.

The site is written beside its place and put there when it is complete, so that an interrupted run
leaves what was there before. Pages load scripts and styles by relative links, never by requests of
a script, which browsers refuse to pages opened from a disk.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from math import comb
from pathlib import Path

import jinja2

from classlens.analysis.neurons.dissection import DETECTOR_IOU
from classlens.analysis.neurons.site import bitgrid
from classlens.analysis.neurons.site.content import Content
from classlens.analysis.neurons.site.overview import figures
from classlens.analysis.neurons.site.sprites import SIDE, Sheets
from classlens.analysis.neurons.site.table import Table
from classlens.analysis.report.templates import asset, environment
from classlens.extractor.errors import UsageError

PACKAGE = "classlens.analysis.neurons.site"
REPORT_PACKAGE = "classlens.analysis.report"
SCRIPTS = ("index.js", "neuron.js")
MARKER = ".classlens-neurons"
"""A file that says that a folder is a site and may be replaced."""

WORD_TITLES = {
    "promoted": "By its value vector",
    "exemplar": "By its exemplars’ labels",
    "clip": "By CLIP, of the masked exemplars",
}


@dataclass(frozen=True)
class Written:
    """What was written: pages of neurons, pictures, files and their bytes together."""

    pages: int
    pictures: int
    files: int
    bytes: int


def write_site(
    content: Content, out: Path, progress: Callable[[int, int], None] | None = None
) -> Written:
    """Writes the site into the folder ``out``; a site that is there already is replaced.

    Args:
        progress: called with (pages done, pages).

    Raises:
        UsageError: the folder holds something else, or cannot be written.
    """
    check_place(out)
    out = out.resolve()
    draft = out.with_name(f".{out.name}-unfinished")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        pictures = _write(content, draft, progress)
        replaced = out.with_name(f".{out.name}-replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        if out.exists():
            out.rename(replaced)
        draft.rename(out)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        raise UsageError(f"{out} cannot be written ({error}); choose another --out.") from error
    sizes = [file.stat().st_size for file in out.rglob("*") if file.is_file()]
    return Written(content.total, pictures, len(sizes), sum(sizes))


def check_place(out: Path) -> None:
    """Raises UsageError if ``out`` is something other than a site, an empty folder or nothing."""
    if out.is_dir() and ((out / MARKER).exists() or not any(out.iterdir())):
        return
    if out.exists():
        raise UsageError(f"{out} exists and is no site of neurons; choose another --out.")


def page_file(block: int, neuron: int) -> str:
    """A neuron's page, relative to the site."""
    return f"neurons/{block}/{neuron}.html"


def _write(content: Content, out: Path, progress: Callable[[int, int], None] | None) -> int:
    """Writes everything into the empty folder ``out``; returns the number of pictures."""
    (out / MARKER).touch()
    style = asset(REPORT_PACKAGE, "style.css") + asset(PACKAGE, "style.css")
    (out / "style.css").write_text(style, encoding="utf-8")
    for script in SCRIPTS:
        (out / script).write_text(asset(PACKAGE, script), encoding="utf-8")
    sheets = Sheets.of(content.aspect)
    pictures = sheets.write(content.pixels(), out)
    templates = _environment(content, sheets)
    table = _write_pages(content, out, templates.get_template("neuron.html"), progress)
    (out / "index-data.js").write_text(table.script(), encoding="utf-8")
    charts = figures(content, table.frame())
    for name in ("index.html", "overview.html"):
        page = templates.get_template(name).render(figures=charts)
        (out / name).write_text(page, encoding="utf-8")
    return pictures


def _write_pages(
    content: Content,
    out: Path,
    template: jinja2.Template,
    progress: Callable[[int, int], None] | None,
) -> Table:
    """Writes the page of each neuron, and the synthesised images; returns the rows of the index."""
    table = Table(content)
    names = [(block, j) for block, neurons in content.neurons.items() for j in neurons]
    synthesised: dict[Path, str] = {}
    (out / "synthesised").mkdir()
    for i, page in enumerate(page for block in content.neurons for page in content.pages(block)):
        assert (page.block, page.neuron) == names[i], page.name
        for image in page.synthesised or ():
            if image.file not in synthesised:
                synthesised[image.file] = f"synthesised/{len(synthesised)}.png"
                shutil.copyfile(image.file, out / synthesised[image.file])
        text = template.render(
            page=page,
            before=names[i - 1] if i else None,
            after=names[i + 1] if i + 1 < len(names) else None,
            synthesised=synthesised,
        )
        file = out / page_file(page.block, page.neuron)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        table.add(page)
        if progress is not None:
            progress(i + 1, len(names))
    return table


def _environment(content: Content, sheets: Sheets) -> jinja2.Environment:
    made = environment(PACKAGE)
    made.filters["bits"] = bitgrid.encode
    made.globals |= {
        "content": content,
        "sheets": sheets,
        "side": SIDE,
        "detector": DETECTOR_IOU,
        "word_titles": WORD_TITLES,
        "pairs": lambda words: comb(words, 2),
        "page_file": page_file,
        "bar_lengths": bar_lengths,
        "version": version("classlens"),
    }
    return made


def bar_lengths(values: Iterable[float]) -> list[float]:
    """Lengths of bars in %: each value's size as a share of the largest."""
    sizes = [abs(value) for value in values]
    largest = max(sizes, default=0.0)
    return [100 * size / largest if largest else 0.0 for size in sizes]
