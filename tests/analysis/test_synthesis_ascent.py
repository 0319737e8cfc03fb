"""Targets, objectives and the ascent, on small models with random weights."""

import numpy as np
import pytest
import torch
from extractor.variants import VARIANTS, config

from classlens.analysis.neurons.synthesis.objectives import Target, gram_similarity, objective
from classlens.analysis.neurons.synthesis.synthesize import Ascent, ascend, draws, look
from classlens.analysis.neurons.synthesis.targets import class_targets, neuron_targets
from classlens.extractor.errors import UsageError
from classlens.extractor.models import load_subject

TARGETS = [
    Target(4, ((2, 5), (0, 7), (2, 190)), "class4"),
    Target(1, ((1, 3), (0, 7)), "class1"),
    Target(0, ((0, 2),), "class0"),
]


@pytest.fixture(scope="module")
def subject():
    return load_subject(config("cls"))


def by_hooks(model, images, target, chosen, after):
    """The objective of one target from what fc1 puts out, key by key, [N]."""
    kept = {}
    hooks = [
        block.mlp.fc1.register_forward_hook(lambda _, __, output, b=b: kept.update({b: output}))
        for b, block in enumerate(model.blocks)
    ]
    model(images)
    for hook in hooks:
        hook.remove()
    means = []
    for b, j in target.keys:
        key_Nt = kept[b][:, chosen, j].double()
        if after:  # GELU by its definition
            key_Nt = key_Nt * (1 + torch.erf(key_Nt / 2**0.5)) / 2
        means.append(key_Nt.mean(1))
    return torch.stack(means).mean(0)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("after", [False, True], ids=["h", "GELU(h)"])
def test_the_objective_is_the_mean_of_the_keys_that_hooks_see(variant, after):
    subject = load_subject(config(variant))
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    prefix = len(subject.prefix_kinds)
    for tokens, chosen in {
        "patches": range(prefix, prefix + 16),
        "all": range(prefix + 16),
    }.items():
        found = objective(
            subject.model, images, TARGETS, images_per_target=2, tokens=tokens,
            after_activation=after,
        ).activation  # fmt: skip
        for m, target in enumerate(TARGETS):
            own = images[2 * m : 2 * m + 2]
            expected = by_hooks(subject.model, own, target, list(chosen), after)
            torch.testing.assert_close(found[2 * m : 2 * m + 2].double(), expected, rtol=1e-5,
                                       atol=1e-6)  # fmt: skip


def test_of_the_cls_token_alone(subject):
    images = torch.randn(3, 3, 32, 32)
    found = objective(subject.model, images, TARGETS, tokens="cls").activation
    for m, target in enumerate(TARGETS):
        expected = by_hooks(subject.model, images[m : m + 1], target, [0], False)
        torch.testing.assert_close(found[m : m + 1].double(), expected, rtol=1e-5, atol=1e-6)


def test_the_walk_ends_behind_the_last_key(subject):
    ran = []
    hooks = [
        block.norm2.register_forward_hook(
            lambda _, inputs, __, b=b: ran.append((b, len(inputs[0])))
        )
        for b, block in enumerate(subject.model.blocks)
    ]
    objective(subject.model, torch.randn(3, 3, 32, 32), TARGETS)
    assert ran == [(0, 3), (1, 2), (2, 1)]
    ran.clear()
    objective(subject.model, torch.randn(1, 3, 32, 32), TARGETS[2:])
    for hook in hooks:
        hook.remove()
    assert ran == [(0, 1)]


def test_similarity_is_the_cosine_of_gram_matrices():
    features = np.random.default_rng(2).normal(size=(2, 3, 16, 8))
    features[1, 2] = features[1, 0]
    found = gram_similarity(torch.from_numpy(features)).numpy()
    for m in range(2):
        grams = []
        for image in features[m]:
            centred = image - image.mean(1, keepdims=True)
            normed = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5)
            grams.append(sum(np.outer(patch, patch) for patch in normed))
        cosines = [
            (grams[r] * grams[s]).sum() / np.sqrt((grams[r] ** 2).sum() * (grams[s] ** 2).sum())
            for r, s in ((0, 1), (0, 2), (1, 2))
        ]
        assert found[m] == pytest.approx(np.mean(cosines), rel=1e-10)
    assert gram_similarity(torch.from_numpy(features[:1, [1, 1]])).item() == pytest.approx(1)


def test_similarity_is_taken_in_the_blocks_of_the_keys(subject):
    images = torch.randn(4, 3, 32, 32)
    targets = [TARGETS[0], TARGETS[2]]
    found = objective(subject.model, images, targets, images_per_target=2, with_similarity=True)
    mids = {}
    hooks = [
        block.norm2.register_forward_hook(lambda _, inputs, __, b=b: mids.update({b: inputs[0]}))
        for b, block in enumerate(subject.model.blocks)
    ]
    subject.model(images)
    for hook in hooks:
        hook.remove()
    alike = {b: gram_similarity(mid[:, 1:].unflatten(0, (2, 2))) for b, mid in mids.items()}
    expected = torch.stack([(2 * alike[2][0] + alike[0][0]) / 3, alike[0][1]])
    torch.testing.assert_close(found.similarity, expected, rtol=1e-5, atol=1e-6)


