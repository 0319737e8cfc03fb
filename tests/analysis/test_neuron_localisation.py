"""Localisation against loops over images, blocks and patches; planted neurons; the command."""

import io
import json
import tarfile

import numpy as np
import polars as pl
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from samples import sample, write_tar

from classlens.analysis.neurons.alignment import TopNeurons, top_neurons
from classlens.analysis.neurons.localisation import (
    dissected,
    iou,
    localisation,
    other_neurons,
    overlaps,
)
from classlens.cli import cli
from classlens.extractor.config import ExtractConfig
from classlens.extractor.errors import UsageError
from classlens.extractor.prepare import prepare
from classlens.extractor.run import extract
from classlens.extractor.scorer import Scorer

ARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
CONFIG = ExtractConfig(
    model="vit_tiny_patch16_224",
    model_args={**ARGS, "num_classes": 10},
    weights="random:3",
    batch_size=4,
)
IMAGES, NEURONS = 7, 192


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Image 4 has no pixel of its class."""
    folder = tmp_path_factory.mktemp("localise")
    samples = [sample(i) for i in range(IMAGES)]
    empty = io.BytesIO()
    Image.new("RGB", (48, 40)).save(empty, "PNG")
    samples[4].members["mask.png"] = empty.getvalue()
    return [write_tar(folder / "a.tar", samples[:4]), write_tar(folder / "b.tar", samples[4:])]


@pytest.fixture(scope="module")
def store(shards, tmp_path_factory):
    path = tmp_path_factory.mktemp("localise-store") / "store"
    extract(prepare(CONFIG, [str(s) for s in shards]), path)
    return path


def prepared_and_scorer(shards):
    prepared = prepare(CONFIG, [str(s) for s in shards])
    scorer = Scorer(prepared.subject, [], dtype=torch.float32, device="cpu", convention="corrected")
    return prepared, scorer


def naive_keys(model, geometry, jpeg):
    """fc1's output at the patches of one picture, from timm's own forward pass: [L] of [G, F]."""
    kept = []
    handles = [
        block.mlp.fc1.register_forward_hook(lambda module, inputs, output: kept.append(output[0]))
        for block in model.blocks
    ]
    pixels = np.asarray(geometry.crop(Image.open(io.BytesIO(jpeg)).convert("RGB")))
    image = (torch.tensor(pixels) / 255 - torch.tensor(geometry.mean)) / torch.tensor(geometry.std)
    with torch.inference_mode():
        model(image.permute(2, 0, 1)[None])
    for handle in handles:
        handle.remove()
    return [tokens[1:].numpy() for tokens in kept]


def naive_class(geometry, png, mask_id):
    """The patches of which the class has half or more, after the picture's resize and crop."""
    rgb = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
    here = Image.fromarray(((rgb[..., 0] + 256 * rgb[..., 1]) == mask_id).astype(np.uint8) * 255)
    return geometry.mask_coverage(here, (4, 4)) >= 127.5


def naive_above(values):
    in_order = sorted(values)
    place = (len(values) - 1) * 0.8
    low = int(place)
    return [v > in_order[low] + (place - low) * (in_order[low + 1] - in_order[low]) for v in values]


def naive_iou(first, second):
    both = sum(a and b for a, b in zip(first, second, strict=True))
    return both / sum(a or b for a, b in zip(first, second, strict=True))


def members_of(shards):
    for path in shards:
        with tarfile.open(path) as tar:
            found = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}
        for key in sorted({name.split(".")[0] for name in found}):
            yield {name.partition(".")[2]: data for name, data in found.items()
                   if name.startswith(key)}  # fmt: skip


def test_overlaps_equal_loops(shards):
    prepared, scorer = prepared_and_scorer(shards)
    tops = top_neurons(prepared.subject, 2)
    wanted = [0, 1, 2, 3, 4, 6]
    manifest = prepared.plan.manifest
    places = manifest["image"].to_list()
    found = overlaps(prepared, scorer, tops, [places[i] for i in wanted], seed=5)
    assert found.n_without == 1
    assert found.images.tolist() == [places[i] for i in wanted if i != 4]
    model, geometry = prepared.subject.model, prepared.subject.geometry
    row = 0
    for i, members in enumerate(members_of(shards)):
        if i not in wanted or i == 4:
            continue
        label = int(members["cls"])
        here = naive_class(geometry, members["mask.png"], json.loads(members["json"])["mask_id"])
        assert here.any()
        keys = naive_keys(model, geometry, members["jpg"])
        others = other_neurons(tops.neurons[:, label, 0], NEURONS, [5, places[i]])
        for b in range(3):
            top = tops.neurons[b, label, 0]
            assert found.top[row, b] == naive_iou(naive_above(keys[b][:, top]), here)
            assert found.random[row, b] == naive_iou(naive_above(keys[b][:, others[b]]), here)
        row += 1
    assert row == len(found.images)


