"""Blocks through the fused kernel: which fit, when they are taken, and what they give."""

import numpy as np
import pytest
import torch
import zarr
from cpu_units import cases, needs_units_bfloat16
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from variants import SMALL, VARIANTS

from classlens.bench.fidelity import first_targets, read_pictures
from classlens.extractor.blocks import block_sites, full_attention
from classlens.extractor.config import ExtractConfig
from classlens.extractor.engine import choose_forward, choose_impl, make_scorer
from classlens.extractor.fused_blocks import FusedBlocks, fusable
from classlens.extractor.interventions import self_only
from classlens.extractor.models import load_subject
from classlens.extractor.prepare import prepare
from classlens.extractor.reducers import ranks
from classlens.extractor.run import extract
from classlens.extractor.schema import read_attributes
from classlens.kernels.class_scores import class_scores
from classlens.kernels.tiles import units_found
from classlens.kernels.vit_block_cpu import VitBlockCpu

WIDE = {**SMALL, "embed_dim": 96, "num_classes": 10}  # heads of 32
SITES = {"resid", "mid", "attn", "mlp", "key_mlp", "key_attn", "query", "key", "value"}


def wide(variant: str = "cls", **settings) -> ExtractConfig:
    name, extra, _ = VARIANTS[variant]
    arguments = {**WIDE, **extra, **settings.pop("model_args", {})}
    settings = {"weights": "random:3", "batch_size": 4, "dtype": "bfloat16", **settings}
    return ExtractConfig(model=name, model_args=arguments, **settings)


@pytest.mark.parametrize(
    ("arguments", "fits"),
    [
        ({}, True),
        ({"init_values": 0.1}, True),
        ({"qkv_bias": False}, True),
        ({"num_heads": 6}, False),  # heads of 16
        ({"embed_dim": 48}, False),
        ({"mlp_ratio": 1.5}, False),  # 144 neurons
        ({"qk_norm": True}, False),
        ({"scale_attn_norm": True}, False),
        ({"scale_mlp_norm": True}, False),
        ({"act_layer": "quick_gelu"}, False),
        ({"act_layer": "gelu_tanh"}, False),
    ],
)
def test_which_blocks_fit(arguments, fits):
    assert fusable(load_subject(wide(model_args=arguments)).model) is fits


def test_other_kinds_of_blocks_do_not_fit():
    assert not fusable(load_subject(wide("post-norm-gap")).model)
    model = VisionTransformer(32, 8, embed_dim=96, depth=2, num_heads=3, num_classes=10)
    assert fusable(model)
    model.blocks[1].mlp.act = nn.GELU(approximate="tanh")  # pyright: ignore
    assert not fusable(model)


