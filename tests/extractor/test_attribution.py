"""The closed form against autograd through a dense attention matrix, block by block and stored."""

import numpy as np
import pytest
import torch
import zarr
from torch import nn
from torch.nn import functional as F
from variants import GAP, SMALL, VARIANTS, config

from classlens.extractor.blocks import walk
from classlens.extractor.config import ExtractConfig
from classlens.extractor.errors import ModelError, UsageError
from classlens.extractor.models import Subject, class_space, load_subject
from classlens.extractor.pictures import read_pictures
from classlens.extractor.prepare import prepare, prepare_again
from classlens.extractor.reducers.attribution import AttributionReducer, require_attribution
from classlens.extractor.reducers.protocol import Targets
from classlens.extractor.run import extract
from classlens.extractor.scorer import Scorer
from classlens.extractor.store import verify

# Norms and factors that the supported kinds with a CLS token may carry besides.
MORE = {
    "layerscale": ("vit_tiny_patch16_224", {"init_values": 0.3}),
    "post-norm": ("vit_base_patch16_rpn_224", {"class_token": True, "global_pool": "token"}),
    "post-norm-layerscale": (
        "vit_base_patch16_rpn_224",
        {"class_token": True, "global_pool": "token", "init_values": 0.3},
    ),
    "attention-norm": ("vit_tiny_patch16_224", {"scale_attn_norm": True}),
    "cls-but-pooled": ("vit_tiny_patch16_224", {"global_pool": "avg", "init_values": 0.3}),
    "gated": ("vit_tiny_patch16_224", {}),
}
WITH_CLS = [name for name, (*_, kinds) in VARIANTS.items() if "cls" in kinds] + list(MORE)


def make_subject(variant: str) -> Subject:
    """Every parameter drawn at random, so that no scale is one and no shift zero; float64."""
    if variant in MORE:
        name, extra = MORE[variant]
        settings = ExtractConfig(name, {**SMALL, "num_classes": 10, **extra}, weights="random:3")
    else:
        settings = config(variant)
    subject = load_subject(settings)
    generator = torch.Generator().manual_seed(1)
    if variant == "gated":
        for block in subject.model.blocks:
            block.attn.gate = nn.Linear(48, 48)
    for parameter in subject.model.parameters():
        parameter.requires_grad_(False)
        parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    subject.model.double()
    return Subject(
        **{**vars(subject), "space": class_space(subject.model, variant), "model": subject.model}
    )


def by_autograd(model, images, labels, convention) -> torch.Tensor:
    """−∂ℓ_b/∂A_b[h, CLS, j] with A_b a leaf, [N, L, H, G]; rows of A but CLS's get no gradient."""
    leaves = []

    def attend(query, key, value):
        attention = (query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5).softmax(-1)
        leaves.append(attention.detach().requires_grad_())
        return leaves[-1] @ value

    final = model.fc_norm if isinstance(model.norm, nn.Identity) else model.norm
    blocks = walk(model, images, convention, attends=[attend] * len(model.blocks))
    found = []
    for _, sites in blocks:
        logits = model.head(final(sites["attn"][:, 0]))
        if convention == "vilas2023":
            logits = logits.softmax(dim=1)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        [gradient] = torch.autograd.grad(loss, leaves[-1], retain_graph=True)
        assert (gradient[:, :, 1:] == 0).all()
        found.append(-gradient[:, :, 0, model.num_prefix_tokens :])
    return torch.stack(found, dim=1)


def closed_form(subject, images, labels, convention) -> torch.Tensor:
    reducer = AttributionReducer(subject.model, subject.space, convention)
    blocks = walk(subject.model, images, convention, reducer.sites)
    with torch.inference_mode():
        heads = [reducer.head_relevance(block, sites, labels) for block, sites in blocks]
    return torch.stack(heads, dim=1)


@pytest.mark.parametrize("convention", ["corrected", "vilas2023"])
@pytest.mark.parametrize("variant", WITH_CLS)
def test_closed_form_is_autograds_gradient(variant, convention):
    subject = make_subject(variant)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, 3, 32, 32, generator=generator).double()
    labels = torch.tensor([0, 7, 9])
    expected = by_autograd(subject.model, images, labels, convention)
    ours = closed_form(subject, images, labels, convention)
    assert ours.shape == (3, 3, 3, 16)  # images, blocks, heads, patches
    assert ours.abs().amax((2, 3)).min() > 1e-8
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-13)


def test_the_conventions_differ():
    subject = make_subject("cls")
    images, labels = torch.randn(2, 3, 32, 32).double(), torch.tensor([1, 2])
    corrected, theirs = (
        closed_form(subject, images, labels, convention)
        for convention in ("corrected", "vilas2023")
    )
    assert not torch.allclose(corrected, theirs, rtol=0.1)


