"""The site's content from a real store, against activations taken by hooks and kept whole."""

import json
import re
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
import zarr
from click.testing import CliRunner
from PIL import Image
from samples import sample, write_tar

from classlens.analysis.commands_neurons import neurons
from classlens.analysis.neurons.exemplars import EXEMPLAR_QUANTILE, thresholds
from classlens.analysis.neurons.localisation import localisation
from classlens.analysis.neurons.site.gather import gather
from classlens.analysis.neurons.site.sources import MISSING, Sources
from classlens.analysis.neurons.synthesis.folder import RESULTS_FILE, SCHEMA
from classlens.analysis.report.pictures import read_pixels
from classlens.analysis.scan import scan_images
from classlens.extractor.config import ExtractConfig
from classlens.extractor.dissect import dissect
from classlens.extractor.models import load_subject
from classlens.extractor.prepare import prepare, prepare_again
from classlens.extractor.run import extract
from classlens.extractor.schema import read_attributes

SETTINGS = ExtractConfig(
    model="vit_tiny_patch16_224",
    model_args={
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 48,
        "depth": 3,
        "num_heads": 3,
        "num_classes": 10,
        "reg_tokens": 4,
    },
    weights="random:3",
    batch_size=4,
)
IMAGES = 22
QUANTILE = 0.9


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with shards, and everything that the site is made of."""
    path = tmp_path_factory.mktemp("neurons")
    (path / "shards").mkdir()
    for i, part in enumerate((range(13), range(13, IMAGES))):
        write_tar(path / "shards" / f"{i}.tar", [sample(n) for n in part])
    shards = [str(path / "shards")]
    extract(prepare(replace(SETTINGS, reduce=("neurons",)), shards), path / "store")
    extract(prepare(SETTINGS, shards), path / "plain")
    _, values = thresholds(path / "store", QUANTILE)
    dissect(prepare_again(path / "store"), path / "store", values, QUANTILE, path / "dissection")
    write_synthesis(path / "images")
    rng = np.random.default_rng(0)
    clip = pl.DataFrame(
        {
            "block": [1, 1],
            "neuron": [0, 5],
            "promoted_word": ["a", "b"],
            "clip_word": ["a <cat>", None],
            "clip_class": [3, None],
            "clip_score": [0.25, None],
        },
        schema_overrides={"block": pl.Int16, "neuron": pl.Int32, "clip_class": pl.Int32},
    )
    clip.write_parquet(path / "words.parquet")
    clip.select("block", "neuron", "promoted_word").write_parquet(path / "without-clip.parquet")
    found = localisation(rng.random((9, 3)) + 0.3, rng.random((9, 3)), over="images")
    (path / "localise.json").write_text(json.dumps({"seed": 0, "within_images": found.to_json()}))
    return path


def write_synthesis(path):
    path.mkdir()
    rows = []
    for steps, predicted in ((250, "4"), (500, "2")):
        Image.new("RGB", (8, 8), (steps % 256, 0, 0)).save(path / f"{steps}.png")
        row = dict.fromkeys(SCHEMA, 0) | {"variant": "topk", "target": "c", "name": "4"}
        row |= {"keys": "1:3 2:0", "predicted_name": predicted, "file": f"{steps}.png"}
        rows.append(row | {"steps": steps})
    pl.DataFrame(rows, schema=SCHEMA).write_parquet(path / RESULTS_FILE)


@pytest.fixture(scope="module")
def content(folder):
    sources = Sources(
        folder / "store",
        folder / "dissection",
        folder / "words.parquet",
        folder / "images",
        folder / "localise.json",
    )
    return gather(sources)


@pytest.fixture(scope="module")
def truth(folder):
    """key_mlp [N, L, G, F] by hooks on fc1, masks [N, G] in 1/255 of a patch, rows, the model."""
    store = folder / "store"
    attributes = read_attributes(store)
    subject = load_subject(ExtractConfig.from_json(attributes["config"]))
    rows = scan_images(store).collect()
    model, geometry = subject.model.eval(), subject.geometry
    kept = []
    for block in model.blocks:
        block.mlp.fc1.register_forward_hook(lambda _, __, output: kept.append(output))
    found = []
    for row in rows.to_dicts():
        pixels = read_pixels(attributes["geometry"], row).astype(np.float32) / 255
        normal = (pixels - np.array(geometry.mean)) / np.array(geometry.std)
        kept.clear()
        with torch.inference_mode():
            model(torch.from_numpy(normal.astype(np.float32)).permute(2, 0, 1)[None])
        found.append(torch.cat(kept)[:, len(subject.prefix_kinds) :].numpy())
    return np.stack(found), rows, subject


def pages_of(content):
    return [page for block in content.neurons for page in content.pages(block)]


def test_every_neuron_of_every_block_has_a_page(content, truth):
    _, blocks, _, width = truth[0].shape
    names = [(page.block, page.neuron) for page in pages_of(content)]
    assert names == [(b, j) for b in range(blocks) for j in range(width)]
    assert content.missing == {}
    assert content.grid == (4, 4)
    assert content.aspect == 1


def test_promoted_classes_are_those_of_the_weights(content, truth):
    model = truth[2].model
    with torch.no_grad():
        head = model.head.weight.double()
        for page in pages_of(content):
            value = model.blocks[page.block].mlp.fc2.weight.double()[:, page.neuron]
            product = (head @ value).numpy()
            best = sorted(range(10), key=lambda c: (-product[c], c))[:8]
            assert [row.name for row in page.promoted] == [str(c) for c in best]
            np.testing.assert_allclose([row.value for row in page.promoted], product[best], 1e-12)
            assert page.words[0].word == str(best[0])


def test_exemplars_are_the_images_of_the_largest_activations(content, truth, folder):
    x_NLGF, rows, _ = truth
    labels = rows["label"].to_list()
    _, values_LF = thresholds(folder / "store", EXEMPLAR_QUANTILE)
    assert [p.image for p in content.pictures] == sorted(
        rows["image"].to_list(), key=lambda i: (labels[rows["image"].to_list().index(i)], i)
    )
    for page in pages_of(content):
        of_neuron = x_NLGF[:, page.block, :, page.neuron]
        order = np.argsort(-of_neuron.max(axis=1), kind="stable")[:15]
        shown = [content.pictures[e.picture] for e in page.exemplars]
        # Batches of another size round otherwise, so that near ties may change places.
        np.testing.assert_allclose(
            [e.value for e in page.exemplars], of_neuron.max(axis=1)[order], rtol=0, atol=2e-5
        )
        threshold = values_LF[page.block, page.neuron]
        assert page.threshold == threshold
        for exemplar, picture in zip(page.exemplars, shown, strict=True):
            n = rows["image"].to_list().index(picture.image)
            assert picture.key == rows["key"][n]
            assert picture.label == str(labels[n])
            clear = np.abs(of_neuron[n] - threshold) > 2e-5
            above = of_neuron[n] >= threshold
            np.testing.assert_array_equal(exemplar.mask.ravel()[clear], above[clear])
        most = [picture.label for picture in shown]
        assert most.count(page.words[1].word) == max(map(most.count, most))
        assert page.words[1].strength.startswith(f"{most.count(page.words[1].word)} of 15")


def test_pictures_are_the_models_input_in_the_order_of_their_numbers(content, truth, folder):
    rows = truth[1]
    geometry = read_attributes(folder / "store")["geometry"]
    for picture, pixels in zip(content.pictures, content.pixels(), strict=True):
        row = rows.row(by_predicate=pl.col("image") == picture.image, named=True)
        np.testing.assert_array_equal(pixels, read_pixels(geometry, row))


def test_class_averages_are_means_over_patches_then_images(content, truth):
    x_NLGF, rows, _ = truth
    label_N = rows["label"].to_numpy()
    for page in pages_of(content):
        mean_N = x_NLGF[:, page.block, :, page.neuron].astype(np.float64).mean(axis=1)
        averages = {str(c): mean_N[label_N == c].mean() for c in set(label_N.tolist())}
        assert len(page.averages) == 8
        for row, value in zip(page.averages, sorted(averages.values(), reverse=True), strict=False):
            # Sums are kept in steps of 2^-16; the model's batches round otherwise.
            assert abs(row.value - averages[row.name]) < 2**-17 + 2e-5
            assert abs(row.value - value) < 2**-17 + 2e-5


def test_overlaps_are_those_of_all_pixels(content, truth, folder):
    x_NLGF, rows, _ = truth
    label_N = rows["label"].to_numpy()
    area_NG = np.asarray(zarr.open_array(str(folder / "store/images/mask_fraction"), mode="r"))
    area_NG = area_NG[rows["image"].to_numpy()].astype(int)
    _, values_LF = thresholds(folder / "store", QUANTILE)
    assert content.iou_quantile == QUANTILE
    checked = 0
    for page in pages_of(content):
        of_neuron = x_NLGF[:, page.block, :, page.neuron]
        threshold = values_LF[page.block, page.neuron]
        if np.abs(of_neuron - threshold).min() < 2e-5:
            continue  # which side it is on depends on rounding
        checked += 1
        above_NG = of_neuron >= threshold
        expected = {}
        for c in set(label_N.tolist()):
            shown_NG = area_NG * (label_N == c)[:, None]
            both = (above_NG * shown_NG).sum()
            expected[str(c)] = both / (255 * above_NG.sum() + shown_NG.sum() - both)
        assert [row.value for row in page.iou] == sorted(expected.values(), reverse=True)[:8]
        assert all(row.value == expected[row.name] for row in page.iou)
    assert checked > 500


def test_words_by_clip_and_synthesised_images_reach_their_neurons(content, folder):
    pages = {(page.block, page.neuron): page for page in pages_of(content)}
    assert pages[1, 0].words[2].word == "a <cat>"
    assert pages[1, 0].words[2].strength == "score 0.250"
    others = [page for name, page in pages.items() if name != (1, 0)]
    assert all([word.kind for word in p.words] == ["promoted", "exemplar"] for p in others)
    for page in pages.values():
        classes = [word.word for word in page.words[:2]]
        classes += ["3"] if (page.block, page.neuron) == (1, 0) else []
        pairs = [(a, b) for i, a in enumerate(classes) for b in classes[i + 1 :]]
        assert page.agreeing == sum(a == b for a, b in pairs)
    for name, page in pages.items():
        if name in ((1, 3), (2, 0)):
            assert [(s.steps, s.predicted, s.target) for s in page.synthesised] == [
                (250, "4", "4"),
                (500, "2", "4"),
            ]
            assert [s.file for s in page.synthesised] == [
                folder / "images/250.png",
                folder / "images/500.png",
            ]
        else:
            assert page.synthesised == ()
    assert content.localisation["within_images"].n == 9


def test_a_plain_store_has_pages_of_the_weights_alone(folder):
    content = gather(Sources(folder / "plain", words=folder / "without-clip.parquet"))
    assert content.missing == MISSING
    assert not content.pictures
    page = next(content.pages(0))
    assert [word.kind for word in page.words] == ["promoted"]
    assert (page.exemplars, page.averages, page.iou, page.synthesised) == (None,) * 4


def run(*arguments):
    return CliRunner().invoke(neurons, ["pages", *map(str, arguments)])


def test_the_command_writes_the_chosen_neurons(folder, tmp_path):
    out = tmp_path / "site"
    chosen = ("--neuron", "2:9", "--neuron", "0:3", "--neuron", "2:1", "--blocks", "1-2")
    result = run(folder / "store", "--dissection", folder / "dissection", *chosen, "--out", out)
    assert result.exit_code == 0, result.output
    assert re.search(r"2 pages, \d+ pictures, \d+ files, \d+\.\d MB in \d+ s", result.output)
    assert MISSING["synthesised"] in result.output
    assert MISSING["iou"] not in result.output
    pages = sorted(str(file.relative_to(out)) for file in out.rglob("neurons/*/*.html"))
    assert pages == ["neurons/2/1.html", "neurons/2/9.html"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--neuron", "3:0"), "no block 3"),
        (("--neuron", "0:0", "--blocks", "1"), "No --neuron lies in --blocks"),
        (("--dissection", "{}/plain"), "accumulates no dissection"),
        (("--words", "{}/localise.json"), "holds no words of neurons"),
        (("--localisation", "{}/words.parquet"), "is no result of localisation"),
        (("--synthesis", "{}/plain"), "cannot be read"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_remedy(folder, tmp_path, arguments, says):
    given = [argument.format(folder) for argument in arguments]
    result = run(folder / "store", *given, "--out", tmp_path / "site")
    assert result.exit_code != 0
    assert says in str(result.exception)
    assert not (tmp_path / "site").exists()
