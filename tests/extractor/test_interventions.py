"""Closed forms against dense attention and true removal in float64; stores of changed models."""

import json

import numpy as np
import pytest
import torch
import zarr
from click.testing import CliRunner
from PIL import Image
from samples import encoded
from torch.nn.attention import SDPBackend, sdpa_kernel
from variants import VARIANTS, config

from classlens.extractor import run
from classlens.extractor.blocks import block_sites, embed, walk
from classlens.extractor.commands import extract as extract_command
from classlens.extractor.commands import info
from classlens.extractor.config import ExtractConfig, parse_blocks
from classlens.extractor.engine import make_scorer
from classlens.extractor.errors import ConfigMismatchError, ModelError, UsageError
from classlens.extractor.interventions import (
    TokenRemoval,
    attend_to_kept,
    make_intervention,
    no_cls,
    no_cls_renormalised,
    self_only,
)
from classlens.extractor.models import load_subject, predict
from classlens.extractor.pictures import read_pictures
from classlens.extractor.prepare import prepare
from classlens.extractor.run import extract
from classlens.extractor.schema import KNOCKOUTS, REMOVALS, Layout, Status, read_layout
from classlens.extractor.store import verify
from classlens.kernels.bounds import rank_bracket

WITH_CLS = [name for name, (_, _, prefix) in VARIANTS.items() if "cls" in prefix]
KNOCKOUT_CASES = [
    (variant, kind)
    for kind in KNOCKOUTS
    for variant in (VARIANTS if kind == "self-only" else WITH_CLS)
]
EMPTY, FULL = 16 * [0], 16 * [255]


def read(store, path) -> np.ndarray:
    return np.asarray(zarr.open_array(str(store / path), mode="r")[...])


def float64_model(settings):
    subject = load_subject(settings)
    subject.model.double()
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()
    return subject, images


def dense_attention(module, x, change):
    """Attention with its matrix A [N, H, T, T] in the open, for ``change`` to edit in place."""
    N, T, _ = x.shape
    query, key, value = (
        part.reshape(N, T, module.num_heads, module.head_dim).transpose(1, 2)
        for part in module.qkv(x).chunk(3, dim=2)
    )
    query, key = module.q_norm(query), module.k_norm(key)
    A = (query @ key.transpose(2, 3) / module.head_dim**0.5).softmax(dim=3)
    change(A)
    return module.proj((A @ value).transpose(1, 2).reshape(N, T, -1))


def changes(kind, prefix):
    """What each knockout does to A, row by row."""

    def change(A):
        for t in range(prefix, A.shape[2]):
            if kind == "self-only":
                A[:, :, t] = 0
                A[:, :, t, t] = 1
            else:
                A[:, :, t, 0] = 0
            if kind == "no-cls-renormalised":
                A[:, :, t] /= A[:, :, t].sum(dim=2, keepdim=True)

    return change


@pytest.mark.parametrize(("variant", "kind"), KNOCKOUT_CASES)
@pytest.mark.parametrize("blocks", [None, (1,)])
def test_a_knockout_equals_the_edited_attention_matrix(variant, kind, blocks, monkeypatch):
    settings = config(variant, intervene=kind, intervene_blocks=blocks)
    subject, images = float64_model(settings)
    intervention = make_intervention(settings, subject)
    walked = walk(
        subject.model, images, "corrected", {"resid"}, block_sites, intervention.attends(None)
    )
    ours = [sites["resid"] for _, sites in walked]
    untouched = list(walk(subject.model, images, "corrected"))
    change, expected = changes(kind, len(subject.prefix_kinds)), []
    for index, block in enumerate(subject.model.blocks):
        block.register_forward_hook(lambda _, inputs, output: expected.append(output))
        if blocks is None or index in blocks:
            monkeypatch.setattr(
                block.attn,
                "forward",
                lambda x, module=block.attn, **_: dense_attention(module, x, change),
            )
    logits = subject.model(images)
    for block, (found, wanted) in enumerate(zip(ours, expected, strict=True)):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
        is_changed = blocks is None or block >= min(blocks)
        assert torch.equal(found, untouched[block][1]["resid"]) != is_changed
    torch.testing.assert_close(predict(subject.model, ours[-1]), logits, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KNOCKOUTS)