@pytest.mark.parametrize("variant", ["gap", "registers-layerscale-gap", "post-norm-gap"])
def test_a_model_without_cls_is_refused_before_anything_is_made(variant, make_shards):
    shards = [str(s) for s in make_shards((2,))]
    with pytest.raises(ModelError, match="has no CLS token"):
        prepare(config(variant, reduce=("attribution",)), shards)


def test_an_unknown_norm_is_named():
    subject = make_subject("attention-norm")
    subject.model.blocks[1].attn.norm = nn.RMSNorm(48)
    with pytest.raises(ModelError, match="Block 1 of toy passes attention through a RMSNorm"):
        require_attribution(subject, "toy")


def test_heads_are_kept_with_the_attribution_only():
    with pytest.raises(UsageError, match="add --reduce attribution"):
        config("cls", per_head=True)
    assert GAP["global_pool"] == "avg"


def read(store, path) -> np.ndarray:
    return np.asarray(zarr.open_array(str(store / path), mode="r")[...])


def stored(store) -> tuple[np.ndarray, np.ndarray]:
    """Relevance [N, L, G] and of heads [N, L, H, G] of a store, float64."""
    scale = 2.0 ** read(store, "attribution/exponent").astype(float)
    relevance = read(store, "attribution/relevance").astype(float) * scale[..., None]
    heads = read(store, "attribution/head_relevance").astype(float) * scale[..., None, None]
    return relevance, heads


@pytest.mark.parametrize("variant", ["cls", "distilled", "qk-norm"])
@pytest.mark.parametrize("convention", ["corrected", "vilas2023"])
def test_a_store_holds_autograds_numbers(variant, convention, make_shards, tmp_path):
    shards = [str(s) for s in make_shards((6, 5))]
    settings = config(
        variant, convention=convention, reduce=("attribution",), per_head=True, topk=0
    )
    extract(prepare(settings, shards), tmp_path / "store")
    assert verify(tmp_path / "store") == []
    relevance, heads = stored(tmp_path / "store")
    assert relevance.shape == (12, 3, 16)
    assert heads.shape == (12, 3, 3, 16)

    prepared = prepare_again(tmp_path / "store")
    [pictures] = read_pictures(prepared, 16)
    scorer = Scorer(prepared.subject, [], dtype=torch.float64, device="cpu", convention=convention)
    images, labels = scorer.images(pictures.pixels), pictures.targets.labels
    expected = by_autograd(scorer.model, images, labels, convention).numpy()
    places = pictures.targets.images.numpy()
    assert places.tolist() == list(range(11))
    # float16 rounds by 2^-11; the float32 forward pass moves a gradient by about 1e-5 of its block.
    size = np.abs(expected).max((2, 3))[..., None]
    slack = 1e-5 * size
    error = np.abs(relevance[places] - expected.sum(2))
    assert (error <= 2.0**-11 * np.abs(expected.sum(2)) + 3 * slack).all()
    error = np.abs(heads[places] - expected)
    assert (error <= 2.0**-11 * np.abs(expected) + slack[..., None]).all()
    assert np.isnan(relevance[11]).all()  # padding


def test_batch_size_changes_nothing_but_rounding(make_shards, tmp_path):
    shards = [str(s) for s in make_shards((7,))]
    found = []
    for batch_size in (1, 3, 7):
        settings = config("cls", reduce=("attribution",), per_head=True, batch_size=batch_size)
        extract(prepare(settings, shards), tmp_path / str(batch_size))
        found.append(stored(tmp_path / str(batch_size)))
    for relevance, heads in found[1:]:
        size = np.abs(found[0][1]).max((2, 3), keepdims=True)
        assert (np.abs(heads - found[0][1]) <= 2e-3 * size).all()
        assert (np.abs(relevance - found[0][0]) <= 2e-3 * size[:, :, 0]).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_models_in_16_bits_are_attributed_in_float32(dtype):
    subject = load_subject(config("cls"))
    targets = Targets(labels=torch.tensor([1, 2, 3]), images=torch.arange(3))
    pixels = torch.randint(
        0, 256, (3, 32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )

    def relevance(dtype):
        reducer = AttributionReducer(subject.model, subject.space.to(dtype=torch.float32))
        scorer = Scorer(subject, [reducer], dtype=dtype, device="cpu", convention="corrected")
        found = scorer.score(pixels, targets)
        assert found["attribution/relevance"].dtype == torch.float32
        assert found["attribution/exponent"].dtype == torch.int32
        return torch.ldexp(found["attribution/relevance"], found["attribution/exponent"][..., None])

    exact = relevance(torch.float32)
    ours = relevance(dtype)
    size = exact.abs().amax(2, keepdim=True)
    assert ((ours - exact).abs() / size).max() < (0.02 if dtype == torch.float16 else 0.15)
