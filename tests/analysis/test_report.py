"""The report and the analyze command: complete, self-contained, right numbers, aligned pictures."""

import base64
import io
import json
import re
import tarfile
from html.parser import HTMLParser

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner
from PIL import Image
from synthetic_store import make_layout, write_store

from classlens.analysis.commands_analyze import analyze
from classlens.analysis.commands_report import report
from classlens.analysis.composition import analyze_composition
from classlens.analysis.identifiability import analyze_identifiability
from classlens.analysis.interventions import analyze_interventions
from classlens.analysis.memories import analyze_memories
from classlens.analysis.report import write_report
from classlens.analysis.report.pictures import choose_images, make_pictures
from classlens.analysis.scan import scan, scan_images
from classlens.analysis.sublayers import analyze_sublayers
from classlens.extractor.errors import UsageError
from classlens.extractor.geometry import Geometry
from classlens.extractor.schema import Status

UNITS = [12, 9]
SIZE = 24
GRID = (3, 4)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("a") / "store", seed=0)


@pytest.fixture(scope="module")
def control(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("b") / "control", seed=1)


@pytest.fixture(scope="module")
def page(store, control, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "new" / "report.html"
    return write_report([store.path], out, control.path, n_images=5, permutations=20).read_text()


def make_store(path, seed, *, shards=True, **layout):
    """A synthetic store with the attributes of a real one and, if wanted, shards it points to."""
    layout = make_layout(images_per_unit=UNITS, grid=GRID, classes=6, **layout)
    shape = (layout.images, layout.blocks, len(layout.streams), layout.tokens)
    logit = np.random.default_rng(seed).normal(size=shape).astype(np.float16)
    content = {"scores/label_logit": logit}
    bad = {3: Status.UNDECODABLE}
    store = write_store(path, layout, UNITS, bad=bad, seed=seed, content=content)
    group = json.loads((path / "zarr.json").read_text())
    group["attributes"]["classlens"] |= {
        "config": {
            "model": "vit_toy",
            "model_args": {"depth": 3},
            "weights": "/home/someone/toy.safetensors",
            "geometry": "squash",
            "dtype": "float32",
            "convention": "corrected",
        },
        "geometry": Geometry.squash((18, 24)).to_json(),
        "fingerprint": {"weights_sha256": "0123456789abcdef" * 4},
        "versions": dict.fromkeys(("classlens", "torch", "timm", "python"), "1.2.3"),
    }
    (path / "zarr.json").write_text(json.dumps(group))
    if shards:
        write_shards(path)
    names = [f"<b>class</b> {c}" for c in range(6)]
    pl.DataFrame(
        {"class": range(6), "name": names}, schema={"class": pl.Int32, "name": pl.String}
    ).write_parquet(path / "classes.parquet")
    return store


def write_shards(path):
    """One tar a unit with a picture for each image; the manifest learns where they are."""
    manifest = pl.read_parquet(path / "manifest.parquet")
    units = pl.read_parquet(path / "units.parquet")
    offsets, sizes, tars = [], [], []
    for (unit,), rows in manifest.group_by("unit", maintain_order=True):
        tars.append(str(path.parent / f"{path.name}-{unit}.tar"))
        with tarfile.open(tars[-1], "w") as tar:
            for image, key in rows.select("image", "key").iter_rows():
                data = io.BytesIO()
                Image.fromarray(picture(image)).save(data, "PNG")
                member = tarfile.TarInfo(f"{key}.png")
                member.size = len(data.getvalue())
                offsets.append(tar.offset + tarfile.BLOCKSIZE)
                sizes.append(member.size)
                tar.addfile(member, io.BytesIO(data.getvalue()))
    manifest.with_columns(
        offset=pl.Series(offsets, dtype=pl.Int64), size=pl.Series(sizes, dtype=pl.Int64)
    ).write_parquet(path / "manifest.parquet")
    units.with_columns(shard=pl.Series(tars)).write_parquet(path / "units.parquet")


def picture(image):
    """A picture of one grey, which differs from image to image."""
    return np.full((SIZE, SIZE, 3), 10 * image, dtype=np.uint8)


class Resources(HTMLParser):
    """Collects what a page would fetch, and whether its elements are closed."""

    def __init__(self):
        super().__init__()
        self.wanted, self.open, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        void = {"meta", "input", "link", "img", "br", "hr"}
        if tag not in void:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data", "action") and tag != "a":
                self.wanted.append(value)
            self.wanted += re.findall(r"url\(([^)]*)\)", value or "")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_data(self, data):
        self.text.append(data)


def parsed(page):
    reader = Resources()
    reader.feed(page)
    assert reader.open == []
    return reader


def test_nothing_is_fetched(page):
    reader = parsed(page)
    assert reader.wanted
    assert all(value.startswith("data:image/") for value in reader.wanted)
    namespaces = re.sub(r'xmlns(:xlink)?="http://www\.w3\.org/[^"]*"', "", page)
    assert not re.search(r"https?://|//[a-z]+\.|@import|<link|<iframe", namespaces)
    assert "default-src 'none'" in page


def test_every_section_is_there(page):
    headings = re.findall(r"<h[123]>([^<]*)</h[123]>", page)
    assert headings == [
        "Class identifiability",
        "What was scored",
        "Identifiability rates",
        "store",
        "Evolution over the blocks",
        "Block change rate",
        "Class against context tokens",
        "How attention and MLP write the class",
        "Pictures",
    ]
    assert len(re.findall(r"<figcaption><b>|<figcaption>\n?<b>", page)) == 8
    assert page.count('<svg role="img" aria-label="') == 8
    assert page.count('<figure class="picture"') == 5


def test_head_says_what_was_scored_without_private_paths(page):
    text = " ".join(parsed(page).text)
    for fact in ("vit_toy depth=3", "toy.safetensors", "squash: 18×24", "1 undecodable"):
        assert fact in text
    assert "/home/someone" not in page


def test_names_from_data_are_escaped(page):
    assert "<b>class</b>" not in page
    assert "&lt;b&gt;class&lt;/b&gt;" in page


def test_numbers_are_those_of_the_analysis(store, control, page):
    result = analyze_identifiability(store.path, control.path, permutations=20)
    text = re.sub(r"\s+", " ", " ".join(parsed(page).text))
    for row in result.rate.iter_rows(named=True):
        assert f"{row['rate']:.2f} [{row['rate_low']:.2f}, {row['rate_high']:.2f}]" in text
    for row in result.context.iter_rows(named=True):
        assert f"{row['delta']:.4f}".replace("-", "−") in text
        assert f"{row['q_value']:.4f}" in text
    assert "n = 20 images" in text.replace("\xa0", " ")


def shown_numbers(page):
    """Rows of the tables behind the figures on sublayers, by caption."""
    tables = {}
    for caption, body in re.findall(
        r"<caption>([^<]*)</caption>\n<thead>.*?<tbody>(.*?)</tbody>", page, re.S
    ):
        rows = re.findall(r"<tr>(.*?)</tr>", body, re.S)
        cells = [re.findall(r">([^<>]*)</t[hd]>", row) for row in rows]
        tables[caption] = [[cell.replace("−", "-") for cell in row] for row in cells]
    return tables


def test_numbers_behind_the_figures_on_sublayers(store, page):
    shown = shown_numbers(page)
    result = analyze_sublayers(store.path, permutations=20)
    published = analyze_sublayers(store.path, convention="vilas2023").change_rate
    rates = pl.concat([result.change_rate, published.filter(pl.col("sublayer") == "mlp")])
    for row, block in zip(shown["Class-similarity change rate"], (1, 2), strict=True):
        of_block = rates.filter(pl.col("block") == block)["change_rate"]
        assert row == [str(block), *(f"{value:.3f}" for value in of_block)]
    for row, block in zip(shown["Class − context, logit change"], (1, 2), strict=True):
        of_block = result.context.filter(pl.col("block") == block)
        assert row == [
            str(block),
            *(f"{v:.3f}" for v in of_block.select("delta", "q_value").row(0)),
        ]
    correct = result.correct_minus_wrong
    for row in shown["CLS, correct − wrong images, Δ r"]:
        of_block = correct.filter(pl.col("block") == int(row[0]))
        pairs = of_block.select("delta", "q_value").rows()
        assert row[1:] == [f"{value:.3f}" for pair in pairs for value in pair]
    for row in shown["Residual composition, % of all tokens, each once"]:
        assert sum(map(float, row[1:])) == pytest.approx(100, abs=0.003)


def test_what_a_store_lacks_is_said_and_the_rest_is_shown(tmp_path):
    only_attn = make_store(tmp_path / "a", seed=2, streams=("resid", "attn"), prefix_kinds=())
    page = write_report([only_attn.path], tmp_path / "a.html", n_images=0, permutations=5)
    text = page.read_text()
    assert "extract a store with <code>--streams resid,mid,attn,mlp</code>" in text
    assert "<code>--streams</code> that include mlp" in text
    for figure, is_shown in {
        "sublayer-rate": True,
        "sublayer-context": True,
        "composition": False,
        "correct-wrong": False,
    }.items():
        assert (f'id="store-1-{figure}"' in text) == is_shown


def decoded(uri):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1]))))