def test_prefix_rows_are_untouched(kind):
    settings = config("registers", intervene=kind)
    subject, images = float64_model(settings)
    x = embed(subject.model, images)
    [attend, *_] = make_intervention(settings, subject).attends(None)
    ours = block_sites(subject.model.blocks[0], x, {"key_attn"}, attend)["key_attn"]
    own = block_sites(subject.model.blocks[0], x, {"key_attn"})["key_attn"]
    torch.testing.assert_close(ours[:, :5], own[:, :5], rtol=1e-12, atol=1e-12)
    assert (ours[:, 5:] != own[:, 5:]).any(dim=2).all()


def some_kept(images, patches=16):
    """Kept tokens of which the first image has one and the second all."""
    kept = torch.rand(images, patches, generator=torch.Generator().manual_seed(1)) < 0.4
    kept[0], kept[1] = False, True
    kept[0, 5] = True
    return kept


@pytest.mark.parametrize("variant", VARIANTS)
def test_hidden_tokens_are_as_good_as_removed(variant):
    settings = config(variant, intervene="drop-context")
    subject, images = float64_model(settings)
    model, prefix, kept = subject.model, len(subject.prefix_kinds), some_kept(3)
    attends = make_intervention(settings, subject).attends(kept)
    walked = walk(model, images, "corrected", {"resid"}, block_sites, attends)
    ours = [sites["resid"] for _, sites in walked]
    logits = predict(model, ours[-1], kept)
    for n in range(3):
        there = torch.cat([torch.ones(prefix, dtype=torch.bool), kept[n]])
        x = embed(model, images[n : n + 1])[:, there]
        for block, found in zip(model.blocks, ours, strict=True):
            x = block(x)
            torch.testing.assert_close(found[n : n + 1, there], x, rtol=1e-10, atol=1e-10)
        expected = model.forward_head(model.norm(x))[0]
        torch.testing.assert_close(logits[n], expected, rtol=1e-10, atol=1e-10)


def test_a_hidden_token_that_overflows_stays_hidden():
    generator = torch.Generator().manual_seed(2)
    query, key, value = (torch.randn(2, 3, 17, 16, generator=generator) for _ in range(3))
    kept = torch.nn.functional.pad(some_kept(2), (1, 0), value=True)[:, None, None]
    expected = attend_to_kept(query, key, value, kept=kept)
    for bad in (float("nan"), float("inf")):
        spoilt = (part.masked_fill(~kept.mT, bad) for part in (key, value))
        assert torch.equal(attend_to_kept(query, *spoilt, kept=kept), expected)


def test_no_intervention_materialises_attention():
    # The fused implementation is the only one allowed; a mask or an odd shape could forbid it.
    generator = torch.Generator().manual_seed(2)
    query, key, value = (
        torch.randn(2, 17, 3, 16, generator=generator).transpose(1, 2) for _ in range(3)
    )
    kept = torch.nn.functional.pad(some_kept(2), (1, 0), value=True)[:, None, None]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        for attend in (self_only, no_cls, no_cls_renormalised):
            assert attend(query, key, value, prefix=1).shape == query.shape
        assert attend_to_kept(query, key, value, kept=kept).shape == query.shape
        with pytest.raises(RuntimeError, match="No available kernel"):
            torch.nn.functional.scaled_dot_product_attention(
                query, key, value, attn_mask=kept.float().requires_grad_()
            )


