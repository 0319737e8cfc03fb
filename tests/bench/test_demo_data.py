"""The demo's images are what they are said to be, and its shipped model reads unseen ones."""

import json
from itertools import pairwise

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from scipy.ndimage import binary_erosion
from sklearn.datasets import load_sample_images

from classlens.bench.demo import prints_data
from classlens.bench.demo.model_card import MEAN, MODEL_ARGS, MODEL_NAME, STD, WEIGHTS
from classlens.bench.demo.prints_data import (
    CLASS_NAMES,
    IMAGE_SIZE,
    SPLITS,
    Split,
    background_columns,
    draw,
)

# Seeds far from those of training, validation and the model card's test figure.
FRESH_SEED = 2**50


@pytest.mark.parametrize("split", SPLITS)
def test_same_arguments_give_the_same_bytes(split: Split) -> None:
    image, mask = draw(split, 42, 7)
    again, mask_again = draw(split, 42, 7)
    assert image.tobytes() == again.tobytes()
    assert mask.tobytes() == mask_again.tobytes()
    assert image.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
    assert image.dtype == np.uint8
    assert mask.shape == (IMAGE_SIZE, IMAGE_SIZE)
    assert mask.dtype == np.bool_


def test_every_argument_changes_the_image() -> None:
    image = draw("train", 42, 7)[0]
    for other in (
        draw("test", 42, 7),
        draw("train", 43, 7),
        draw("train", 42, 8),
        draw("train", 42, 7, difficulty=0.0),
        draw("train", 42, 7, clutter=0.0),
    ):
        assert (image != other[0]).any()


def test_splits_share_no_background() -> None:
    columns = [background_columns(split) for split in SPLITS]
    assert columns[0][0] == 0
    assert columns[-1][1] == 640
    for (_, stop), (first, _) in pairwise(columns):
        assert stop == first


@pytest.mark.parametrize("split", SPLITS)
def test_draw_uses_nothing_of_the_other_splits(
    split: Split, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    before = [draw(split, label, 5)[0] for label in range(len(CLASS_NAMES))]
    rng = np.random.default_rng(0)
    photographs = load_sample_images()
    first, stop = background_columns(split)
    images = []
    for photograph in photographs.images:  # these arrays are read-only
        noise = rng.integers(256, size=photograph.shape)
        noise[:, first:stop] = photograph[:, first:stop]
        images.append(noise.astype(np.uint8))
    photographs.images = images

    monkeypatch.setattr(prints_data, "load_sample_images", lambda: photographs)
    request.addfinalizer(prints_data._material.cache_clear)
    prints_data._material.cache_clear()
    after = [draw(split, label, 5)[0] for label in range(len(CLASS_NAMES))]
    np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("split", SPLITS)
def test_mask_is_where_the_cloth_lies(split: Split) -> None:
    for label in range(len(CLASS_NAMES)):
        image, mask = draw(split, label, 3, clutter=0.0)
        assert 0.12 < mask.mean() < 0.67  # of a small ellipse, and a large square
        # Without clutter the background is one grey; a pixel of the edge may be cloth by a quarter.
        inner, outer = (
            np.asarray(binary_erosion(part, iterations=2), dtype=np.bool_) for part in (mask, ~mask)
        )
        assert (image[outer] == 97).all()
        assert (image[inner] != 97).any(axis=1).mean() > 0.95


def test_without_difficulty_nothing_but_the_phase_varies() -> None:
    """Without it an image is the cloth in the middle; only its threads begin elsewhere."""
    plain = [draw("train", 11, seed, difficulty=0.0, clutter=0.0) for seed in range(40)]
    masks = np.stack([mask for _, mask in plain])
    assert (masks.any(axis=0) & ~masks.all(axis=0)).mean() < 0.15  # of corners, round or square
    middle = [np.nonzero(mask)[0].mean() for mask in masks]
    assert np.ptp(middle) < 0.5
    assert np.std([np.nonzero(draw("train", 11, s)[1])[0].mean() for s in range(40)]) > 2
    colours = np.stack([image[masks.all(axis=0)].mean(axis=0) for image, _ in plain])
    assert np.ptp(colours, axis=0).max() < 10


def test_prints_differ() -> None:
    """No print is nearly another one, wherever its threads begin."""
    spectra = np.stack([np.abs(np.fft.fft2(prints_data._tile(n), axes=(0, 1))) for n in range(100)])
    flat = spectra[:, :3].reshape(100, -1) / prints_data._TILE_SIZE**2
    distance = np.linalg.norm(flat[:, None] - flat[None], axis=-1)
    assert distance[~np.eye(100, dtype=bool)].min() > 15


@pytest.mark.parametrize(("split", "label"), [("training", 1), ("test", 100), ("test", -1)])
def test_bad_arguments_are_refused(split: Split, label: int) -> None:
    with pytest.raises(ValueError, match="use"):
        draw(split, label, 0)


def test_shipped_weights_are_small_and_say_what_they_are() -> None:
    assert WEIGHTS.stat().st_size <= 4 * 2**20
    with safe_open(WEIGHTS, framework="np") as weights:
        metadata = weights.metadata()
    assert metadata["model_name"] == MODEL_NAME
    assert json.loads(metadata["model_args"]) == MODEL_ARGS
    assert tuple(json.loads(metadata["mean"])) == MEAN
    assert tuple(json.loads(metadata["std"])) == STD
    assert int(metadata["test_images"]) == 5000


def test_shipped_model_reads_fresh_test_images() -> None:
    model = timm.create_model(MODEL_NAME, **MODEL_ARGS)
    model.load_state_dict(load_file(WEIGHTS), strict=True)
    model.eval()
    labels = torch.arange(len(CLASS_NAMES)).repeat(3)
    images = np.stack([draw("test", y, FRESH_SEED + i)[0] for i, y in enumerate(labels.tolist())])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    with torch.inference_mode():
        predictions = model((pixels - mean) / std).argmax(dim=1)
    # The card says 92.6 % of 5,000; 0.88 is three standard deviations below for 300 images.
    assert (predictions == labels).float().mean() >= 0.88
