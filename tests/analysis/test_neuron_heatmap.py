"""Heat-maps and masks against torch, sorting and timm's forward pass; the figure; the command."""

import io

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from samples import encoded, picture, sample, write_tar
from torch.nn import functional as F

from classlens.analysis.colors import DIVERGING, SEQUENTIAL, in_colors
from classlens.analysis.neurons.alignment import top_neurons
from classlens.analysis.neurons.heatmap import (
    above_percentile,
    heat_maps,
    resize_bilinear,
    running_mean,
)
from classlens.analysis.neurons.heatmap_figure import draw, overlay, spotlight
from classlens.cli import cli
from classlens.extractor.config import ExtractConfig
from classlens.extractor.models import load_subject
from classlens.extractor.prepare import prepare
from classlens.extractor.run import extract

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
VARIANTS = {
    "cls": ("vit_tiny_patch16_224", {}),
    "gap, registers": (
        "vit_tiny_patch16_224",
        {"class_token": False, "global_pool": "avg", "reg_tokens": 4},
    ),
    "post-norm": ("vit_base_patch16_rpn_224", {}),
}


def config(variant):
    """Random weights, 10 classes."""
    name, extra = VARIANTS[variant]
    args = {**SMALL, "num_classes": 10, **extra}
    return ExtractConfig(model=name, model_args=args, weights="random:3", batch_size=4)


@pytest.mark.parametrize("grid", [(4, 4), (3, 7), (1, 5), (1, 1), (14, 14)])
@pytest.mark.parametrize("size", [(32, 32), (30, 49), (3, 7), (2, 2)])
def test_resize_equals_torchs(grid, size):
    maps = np.random.default_rng(0).normal(size=(2, 3, *grid))
    found = resize_bilinear(maps, size)
    expected = F.interpolate(torch.tensor(maps), size, mode="bilinear", align_corners=False)
    # Places differ by rounding: a few units in the last place, times the steps between patches.
    bound = 64 * np.finfo(float).eps * np.abs(maps).max() * max(grid)
    assert np.abs(found - expected.numpy()).max() <= bound


def test_a_constant_map_stays_constant_and_has_no_mask():
    maps = resize_bilinear(np.full((1, 5, 5), 0.1), (37, 41))
    assert (maps == 0.1).all()
    assert not above_percentile(maps).any()


@pytest.mark.parametrize("count", [(1, 1), (2, 3), (8, 8), (9, 11)])
@pytest.mark.parametrize("percentile", [0.0, 80.0, 99.5, 100.0])
def test_percentile_equals_a_sort(count, percentile):
    maps = np.random.default_rng(1).integers(-5, 6, size=(4, *count)).astype(float)
    found = above_percentile(maps, percentile)
    for values, mask in zip(maps, found, strict=True):
        in_order = sorted(values.ravel())
        place = (len(in_order) - 1) * percentile / 100
        low = int(place)
        high = min(low + 1, len(in_order) - 1)
        threshold = in_order[low] + (place - low) * (in_order[high] - in_order[low])
        np.testing.assert_array_equal(mask, values > threshold)
    if count == (8, 8) and percentile == 80.0:
        distinct = np.arange(64.0).reshape(1, 8, 8)
        assert above_percentile(distinct).sum() == 13  # the 63 · 0.8 = 50.4th and what is above


def test_running_mean_equals_a_loop():
    maps = np.random.default_rng(2).normal(size=(5, 3, 2))
    for b, mean in enumerate(running_mean(maps)):
        np.testing.assert_allclose(mean, sum(maps[: b + 1]) / (b + 1), rtol=1e-13, atol=1e-15)


def hooked(subject, pixels):
    """fc1's output at the image tokens, from timm's own forward pass: a list of [G, F]."""
    model, geometry = subject.model, subject.geometry
    kept = []
    handles = [
        block.mlp.fc1.register_forward_hook(lambda module, inputs, output: kept.append(output[0]))
        for block in model.blocks
    ]
    mean, std = torch.tensor(geometry.mean), torch.tensor(geometry.std)
    image = (torch.tensor(pixels).float() / 255 - mean) / std
    with torch.inference_mode():
        model(image.permute(2, 0, 1)[None])
    for handle in handles:
        handle.remove()
    return [tokens[model.num_prefix_tokens :].numpy() for tokens in kept]


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_heat_maps_equal_timms_activations(variant):
    subject = load_subject(config(variant))
    pixels = np.asarray(subject.geometry.crop(picture(3)))
    neurons_LK = np.random.default_rng(3).integers(192, size=(3, 4))
    maps = heat_maps(subject, pixels, range(3), neurons_LK)
    assert maps.heat.shape == maps.mask.shape == (3, 4, 32, 32)
    np.testing.assert_array_equal(maps.pixels, pixels)
    for b, keys_GF in enumerate(hooked(subject, pixels)):
        for k, j in enumerate(neurons_LK[b]):
            grid = keys_GF[:, j].reshape(4, 4)
            np.testing.assert_allclose(maps.activation[b, k], grid, rtol=0, atol=2e-5)
            heat = F.interpolate(torch.tensor(maps.activation[b, k]).double()[None, None], (32, 32),
                                 mode="bilinear").numpy()[0, 0]  # fmt: skip
            np.testing.assert_allclose(maps.heat[b, k], heat, rtol=1e-6, atol=1e-7)
            # At most a fifth (less where pixels tie at the threshold), and those of largest heat.
            assert 0.15 * 1024 < maps.mask[b, k].sum() <= np.ceil(0.2 * 1023)
            assert maps.heat[b, k][maps.mask[b, k]].min() >= maps.heat[b, k][~maps.mask[b, k]].max()
        mean = maps.heat[: b + 1, 0].astype(float).mean(0)
        np.testing.assert_allclose(maps.mean_heat[b], mean, rtol=1e-5, atol=1e-6)
        assert (
            maps.mean_heat[b][maps.mean_mask[b]].min()
            >= maps.mean_heat[b][~maps.mean_mask[b]].max()
        )