@pytest.mark.parametrize("kind", ["no-cls", "drop-context"])
def test_compiled_blocks_attend_alike(kind, make_shards):
    # One compilation serves all batches.
    pytest.importorskip("torch._inductor")
    shards = [str(s) for s in make_shards((6,))]
    results = {}
    torch._dynamo.reset()
    for compile in (False, True):
        prepared = prepare(config("cls", intervene=kind, compile=compile, batch_size=3), shards)
        scorer = make_scorer(prepared)
        with torch._dynamo.config.patch(recompile_limit=3, fail_on_recompile_limit_hit=True):
            results[compile] = [
                scorer.score(batch.pixels, batch.targets) for batch in read_pictures(prepared, 3)
            ]
    for eager, compiled in zip(results[False], results[True], strict=True):
        difference = eager["scores/label_logit"] - compiled["scores/label_logit"]
        assert difference.abs().max() < 1e-4


def emptied(samples):
    """The first image's mask covers nothing, the second's everything."""
    for sample, mask_id in zip(samples, (0, 301), strict=False):
        pixels = np.zeros((40, 48, 3), np.uint8)
        pixels[..., 0], pixels[..., 1] = mask_id % 256, mask_id // 256
        sample.members["mask.png"] = encoded(Image.fromarray(pixels), "PNG")


CASES = [
    ("cls", {"intervene": "no-cls", "intervene_blocks": (0, 2)}),
    ("gap", {"intervene": "self-only"}),
    ("cls", {"intervene": "drop-context", "certify": True}),
    ("registers-layerscale-gap", {"intervene": "drop-class", "class_fraction": 0.25}),
    ("cls", {"intervene": "drop-context", "dtype": "bfloat16"}),
]


@pytest.mark.parametrize(("variant", "changed"), CASES)
def test_every_stored_number_is_that_of_the_changed_model(make_shards, tmp_path, variant, changed):
    settings = config(variant, batch_size=16, topk=2, **changed)
    prepared = prepare(settings, [str(s) for s in make_shards((9,), change=emptied)])
    out = tmp_path / "store"
    extract(prepared, out)
    [batch] = read_pictures(prepared, 16)
    scorer = make_scorer(prepared)
    with torch.inference_mode():
        walked = list(
            walk(
                scorer.model,
                scorer.images(batch.pixels),
                "corrected",
                scorer.sites,
                block_sites,
                make_intervention(settings, prepared.subject).attends(batch.targets.kept),
            )
        )
        logits = predict(scorer.model, walked[-1][1]["resid"], batch.targets.kept)
    layout = read_layout(out)
    places = batch.targets.images.numpy()
    there = np.ones((len(places), layout.tokens), bool)
    if settings.removes_tokens:
        covered = read(out, "images/mask_fraction")[places]
        is_class = covered >= 255 * settings.class_fraction
        there[:, layout.prefix :] = is_class if settings.intervene == "drop-context" else ~is_class
        assert not there.all()
        np.testing.assert_array_equal(there[:, layout.prefix :], batch.targets.kept)
    rank = read(out, "scores/rank")[places]
    for path in ("scores/rank", "scores/top1", "scores/top2"):
        assert ((read(out, path)[places] == 65_535) == ~there[:, None, None]).all()
    for path in ("scores/label_logit", "scores/label_logprob"):
        assert (np.isnan(read(out, path)[places]) == ~there[:, None, None]).all()
    dtype = scorer.dtype
    for block, sites in walked:
        for place, stream in enumerate(settings.streams):
            low, high = rank_bracket(
                sites[stream].double(),
                prepared.subject.space,
                batch.targets.labels,
                dtype,
            )
            found = rank[:, block, place]
            inside = (low.numpy() <= found) & (found <= high.numpy())
            assert (inside | ~there).all()
    predictions = read(out, "images/prediction")[places]
    assert predictions.tolist() == logits.float().argmax(1).tolist()
    assert verify(out) == []


