"""Baselines against one image at a time through timm's own forward pass, its attention hooked."""

import numpy as np
import pytest
import torch
from variants import config

from classlens.extractor.models import load_subject
from classlens.extractor.pictures import Pictures, read_pictures
from classlens.extractor.prepare import prepare
from classlens.extractor.relevance import (
    chefer_relevance,
    make_methods,
    random_relevance,
    rollout_relevance,
)
from classlens.extractor.run import extract
from classlens.extractor.scorer import Scorer

VARIANTS = ["cls", "registers", "distilled", "qk-norm", "norm-pre"]


def attention_of_one(model, image):
    """A of every block, kept in the graph of the logits, from the unfused path of timm."""
    maps = []

    def keep(module, inputs, output):
        maps.append(inputs[0])

    handles = []
    for block in model.blocks:
        block.attn.fused_attn = False
        handles.append(block.attn.attn_drop.register_forward_hook(keep))
    image = image[None].clone().requires_grad_()  # so that every A is part of a graph
    logits = model(image)
    for handle in handles:
        handle.remove()
    return maps, logits[0]


def naive_chefer(model, image, label):
    maps, logits = attention_of_one(model, image)
    tokens = maps[0].shape[-1]
    R = np.eye(tokens)
    for A in maps:
        [gradient] = torch.autograd.grad(logits[label], A, retain_graph=True)
        cam = np.zeros((tokens, tokens))
        heads = A.shape[1]
        for h in range(heads):
            product = (gradient[0, h] * A[0, h]).detach().numpy()
            cam += np.maximum(product, 0) / heads
        R = R + cam @ R
    return R[0, model.num_prefix_tokens :]


def naive_rollout(model, image):
    maps, _ = attention_of_one(model, image)
    R = np.eye(maps[0].shape[-1])
    for A in maps:
        mixed = 0.5 * A[0].detach().numpy().mean(0) + 0.5 * np.eye(len(R))
        R = mixed / mixed.sum(1, keepdims=True) @ R
    return R[0, model.num_prefix_tokens :]


@pytest.fixture(params=VARIANTS)
def model(request):
    model = load_subject(config(request.param)).model.double()
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()
LABELS = torch.tensor([1, 9, 4])


def test_chefers_relevance_of_a_batch_is_that_of_each_image(model):
    ours = chefer_relevance(model, IMAGES, LABELS)
    assert not ours.requires_grad
    expected = [naive_chefer(model, x, y) for x, y in zip(IMAGES, LABELS.tolist(), strict=True)]
    np.testing.assert_allclose(ours.numpy(), np.stack(expected), rtol=1e-9, atol=1e-12)


def test_rollout_of_a_batch_is_that_of_each_image(model):
    ours = rollout_relevance(model, IMAGES)
    expected = [naive_rollout(model, x) for x in IMAGES]
    np.testing.assert_allclose(ours.numpy(), np.stack(expected), rtol=1e-9, atol=1e-12)
    assert (ours.sum(1) < 1).all()  # the rest is CLS and the other prefix tokens


def test_random_relevance_belongs_to_the_image_and_the_seed():
    whole = random_relevance(torch.tensor([3, 8, 20]), 16, seed=0)
    alone = random_relevance(torch.tensor([8]), 16, seed=0)
    assert (whole[1] == alone[0]).all()
    assert (random_relevance(torch.tensor([8]), 16, seed=1) != alone).all()
    assert len(np.unique(whole)) == whole.numel()


def scored(prepared) -> tuple[Scorer, Pictures]:
    scorer = Scorer(prepared.subject, [], dtype=torch.float32, device="cpu", convention="corrected")
    [pictures] = read_pictures(prepared, 16)
    return scorer, pictures


@pytest.mark.parametrize("blocks", [None, [0, 2]])
def test_class_embedding_relevance_is_the_same_from_the_store_and_computed(
    blocks, make_shards, tmp_path
):
    shards = [str(s) for s in make_shards((5, 4))]
    prepared = prepare(config("registers", reduce=("attribution",)), shards)
    extract(prepared, tmp_path / "store")
    scorer, pictures = scored(prepared)
    found = []
    for store in (tmp_path / "store", None):
        methods = make_methods(prepared, scorer, ["class-embedding"], store=store, blocks=blocks)
        found.append(methods["class-embedding"](pictures))
    read, computed = found
    assert read.shape == (9, 16)
    # Each block is rounded to eleven bits of its own values; sums may cancel.
    assert ((read - computed).abs().amax(1) <= 2e-3 * computed.abs().amax(1)).all()
    theirs = make_methods(
        prepared, scorer, ["class-embedding"], store=None, convention="vilas2023", blocks=blocks
    )["class-embedding"](pictures)
    assert not torch.allclose(theirs, computed, rtol=0.1)


def test_baselines_of_a_model_in_16_bits_run_in_float32(make_shards):
    prepared = prepare(config("cls", dtype="float16"), [str(s) for s in make_shards((4,))])
    scorer = Scorer(prepared.subject, [], dtype=torch.float16, device="cpu", convention="corrected")
    [pictures] = read_pictures(prepared, 16)
    methods = make_methods(prepared, scorer, ["rollout", "chefer"], store=None)
    for relevance in methods.values():
        found = relevance(pictures)
        assert found.dtype == torch.float32
        assert torch.isfinite(found).all()
    assert scorer.model.head.weight.dtype == torch.float16  # the perturbed one is untouched
