"""The perturbation test against one image and one count at a time, with a plain slice of tokens."""

import numpy as np
import polars as pl
import pytest
import torch
from variants import config

from classlens.extractor.blocks import embed
from classlens.extractor.errors import ModelError
from classlens.extractor.perturb import (
    TESTS,
    by_relevance,
    kept_counts,
    make_perturbed,
    perturb,
    predict_kept,
)
from classlens.extractor.pictures import read_pictures
from classlens.extractor.prepare import prepare
from classlens.extractor.relevance import make_methods


@pytest.mark.parametrize(
    ("patches", "steps", "expected"),
    [
        (4, None, [0, 1, 2, 3, 4]),
        (10, 5, [0, 2, 4, 6, 8, 10]),
        (49, None, list(range(50))),
        (9, 50, list(range(10))),
        (7, 1, [0, 7]),
    ],
)
def test_counts_go_from_none_to_all(patches, steps, expected):
    assert kept_counts(patches, steps) == expected


def test_many_patches_take_25_even_steps():
    counts = kept_counts(196)
    assert (counts[0], counts[-1], len(counts)) == (0, 196, 26)
    assert set(np.diff(counts)) == {7, 8}


def test_equal_relevance_goes_to_the_lower_patch_first():
    relevance = torch.tensor([[1.0, 3.0, 1.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert by_relevance(relevance).tolist() == [[1, 3, 4, 0, 2], [0, 1, 2, 3, 4]]


@pytest.fixture
def prepared(make_shards):
    return prepare(config("registers", weights="random:5"), [str(s) for s in make_shards((6, 3))])


def naive_prediction(model, image, kept):
    """One image through the model's blocks, tokens that are dropped cut out by hand."""
    prefix = model.num_prefix_tokens
    x = model._pos_embed(model.patch_embed(image[None]))
    keep = [*range(prefix), *(prefix + patch for patch in sorted(kept))]
    x = model.norm_pre(x)[:, keep]
    for block in model.blocks:
        x = block(x)
    return int(model.head(model.fc_norm(model.norm(x)[:, 0])).argmax())


def test_answers_are_those_of_one_image_at_a_time(prepared):
    scorer = make_perturbed(prepared)
    methods = make_methods(prepared, scorer, ["class-embedding", "random"], store=None, seed=3)
    images = [0, 3, 7]
    found = perturb(prepared, scorer, methods, images, kept_counts(16), batch_size=2)
    assert found.height == 3 * 2 * 2 * 17
    rows = {row[:4]: row[4] for row in found.iter_rows()}
    assert len(rows) == found.height
    [pictures] = read_pictures(prepared, 16, images)
    pixels = scorer.images(pictures.pixels)
    for name, relevance in methods.items():
        values = relevance(pictures)
        for i, image in enumerate(images):
            best_first = sorted(range(16), key=lambda patch: (-values[i, patch].item(), patch))
            for count in range(17):
                for test, kept in (
                    ("negative", best_first[:count]),
                    ("positive", best_first[16 - count :]),
                ):
                    predicted = naive_prediction(scorer.model, pixels[i], kept)
                    right = predicted == int(pictures.targets.labels[i])
                    assert rows[image, name, test, count] == right, (image, name, test, count)
    assert found.filter(pl.col("kept") == 16).n_unique(("image", "right")) == 3


def test_dropped_tokens_cost_nothing(prepared):
    scorer = make_perturbed(prepared)
    seen = []
    scorer.model.blocks[-1].register_forward_hook(lambda m, x, y: seen.append(y.shape[1]))
    methods = make_methods(prepared, scorer, ["random"], store=None)
    perturb(prepared, scorer, methods, [1, 2], [0, 4, 16], batch_size=8)
    prefix = 5
    assert sorted(seen) == sorted([prefix, prefix + 16, *[prefix + 4] * len(TESTS)])


def test_what_is_kept_depends_on_the_set_alone(prepared):
    scorer = make_perturbed(prepared)
    [pictures] = read_pictures(prepared, 16, [0, 1])
    x = embed(scorer.model, scorer.images(pictures.pixels))
    one, other = torch.tensor([[3, 1, 2]] * 2), torch.tensor([[2, 3, 1]] * 2)
    assert (predict_kept(scorer.model, x, one) == predict_kept(scorer.model, x, other)).all()


def test_all_patches_give_the_models_own_prediction(prepared):
    scorer = make_perturbed(prepared)
    [pictures] = read_pictures(prepared, 16)
    images = scorer.images(pictures.pixels)
    everything = torch.arange(16).expand(len(images), -1)
    ours = predict_kept(scorer.model, embed(scorer.model, images), everything)
    assert ours.tolist() == scorer.model(images).argmax(1).tolist()


def test_progress_reaches_the_number_of_images(prepared):
    scorer, calls = make_perturbed(prepared), []
    methods = make_methods(prepared, scorer, ["random"], store=None)
    perturb(
        prepared, scorer, methods, range(9), [0, 16], batch_size=4,
        progress=lambda done, total: calls.append((done, total)),
    )  # fmt: skip
    assert calls[-1] == (9, 9)


def test_models_that_pool_patches_are_refused(make_shards):
    prepared = prepare(config("gap"), [str(s) for s in make_shards((2,))])
    with pytest.raises(ModelError, match="does not predict from a CLS token"):
        make_perturbed(prepared)
