"""`probe`: a store held to scikit-learn's Ridge, few passes, resume, and data that do not fit."""

from itertools import product

import numpy as np
import polars as pl
import pytest
import torch
import zarr
from samples import Sample, encoded, picture, sample, write_tar
from sklearn.linear_model import Ridge
from test_probe import added, one_hot, rank_bracket, score_tolerance, weight_tolerance
from variants import config

from classlens.extractor import pictures, pipeline, probe_run
from classlens.extractor.blocks import walk
from classlens.extractor.errors import ConfigMismatchError, ModelError, UsageError
from classlens.extractor.models import load_subject
from classlens.extractor.pictures import read_pictures
from classlens.extractor.prepare import prepare
from classlens.extractor.probe import probe_bytes
from classlens.extractor.probe_run import prepare_probe, probe
from classlens.extractor.run import extract
from classlens.extractor.schema import Status, committed_units, read_attributes, read_layout
from classlens.extractor.scorer import Scorer
from classlens.extractor.store import verify

TRAIN, TEST = 25, 9  # labels are image number modulo 10
EACH = probe_bytes(48, 10)


@pytest.fixture
def shards(make_shards):
    """Training shards and test shards."""
    paths = [str(p) for p in make_shards((15, 10, 5, 4))]
    return paths[:2], paths[2:]


def read(store, path) -> np.ndarray:
    return np.asarray(zarr.open_array(str(store / path), mode="r")[...])


def activations(prepared, images=None):
    """Sites of some planned images in one batch, as the run has them, and their labels."""
    [batch] = read_pictures(prepared, 100, images)
    scorer = Scorer(
        load_subject(prepared.config), [], dtype=torch.float32, device="cpu", convention=""
    )
    with torch.inference_mode():
        blocks = walk(scorer.model, scorer.images(batch.pixels), "")
        sites = {(b, s): x.double().numpy() for b, found in blocks for s, x in found.items()}
    return sites, batch.targets.labels.numpy()


@pytest.mark.parametrize(
    ("variant", "alpha"),
    [("cls", 1.0), ("registers-layerscale-gap", 1.0), ("post-norm-gap", 1e-3)],
)
def test_every_stored_number_equals_scikit_learns_ridge(shards, tmp_path, variant, alpha):
    # One batch holds all images, so that the activations are the run's own to the last bit.
    settings = config(variant, topk=2, batch_size=100, streams=("attn", "resid", "mid", "mlp"))
    prepared = prepare_probe(settings, *shards, per_class=2, alpha=alpha)
    rows = prepared.train.plan.manifest.filter(pl.col("image").is_in(prepared.images))
    assert rows["key"].to_list() == [f"image{i:04d}" for i in range(20)]  # each class twice
    out = tmp_path / "store"
    summary = probe(prepared, out)
    assert (summary.passes, summary.train_images, summary.store.status) == (1, 20, {"ok": TEST})
    trained, y = activations(prepared.train, prepared.images)
    layout = read_layout(out)
    names = ("rank", "label_logit", "label_logprob", "top1", "top2")
    stored = {name: read(out, f"scores/{name}") for name in names}
    fitted = {}
    for (block, name), token in product(trained, range(layout.tokens)):
        x = trained[block, name][:, token]
        ridge = Ridge(alpha=alpha).fit(x, one_hot(y, 10))
        fitted[block, name, token] = ridge, weight_tolerance(x, y, ridge, x.mean(0))
    exact_ranks, ranks = 0, 0
    manifest = prepared.test.plan.manifest  # a batch does not go beyond a unit
    for places in manifest.group_by("unit", maintain_order=True).agg("image")["image"]:
        scored, labels = activations(prepared.test, places.to_list())
        for (block, name), token in product(trained, range(layout.tokens)):
            x, new = trained[block, name][:, token], scored[block, name][:, token]
            ridge, weight_error = fitted[block, name, token]
            exact = ridge.predict(new)
            tolerance = score_tolerance(new, x.mean(0), ridge, weight_error, -0.8)  # 2/10 − 1
            where = (places.to_numpy(), block, settings.streams.index(name), token)
            found = {name: values[where] for name, values in stored.items()}
            low, high = rank_bracket(exact, labels, tolerance)
            rank = found["rank"].astype(int)
            assert ((low <= rank) & (rank <= high)).all()
            exact_ranks, ranks = exact_ranks + (low == high).sum(), ranks + len(low)
            half = 2.0**-11  # of float16
            images = np.arange(len(labels))
            own, worst = exact[images, labels], added(tolerance, exact).max(1)
            slack = worst + half * np.abs(own) + 1e-6
            assert (np.abs(found["label_logit"] - own) <= slack).all()
            logprob = own - np.log(np.exp(exact).sum(1))
            slack = 3 * worst + half * np.abs(logprob) + 1e-5
            assert (np.abs(found["label_logprob"] - logprob) <= slack).all()
            for place, best in (("top1", np.sort(exact)[:, -1]), ("top2", np.sort(exact)[:, -2])):
                value = exact[images, found[place].astype(int)]
                assert (np.abs(value - best) <= 2 * tolerance.max(1)).all()
    # Beyond the tolerance the margins prove the rank.
    assert exact_ranks > 0.99 * ranks


