"""Distances between class averages, and the commands on neurons."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from variants import config

from classlens.analysis.neurons.alignment import top_neurons
from classlens.analysis.neurons.class_means import (
    ClassMeans,
    block_class_means,
    class_distances,
    class_means,
    distance_table,
    running_mean,
)
from classlens.analysis.neurons.subject import subject_of_store
from classlens.cli import cli
from classlens.extractor.errors import UsageError
from classlens.extractor.models import load_subject
from classlens.extractor.prepare import prepare
from classlens.extractor.run import extract


def random_means(K=5, L=3, F=11) -> ClassMeans:
    means = np.random.default_rng(0).standard_normal((K, L, F))
    return ClassMeans(np.arange(K, dtype=np.int32) * 2, np.ones(K, np.int64), means)


@pytest.mark.parametrize("top", [1, 3, None])
def test_distances_are_those_at_the_neurons_of_either_class(top):
    means = random_means()
    K, L, F = means.means.shape
    source = np.random.default_rng(1)
    tops = None
    if top is not None:
        tops = np.stack([[source.permutation(F)[:top] for _ in range(K)] for _ in range(L)])
    found = class_distances(means, tops)
    for block in range(L):
        for a in range(K):
            for b in range(K):
                at = range(F)
                if tops is not None:
                    at = sorted({*tops[block, a].tolist(), *tops[block, b].tolist()})
                pairs = [(means.means[a, block, j], means.means[b, block, j]) for j in at]
                expected = sum((x - y) ** 2 for x, y in pairs) ** 0.5
                assert found[block, a, b] == pytest.approx(expected, rel=1e-13)


def test_a_running_mean_is_the_mean_of_the_blocks_so_far():
    values = np.random.default_rng(0).standard_normal((4, 3))
    for block in range(4):
        assert np.allclose(running_mean(values)[block], values[: block + 1].mean(axis=0))


def run(*arguments) -> dict | list:
    result = CliRunner().invoke(cli, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_commands_on_a_store(make_shards, tmp_path):
    settings = config("cls", reduce=("neurons",))
    store, out = tmp_path / "store", tmp_path / "dissection"
    extract(prepare(settings, [str(s) for s in make_shards((12, 8))]), store)

    found = run("neurons", "exemplars", store, "--neuron", "2:7")
    assert [row["place"] for row in found["exemplars"]] == list(range(15))
    values = [row["value"] for row in found["exemplars"]]
    assert values == sorted(values, reverse=True)
    assert found["quantiles"]["0.5"] <= found["quantiles"]["0.995"] <= values[0] * 1.07
    assert all(0 <= row["share"] <= 1 for row in found["exemplars"])
    assert found["exemplars"][0]["share"] > 0

    means = class_means(store)
    for block in range(3):
        assert np.array_equal(block_class_means(store, block).means, means.means[:, [block]])
    model = load_subject(settings).model.state_dict()
    tops = top_neurons(subject_of_store(store), 2).neurons
    for block in range(3):
        products = model["head.weight"].double() @ model[f"blocks.{block}.mlp.fc2.weight"].double()
        assert tops[block].tolist() == products.topk(2).indices.tolist()
    rows = run("neurons", "class-distances", store, "--top", 2)
    distances = class_distances(means, tops[:, means.classes])
    expected = [of_block[~np.eye(10, dtype=bool)].mean() for of_block in distances]
    assert [row["mean"] for row in rows] == pytest.approx(expected, rel=1e-14)
    for row, of_block in zip(rows, distances, strict=True):
        assert of_block[row["class_a"], row["class_b"]] == row["smallest"]
        assert row["smallest"] == of_block[~np.eye(10, dtype=bool)].min()

    for _ in range(2):  # the second time everything is there
        dissected = run("neurons", "dissect", store, "--out", out)
        assert [row["neurons"] for row in dissected["blocks"]] == [192] * 3
    told = CliRunner().invoke(cli, ["info", str(out)])
    assert "network dissection" in told.output
    assert "dissection/intersection" in told.output


@pytest.mark.parametrize(
    ("neuron", "message"),
    [("7", "BLOCK:J"), ("1:x", "BLOCK:J"), ("9:0", "no block 9"), ("0:192", "no neuron 192")],
)
def test_a_neuron_that_is_none(make_shards, tmp_path, neuron, message):
    store = tmp_path / "store"
    extract(prepare(config("cls", reduce=("neurons",)), [str(s) for s in make_shards((2,))]), store)
    result = CliRunner().invoke(cli, ["neurons", "exemplars", str(store), "--neuron", neuron])
    assert result.exit_code == 2
    assert message in result.output


def test_a_single_class_has_no_distances(make_shards, tmp_path):
    store = tmp_path / "store"
    extract(prepare(config("cls", reduce=("neurons",)), [str(s) for s in make_shards((1,))]), store)
    means = class_means(store)
    with pytest.raises(UsageError, match="one class"):
        distance_table(store, means, class_distances(means))


def test_a_store_without_neurons_says_how_to_have_them(make_shards, tmp_path):
    store = tmp_path / "store"
    extract(prepare(config("cls"), [str(s) for s in make_shards((2,))]), store)
    result = CliRunner().invoke(cli, ["neurons", "class-distances", str(store)])
    assert result.exit_code == 2
    assert "--reduce neurons" in result.output
