"""Stored memories against a plain implementation; what they do and do not depend on."""

import io
from dataclasses import replace
from itertools import product

import numpy as np
import polars as pl
import pytest
import torch
import zarr
from naive_memories import naive_control, naive_flags, unpacked
from PIL import Image
from variants import VARIANTS, config

from classlens.extractor import run
from classlens.extractor.blocks import walk
from classlens.extractor.errors import ModelError
from classlens.extractor.models import load_subject
from classlens.extractor.prepare import prepare
from classlens.extractor.reducers import memories
from classlens.extractor.reducers.memories import MemoriesReducer, control_classes
from classlens.extractor.reducers.protocol import Targets
from classlens.extractor.reducers.ranks import RanksReducer
from classlens.extractor.run import extract
from classlens.extractor.schema import SUBLAYERS, Status
from classlens.extractor.scorer import Scorer
from classlens.extractor.store import verify
from classlens.extractor.value_vectors import value_tables
from classlens.kernels.bounds import logit_error
from classlens.kernels.class_scores import class_scores

SITES = frozenset(("attn", "mlp", "key_attn", "key_mlp"))


def read(store, path="memories/flags") -> np.ndarray:
    return np.asarray(zarr.open_array(str(store / path), mode="r")[...])


def activations(settings, store, shard):
    """The model, its sites [block][site] in the run's own float32, and the manifest."""
    subject = load_subject(settings)
    scorer = Scorer(subject, [], dtype=torch.float32, device="cpu", convention=settings.convention)
    manifest = pl.read_parquet(store / "manifest.parquet")
    pixels = []
    with shard.open("rb") as file:
        for row in manifest.iter_rows(named=True):
            file.seek(row["offset"])
            image = Image.open(io.BytesIO(file.read(row["size"]))).convert("RGB")
            pixels.append(np.asarray(subject.geometry.crop(image)))
    images = scorer.images(torch.from_numpy(np.stack(pixels)))
    with torch.inference_mode():
        blocks = [sites for _, sites in walk(scorer.model, images, settings.convention, SITES)]
    return subject, blocks, manifest


def weights(subject, block, sublayer):
    """Value vectors [D, F] straight from the state dict, as float64."""
    name = "attn.proj" if sublayer == "attn" else "mlp.fc2"
    return subject.model.state_dict()[f"blocks.{block}.{name}.weight"].double().numpy()


def top_classes(x, space):
    """Exact logits [N, T, C], and whether rounding in float32 cannot change the first [N, T]."""
    parts = [logit_error(image, space, torch.float32) for image in x]
    logits, error = (torch.stack(part) for part in zip(*parts, strict=True))
    best = logits.topk(2).values
    return logits.numpy(), (best[..., 0] - best[..., 1] > 2 * error.amax(dim=-1)).numpy()