def test_a_store_of_probes_says_so_and_keeps_the_models_own_predictions(shards, tmp_path):
    settings = config("cls")
    probe(prepare_probe(settings, *shards, per_class=2, alpha=3.0), tmp_path / "probes")
    extract(prepare(settings, shards[1]), tmp_path / "store")
    attributes = read_attributes(tmp_path / "probes")
    section = attributes["probe"]
    assert (section["alpha"], section["per_class"], section["train_images"]) == (3.0, 2, 20)
    assert attributes["fingerprint"]["probe"] == section
    assert verify(tmp_path / "probes") == []
    for path in ("images/label", "images/status", "images/prediction", "images/mask_fraction"):
        np.testing.assert_array_equal(
            read(tmp_path / "probes", path), read(tmp_path / "store", path)
        )
    for change in ({"alpha": 1.0}, {"per_class": 3}):
        with pytest.raises(ConfigMismatchError, match="probe"):
            probe(
                prepare_probe(settings, *shards, **{"alpha": 3.0, "per_class": 2, **change}),
                tmp_path / "probes",
            )
    with pytest.raises(ConfigMismatchError, match="probe"):
        extract(prepare(settings, shards[1]), tmp_path / "probes")


@pytest.mark.parametrize("at_once", [200, 52, 50, 20, 7])
def test_passes_of_any_size_give_the_same_store(shards, tmp_path, at_once):
    # 3 blocks · 3 streams · 17 tokens = 153 probes.
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    probe(prepare_probe(config("cls", topk=2), *shards), whole)
    prepared = prepare_probe(config("cls", topk=2), *shards, memory_bytes=at_once * EACH)
    summary = probe(prepared, parted)
    assert summary.passes == len(prepared.plan.passes) == -(-153 // at_once)
    assert verify(parted) == []
    for path in ("scores/rank", "scores/top1", "scores/top2", "images/status"):
        np.testing.assert_array_equal(read(whole, path), read(parted, path))
    for path in ("scores/label_logit", "scores/label_logprob"):
        np.testing.assert_allclose(read(whole, path), read(parted, path), rtol=2**-10, atol=1e-5)


@pytest.fixture
def decoded(monkeypatch):
    """Keys of the pictures in the order in which they are decoded."""
    keys = []
    decode = pictures.decode

    def counting(image, *others):
        keys.append(image.row["key"])
        return decode(image, *others)

    monkeypatch.setattr(pictures, "decode", counting)
    monkeypatch.setattr(pipeline, "decode", counting)
    return keys


def test_the_demo_model_is_probed_in_one_pass_over_each_set(decoded, make_shards, tmp_path):
    from classlens.bench.demo.command import demo_config

    train, test = ([str(p)] for p in make_shards((12, 5)))
    prepared = prepare_probe(demo_config("random:0"), train, test)
    assert prepared.plan.probes == 8 * 3 * 65
    probe(prepared, tmp_path / "store")
    assert sorted(decoded) == [f"image{i:04d}" for i in range(17)]


def test_a_killed_run_leaves_whole_units_and_goes_on(shards, tmp_path, monkeypatch, decoded):
    out, settings = tmp_path / "store", config("cls")
    probe(prepare_probe(settings, *shards), tmp_path / "undisturbed")
    stage = pipeline.Pipeline.commit

    def failing(self, batch):
        if batch.unit.index == 1:
            raise KeyboardInterrupt
        stage(self, batch)

    monkeypatch.setattr(pipeline.Pipeline, "commit", failing)
    with pytest.raises(KeyboardInterrupt):
        probe(prepare_probe(settings, *shards), out)
    assert committed_units(out) == [0]
    monkeypatch.setattr(pipeline.Pipeline, "commit", stage)
    decoded.clear()
    summary = probe(prepare_probe(settings, *shards), out)
    assert (summary.store.scored, summary.passes) == (4, 1)
    assert len(decoded) == TRAIN + 4
    decoded.clear()
    again = probe(prepare_probe(settings, *shards), out)
    assert (again.store.scored, again.passes, decoded) == (0, 0, [])
    assert verify(out) == []
    for path in ("scores/rank", "scores/label_logit", "images/status"):
        np.testing.assert_array_equal(read(out, path), read(tmp_path / "undisturbed", path))


def test_a_run_of_several_passes_commits_in_the_last(shards, tmp_path, monkeypatch, decoded):
    out, settings = tmp_path / "store", config("cls")
    train, calls = probe_run.train, []

    def failing(*arguments):
        calls.append(committed_units(out))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train(*arguments)

    monkeypatch.setattr(probe_run, "train", failing)
    with pytest.raises(KeyboardInterrupt):
        probe(prepare_probe(settings, *shards, memory_bytes=60 * EACH), out)
    assert calls == [[], [], []]
    assert committed_units(out) == []
    # Nothing but the store, empty, is left beside the shards.
    assert {p.name for p in tmp_path.iterdir()} == {"shards", "store"}
    monkeypatch.setattr(probe_run, "train", train)
    decoded.clear()
    summary = probe(prepare_probe(settings, *shards, memory_bytes=60 * EACH), out)
    assert (summary.passes, summary.store.units_committed) == (3, 2)
    assert len(decoded) == 3 * (TRAIN + TEST)
    assert verify(out) == []


def test_a_lost_file_of_a_committed_unit_is_made_again(shards, tmp_path):
    out, settings = tmp_path / "store", config("cls")
    probe(prepare_probe(settings, *shards), out)
    ranks = read(out, "scores/rank")
    (out / "scores/rank/c/1/0/0/0").unlink()
    summary = probe(prepare_probe(settings, *shards), out)
    assert summary.store.scored == 4
    np.testing.assert_array_equal(read(out, "scores/rank"), ranks)


@pytest.mark.parametrize("at_once", [200, 60])
def test_bad_images_are_left_out_of_training_and_get_a_status(make_shards, tmp_path, at_once):
    def spoil(samples: list[Sample]) -> None:
        samples[3].members["jpg"] = b"no picture"  # training: class 3 has one image less
        samples[4].members["cls"] = b"10"
        del samples[5].members["mask.png"]  # needs none there
        samples[26].members["jpg"] = b"no picture"
        samples[28].members["jpg"] = encoded(picture(7, (70, 60)))  # mask of another size

    train, test = ([str(p)] for p in make_shards((TRAIN, TEST), change=spoil))
    prepared = prepare_probe(config("cls"), train, test, memory_bytes=at_once * EACH)
    assert prepared.class_images.tolist() == [3, 3, 3, 3, 2, 2, 2, 2, 2, 2]
    summary = probe(prepared, tmp_path / "store")
    assert summary.train_images == TRAIN - 2
    assert summary.store.bad_images == 2
    status = read(tmp_path / "store", "images/status")
    assert status[1] == Status.UNDECODABLE
    assert status[3] == Status.MASK_UNDECODABLE
    assert (read(tmp_path / "store", "scores/rank")[[1, 3]] == 65_535).all()


def test_activations_that_overflow(shards, tmp_path, monkeypatch):
    def overflowing(model, images, convention, *others):
        for block, sites in walk(model, images, convention, *others):
            if spoils:
                sites["attn"][0, 2, 3] = float("inf")  # of the first image of each batch
            yield block, sites

    def scoring(self, *args):
        spoils.append("when scoring")
        try:
            return score(self, *args)
        finally:
            spoils.pop()

    score, spoils = Scorer.score, []
    monkeypatch.setattr("classlens.extractor.scorer.walk", overflowing)
    monkeypatch.setattr(Scorer, "score", scoring)
    summary = probe(prepare_probe(config("cls"), *shards), tmp_path / "store")
    assert summary.store.status == {"ok": 6, "nonfinite": 3}
    spoils.append("when training too")
    with pytest.raises(ModelError, match="attn activations of block 0 are not finite"):
        probe(prepare_probe(config("cls"), *shards), tmp_path / "other")


def test_data_that_do_not_fit_are_named(shards, tmp_path):
    train, test = shards
    with pytest.raises(UsageError, match="the first is image0025"):
        prepare_probe(config("cls"), [*train, test[0]], [test[0]])
    prepare_probe(config("cls"), [*train, test[0]], [test[0]], allow_overlap=True)
    # Keys that are planned and not trained on do no harm.
    prepare_probe(config("cls"), [*train, test[0]], [test[0]], per_class=2)
    unlabelled = write_tar(tmp_path / "unlabelled.tar", [sample(i, classes=99) for i in (40, 41)])
    with pytest.raises(UsageError, match="No training image has a label in 0 to 9"):
        prepare_probe(config("cls"), [str(unlabelled)], test)
    broken = [Sample(f"broken{i}", {"jpg": b"?", "cls": b"1"}) for i in range(2)]
    prepared = prepare_probe(config("cls"), [str(write_tar(tmp_path / "b.tar", broken))], test)
    with pytest.raises(UsageError, match="No training image can be read"):
        probe(prepared, tmp_path / "store")
