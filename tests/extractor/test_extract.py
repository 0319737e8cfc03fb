import io

import numpy as np
import polars as pl
import pytest
import torch
import zarr
from cpu_units import cases
from PIL import Image
from samples import Sample, encoded, picture
from variants import SMALL, VARIANTS, config

from classlens.extractor import run
from classlens.extractor.blocks import walk
from classlens.extractor.engine import choose_forward, choose_impl
from classlens.extractor.errors import ConfigMismatchError, ShardError, UsageError
from classlens.extractor.models import load_subject
from classlens.extractor.plan import make_plan
from classlens.extractor.prepare import prepare
from classlens.extractor.run import extract
from classlens.extractor.schema import STREAMS, Status, read_attributes, read_layout
from classlens.extractor.scorer import DTYPES, Scorer
from classlens.extractor.store import verify
from classlens.kernels.bounds import rank_bracket
from classlens.kernels.reference import class_scores_reference, logits_reference


def read(store, path) -> np.ndarray:
    return np.asarray(zarr.open_array(str(store / path), mode="r")[...])


def activations(settings, store, shards):
    """Sites of the store's images, computed from the shards once more in the run's dtype."""
    subject = load_subject(settings)
    dtype = DTYPES[settings.dtype]
    scorer = Scorer(
        subject,
        [],
        dtype=dtype,
        device="cpu",
        convention=settings.convention,
        forward=choose_forward(settings, subject, 1),
    )
    manifest = pl.read_parquet(store / "manifest.parquet")
    pixels = []
    for unit in make_plan(shards).units:
        with unit.path.open("rb") as file:
            for row in manifest.filter(pl.col("unit") == unit.index).iter_rows(named=True):
                file.seek(row["offset"])
                image = Image.open(io.BytesIO(file.read(row["size"]))).convert("RGB")
                pixels.append(np.asarray(subject.geometry.crop(image)))
    batches = torch.from_numpy(np.stack(pixels))
    sites: dict[tuple[int, str], torch.Tensor] = {}
    with torch.inference_mode():
        for block, found in scorer.walk(batches, wanted=frozenset(STREAMS)):
            sites |= {(block, stream): x for stream, x in found.items()}
    return subject, manifest, sites


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_stored_number_equals_the_specification(make_shards, tmp_path, variant):
    # One batch holds all images, so that the activations are the run's own to the last bit.
    settings = config(variant, topk=2, batch_size=16, streams=("attn", "resid", "mid", "mlp"))
    check_store(settings, make_shards((9,)), tmp_path / "store")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_stored_number_equals_the_specification_in_16_bits(make_shards, tmp_path, dtype):
    check_store(config("cls", batch_size=16, dtype=dtype), make_shards((9,)), tmp_path / "store")


@pytest.mark.parametrize(("units", "dtype"), cases())
def test_every_stored_number_equals_the_specification_of_fused_blocks(
    make_shards, tmp_path, monkeypatch, units, dtype
):
    monkeypatch.setattr("classlens.extractor.engine.units_found", lambda _: units)
    arguments = {**SMALL, "embed_dim": 96, "num_classes": 10}  # heads of 32, which it takes
    dtype = str(dtype).removeprefix("torch.")
    settings = config("cls", batch_size=16, dtype=dtype, model_args=arguments)
    check_store(settings, make_shards((9,)), tmp_path / "store")
    assert read_attributes(tmp_path / "store")["forward"] == units


