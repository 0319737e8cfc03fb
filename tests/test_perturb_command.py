"""The command perturb, from a store and its shards to files, tables and a report."""

import json

import polars as pl
import pytest
from samples import sample, write_tar
from test_cli import MODEL, run

from classlens.extractor import relevance
from classlens.extractor.errors import ModelError, ShardError, UsageError


@pytest.fixture
def make_store(make_shards, tmp_path):
    def make(*arguments):
        shards = make_shards((5, 4))[0].parent
        run("extract", shards, *MODEL, *arguments, "--out", tmp_path / "store")
        return tmp_path / "store"

    return make


def test_all_methods_from_a_store_to_a_report(make_store, tmp_path, monkeypatch):
    store, out = make_store("--reduce", "attribution"), tmp_path / "p.parquet"
    read, calls = relevance.stored_relevance, []
    monkeypatch.setattr(
        relevance, "stored_relevance", lambda *given: calls.append(given) or read(*given)
    )
    _, shown, _ = run("perturb", store, "--device", "cpu", "--out", out)
    assert calls  # the store's own attribution was taken
    for text in ("class-embedding", "chefer", "rollout", "random", "negative test", "ahead of"):
        assert text in shown
    found = pl.read_parquet(out)
    assert found.height == 9 * 4 * 2 * 17
    with_all = found.filter(pl.col("kept") == 16).group_by("image").agg(pl.n_unique("right"))
    assert with_all["right"].unique().to_list() == [1]  # the same prediction for every method
    run("report", store, "--perturbation", out, "--images", 2, "--permutations", 5,
        "--out", tmp_path / "r.html")  # fmt: skip
    assert 'id="perturbation-1"' in (tmp_path / "r.html").read_text()


def test_a_store_without_attribution_computes_it(make_store, tmp_path, monkeypatch):
    store, out = make_store(), tmp_path / "p.json"
    monkeypatch.setattr(relevance, "stored_relevance", None)
    options = ("--method", "class-embedding", "--method", "random", "--images", 4, "--steps", 4)
    _, shown, _ = run("perturb", store, *options, "--blocks", "1", "--device", "cpu",
                      "--out", out, "--json")  # fmt: skip
    result = json.loads(shown)
    assert result == json.loads(out.read_text())
    assert result["n_images"] == 4
    assert result["facts"]["blocks"] == "1"
    assert {row["kept"] for row in result["curves"]} == {0, 4, 8, 12, 16}
    assert len(result["auc"]) == 4
    assert len(result["differences"]) == 2


def test_linear_probes_rank_patches_by_their_store(make_store, tmp_path):
    store, out = make_store(), tmp_path / "p.json"
    train = write_tar(tmp_path / "train.tar", [sample(i) for i in range(20, 32)])
    probes = tmp_path / "probes"
    run("probe", train, "--test", tmp_path / "shards", *MODEL, "--out", probes)
    _, shown, _ = run("perturb", store, "--probe", probes, "--device", "cpu", "--out", out)
    for text in ("class-embedding", "chefer", "rollout", "linear-probe", "random"):
        assert text in shown
    assert len(json.loads(out.read_text())["differences"]) == 20  # ten pairs, two tests
    run("report", store, "--perturbation", out, "--images", 2, "--permutations", 5,
        "--out", tmp_path / "r.html")  # fmt: skip
    assert "linear-probe" in (tmp_path / "r.html").read_text()
    for options, message in (
        (("--method", "linear-probe"), "need each other"),
        (("--method", "random", "--probe", probes), "need each other"),
        (("--probe", store), "was made by `classlens extract`"),
    ):
        code, _, err = run("perturb", store, *options, "--device", "cpu", "--out", out)
        assert code == UsageError.exit_code
        assert message in err


def test_a_store_of_an_intervention_is_refused(make_store, tmp_path):
    store = make_store("--intervene", "self-only")
    code, _, err = run("perturb", store, "--device", "cpu", "--out", tmp_path / "p.json")
    assert code == UsageError.exit_code
    assert "extracted with --intervene self-only" in err
    assert "name the store extracted without" in err


def test_vilas2023_takes_its_own_loss_and_every_count(make_store, tmp_path):
    store, out = make_store("--reduce", "attribution"), tmp_path / "p.json"
    options = ("--convention", "vilas2023", "--method", "class-embedding", "--device", "cpu")
    run("perturb", store, *options, "--out", out)
    result = json.loads(out.read_text())
    assert result["facts"]["convention"] == "vilas2023"
    assert {row["kept"] for row in result["curves"]} == set(range(17))
    code, _, err = run("perturb", store, *options, "--steps", 3, "--out", out)
    assert code == UsageError.exit_code
    assert "leave out --steps" in err


def test_what_cannot_be_perturbed_is_named_before_anything_runs(make_store, make_shards, tmp_path):
    gap = ("--model-arg", "class_token=false", "--model-arg", "global_pool=avg")
    store = make_store(*gap)

    def failed(out):
        return run("perturb", store, "--device", "cpu", "--out", tmp_path / out)

    code, _, err = failed("p.json")
    assert code == ModelError.exit_code
    assert "does not predict from a CLS token" in err
    code, _, err = failed("p.txt")
    assert code == UsageError.exit_code
    assert "must end in .parquet" in err
    (tmp_path / "shards" / "shard-0.tar").unlink()
    assert failed("p.json")[0] == ShardError.exit_code