@pytest.mark.parametrize("kind", REMOVALS)
def test_an_image_without_image_tokens_is_scored_where_a_prefix_token_predicts(
    make_shards, tmp_path, kind
):
    shards = [str(s) for s in make_shards((6,), change=emptied)]
    emptied_image = REMOVALS.index(kind)  # nothing is class in image 0, everything in image 1
    of_cls, of_gap = tmp_path / "cls", tmp_path / "gap"
    assert extract(prepare(config("cls", intervene=kind), shards), of_cls).status == {"ok": 6}
    rank = read(of_cls, "scores/rank")
    assert (rank[:, :, :, 0] < 10).all()
    assert (rank[emptied_image, :, :, 1:] == 65_535).all()
    assert (rank[1 - emptied_image] < 10).all()
    summary = extract(prepare(config("gap", intervene=kind), shards), of_gap)
    assert summary.status == {"ok": 5, "no_tokens": 1}
    assert summary.bad_images == 1
    assert read(of_gap, "images/status").tolist().index(Status.NO_TOKENS) == emptied_image
    assert (read(of_gap, "scores/rank")[emptied_image] == 65_535).all()
    assert read(of_gap, "images/prediction")[emptied_image] == -1
    covered = read(of_gap, "images/mask_fraction")[emptied_image].tolist()
    assert covered == (EMPTY, FULL)[emptied_image]


def test_only_tokens_that_remain_can_overflow(make_shards, tmp_path, monkeypatch):
    kept_by_image = []

    def overflowing(model, images, convention, wanted, sites_of, attends):
        kept = attends[0].keywords["kept"][:, 0, 0]
        kept_by_image.extend(kept)
        for block, sites in walk(model, images, convention, wanted, sites_of, attends):
            for n in range(len(images)):
                hidden = [t for t in range(17) if not kept[n, t]]
                remaining = [t for t in range(1, 17) if kept[n, t]]
                sites["attn"][n, (remaining if n == 2 else hidden)[0]] = float("nan")
            yield block, sites

    monkeypatch.setattr("classlens.extractor.scorer.walk", overflowing)
    prepared = prepare(config("cls", intervene="drop-context"), [str(s) for s in make_shards((4,))])
    summary = extract(prepared, tmp_path / "store")
    assert summary.status == {"ok": 3, "nonfinite": 1}
    assert read(tmp_path / "store", "images/status").tolist() == [0, 0, Status.NONFINITE, 0]
    assert len(kept_by_image) == 4


@pytest.mark.parametrize("kind", ["no-cls", "drop-class"])
def test_a_run_resumes_and_another_intervention_does_not(make_shards, tmp_path, monkeypatch, kind):
    shards = [str(s) for s in make_shards((4, 4))]
    settings = config("cls", intervene=kind)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    extract(prepare(settings, shards), whole)
    stage, staged = run.stage_results, []

    def failing(*arguments):
        if staged:
            raise KeyboardInterrupt
        staged.append(stage(*arguments))

    with monkeypatch.context() as patched:
        patched.setattr(run, "stage_results", failing)
        with pytest.raises(KeyboardInterrupt):
            extract(prepare(settings, shards), parts)
    assert extract(prepare(settings, shards), parts).scored == 4
    for path in ("scores/rank", "scores/label_logit", "scores/top1", "images/prediction"):
        np.testing.assert_array_equal(read(parts, path), read(whole, path))
    others = [{}, {"intervene": "self-only"}]
    others += [{"intervene": kind, "intervene_blocks": (1,)}] if kind == "no-cls" else []
    others += [{"intervene": kind, "class_fraction": 0.25}] if kind == "drop-class" else []
    for other in others:
        with pytest.raises(ConfigMismatchError, match=r"interven|class_fraction"):
            extract(prepare(config("cls", **other), shards), whole)