def test_pictures_show_the_image_its_tokens_and_its_mask(store):
    pictures = make_pictures(store.path, 5)
    rows = scan_images(store.path).collect()
    lazy = scan(store.path).filter(pl.col("kind") == "patch")
    for shown in pictures:
        row = rows.row(by_predicate=pl.col("key") == shown.key, named=True)
        assert shown.right == (row["label"] == row["prediction"])
        photo = decoded(shown.photo)
        assert photo.shape == (18, 24, 3)
        assert abs(int(photo[5, 5, 0]) - 10 * row["image"]) <= 2  # JPEG
        tokens = lazy.filter(pl.col("image") == row["image"]).sort("block", "token").collect()
        for stream in store.layout.streams:
            of_stream = tokens.filter(pl.col("stream") == stream)
            heat = decoded(shown.heat[stream])
            assert heat.shape == (GRID[0], GRID[1] * store.layout.blocks, 3)
            for token in of_stream.iter_rows(named=True):
                pixel = heat[token["row"], token["block"] * GRID[1] + token["col"]].astype(int)
                redder = pixel[0] > pixel[2]
                if token["identifiability"] != 0.5:
                    assert redder == (token["identifiability"] > 0.5)
                dot = f"M{token['col']}.5 {token['row']}.5h0"
                assert (dot in shown.identified[stream][token["block"]]) == (token["rank"] == 0)
        resid = tokens.filter(pl.col("stream") == "resid")
        shares = resid.group_by("block").agg(share=100 * (pl.col("rank") == 0).mean())
        assert shown.shares == pytest.approx(shares.sort("block")["share"].to_list())
        inside = resid.filter(pl.col("block") == 0)["mask_fraction"].to_numpy().reshape(GRID) >= 0.5
        assert shown.outline == plain_outline(inside)