def check_store(settings, shards, out):
    summary = extract(prepare(settings, [str(s) for s in shards]), out)
    assert summary.status == {"ok": 9}
    subject, manifest, sites = activations(settings, out, shards)
    labels = torch.from_numpy(manifest["label"].to_numpy().copy()).long()
    rank, logit = read(out, "scores/rank"), read(out, "scores/label_logit")
    logprob, top1 = read(out, "scores/label_logprob"), read(out, "scores/top1")
    split = choose_impl(settings, 9) == "amx"
    half = 2.0**-11 if settings.dtype == "float32" else 2.0**-7  # of float16 or of bfloat16 weights
    for block in range(subject.blocks):
        for place, stream in enumerate(settings.streams):
            x = sites[block, stream].double()
            low, high = rank_bracket(
                x,
                subject.space,
                labels,
                DTYPES[settings.dtype],
                split=split,
            )
            ours = torch.from_numpy(rank[:, block, place].astype(np.int32))
            assert ((low <= ours) & (ours <= high)).all()
            logits = logits_reference(x, subject.space)
            label_logit = logits.gather(2, labels[:, None, None].expand(*x.shape[:2], 1))[..., 0]
            expected = label_logit.numpy()
            scale = np.abs(logits.numpy()).max(axis=2)
            slack = half * np.maximum(scale, 1) * 1.1 + 1e-5
            assert (np.abs(logit[:, block, place] - expected) <= slack).all()
            expected = (label_logit - logits.logsumexp(2)).numpy()
            assert (np.abs(logprob[:, block, place] - expected) <= 3 * slack).all()
            best = logits.gather(2, torch.from_numpy(top1[:, block, place].astype(int))[..., None])
            assert (logits.amax(2) - best[..., 0] <= 2 * torch.from_numpy(slack)).all()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_certified_ranks_are_those_of_float64(make_shards, tmp_path, dtype):
    settings = config("cls", batch_size=16, dtype=dtype, certify=True)
    shards, out = make_shards((9,)), tmp_path / "store"
    summary = extract(prepare(settings, [str(s) for s in shards]), out)
    subject, manifest, sites = activations(settings, out, shards)
    labels = torch.from_numpy(manifest["label"].to_numpy().copy()).long()
    rank = read(out, "scores/rank")
    for block in range(subject.blocks):
        for place, stream in enumerate(settings.streams):
            exact = class_scores_reference(
                sites[block, stream], subject.space, labels, topk=0, dtype=torch.float64
            )
            assert (rank[:, block, place] == exact.rank.numpy()).all()
    recomputed = read(out, "scores/recomputed")
    assert summary.recomputed_share == recomputed.sum() / rank.size
    if dtype == "bfloat16":  # its products are made in float32, so that few are open
        assert summary.recomputed_share < 0.1


def test_images_labels_masks_and_predictions_are_rows(make_shards, tmp_path):
    settings = config("registers-layerscale-gap", batch_size=16)
    shards = make_shards((7, 5))
    out = tmp_path / "store"
    extract(prepare(settings, [str(shards[0].parent)]), out)
    layout = read_layout(out)
    assert (layout.images, layout.unit_images, layout.prefix, layout.patches) == (14, 7, 4, 16)
    assert read(out, "images/label").tolist() == [
        *range(7),
        *(i % 10 for i in range(7, 12)),
        -1,
        -1,
    ]
    assert read(out, "images/status").tolist() == [0] * 12 + [Status.ABSENT] * 2
    covered = read(out, "images/mask_fraction")
    assert ((covered[:12] > 0).any(1) & (covered[:12] < 255).any(1)).all()
    subject, manifest, _ = activations(settings, out, shards)
    predictions = read(out, "images/prediction")[manifest["image"].to_numpy()]
    assert ((predictions >= 0) & (predictions < 10)).all()
    assert verify(out) == []
    attributes = read_attributes(out)
    assert attributes["config"]["model"] == settings.model
    assert attributes["fingerprint"]["weights_sha256"] == subject.weights_sha256


def damage(samples: list[Sample]) -> None:
    samples[0].members["jpg"] = samples[0].members["jpg"][:300]  # cut
    samples[1].members["jpg"] = b"no picture"
    samples[2].members["jpg"] = encoded(picture(2, (70, 60)))  # mask of another size
    samples[3].members["cls"] = b"10"  # there are 10 classes, 0..9
    samples[4].members["cls"] = b"cat"
    del samples[5].members["mask.png"]
    samples[6].members["mask.png"] = b"\x89PNG but not really"
    samples[7].members["jpg"] = encoded(picture(7, (400, 300)))
    samples[8].members["jpg"] = encoded(picture(8, (1, 4000)))  # huge only once it is resized