@pytest.mark.parametrize("convention", ["corrected", "vilas2023"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_flag_equals_the_definition(make_shards, tmp_path, variant, convention):
    # One batch holds all images, so that the activations are the run's own to the last bit.
    settings = config(variant, batch_size=16, reduce=("memories",), convention=convention)
    [shard] = make_shards((6,))
    out = tmp_path / "store"
    assert extract(prepare(settings, [str(shard)]), out).status == {"ok": 6}
    subject, blocks, manifest = activations(settings, out, shard)
    embedding = subject.model.state_dict()["head.weight"].double().numpy()
    flags = unpacked(read(out))
    seen = {name: set() for name in flags}
    compared = 0
    for block, (place, sublayer) in product(range(subject.blocks), enumerate(SUBLAYERS)):
        sites, values = blocks[block], weights(subject, block, sublayer)
        logits, top1_clear = top_classes(sites[sublayer], subject.space)
        for n, row in enumerate(manifest.iter_rows(named=True)):
            control = naive_control(row["image"], row["label"], 10)
            for t in range(logits.shape[1]):
                expected = naive_flags(
                    sites[f"key_{sublayer}"][n, t].double().tolist(),
                    embedding,
                    values,
                    logits[n, t].argmax(),
                    row["label"],
                    control,
                )
                if not top1_clear[n, t]:
                    del expected["composed"]
                else:
                    compared += 1
                for name, value in expected.items():
                    assert flags[name][n, block, place, t] == value, (name, n, block, sublayer, t)
                    seen[name].add(value)
    assert compared > 0.9 * read(out).size
    assert all(values == {False, True} for values in seen.values())
    assert verify(out) == []


def test_ties_go_to_the_lower_index():
    """Small integers, so that products tie in masses and are exact."""
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randint(-1, 2, (7, 4), generator=generator).double()
    values = torch.randint(-1, 2, (4, 12), generator=generator).double()
    tables = value_tables(embedding, values, "cpu")
    products = (embedding @ values).numpy()
    for c in range(7):
        assert tables.values[c].tolist() == np.argsort(-products[c], kind="stable")[:5].tolist()
    for j in range(12):
        expected = np.argsort(-products[:, j], kind="stable")[:5]
        assert tables.classes[j].tolist() == expected.tolist()


def test_fewer_classes_and_vectors_than_are_kept():
    tables = value_tables(torch.eye(3).double(), torch.eye(3)[:, :2].double(), "cpu")
    assert tables.values.tolist() == [[0, 1], [1, 0], [0, 1]]
    assert tables.classes.tolist() == [[0, 1, 2], [1, 0, 2]]


def test_the_control_is_another_class_and_all_are_drawn():
    images = torch.arange(20_000)
    labels = images % 10
    drawn = control_classes(Targets(labels, images), 10)
    assert not (drawn == labels).any()
    steps = torch.bincount((drawn - labels) % 10, minlength=10)[1:].double()
    expected = len(images) / 9
    assert ((steps - expected).abs() < 5 * expected**0.5).all()
    some = drawn[:50].tolist()
    assert some == [naive_control(i, i % 10, 10) for i in range(50)]
    turned = control_classes(Targets(labels.flip(0), images.flip(0)), 10)
    assert torch.equal(turned.flip(0), drawn)
    huge = torch.tensor([2**31, 2**40])
    assert not (control_classes(Targets(torch.zeros(2).long(), huge), 2) == 0).any()


def test_flags_do_not_depend_on_the_batch_size(make_shards, tmp_path):
    """Other batches round otherwise, which seldom moves a flag; another control would half."""
    shards = [str(s) for s in make_shards((5, 4))]
    stores = []
    for size in (16, 2):
        stores.append(tmp_path / f"store-{size}")
        settings = config("registers", reduce=("memories",), batch_size=size)
        extract(prepare(settings, shards), stores[-1])
    one, other = map(read, stores)
    assert (one == other).mean() > 0.999


@pytest.mark.parametrize(
    ("settings", "projected"),
    [
        ({}, 0),
        ({"streams": ("mlp", "resid")}, 1),
        ({"streams": ("resid",)}, 2),
        ({"topk": 0}, 2),
        ({"topk": 3}, 0),
        ({"certify": True, "streams": ("attn",)}, 1),
    ],
)
def test_no_projection_is_paid_twice(make_shards, tmp_path, monkeypatch, settings, projected):
    calls = []

    def counted(*arguments, **options):
        calls.append(options)
        return class_scores(*arguments, **options)

    monkeypatch.setattr(memories, "class_scores", counted)
    shards = [str(s) for s in make_shards((4,))]
    settings = config("cls", reduce=("memories",), **settings)
    extract(prepare(settings, shards), tmp_path / "store")
    assert len(calls) == 3 * projected
    plain = tmp_path / "plain"
    monkeypatch.undo()
    extract(prepare(config("cls", reduce=("memories",)), shards), plain)
    assert np.array_equal(read(tmp_path / "store"), read(plain))


def test_ranks_are_those_of_a_run_without_memories(make_shards, tmp_path):
    shards = [str(s) for s in make_shards((4,))]
    extract(prepare(config("cls", reduce=("memories",)), shards), tmp_path / "with")
    extract(prepare(config("cls"), shards), tmp_path / "without")
    assert not (tmp_path / "without/memories").exists()
    for path in ("scores/rank", "scores/top1", "scores/label_logit", "images/prediction"):
        assert np.array_equal(read(tmp_path / "with", path), read(tmp_path / "without", path))


@pytest.mark.parametrize("site", ["key_mlp", "key_attn", "mlp"])
def test_activations_that_overflow_are_reported_not_stored(
    make_shards, tmp_path, monkeypatch, site
):
    def overflowing(model, images, convention, wanted, *others):
        for block, sites in walk(model, images, convention, wanted, *others):
            if block == 2:  # in the last block nothing later would show it
                sites[site][1, 2, 3] = float("nan")
            yield block, sites

    monkeypatch.setattr("classlens.extractor.scorer.walk", overflowing)
    settings = config("cls", reduce=("memories",), streams=("attn",))
    summary = extract(prepare(settings, [str(s) for s in make_shards((8,))]), tmp_path / "store")
    assert summary.status == {"ok": 6, "nonfinite": 2}
    flags = read(tmp_path / "store")
    assert (flags[[1, 5]] == 255).all()
    assert (flags[[0, 2, 3, 4, 6, 7]] < 32).all()
    assert read(tmp_path / "store", "images/status")[1] == Status.NONFINITE


def test_bad_images_keep_the_fill(make_shards, tmp_path):
    def cut(samples):
        samples[1].members["jpg"] = b"no picture"

    shards = [str(s) for s in make_shards((3, 2), change=cut)]
    extract(prepare(config("gap", reduce=("memories",)), shards), tmp_path / "store")
    flags = read(tmp_path / "store")
    assert flags.shape == (6, 3, 2, 16)
    assert (flags[[1, 5]] == 255).all()  # undecodable, and padding
    assert verify(tmp_path / "store") == []


def test_a_killed_run_is_finished_to_the_same_flags(make_shards, tmp_path, monkeypatch):
    shards = [str(s) for s in make_shards((4, 4))]
    settings = config("cls", reduce=("memories",))
    stage_results, staged = run.stage_results, []

    def failing(*arguments):
        staged.append(arguments)
        if len(staged) == 2:
            raise KeyboardInterrupt
        stage_results(*arguments)

    monkeypatch.setattr(run, "stage_results", failing)
    with pytest.raises(KeyboardInterrupt):
        extract(prepare(settings, shards), tmp_path / "store")
    assert extract(prepare(settings, shards), tmp_path / "store").scored == 4
    extract(prepare(settings, shards), tmp_path / "whole")
    assert np.array_equal(read(tmp_path / "store"), read(tmp_path / "whole"))


def test_models_without_memories_are_refused_before_the_run(make_shards):
    shards = [str(s) for s in make_shards((2,))]
    gated = replace(config("cls", reduce=("memories",)), model="vit_giant_patch14_dinov2")
    with pytest.raises(ModelError, match=r"Block 0 of .* has a GluMlp, .* without --reduce"):
        prepare(gated, shards)
    single = config("cls", reduce=("memories",))
    single.model_args["num_classes"] = 1
    with pytest.raises(ModelError, match="a single class"):
        prepare(single, shards)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_take_the_top_of_their_own_coefficients(dtype):
    """Coefficients of 16 bits tie often; the lower index counts, whatever computes it."""
    subject = load_subject(config("cls"))
    embedding, space = subject.embedding(), subject.space.to(dtype=torch.float32)
    labels, images = torch.tensor([3, 4, 5]), torch.arange(3)
    ranks = RanksReducer(space, ("attn", "mlp"), 1)
    reducer = MemoriesReducer.of(
        subject.model, embedding, space, streams=("attn", "mlp"), impl="torch"
    )
    scorer = Scorer(subject, [], dtype=dtype, device="cpu", convention="corrected")
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8, generator=generator)
    targets = Targets(labels, images)
    with torch.inference_mode():
        _, sites = next(walk(scorer.model, scorer.images(pixels), "corrected", SITES))
        found = ranks.for_batch(targets)(0, sites)
        flags = reducer.for_batch(targets)(0, sites | found)["memories/flags"].numpy()
    exact = load_subject(config("cls"))
    for (place, sublayer), n, t in product(enumerate(SUBLAYERS), range(3), range(17)):
        expected = naive_flags(
            sites[f"key_{sublayer}"][n, t].double().tolist(),
            embedding.numpy(),
            weights(exact, 0, sublayer),
            found["scores/top1"][n, place, t],
            int(labels[n]),
            naive_control(n, int(labels[n]), 10),
        )
        assert {k: bool(v) for k, v in unpacked(flags[n, place, t]).items()} == expected