def plain_outline(inside):
    """Upright borders row by row, then level ones, by looking at both neighbours of each edge."""
    rows, columns = inside.shape

    def at(y, x):
        return 0 <= y < rows and 0 <= x < columns and bool(inside[y, x])

    upright = [
        f"M{x} {y}v1" for y in range(rows) for x in range(columns + 1) if at(y, x) != at(y, x - 1)
    ]
    level = [
        f"M{x} {y}h1" for y in range(rows + 1) for x in range(columns) if at(y, x) != at(y - 1, x)
    ]
    return "".join(upright + level)


def test_chosen_images_are_spread_over_classes_and_predictions():
    images = pl.DataFrame(
        {
            "image": range(100),
            "label": [i % 10 for i in range(100)],
            "prediction": [i % 10 if i % 4 else 99 for i in range(100)],
        }
    )
    chosen = choose_images(images, 12)
    assert chosen == choose_images(images.sample(fraction=1, shuffle=True, seed=3), 12)
    rows = images[chosen]
    right = rows.filter(pl.col("label") == pl.col("prediction"))
    assert (right.height, rows.height) == (8, 12)
    assert right["label"].n_unique() == 8
    only_wrong = images.filter(pl.col("prediction") == 99)
    assert len(set(choose_images(only_wrong, 12))) == 12
    assert choose_images(images[:3], 12) == [1, 2, 0]


