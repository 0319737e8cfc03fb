"""The site of neurons: complete, escaped, in itself closed, its pictures and masks in place."""

import base64
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import chain
from math import comb

import numpy as np
import polars as pl
import pytest
from PIL import Image

from classlens.analysis.neurons.localisation import localisation
from classlens.analysis.neurons.site import bitgrid
from classlens.analysis.neurons.site.content import (
    Content,
    Exemplar,
    NeuronPage,
    Picture,
    Scored,
    Synthesised,
    Word,
)
from classlens.analysis.neurons.site.pages import bar_lengths, write_site
from classlens.analysis.neurons.site.sources import MISSING
from classlens.analysis.neurons.site.sprites import Sheets
from classlens.extractor.errors import UsageError

NAMES = (
    "tench, Tinca tinca",
    'potter\'s <b>"wheel"</b> & cie',
    "</script><script>alert(1)</script>",
    "`tick`",
    "Dåndý 🐟",
)
GRID = (3, 5)
NEURONS = {0: [0, 1, 2], 2: [1, 7]}
PICTURES = 70
"""More than a sheet holds."""


class Reader(HTMLParser):
    """Elements with their attributes, what is linked, and the text."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.links, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.links += [value for name, value in attrs if name in ("href", "src")]

    def handle_data(self, data):
        self.text += data

    def named(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def picture(i):
    """A plain colour of its own, 30 × 50."""
    return np.full((30, 50, 3), (3 * i, 255 - 3 * i, (40 * i) % 256), np.uint8)


def scored(rng, sign=1):
    values = sorted(rng.normal(size=3), reverse=True)
    return tuple(
        Scored(NAMES[c], sign * v) for c, v in zip(rng.permutation(5)[:3], values, strict=True)
    )


def neuron_page(block, neuron, files):
    rng = np.random.default_rng([block, neuron])
    return NeuronPage(
        block=block,
        neuron=neuron,
        promoted=scored(rng),
        words=tuple(
            Word(kind, NAMES[c], f"speaks {kind}")
            for kind, c in zip(
                ("promoted", "exemplar", "clip"), rng.integers(5, size=3), strict=True
            )
        ),
        agreeing=int(rng.integers(2)),
        exemplars=tuple(
            Exemplar(int(p), float(v), rng.random(GRID) < 0.4)
            for p, v in zip(rng.integers(PICTURES, size=4), (4.0, 3.0, 2.0, -1.5), strict=True)
        ),
        threshold=1.25,
        averages=scored(rng),
        iou=(Scored(NAMES[neuron % 5], 0.05 if neuron == 1 else 0.03), Scored(NAMES[0], 0.01)),
        synthesised=tuple(
            Synthesised(file, "top1, for <i>", steps, NAMES[2], NAMES[2 if steps == 250 else 0])
            for file, steps in zip(files, (250, 500), strict=True)
        )
        if neuron == 1
        else (),
    )


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthesised")
    files = [folder / "a b#1.png", folder / "é%20.png"]
    for i, file in enumerate(files):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(file)
    rng = np.random.default_rng(0)
    found = localisation(rng.random((20, 3)) + 0.2, rng.random((20, 3)), over="images")
    return Content(
        title="vit <i>demo</i>",
        facts={"Model": "vit & co"},
        quantile=0.99,
        iou_quantile=0.995,
        grid=GRID,
        aspect=0.6,
        neurons=NEURONS,
        missing={},
        pages=lambda block: (neuron_page(block, j, files) for j in NEURONS[block]),
        pictures=[Picture(10 * i, f'key<"{i}">', NAMES[i % 5]) for i in range(PICTURES)],
        pixels=lambda: map(picture, range(PICTURES)),
        top_blocks=pl.DataFrame({"block": [0, 1, 2], "classes": [1, 0, 4], "share": [0.2, 0, 0.8]}),
        localisation={"within_images": found},
    )


@pytest.fixture(scope="module")
def site(content, tmp_path_factory):
    out = tmp_path_factory.mktemp("new") / "deep" / "site"
    seen = []
    written = write_site(content, out, lambda done, total: seen.append((done, total)))
    assert seen == [(i, 5) for i in range(1, 6)]
    files = [file for file in out.rglob("*") if file.is_file()]
    assert (written.pages, written.pictures, written.files) == (5, PICTURES, len(files))
    assert written.bytes == sum(len(file.read_bytes()) for file in files)
    return out


def read(site, block, neuron):
    return Reader((site / f"neurons/{block}/{neuron}.html").read_text(encoding="utf-8"))


def index(site):
    return json.loads(
        (site / "index-data.js").read_text().removeprefix("const CLASSLENS_INDEX = ").rstrip(";\n")
    )


@pytest.mark.parametrize("grid", [(1, 1), (2, 4), (3, 5), (8, 8), (14, 14), (16, 16), (1, 17)])
def test_masks_come_back(grid):
    rng = np.random.default_rng(grid[1])
    for mask in (rng.random(grid) < 0.3, np.zeros(grid, bool), np.ones(grid, bool)):
        text = bitgrid.encode(mask)
        np.testing.assert_array_equal(bitgrid.decode(text, grid), mask)
        # As the page's script reads it.
        data = base64.b64decode(text)
        bits = [(data[i >> 3] >> (i & 7)) & 1 for i in range(mask.size)]
        assert bits == mask.ravel().astype(int).tolist()


def test_a_mask_of_another_grid_is_refused():
    with pytest.raises(ValueError, match="8 bits are no mask of 3×3"):
        bitgrid.decode(bitgrid.encode(np.ones((2, 4), bool)), (3, 3))


def test_each_picture_is_on_a_sheet_once(site):
    sheets = Sheets.of(0.6)
    assert sheets.height == 64  # 112 · 0.6 in whole JPEG blocks
    files = sorted(site.glob("sprites/*"))
    assert [file.name for file in files] == ["00000.jpg", "00001.jpg"]
    shown = [np.asarray(Image.open(file), int) for file in files]
    assert [sheet.shape for sheet in shown] == [(8 * 64, 8 * 112, 3), (64, 8 * 112, 3)]
    for i in range(PICTURES):
        row, column = divmod(i % 64, 8)
        assert sheets.corner(i) == (column * 112, row * 64)
        assert sheets.file(i) == f"sprites/{files[i // 64].name}"
        thumbnail = shown[i // 64][row * 64 : row * 64 + 64, column * 112 : column * 112 + 112]
        # Quantising luma and chroma of a plain block costs each less than one grey level, so the
        # colours less than 1 + 1.78 and a rounding; chroma is smoothed over a pixel at the edges.
        assert np.abs(thumbnail[2:-2, 2:-2] - picture(i)[0, 0]).max() <= 4


@pytest.mark.parametrize(
    ("aspect", "height"), [(1.0, 112), (0.5, 64), (1.5, 160), (0.01, 16), (224 / 256, 96)]
)
def test_thumbnails_have_the_pictures_shape_in_whole_blocks(aspect, height):
    assert Sheets.of(aspect).height == height


def test_exemplars_are_shown_with_their_masks_and_places(site, content):
    for block in NEURONS:
        for page in content.pages(block):
            shown = read(site, page.block, page.neuron)
            masks = [a["data-bits"] for a in shown.named("span") if "data-bits" in a]
            pictures = [a for a in shown.named("img") if "object-position" in a.get("style", "")]
            assert len(masks) == len(pictures) == 4
            for exemplar, mask, image in zip(page.exemplars, masks, pictures, strict=True):
                np.testing.assert_array_equal(bitgrid.decode(mask, GRID), exemplar.mask)
                row, column = divmod(exemplar.picture % 64, 8)
                assert image["style"] == f"object-position:-{column * 112}px -{row * 64}px"
                assert image["src"] == f"../../sprites/{exemplar.picture // 64:05d}.jpg"
                assert image["alt"] == f'key<"{exemplar.picture}">'


def test_every_link_leads_somewhere_and_the_neighbours_visit_every_page(site):
    found, todo = set(), [site / "index.html"]
    todo += [site / f"neurons/{block}/{j}.html" for block, of in NEURONS.items() for j in of]
    while todo:
        file = todo.pop()
        if file in found:
            continue
        found.add(file)
        if file.suffix != ".html":
            continue
        for link in Reader(file.read_text(encoding="utf-8")).links:
            path, _, anchor = link.partition("#")
            assert not re.match(r"[a-z]+:|/", path) or path == "data:,", link
            if path in ("", "data:,"):
                continue
            target = (file.parent / path).resolve()
            assert target.is_file(), (file, link)
            if anchor:
                ids = [a.get("id") for _, a in Reader(target.read_text("utf-8")).elements]
                assert ids.count(anchor) == 1, link
            todo.append(target)
    assert {file.relative_to(site) for file in found} == {
        file.relative_to(site)
        for file in site.rglob("*")
        if file.is_file() and not file.name.startswith(".")
    }
    names = list(chain(*([(block, j) for j in of] for block, of in NEURONS.items())))
    for i, name in enumerate(names):
        rel = {a["rel"]: a["href"] for a in read(site, *name).named("a") if "rel" in a}
        near = {"prev": i - 1, "next": i + 1}
        assert rel == {
            side: f"../../neurons/{names[k][0]}/{names[k][1]}.html"
            for side, k in near.items()
            if 0 <= k < len(names)
        }


def test_nothing_is_asked_of_a_network(site):
    for file in site.rglob("*"):
        if file.suffix not in (".html", ".js", ".css"):
            continue
        text = re.sub(r'xmlns(:xlink)?="http://www\.w3\.org/[^"]*"', "", file.read_text("utf-8"))
        assert not re.search(r"https?:|@import|url\(|fetch\(|XMLHttp|import\(|<iframe", text), file
        if file.suffix == ".html":
            assert "default-src 'none'" in text


def test_names_are_text_and_never_markup(site, content):
    every = {"html", "head", "meta", "title", "link", "script", "body", "main", "nav", "span", "a"}
    every |= {"h1", "h2", "h3", "p", "section", "table", "thead", "tbody", "tr", "th", "td", "b"}
    every |= {"fieldset", "legend", "label", "input", "div", "figure", "figcaption", "img", "i"}
    every |= {"sub", "em", "br", "footer"}
    for page in chain(*(content.pages(block) for block in NEURONS)):
        shown = read(site, page.block, page.neuron)
        assert {tag for tag, _ in shown.elements} <= every
        assert [a["src"] for a in shown.named("script")] == ["../../neuron.js"]
        assert "vit <i>demo</i>" in shown.text
        for row in (*page.promoted, *page.averages, *page.iou):
            assert row.name in shown.text
        assert len(shown.named("i")) == len((*page.promoted, *page.averages, *page.iou))
        for word in page.words:
            assert f"{word.word}{word.strength}" in shown.text.replace("\n", "")
        assert "alert(1)" not in "".join(a.get("src", "") for _, a in shown.elements)


def test_a_page_says_every_number(site, content):
    for page in chain(*(content.pages(block) for block in NEURONS)):
        text = read(site, page.block, page.neuron).text
        assert f"Neuron {page.block}:{page.neuron}\n" in text
        assert f"{page.agreeing} of {comb(3, 2)} pairs of words name the same class" in text
        assert "above its 0.99 quantile over the data set, here 1.25 or more" in text
        for rows, digits in ((page.promoted, 3), (page.averages, 3), (page.iou, 4)):
            for row in rows:
                assert f"{row.name}{row.value:.{digits}f}".replace("-", "−") in text
        assert f"{NAMES[page.exemplars[3].picture % 5]} −1.50" in text
        if page.neuron == 1:
            assert f"it detects {NAMES[1]}." in text
            assert "top1, for <i>" in text
            assert f"250 steps: ✓ {NAMES[2]}" in text
            assert f"500 steps: ✗ {NAMES[0]}" in text
        else:
            assert "it detects none." in text
            assert "None was made for this neuron" in text


def test_synthesised_images_are_copied_once(site, content):
    copies = {file.name: file.read_bytes() for file in site.glob("synthesised/*")}
    pages = chain(*(content.pages(block) for block in NEURONS))
    sources = {image.file for page in pages for image in page.synthesised}
    assert sorted(copies.values()) == sorted(file.read_bytes() for file in sources)


def test_the_index_has_a_row_for_every_neuron(site, content):
    found = index(site)
    names, columns = found["names"], found["columns"]
    assert len(set(names)) == len(names)
    pages = list(chain(*(content.pages(block) for block in NEURONS)))
    for i, page in enumerate(pages):
        row = {key: values[i] for key, values in columns.items()}
        labels = [NAMES[e.picture % 5] for e in page.exemplars]
        assert (row["block"], row["neuron"]) == (page.block, page.neuron)
        assert names[row["promoted"]] == page.promoted[0].name
        assert row["product"] == pytest.approx(page.promoted[0].value, rel=5e-4)
        assert names[row["label"]] == page.words[1].word
        assert row["share"] == labels.count(page.words[1].word) / 4
        assert names[row["detected"]] == page.iou[0].name
        assert row["iou"] == page.iou[0].value
        assert names[row["clip"]] == page.words[2].word
        assert row["agreeing"] == page.agreeing
    assert all(len(values) == len(pages) for values in columns.values())


def test_the_overview_has_every_figure_and_its_numbers(site):
    shown = Reader((site / "overview.html").read_text(encoding="utf-8"))
    anchors = [a["id"] for a in shown.named("section")]
    assert anchors == [
        "top-neurons", "within_images", "detectors", "agreement", "definitions", "made"
    ]  # fmt: skip
    assert len(shown.named("svg")) == 4
    assert "vit & co" in shown.text
    text = re.sub(r"\s+", " ", shown.text)
    assert "blockneuronsdetectorssharemedian_iou" in text.replace(" ", "")
    assert "0310.33330.0300" in text.replace(" ", "")  # block 0: 1 of 3 detects, median IoU 0.03


def test_what_was_not_computed_is_said_once_with_its_command(content, tmp_path):
    def bare(block):
        for page in content.pages(block):
            yield replace(
                page,
                words=page.words[:1],
                exemplars=None,
                threshold=None,
                averages=None,
                iou=None,
                synthesised=None,
            )

    empty = replace(
        content,
        missing=MISSING,
        pages=bare,
        pictures=[],
        pixels=lambda: iter(()),
        localisation={},
    )
    written = write_site(empty, tmp_path / "bare")
    assert written.pictures == 0
    shown = read(tmp_path / "bare", 2, 7)
    for sentence in MISSING.values():
        assert sentence.replace("`", "") in shown.text
    assert not shown.named("img")
    assert "pairs of words" not in shown.text
    assert set(index(tmp_path / "bare")["columns"]) == {"block", "neuron", "promoted", "product"}
    overview = Reader((tmp_path / "bare" / "overview.html").read_text("utf-8"))
    assert [a["id"] for a in overview.named("section")] == [
        "top-neurons", "missing", "definitions", "made"
    ]  # fmt: skip


def test_a_site_is_replaced_and_nothing_else_is(content, site, tmp_path):
    out = tmp_path / "site"
    write_site(content, out)
    first = {f.relative_to(out): f.read_bytes() for f in out.rglob("*") if f.is_file()}
    assert first == {f.relative_to(site): f.read_bytes() for f in site.rglob("*") if f.is_file()}
    write_site(replace(content, neurons={2: NEURONS[2]}), out)
    assert sorted(f.stem for f in out.rglob("neurons/*/*.html")) == ["1", "7"]

    def stops(block):
        yield from list(content.pages(block))[:1]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_site(replace(content, pages=stops), out)
    assert sorted(f.stem for f in out.rglob("neurons/*/*.html")) == ["1", "7"]
    write_site(content, out)
    assert {f.relative_to(out): f.read_bytes() for f in out.rglob("*") if f.is_file()} == first
    assert [f.name for f in tmp_path.iterdir()] == ["site"]

    other = tmp_path / "photos"
    other.mkdir()
    (other / "mine.jpg").touch()
    with pytest.raises(UsageError, match="no site of neurons"):
        write_site(content, other)
    assert (other / "mine.jpg").exists()


@pytest.mark.parametrize(
    ("values", "lengths"),
    [([2.0, 1.0, -4.0], [50, 25, 100]), ([0.0, 0.0], [0, 0]), ([], []), ([0.3], [100])],
)
def test_bars_are_shares_of_the_largest(values, lengths):
    assert bar_lengths(values) == lengths