def test_targets_are_the_most_predictive_value_vectors(subject):
    model = subject.model.double()
    products, probabilities = {}, {}
    for b, block in enumerate(model.blocks):
        for j in range(block.mlp.fc2.in_features):
            vector = block.mlp.fc2.weight[:, j].detach()
            products[b, j] = (model.head.weight @ vector).detach().numpy()
            logits = model.head(model.norm(vector)).detach().numpy()
            probabilities[b, j] = np.exp(logits) / np.exp(logits).sum()
    subject.model.float()
    for selection, scores in (("alignment", products), ("probability", probabilities)):
        targets = class_targets(subject, [7, 2], 5, selection)
        for c, target in zip((7, 2), targets, strict=True):
            best = sorted(scores, key=lambda key: -scores[key][c])[:5]
            assert target == Target(c, tuple(best), f"class{c}")
        label = int(np.argmax(scores[1, 9]))
        assert neuron_targets(subject, [(1, 9)], selection) == [
            Target(label, ((1, 9),), "neuron1-9")
        ]


def test_equal_value_vectors_go_by_block_and_index():
    subject = load_subject(config("cls"))
    for block in (2, 1):
        for j in (50, 3):
            vector = subject.model.head.weight[6] * 100
            subject.model.blocks[block].mlp.fc2.weight.data[:, j] = vector
    assert class_targets(subject, [6], 3, "alignment")[0].keys == ((1, 3), (1, 50), (2, 3))


def test_what_there_is_not(subject):
    with pytest.raises(UsageError, match="class 10; the model has 0 to 9"):
        class_targets(subject, [10], 1, "alignment")
    with pytest.raises(UsageError, match="--keys is 577; the model has 576"):
        class_targets(subject, [1], 577, "alignment")
    with pytest.raises(UsageError, match="block 3; give 0 to 2"):
        neuron_targets(subject, [(3, 0)], "alignment")
    with pytest.raises(UsageError, match="1:192; give 0 to 191"):
        neuron_targets(subject, [(1, 192)], "alignment")


def pixels_of(subject, targets, ascent):
    return {point.steps: point.pixels.astype(int) for point in ascend(subject, targets, ascent)}


@pytest.mark.parametrize("after", [False, True], ids=["h", "GELU(h)"])
def test_steps_raise_the_objective(subject, after):
    ascent = Ascent((32, 32), (1, 30), after_activation=after)
    first, last = (
        look(subject, TARGETS, point.pixels) for point in ascend(subject, TARGETS, ascent)
    )
    assert (last.activation > first.activation + 0.05).all()


def test_bfloat16_does_so_too(subject):
    ascent = Ascent((32, 32), (1, 30), dtype="bfloat16")
    first, last = (
        look(subject, TARGETS, point.pixels) for point in ascend(subject, TARGETS, ascent)
    )
    assert (last.activation > first.activation + 0.05).all()


def test_diversity_drives_images_apart(subject):
    def alike(diversity):
        ascent = Ascent((32, 32), (25,), images=3, diversity=diversity)
        (point,) = ascend(subject, TARGETS, ascent)
        return look(subject, TARGETS, point.pixels, images=3).similarity

    assert (alike(10.0) < alike(0.0)).all()


def test_draws_depend_on_seed_target_and_image_alone():
    def numbers(seed, target, image):
        first, steps = draws(seed, target, image)
        return first.random(), steps.random()

    assert numbers(0, TARGETS[0], 1) == numbers(0, TARGETS[0], 1)
    others = [
        numbers(*case)
        for case in ((0, TARGETS[0], 1), (1, TARGETS[0], 1), (0, TARGETS[1], 1), (0, TARGETS[0], 0))
    ]
    assert len({number for pair in others for number in pair}) == 8


def test_images_do_not_depend_on_their_batch(subject):
    """A float32 product of other batch size rounds otherwise, which Adam's division by the
    gradient's size amplifies where a gradient is next to nothing; after a few steps that stays
    below one of 255 levels."""
    ascent = Ascent((32, 32), (2, 4), images=2, diversity=0.5)
    together = pixels_of(subject, TARGETS, ascent)
    for m, target in enumerate(TARGETS):
        alone = pixels_of(subject, [target], ascent)
        for steps in ascent.steps:
            assert np.abs(together[steps][2 * m : 2 * m + 2] - alone[steps]).max() <= 1


def test_more_steps_go_on_where_fewer_end(subject):
    few = pixels_of(subject, TARGETS, Ascent((32, 32), (3,)))
    more = pixels_of(subject, TARGETS, Ascent((32, 32), (3, 5)))
    np.testing.assert_array_equal(few[3], more[3])
    assert not np.array_equal(more[3], more[5])


def test_images_of_another_size_are_seen_at_the_models(subject):
    (point,) = ascend(subject, TARGETS[:1], Ascent((48, 40), (2,)))
    assert point.pixels.shape == (1, 48, 40, 3)
    assert look(subject, TARGETS[:1], point.pixels).predicted.shape == (1,)


def test_looking_is_what_the_model_says(subject):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    seen = look(subject, TARGETS, pixels, images=2)
    mean, std = subject.geometry.mean, subject.geometry.std
    images = (pixels / 255 - np.array(mean)) / np.array(std)
    with torch.no_grad():
        logits = subject.model(torch.from_numpy(images).permute(0, 3, 1, 2).float()).numpy()
    labels = np.repeat([t.label for t in TARGETS], 2)
    np.testing.assert_array_equal(seen.predicted, logits.argmax(1))
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(seen.probability, shares[np.arange(6), labels], rtol=1e-4)
    np.testing.assert_array_equal(
        seen.rank, [(logits[n] > logits[n, label]).sum() for n, label in enumerate(labels)]
    )