BAD = [
    Status.UNDECODABLE,
    Status.UNDECODABLE,
    Status.MASK_UNDECODABLE,
    Status.LABEL_INVALID,
    Status.LABEL_INVALID,
    Status.MASK_MISSING,
    Status.MASK_UNDECODABLE,
    Status.TOO_LARGE,
    Status.TOO_LARGE,
]


def test_bad_images_are_rows_with_a_status_and_the_others_are_untouched(make_shards, tmp_path):
    settings = config("cls", max_pixels=100_000)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    extract(prepare(settings, [str(s) for s in make_shards((13,))]), whole)
    summary = extract(
        prepare(settings, [str(s) for s in make_shards((13,), change=damage)]), broken
    )
    assert read(broken, "images/status").tolist() == [*BAD, 0, 0, 0, 0]
    assert summary.bad_images == 9
    assert summary.status["ok"] == 4
    rank = read(broken, "scores/rank")
    assert (rank[:9] == 65_535).all()
    assert np.isnan(read(broken, "scores/label_logit")[:9]).all()
    low = read(whole, "scores/rank")[9:].astype(int)
    assert np.abs(rank[9:].astype(int) - low).max() <= 1  # batched otherwise, rounded otherwise
    assert verify(broken) == []


def test_activations_that_overflow_are_reported_not_stored(make_shards, tmp_path, monkeypatch):
    def overflowing(model, images, convention, *others):
        for block, sites in walk(model, images, convention):
            sites["attn"][1, 2, 3] = float("inf")  # of the second image of each batch
            yield block, sites

    monkeypatch.setattr("classlens.extractor.scorer.walk", overflowing)
    summary = extract(
        prepare(config("cls"), [str(s) for s in make_shards((8,))]), tmp_path / "store"
    )
    assert summary.status == {"ok": 6, "nonfinite": 2}
    assert (read(tmp_path / "store", "scores/rank")[[1, 5]] == 65_535).all()


def test_resume_scores_only_what_is_missing(make_shards, tmp_path, monkeypatch):
    shards = [str(s) for s in make_shards((4, 4, 4))]
    out = tmp_path / "store"
    scored = 0
    stage_results = run.stage_results

    def failing(*arguments):
        nonlocal scored
        scored += 1
        if scored == 2:
            raise KeyboardInterrupt
        stage_results(*arguments)

    monkeypatch.setattr(run, "stage_results", failing)
    with pytest.raises(KeyboardInterrupt):
        extract(prepare(config("cls"), shards), out)
    summary = extract(prepare(config("cls"), shards), out)
    assert (summary.scored, summary.images, summary.units_committed) == (8, 12, 3)
    again = extract(prepare(config("cls"), shards), out)
    assert (again.scored, again.images_per_s) == (0, 0.0)
    assert verify(out) == []


def test_speed_settings_resume_and_content_settings_do_not(make_shards, tmp_path):
    shards = [str(s) for s in make_shards((3,))]
    extract(prepare(config("cls"), shards), tmp_path / "store")
    extract(prepare(config("cls", batch_size=2, decode_threads=1), shards), tmp_path / "store")
    for change in ({"weights": "random:4"}, {"topk": 0}, {"geometry": "squash"}):
        with pytest.raises(ConfigMismatchError):
            extract(prepare(config("cls", **change), shards), tmp_path / "store")


def test_a_shard_that_changed_since_it_was_planned_is_an_error(make_shards, tmp_path):
    shards = [str(s) for s in make_shards((6,))]
    prepared = prepare(config("cls"), shards)
    make_shards((5,))
    with pytest.raises(ShardError, match="changed since it was planned"):
        extract(prepared, tmp_path / "store")


def test_arguments_that_do_not_fit_are_named(make_shards, tmp_path):
    shards = [str(s) for s in make_shards((2,))]
    with pytest.raises(UsageError, match="--streams"):
        config("cls", streams=("resid", "q"))
    with pytest.raises(UsageError, match="--topk is 11"):
        prepare(config("cls", topk=11), shards)
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\n")
    with pytest.raises(UsageError, match="2 lines, the model has 10"):
        prepare(config("cls"), shards, names)
