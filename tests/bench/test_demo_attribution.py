"""Why the attribution loses to chance on the demo's model in the negative test.

It is no slip: the relevance is the gradient that autograd gives. That says what more attention to a
patch would do, not how much it gets; multiplied by the attention of CLS it beats chance.
"""

import numpy as np
import polars as pl
import pytest
import torch
from torch.nn import functional as F

from classlens.analysis.perturbation import summarise
from classlens.bench.demo.command import demo_config
from classlens.bench.demo.model_card import WEIGHTS
from classlens.bench.demo.prints_data import draw
from classlens.extractor.blocks import walk
from classlens.extractor.models import load_subject
from classlens.extractor.perturb import kept_counts, perturb_batch
from classlens.extractor.pictures import Pictures
from classlens.extractor.reducers.attribution import AttributionReducer
from classlens.extractor.reducers.protocol import Targets
from classlens.extractor.relevance import random_relevance
from classlens.extractor.scorer import Scorer

CLASSES, PATCH, GRID = 100, 8, 8


def make_pictures(images):
    """So many images, class after class, with the share of each patch that the mask covers."""
    drawn = [draw("test", i % CLASSES, i // CLASSES) for i in range(images)]
    masks = np.stack([mask for _, mask in drawn]).reshape(-1, GRID, PATCH, GRID, PATCH)
    covered = (255 * masks.mean(axis=(2, 4))).astype(np.uint8).reshape(len(drawn), -1)
    targets = Targets(
        labels=torch.arange(len(drawn)) % CLASSES, images=torch.arange(len(drawn)), kept=None
    )
    return Pictures(torch.from_numpy(np.stack([pixels for pixels, _ in drawn])), targets, covered)


def make_scorer(dtype):
    subject = load_subject(demo_config(str(WEIGHTS)))
    return Scorer(subject, [], dtype=dtype, device="cpu", convention="corrected")


def by_autograd(scorer, pictures):
    """Minus each block's gradient by its attention, and that attention; [L, N, H, G]."""
    maps, gradients = [], []

    def attend(query, key, value):
        attention = (query * query.shape[-1] ** -0.5 @ key.mT).softmax(dim=-1)
        maps.append(attention.detach().requires_grad_())
        return maps[-1] @ value

    model, images = scorer.model, scorer.images(pictures.pixels)
    attends = [attend] * len(model.blocks)
    for _, sites in walk(model, images, "corrected", frozenset({"attn"}), attends=attends):
        logits = model.head(model.norm(sites["attn"][:, 0]))
        loss = F.cross_entropy(logits, pictures.targets.labels, reduction="sum")
        gradients.append(-torch.autograd.grad(loss, maps[-1], retain_graph=True)[0][:, :, 0, 1:])
    return torch.stack(gradients), torch.stack([a.detach()[:, :, 0, 1:] for a in maps])


def test_the_closed_form_is_the_gradient():
    scorer, pictures = make_scorer(torch.float64), make_pictures(12)
    gradients, _ = by_autograd(scorer, pictures)
    space = load_subject(demo_config(str(WEIGHTS))).space
    reducer = AttributionReducer(scorer.model, space)
    images = scorer.images(pictures.pixels)
    with torch.inference_mode():
        for block, sites in walk(scorer.model, images, "corrected", reducer.sites):
            ours_NHG = reducer.head_relevance(block, sites, pictures.targets.labels)
            error = (ours_NHG - gradients[block]).abs().amax()
            # The space is folded in float64 and kept in float32.
            assert error <= 1e-6 * gradients[block].abs().amax()


@pytest.mark.slow
def test_the_true_mask_beats_chance_and_attention_makes_the_difference():
    scorer, pictures = make_scorer(torch.float32), make_pictures(500)
    gradients, attention = by_autograd(scorer, pictures)
    alone = beats_chance(scorer, pictures, gradients.sum(dim=(0, 2)))
    assert alone["negative"][1] < 0  # the whole interval: worse than chance
    assert alone["positive"][0] > 0
    masked = beats_chance(scorer, pictures, torch.from_numpy(pictures.mask_fraction.copy()))
    assert masked["negative"][0] > 0
    assert masked["positive"][0] > 0
    weighted = beats_chance(scorer, pictures, (gradients * attention).sum(dim=(0, 2)))
    assert weighted["negative"][0] > 0
    assert weighted["positive"][0] > 0


def beats_chance(scorer, pictures, relevance_NG) -> dict[str, tuple[float, float]]:
    """By test the 95 % interval of how much better than random a relevance is."""
    patches = relevance_NG.shape[1]
    methods = {
        "class-embedding": lambda _: relevance_NG,
        "random": lambda _: random_relevance(pictures.targets.images, patches, seed=0),
    }
    frames = perturb_batch(scorer, methods, pictures, kept_counts(patches, 8))
    found = summarise(pl.concat(frames), {"convention": "corrected", "seed": 0})
    rows = {row["test"]: (row["low"], row["high"]) for row in found.differences.to_dicts()}
    low, high = rows["positive"]
    return {"negative": rows["negative"], "positive": (-high, -low)}
