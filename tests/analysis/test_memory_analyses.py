"""memories.py against plain loops over the stored bytes; the command."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from synthetic_store import make_layout, write_store

from classlens.analysis.memories import (
    agreement,
    analyze_memories,
    composition,
    correct_minus_wrong,
    per_image,
)
from classlens.analysis.scan import scan_memories
from classlens.cli import cli
from classlens.extractor.errors import UsageError
from classlens.extractor.schema import Status

UNITS = [12, 9]
BAD = {2: Status.UNDECODABLE, 15: Status.NONFINITE}
BIT = {
    "agreement": 0,
    "agreement_control": 1,
    "agreement_text": 2,
    "agreement_text_control": 3,
    "composed": 4,
}
FLAG = {"corrected": "agreement_text", "vilas2023": "agreement"}
CONVENTIONS = list(FLAG)


def make_store(folder, seed, **layout):
    layout = {"prefix_kinds": ("cls", "register"), "classes": 4} | layout
    layout = make_layout(images_per_unit=UNITS, blocks=4, reducers=("memories",), **layout)
    return write_store(folder / "store", layout, UNITS, bad=BAD, seed=seed)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("store"), seed=0)


@pytest.fixture(scope="module")
def gap(tmp_path_factory):
    """A store without prefix tokens."""
    return make_store(tmp_path_factory.mktemp("gap"), seed=1, prefix_kinds=())


def good(store, path):
    return store.arrays[path][store.arrays["images/status"] == Status.OK]


def bits(store, name):
    """[N, B, 2, T], bool."""
    return (good(store, "memories/flags") >> BIT[name]) % 2 == 1


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_agreement(store, convention):
    frame = agreement(per_image(scan_memories(store.path)), convention=convention)
    labels = good(store, "images/label")
    assert frame.height == 8
    for row in frame.iter_rows(named=True):
        sublayer = ["attn", "mlp"].index(row["sublayer"])
        for column, flag in (("agreement", ""), ("control", "_control")):
            values = bits(store, FLAG[convention] + flag)[:, row["block"], sublayer]
            rates = []
            for c in set(labels.tolist()):
                tokens = [hit for n, y in enumerate(labels) if y == c for hit in values[n]]
                rates.append(100 * sum(tokens) / len(tokens))
            assert row[column] == pytest.approx(sum(rates) / len(rates))
            assert row[f"{column}_low"] < row[column] < row[f"{column}_high"]
        assert row["difference"] == pytest.approx(row["agreement"] - row["control"])
        assert (row["n_images"], row["n_classes"], row["n_tokens"]) == (19, len(set(labels)), 8)
        assert row["convention"] == convention


@pytest.mark.parametrize("which", ["store", "gap"])
def test_composition(which, request):
    store = request.getfixturevalue(which)
    frame = composition(per_image(scan_memories(store.path)))
    kinds = [*store.layout.prefix_kinds, *["patch"] * store.layout.patches]
    groups = ["all", "cls", "patch"] if "cls" in kinds else ["all", "patch"]
    assert frame["group"].unique(maintain_order=True).to_list() == groups
    assert frame.height == 8 * len(groups)
    for row in frame.iter_rows(named=True):
        tokens = [t for t, kind in enumerate(kinds) if row["group"] in ("all", kind)]
        sublayer = ["attn", "mlp"].index(row["sublayer"])
        values = bits(store, "composed")[:, row["block"], sublayer][:, tokens]
        assert row["composed"] == pytest.approx(100 * values.mean())
        assert row["low"] <= row["composed"] <= row["high"]
        assert (row["n_images"], row["n_tokens"]) == (19, len(tokens))


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_correct_minus_wrong(store, convention):
    images = per_image(scan_memories(store.path))
    frame = correct_minus_wrong(images, convention=convention, permutations=99)
    right = good(store, "images/prediction") == good(store, "images/label")
    for row in frame.iter_rows(named=True):
        sublayer = ["attn", "mlp"].index(row["sublayer"])
        of_cls = bits(store, FLAG[convention])[:, row["block"], sublayer, 0]
        delta = 100 * (of_cls[right].mean() - of_cls[~right].mean())
        assert row["delta"] == pytest.approx(delta)
        assert (row["n_correct"], row["n_wrong"]) == (right.sum(), (~right).sum())
        assert 0 <= row["p_value"] <= 1
        assert (row["q_value"] is None) == (convention == "vilas2023")
    assert frame.height == 8


def test_without_cls_only_vilas2023_compares_token_0(gap):
    images = per_image(scan_memories(gap.path))
    assert correct_minus_wrong(images).is_empty()
    frame = correct_minus_wrong(images, convention="vilas2023")
    right = good(gap, "images/prediction") == good(gap, "images/label")
    of_first = bits(gap, "agreement")[:, 3, 1, 0]
    delta = 100 * (of_first[right].mean() - of_first[~right].mean())
    assert frame.row(-1, named=True)["delta"] == pytest.approx(delta)


def test_analysis_and_its_json(store):
    result = analyze_memories(store.path, permutations=9)
    assert (result.n_images, result.n_bad, result.classes) == (19, 2, 4)
    plain = json.loads(json.dumps(result.to_json()))
    assert len(plain["agreement"]) == 8
    assert len(plain["composition"]) == 24


def test_nothing_scored_is_named(tmp_path):
    layout = make_layout(images_per_unit=[2], reducers=("memories",))
    store = write_store(tmp_path / "s", layout, [2], uncommitted=(0,))
    with pytest.raises(UsageError, match="no scored image yet"):
        analyze_memories(store.path)


@pytest.mark.parametrize("which", ["store", "gap"])
def test_the_command(which, request):
    path = str(request.getfixturevalue(which).path)
    shown = CliRunner().invoke(cli, ["analyze", "memories", path, "--convention", "both"])
    assert shown.exit_code == 0, shown.output
    assert "(vilas2023)" in shown.output
    assert "memory compositionality" in shown.output
    as_json = CliRunner().invoke(cli, ["analyze", "memories", path, "--json"])
    found = json.loads(as_json.stdout)["corrected"]
    expected = agreement(per_image(scan_memories(path)))["agreement"].to_list()
    np.testing.assert_allclose([row["agreement"] for row in found["agreement"]], expected)