def test_settings_that_do_not_fit_are_named(make_shards):
    with pytest.raises(UsageError, match="--intervene takes one of self-only, no-cls"):
        config("cls", intervene="no-mlp")
    with pytest.raises(UsageError, match="--blocks says in which blocks"):
        config("cls", intervene="drop-class", intervene_blocks=(0,))
    with pytest.raises(UsageError, match="--blocks says in which blocks"):
        config("cls", intervene_blocks=(0,))
    for fraction in (0.0, 1.5, float("nan")):
        with pytest.raises(UsageError, match="--class-fraction is"):
            config("cls", intervene="drop-class", class_fraction=fraction)
    with pytest.raises(UsageError, match="--class-fraction is for token removal"):
        config("cls", intervene="no-cls", class_fraction=0.25)
    with pytest.raises(UsageError, match="leave those out"):
        config("cls", intervene="drop-class", cuda_graph=True, device="cuda")
    with pytest.raises(UsageError, match="leave those out"):
        config("cls", intervene="drop-class", reduce=("memories",))
    shards = [str(s) for s in make_shards((2,))]
    with pytest.raises(UsageError, match=r"names block 3, .* has the blocks 0 to 2"):
        prepare(config("cls", intervene="no-cls", intervene_blocks=(0, 3)), shards)
    for kind in ("no-cls", "no-cls-renormalised"):
        with pytest.raises(ModelError, match="has no CLS token"):
            prepare(config("registers-layerscale-gap", intervene=kind), shards)
    bare = [str(s) for s in make_shards((2,), mask=False)]
    with pytest.raises(UsageError, match=r"shard-0.tar has none; give shards with mask.png"):
        prepare(config("cls", intervene="drop-context"), bare)


def test_blocks_are_numbers_and_ranges():
    assert parse_blocks("3") == (3,)
    assert parse_blocks("0-2, 8,1") == (0, 1, 2, 8)
    for text in ("", "a", "2-1", "-1", "1-", "1;2", "²", "0-99999"):
        with pytest.raises(UsageError, match="--blocks takes"):
            parse_blocks(text)


def test_class_labelled_is_at_least_the_fraction():
    covered = np.array([0, 127, 128, 255], np.uint8)
    of_class = TokenRemoval(keeps_class=True, class_fraction=0.5, may_empty=True)
    of_context = TokenRemoval(keeps_class=False, class_fraction=0.5, may_empty=True)
    assert of_class.kept(covered).tolist() == [False, False, True, True]
    assert of_context.kept(covered).tolist() == [True, True, False, False]
    exact = TokenRemoval(keeps_class=True, class_fraction=0.2, may_empty=True)
    assert exact.kept(np.array([50, 51], np.uint8)).tolist() == [False, True]


def test_stores_from_before_there_were_interventions_are_read():
    layout = Layout(4, 4, 3, ("resid",), ("cls",), (2, 2), 10, 1, False)
    old = layout.to_json()
    del old["tokens_removed"]
    assert Layout.from_json(old) == layout
    settings = config("cls")
    fields = settings.to_json()
    for name in ("intervene", "intervene_blocks", "class_fraction"):
        del fields[name]
        assert name not in settings.content()
    assert ExtractConfig.from_json(fields) == settings
    changed = config("cls", intervene="no-cls", intervene_blocks=(0, 1))
    assert ExtractConfig.from_json(json.loads(json.dumps(changed.to_json()))) == changed


def test_the_command_takes_blocks_and_info_tells_them(make_shards, tmp_path):
    shards = [str(s) for s in make_shards((3,))]
    out = str(tmp_path / "store")
    arguments = [*shards, "--model", "vit_tiny_patch16_224", "--weights", "random", "--out", out]
    small = ("img_size=32", "patch_size=8", "embed_dim=48", "depth=3", "num_heads=3")
    for argument in (*small, "num_classes=10"):
        arguments += ["--model-arg", argument]
    arguments += ["--intervene", "no-cls", "--blocks", "0-1", "--device", "cpu"]
    result = CliRunner().invoke(extract_command, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    told = CliRunner().invoke(info, [out], catch_exceptions=False).output
    assert "intervened  no-cls in blocks 0, 1" in told
