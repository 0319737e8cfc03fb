"""Exemplars kept up to date, and patches drawn for an image."""

import numpy as np
import pytest
import torch

from classlens.analysis.neurons.exemplars import quantile_codes, rank_error
from classlens.extractor.reducers.drawing import drawn_patches
from classlens.extractor.reducers.exemplars import merge_exemplars

F, G = 7, 3


def code_grid(neuron: int, image: int) -> np.ndarray:
    """Of a neuron and image, so that a mix-up shows."""
    return np.array([neuron, image % 256, image // 256], np.uint8)


@pytest.mark.parametrize("levels", [2, 5, 1000])
@pytest.mark.parametrize("shuffled", [False, True])
def test_the_largest_stay_with_ties_to_the_lower_image(levels, shuffled):
    source = np.random.default_rng(levels)
    all_values = source.integers(0, levels, (400, F)).astype(np.float32)
    images = source.permutation(400) if shuffled else np.arange(400)
    value = np.full((F, 15), -np.inf, np.float32)
    image = np.full((F, 15), -1, np.int32)
    codes = np.zeros((F, 15, G), np.uint8)
    seen: list[int] = []
    while len(seen) < 400:
        batch = images[len(seen) : len(seen) + source.integers(1, 40)]
        candidate = np.ones((len(batch), F), bool)
        if not shuffled:  # what the device leaves out
            candidate &= all_values[batch] > value.min(axis=1)
        n, f = np.nonzero(candidate)
        merge_exemplars(
            value,
            image,
            codes,
            neuron_P=f,
            value_P=all_values[batch[n], f],
            image_P=batch[n],
            codes_PG=np.array([code_grid(*pair) for pair in zip(f, batch[n], strict=True)]).reshape(
                -1, G
            ),
        )
        seen += batch.tolist()
        for neuron in range(F):
            best = sorted(seen, key=lambda i: (-all_values[i, neuron], i))[:15]
            there = image[neuron] >= 0
            assert sorted(image[neuron, there].tolist()) == sorted(best)
            assert (value[neuron, there] == all_values[image[neuron, there], neuron]).all()
            assert (value[neuron, ~there] == -np.inf).all()
            for place in np.flatnonzero(there):
                assert (codes[neuron, place] == code_grid(neuron, image[neuron, place])).all()


def test_every_patch_is_drawn_equally_often_and_none_twice():
    keys = torch.arange(20_000) * 7919
    drawn = drawn_patches(keys, 196, 64)
    assert (drawn.diff(dim=1) > 0).all()
    counts = torch.bincount(drawn.flatten(), minlength=196)
    p = 64 / 196
    spread = (len(keys) * p * (1 - p)) ** 0.5
    assert ((counts - len(keys) * p).abs() < 5 * spread).all()
    assert torch.equal(drawn_patches(keys[100:103], 196, 64), drawn[100:103])
    assert len(drawn.unique(dim=0)) == len(keys)


def test_the_rank_error_holds_and_is_not_far_off():
    """Images that are alike inside and unlike each other: draws within each image lose little."""
    images, patches, drawn, quantile, failure = 60, 196, 64, 0.95, 0.05
    source = np.random.default_rng(0)
    level = source.standard_normal((images, 1))
    x = (level + 0.7 * source.standard_normal((images, patches))).astype(np.float32)
    threshold = np.sort(x, axis=None)[int(quantile * x.size)]
    above = torch.from_numpy(x >= threshold)
    bound = rank_error(images * drawn, quantile, failure)
    errors = []
    for trial in range(1000):
        chosen = drawn_patches(torch.arange(images) + 1000 * trial, patches, drawn)
        share = above.gather(1, chosen).double().mean().item()
        errors.append(abs(share - above.double().mean().item()))
    assert np.mean(np.array(errors) > bound) <= failure
    assert np.quantile(errors, 1 - failure) > bound / 3
    # By hand, for independent draws: 2.576 standard deviations hold 99 %.
    assert rank_error(795_000, 0.995, 0.01) > 2.576 * (0.005 * 0.995 / 795_000) ** 0.5


@pytest.mark.parametrize(
    ("counts", "quantile", "code"),
    [
        ({3: 1}, 0.5, 3),
        ({3: 1, 9: 1}, 0.5, 3),
        ({3: 1, 9: 1}, 0.51, 9),
        ({3: 995, 9: 5}, 0.995, 3),  # exactly: ⌈0.995 · 1000⌉ = 995
        ({3: 994, 9: 6}, 0.995, 9),
        ({0: 1, 255: 99}, 0.01, 0),
    ],
)
def test_a_quantile_is_the_kth_smallest(counts, quantile, code):
    histogram = np.zeros((1, 256), np.int64)
    histogram[0, list(counts)] = list(counts.values())
    assert quantile_codes(histogram, quantile).tolist() == [code]