def test_colors_are_not_swapped():
    np.testing.assert_array_equal(in_colors(np.array([0.0, 1.0]), SEQUENTIAL),
                                  [[0, 0, 4], [252, 255, 164]])  # fmt: skip
    np.testing.assert_array_equal(in_colors(np.array([0.0, 0.5, 1.0]), DIVERGING),
                                  [[33, 102, 172], [247, 247, 247], [178, 24, 43]])  # fmt: skip
    red = np.broadcast_to(np.uint8([250, 10, 20]), (2, 2, 3))
    mask = np.array([[True, False], [False, False]])
    lit = spotlight(red, mask)
    assert lit[0, 0].tolist() == [250, 10, 20]
    assert lit[1, 1].tolist() == [55, 2, 4]
    # Grey of the red picture, 78, shines through the lowest and the highest colour.
    over = overlay(red, np.array([[0.0, 1.0], [0.5, 0.5]]))
    grey = np.asarray(Image.fromarray(np.ascontiguousarray(red)).convert("L"))[0, 0]
    for place, color in (((0, 0), [0, 0, 4]), ((0, 1), [252, 255, 164])):
        np.testing.assert_array_equal(over[place], np.rint(0.6 * np.array(color) + 0.4 * grey))


def test_the_figure_has_a_row_a_block_and_a_panel_a_neuron():
    subject = load_subject(config("cls"))
    pixels = np.asarray(subject.geometry.crop(picture(3)))
    sizes = {}
    for blocks, kept in ((3, 4), (3, 1), (1, 1)):
        maps = heat_maps(subject, pixels, range(blocks), np.zeros((blocks, kept), int))
        sizes[blocks, kept] = draw(maps, "title", [["name"] * kept] * blocks).size
    assert sizes[3, 4][0] > sizes[3, 1][0] > sizes[1, 1][0]
    assert sizes[3, 4][1] == sizes[3, 1][1] > sizes[1, 1][1]


def run(*arguments):
    return CliRunner().invoke(cli, ["neurons", "heatmap", *arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heat")
    tar = write_tar(folder / "shard.tar", [sample(i) for i in range(3)])
    extract(prepare(config("cls"), [str(tar)]), folder / "store")
    return folder / "store"


def test_command_on_a_store(store, tmp_path):
    out, arrays = tmp_path / "heat.png", tmp_path / "heat.npz"
    result = run(str(store), "--image", "image0002", "--top", "3", "--out", str(out),
                 "--arrays", str(arrays))  # fmt: skip
    assert result.exit_code == 0, result.output
    subject = load_subject(config("cls"))
    with np.load(arrays) as file:
        saved = dict(file)
    assert saved["neurons"].tolist() == top_neurons(subject, 3).neurons[:, 2].tolist()
    assert saved["blocks"].tolist() == [0, 1, 2]
    stored = Image.open(io.BytesIO(encoded(picture(2))))
    np.testing.assert_array_equal(saved["pixels"], np.asarray(subject.geometry.crop(stored)))
    expected = heat_maps(subject, saved["pixels"], range(3), saved["neurons"])
    for name, value in vars(expected).items():
        np.testing.assert_array_equal(saved[name], value)
    with Image.open(out) as figure:
        assert figure.mode == "RGB"


def test_command_on_a_file_and_one_neuron(store, tmp_path):
    path, arrays = tmp_path / "a.png", tmp_path / "a.npz"
    picture(9).save(path)
    result = run(str(store), "--image", str(path), "--neuron", "1:17", "--out",
                 str(tmp_path / "heat.png"), "--arrays", str(arrays))  # fmt: skip
    assert result.exit_code == 0, result.output
    subject = load_subject(config("cls"))
    pixels = np.asarray(subject.geometry.crop(picture(9)))
    with np.load(arrays) as file:
        saved = dict(file)
    assert saved["heat"].shape == (1, 1, 32, 32)
    grid = hooked(subject, pixels)[1][:, 17].reshape(4, 4)
    np.testing.assert_allclose(saved["activation"][0, 0], grid, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image", "nobody"], "has no image 'nobody'"),
        (["--image", "{file}"], "The image has no label here"),
        (["--image", "{file}", "--neuron", "3:0"], "There is no block 3"),
        (["--image", "{file}", "--neuron", "0:192"], "There is no neuron 192 in block 0"),
        (["--image", "{file}", "--neuron", "x"], "takes BLOCK:J"),
        (["--image", "{file}", "--neuron", "0:0", "--class", "1"], "give one of them"),
        (["--image", "{file}", "--class", "1", "--out", "heat.jpg"], "give a .png file"),
        (["--image", "{text}", "--class", "1"], "no readable picture"),
    ],
)
def test_usage_errors(store, tmp_path, options, message):
    file, text = tmp_path / "a.png", tmp_path / "a.txt"
    picture(1).save(file)
    text.write_text("no picture")
    options = [option.format(file=file, text=text) for option in options]
    out = [] if "--out" in options else ["--out", str(tmp_path / "heat.png")]
    result = run(str(store), *options, *out)
    assert result.exit_code == 2
    assert message in result.stderr