@pytest.mark.parametrize("variant", ["cls", "registers-layerscale-gap"])
@pytest.mark.parametrize("attend", [full_attention, lambda q, k, v: self_only(q, k, v, prefix=1)])
@pytest.mark.parametrize(("units", "dtype"), cases())
def test_sites_are_those_of_the_block_but_for_rounding(variant, attend, units, dtype):
    off = {torch.bfloat16: 2.0**-7, torch.float32: 2.0**-20}[dtype]
    model = load_subject(wide(variant)).model.to(dtype)
    fused = FusedBlocks(model, units)
    x = torch.randn(2, 17, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.inference_mode():
        for block in model.blocks:
            expected = block_sites(block, x, SITES, attend)
            found = fused(block, x, SITES, attend)
            assert set(found) == set(expected) == SITES
            for name, site in expected.items():
                assert found[name].shape == site.shape
                # Sums in another order, whose rounding carries on through four products.
                scale = float(site.abs().max())
                torch.testing.assert_close(found[name], site, rtol=off, atol=off * scale)
            assert set(fused(block, x, {"mlp", "query"})) == {"resid", "mlp", "query"}
            x = expected["resid"]


def test_when_the_fused_blocks_are_taken(monkeypatch):
    found = {torch.bfloat16: "amx", torch.float32: "avx512"}
    monkeypatch.setattr("classlens.extractor.engine.units_found", found.get)
    subject, post_norm = load_subject(wide()), load_subject(wide("post-norm-gap"))
    assert choose_forward(wide(), subject, 5) == choose_impl(wide(), 5) == "amx"
    assert choose_forward(wide(compile=True), subject, 5) == "amx"
    assert choose_forward(wide(certify=True), subject, 5) == "amx"
    assert choose_impl(wide(certify=True), 5) == "torch"
    assert choose_forward(wide(compile=False), subject, 5) == "eager"
    assert choose_impl(wide(compile=False), 5) == "torch"
    float32 = wide(dtype="float32")
    assert choose_forward(float32, subject, 5) == choose_impl(float32, 5) == "avx512"
    assert choose_forward(wide(dtype="float16"), subject, 5) == "eager"
    assert choose_forward(wide("post-norm-gap"), post_norm, 5) == "eager"
    assert choose_forward(wide("post-norm-gap", compile=True), post_norm, 5) == "compiled"
    found.clear()
    assert choose_forward(wide(), subject, 5) == "eager"


@needs_units_bfloat16
def test_an_extraction_takes_them_and_says_so(make_shards, tmp_path, monkeypatch):
    shards, blocks = [str(s) for s in make_shards((9,))], []
    original = VitBlockCpu.after_attention

    def counted(self, *args, **kwargs):
        blocks.append(self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(VitBlockCpu, "after_attention", counted)
    prepared = prepare(wide(), shards)
    extract(prepared, tmp_path / "fused")
    assert len(set(blocks)) == 3
    assert read_attributes(tmp_path / "fused")["forward"] == units_found(torch.bfloat16)
    eager = prepare(wide(compile=False), shards)
    extract(eager, tmp_path / "eager")
    assert read_attributes(tmp_path / "eager")["forward"] == "eager"
    ranks = [
        np.asarray(zarr.open_array(str(tmp_path / name / "scores/rank"), mode="r")[...])
        for name in ("fused", "eager")
    ]
    assert np.abs(ranks[0].astype(int) - ranks[1]).mean() < 0.2  # of 10 classes


@pytest.mark.parametrize(
    ("variant", "convention", "settings", "fused"),
    [
        ("cls", "corrected", {}, True),
        ("cls", "corrected", {"streams": ("mid", "attn"), "topk": 3}, True),
        ("cls", "corrected", {"reduce": ("memories",)}, True),
        ("registers-layerscale-gap", "corrected", {}, True),
        ("registers-layerscale-gap", "vilas2023", {}, False),  # attn and mlp pass a norm
        ("cls", "corrected", {"certify": True}, False),
    ],
)
@pytest.mark.parametrize(("units", "dtype"), cases())
def test_which_ranks_the_blocks_find(
    make_shards, monkeypatch, units, dtype, variant, convention, settings, fused
):
    """And that they are those of the streams scored one by one."""
    monkeypatch.setattr("classlens.extractor.engine.units_found", lambda _: units)
    dtype = str(dtype).removeprefix("torch.")
    config = wide(variant, convention=convention, dtype=dtype, **settings)
    prepared = prepare(config, [str(s) for s in make_shards((3,))])
    pixels, labels = read_pictures(prepared, 3)
    scored = []
    monkeypatch.setattr(
        ranks, "class_scores", lambda *args, **kw: scored.append(args) or class_scores(*args, **kw)
    )
    scorer = make_scorer(prepared)
    results = scorer.score(pixels, first_targets(labels))
    assert bool(scored) is not fused
    scorer = make_scorer(prepared)
    monkeypatch.setattr(scorer, "_scoring", None)
    monkeypatch.setattr(scorer, "_sites_to_reduce", scorer.sites)
    one_by_one = scorer.score(pixels, first_targets(labels))
    assert len(scored) > 0
    assert set(results) == set(one_by_one)
    for path, values in one_by_one.items():
        torch.testing.assert_close(results[path], values, rtol=0, atol=0, equal_nan=True)


@needs_units_bfloat16
def test_labels_out_of_range_are_refused(make_shards):
    prepared = prepare(wide(), [str(s) for s in make_shards((3,))])
    pixels, _ = read_pictures(prepared, 3)
    with pytest.raises(ValueError, match=r"label 10 of image 1 is not in \[0, 10\)"):
        make_scorer(prepared).score(pixels, first_targets(torch.tensor([0, 10, 1])))