def test_the_report_is_the_same_every_time(store, page, control, tmp_path):
    again = write_report(
        [store.path], tmp_path / "r.html", control.path, n_images=5, permutations=20
    )
    assert again.read_text() == page


def test_lost_shards_are_told_and_the_rest_stays(tmp_path):
    few = {"masks": False, "prefix_kinds": (), "blocks": 1}
    lost = make_store(tmp_path / "lost", seed=0, shards=False, **few)
    out = write_report([lost.path], tmp_path / "report.html", permutations=5)
    page = out.read_text()
    assert "The pictures cannot be shown" in page
    assert "/data/" in page
    assert '<figure class="picture"' not in page
    assert "has no segmentation masks" in page
    assert "No control was given" in page
    assert "A model of one block" in page
    parsed(page)


def test_several_stores_stand_side_by_side(store, control, tmp_path):
    out = write_report([store.path, control.path], tmp_path / "r.html", n_images=0, permutations=5)
    page = out.read_text()
    assert re.findall(r"<h2>([^<]*)</h2>", page)[2:] == ["store", "control"]
    assert "<h3>Pictures</h3>" not in page
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    with pytest.raises(UsageError, match="No stores"):
        write_report([], tmp_path / "none.html")


def test_interventions_have_a_section(store, tmp_path):
    knockout = make_store(tmp_path / "knockout", seed=2, shards=False)
    group = json.loads((knockout.path / "zarr.json").read_text())
    group["attributes"]["classlens"]["config"] |= {"intervene": "no-cls", "intervene_blocks": None}
    (knockout.path / "zarr.json").write_text(json.dumps(group))
    arguments = [str(store.path), "--perturbed", str(knockout.path), "--images", "0"]
    arguments += ["--permutations", "5", "--out", str(tmp_path / "r.html")]
    run = CliRunner().invoke(report, arguments, catch_exceptions=False)
    assert run.exit_code == 0
    page = (tmp_path / "r.html").read_text()
    text = re.sub(r"\s+", " ", " ".join(parsed(page).text))
    assert "no-cls in all blocks" in text
    assert "knockout: 20 images, 240 image tokens" in text
    result = analyze_interventions(store.path, [knockout.path])
    for row in result.rates.iter_rows(named=True):
        numbers = f"{row['value']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
        assert numbers.replace("-", "−") in text
    assert page.count('id="figure-interventions') == 2
    with pytest.raises(UsageError, match="report on one store"):
        write_report(
            [store.path, store.path], tmp_path / "none.html", perturbed=[knockout.path], n_images=0
        )


def test_report_command(store, control, tmp_path):
    out = tmp_path / "r.html"
    arguments = [str(store.path), "--control", str(control.path), "--out", str(out)]
    result = CliRunner().invoke(report, [*arguments, "--images", "2", "--permutations", "5"])
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(out)
    assert out.read_text().count('<figure class="picture"') == 2


def test_analyze_command_prints_tables_with_chance_and_sample_sizes(store, control):
    arguments = ["identifiability", str(store.path), "--control", str(control.path)]
    result = CliRunner().invoke(analyze, [*arguments, "--convention", "both"])
    assert result.exit_code == 0, result.output
    for words in (
        "20 images, 1 not scored (corrected)",
        "(vilas2023)",
        "chance",
        "Block change rate",
        "Class-labelled against context tokens",
    ):
        assert words in result.stdout


