"""Baselines against one image at a time through timm's own forward pass, its attention hooked."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from samples import sample, write_tar
from variants import config

from classlens.analysis.scan import scan
from classlens.extractor.errors import UsageError
from classlens.extractor.models import load_subject
from classlens.extractor.pictures import Pictures, read_pictures
from classlens.extractor.prepare import prepare
from classlens.extractor.probe_run import prepare_probe, probe
from classlens.extractor.relevance import (
    chefer_relevance,
    make_methods,
    probe_relevance,
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


def make_probes(config, test, tmp_path):
    """The store of linear probes, trained on twelve other images."""
    train = write_tar(tmp_path / "train.tar", [sample(i) for i in range(20, 32)])
    probe(prepare_probe(config, [str(train)], [str(path) for path in test]), tmp_path / "probes")
    return tmp_path / "probes"


@pytest.mark.parametrize("blocks", [None, [1]])
def test_probe_relevance_is_minus_the_ranks_of_resid_probes(make_shards, tmp_path, blocks):
    probes = make_probes(config("registers"), make_shards((3, 2)), tmp_path)
    frame = scan(probes).filter(pl.col("stream") == "resid").collect()
    images = frame["image"].unique().sort()[[0, 2, 4]].to_numpy()
    found = probe_relevance(probes, images, blocks)
    for row, image in zip(found.tolist(), images, strict=True):
        of_image = frame.filter(pl.col("image") == int(image), pl.col("kind") == "patch")
        expected: dict[tuple[int, int], int] = {}
        for r in of_image.iter_rows(named=True):
            if blocks is None or r["block"] in blocks:
                place = (r["row"], r["col"])
                expected[place] = expected.get(place, 0) - r["rank"]
        assert row == [expected[place] for place in sorted(expected)]


def test_probes_without_resid_are_refused(make_shards, tmp_path):
    only = replace(config("cls"), streams=("attn",))
    probes = make_probes(only, make_shards((2,)), tmp_path)
    with pytest.raises(UsageError, match="no probes of the stream resid"):
        probe_relevance(probes, np.array([0]), None)