def test_random_neurons_depend_on_seed_and_image_and_are_never_the_top_one():
    top_L = np.array([0, 3, 1])
    drawn = np.array([other_neurons(top_L, 4, [0, n]) for n in range(900)])
    np.testing.assert_array_equal(drawn[7], other_neurons(top_L, 4, [0, 7]))
    assert (drawn != [other_neurons(top_L, 4, [1, n]) for n in range(900)]).any()
    for b in range(3):
        times = np.bincount(drawn[:, b], minlength=4)
        assert times[top_L[b]] == 0
        # 300 each; six standard deviations of a binomial with n = 900, p = 1/3.
        others = np.delete(times, top_L[b])
        assert np.abs(others - 300).max() < 6 * np.sqrt(900 * 2 / 9)


def test_iou_of_booleans():
    a = np.array([[True, True, False, False], [False] * 4])
    b = np.array([[True, False, True, False], [False] * 4])
    assert iou(a, b).tolist() == [1 / 3, 0]


def test_planted_neurons_are_found():
    """Late blocks whose top neuron is the mask, early blocks where it is noise."""
    rng = np.random.default_rng(0)
    noise, other = rng.random((40, 4)) * 0.2, rng.random((40, 4)) * 0.2
    top = noise.copy()
    top[:, 2:] += 0.5
    result = localisation(top, other, over="images", seed=1)
    assert (result.over, result.n) == ("images", 40)
    assert result.blocks["block"].to_list() == [0, 1, 2, 3]
    for b, row in enumerate(result.blocks.iter_rows(named=True)):
        assert row["top"] == pytest.approx(top[:, b].mean())
        assert row["random"] == pytest.approx(other[:, b].mean())
        assert row["difference"] == pytest.approx((top - other)[:, b].mean())
        for name in ("top", "random", "difference"):
            assert row[f"{name}_low"] < row[name] < row[f"{name}_high"]
        assert (row["difference_low"] > 0.4) == (b >= 2)
    mean, low, high = result.late_minus_early
    assert mean == pytest.approx(top[:, 2:].mean() - top[:, :2].mean())
    assert 0.4 < low < mean < high < 0.6
    assert localisation(top, other, over="images", seed=1).blocks.equals(result.blocks)


def test_the_middle_block_is_in_neither_half():
    top = np.array([[1.0, 100.0, 3.0], [1.0, 100.0, 4.0]])
    assert localisation(top, top, over="classes").late_minus_early[0] == 2.5
    assert (localisation(top, top, over="classes").blocks["difference_high"] == 0).all()


def test_dissected_equals_loops():
    rng = np.random.default_rng(4)
    neurons = rng.integers(6, size=(2, 5, 1)).astype(np.int32)
    tops = TopNeurons(neurons, np.zeros((2, 5, 1)), tuple("abcde"))
    parts = [(np.array([0, 2, 4]), rng.random((3, 6))) for _ in range(2)]
    top, others = dissected(tops, parts)
    for b, (classes, values) in enumerate(parts):
        for k, c in enumerate(classes):
            j = neurons[b, c, 0]
            assert top[k, b] == values[k, j]
            rest = [values[k, i] for i in range(6) if i != j]
            assert others[k, b] == pytest.approx(np.mean(rest), abs=1e-15)


def run(*arguments):
    return CliRunner().invoke(cli, ["neurons", "localise", *arguments], catch_exceptions=False)


def test_command(store, shards):
    prepared, scorer = prepared_and_scorer(shards)
    tops = top_neurons(prepared.subject, 1)
    found = overlaps(prepared, scorer, tops, prepared.plan.manifest["image"], seed=2)
    expected = localisation(found.top, found.random, over="images", seed=2)
    result = run(str(store), "--seed", "2", "--json", "--device", "cpu")
    assert result.exit_code == 0, result.output
    saved = json.loads(result.stdout)
    assert saved["n_without"] == 1
    assert saved["within_images"]["n"] == IMAGES - 1
    assert pl.DataFrame(saved["within_images"]["blocks"]).equals(
        expected.blocks.cast({"block": pl.Int64})
    )
    shown = run(str(store), "--seed", "2", "--device", "cpu").stdout
    assert "6 images (1 without a class patch left out)" in " ".join(shown.split())
    assert f"{expected.blocks['random'][1]:.4f}" in shown


def test_stores_it_refuses(shards, tmp_path):
    no_masks = write_tar(tmp_path / "none.tar", [sample(0, mask=False)])
    extract(prepare(CONFIG, [str(no_masks)]), tmp_path / "none")
    result = run(str(tmp_path / "none"), "--device", "cpu")
    assert result.exit_code == 2
    assert "no segmentation masks" in result.stderr
    changed = ExtractConfig(**{**CONFIG.to_json(), "streams": ("resid",), "reduce": (),
                               "intervene": "no-cls"})  # fmt: skip
    extract(prepare(changed, [str(shards[0])]), tmp_path / "changed")
    result = run(str(tmp_path / "changed"), "--device", "cpu")
    assert result.exit_code == 2
    assert "--intervene no-cls" in result.stderr


def test_no_image_with_a_class_patch(shards):
    prepared, scorer = prepared_and_scorer(shards)
    tops = top_neurons(prepared.subject, 1)
    place = prepared.plan.manifest["image"][4]
    with pytest.raises(UsageError, match="No image has a patch"):
        overlaps(prepared, scorer, tops, [place])