def test_analyze_command_prints_json(store):
    arguments = [
        "identifiability",
        str(store.path),
        "--json",
        "--permutations",
        "30",
        "--seed",
        "3",
    ]
    result = CliRunner().invoke(analyze, arguments)
    printed = json.loads(result.stdout)
    expected = analyze_identifiability(store.path, permutations=30, seed=3)
    assert printed == {"corrected": json.loads(json.dumps(expected.to_json()))}


def test_memories_have_figures_and_numbers(tmp_path):
    store = make_store(tmp_path / "store", 0, reducers=("memories",))
    out = write_report([store.path], tmp_path / "r.html", n_images=0, permutations=9)
    text = out.read_text()
    assert "Key-value agreement rate" in text
    assert "Memory compositionality" in text
    row = analyze_memories(store.path).agreement.row(-1, named=True)
    assert (row["sublayer"], row["block"]) == ("mlp", 2)
    assert f"<td>{row['agreement']:.1f}</td><td>{row['control']:.1f}</td>" in text


def test_a_store_without_memories_says_nothing_of_them(page):
    assert "Key-value memories" not in page
    assert "Value vectors" not in page


def test_value_vectors_have_a_figure(store, tmp_path):
    rows = [
        {"source": source, "sublayer": s, "block": b, "cosine": 0.2, "low": 0.1, "high": 0.3}
        for source in ("model", "control")
        for s in ("attn", "mlp")
        for b in range(3)
    ]
    values, out = tmp_path / "values.json", tmp_path / "report.html"
    values.write_text(json.dumps({"agreement": rows}))
    options = ["--values", str(values), "--out", str(out), "--permutations", "5", "--images", "0"]
    shown = CliRunner().invoke(report, [str(store.path), *options])
    assert shown.exit_code == 0, shown.output
    page = out.read_text()
    assert "Class-value agreement" in page
    assert "mean over classes of max cos(E, v)" in page
    parsed(page)
    two = [str(store.path), str(store.path), *options]
    refused = CliRunner().invoke(report, two)
    assert "--values belongs to one model" in str(refused.exception)
    values.write_text("{}")
    refused = CliRunner().invoke(report, [str(store.path), *options])
    assert "no result of `classlens analyze values` (KeyError)" in str(refused.exception)


@pytest.mark.parametrize(
    ("command", "words"),
    {
        "sublayers": [
            "change rate of attn (corrected)",
            "20 images, 1 not scored",
            "the stream mid, which the store lacks",
            "change rate of mlp (vilas2023)",
            "change by attn (corrected)",
            "correct minus wrong images, resid",
            "300 shuffles",
        ],
        "composition": [
            "top class of all tokens, overlapping (vilas2023)",
            "top class of CLS, exclusive (corrected)",
            "20 images, 1 not scored",
            "a row sums to 100",
        ],
    }.items(),
)
def test_commands_of_paper_4_3_print_tables(store, command, words):
    result = CliRunner().invoke(analyze, [command, str(store.path), "--convention", "both"])
    assert result.exit_code == 0, result.output
    text = " ".join(result.stdout.split())
    assert [w for w in words if w not in text] == []


@pytest.mark.parametrize(
    ("command", "expected"),
    [("sublayers", analyze_sublayers), ("composition", analyze_composition)],
)
def test_commands_of_paper_4_3_print_json(store, command, expected):
    result = CliRunner().invoke(analyze, [command, str(store.path), "--json", "--seed", "3"])
    assert result.exit_code == 0, result.output
    corrected = json.loads(json.dumps(expected(store.path, seed=3).to_json()))
    assert json.loads(result.stdout) == {"corrected": corrected}


def test_composition_of_a_store_without_the_mlp_is_refused(tmp_path):
    store = make_store(tmp_path / "a", seed=2, streams=("resid", "attn"), shards=False)
    result = CliRunner().invoke(analyze, ["composition", str(store.path)])
    assert isinstance(result.exception, UsageError)
