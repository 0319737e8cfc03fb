"""Alignment against loops over the state dict; shared value vectors; class names; the commands."""

import json

import numpy as np
import polars as pl
import pytest
import torch
from click.testing import CliRunner

from classlens.analysis.neurons.alignment import (
    block_distribution,
    shared_neurons,
    top_neurons,
)
from classlens.analysis.neurons.subject import find_class, neuron_count, open_subject
from classlens.cli import cli
from classlens.extractor.errors import UsageError

MODEL = "vit_tiny_patch16_224"
ARGS = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 48,
    "depth": 3,
    "num_heads": 3,
    "num_classes": 12,
    "init_values": 0.1,  # LayerScale stands behind the MLP and is left out
}
OPTIONS = ["--weights=random:4", *(f"--model-arg={name}={value}" for name, value in ARGS.items())]
NEURONS = 4 * ARGS["embed_dim"]


def make_subject():
    return open_subject(MODEL, weights="random:4", model_args=ARGS)


@pytest.fixture(scope="module")
def subject():
    return make_subject()


def plain(subject):
    """(class, block, neuron) -> alignment, one product at a time."""
    state = {k: v.double().numpy() for k, v in subject.model.state_dict().items()}
    return {
        (c, b, j): float(np.sum(e * state[f"blocks.{b}.mlp.fc2.weight"][:, j]))
        for c, e in enumerate(state["head.weight"])
        for b in range(ARGS["depth"])
        for j in range(NEURONS)
    }


@pytest.fixture(scope="module")
def expected(subject):
    return plain(subject)


def in_order(expected, c, blocks):
    """(block, neuron) of a class, the largest alignment first, ties to lower block and neuron."""
    keys = [(b, j) for b in blocks for j in range(NEURONS)]
    return sorted(keys, key=lambda key: (-expected[c, *key], key))


@pytest.mark.parametrize("blocks", [None, [1], [2, 0]])
def test_top_neurons_equal_plain_loops(subject, expected, blocks):
    frame = top_neurons(subject, 4).over(blocks)
    assert frame.columns == ["class", "name", "place", "block", "neuron", "alignment"]
    assert frame.height == 12 * 4
    rows = frame.iter_rows(named=True)
    for c in range(12):
        best = in_order(expected, c, range(3) if blocks is None else blocks)[:4]
        for place, (b, j) in enumerate(best):
            row = next(rows)
            found = (row["class"], row["place"], row["block"], row["neuron"], row["name"])
            assert found == (c, place, b, j, str(c))
            # Two sums of 48 terms in float64, in any order.
            terms = 48 * 2**-52 * 48 * max(1.0, abs(expected[c, b, j]))
            assert abs(row["alignment"] - expected[c, b, j]) <= terms


def test_distribution_and_shared_neurons_equal_plain_loops(subject, expected):
    tops = top_neurons(subject, 1)
    firsts = [in_order(expected, c, range(3))[0] for c in range(12)]
    distribution = block_distribution(tops)
    assert distribution["classes"].to_list() == [sum(b == k for b, _ in firsts) for k in range(3)]
    assert distribution["share"].sum() == pytest.approx(1)
    assert distribution["block"].to_list() == [0, 1, 2]
    for blocks in (None, [0]):
        firsts = [in_order(expected, c, blocks or range(3))[0] for c in range(12)]
        shared = {key: [c for c in range(12) if firsts[c] == key] for key in set(firsts)}
        shared = {key: cs for key, cs in shared.items() if len(cs) > 1}
        found = shared_neurons(tops, blocks)
        assert {(r["block"], r["neuron"]): sorted(r["classes"]) for r in found.to_dicts()} == shared
        for row in found.iter_rows(named=True):
            assert row["alignments"] == sorted(row["alignments"], reverse=True)
            assert row["names"] == [str(c) for c in row["classes"]]
            assert row["n_classes"] == len(row["classes"])


def tied_subject():
    """Small whole numbers, so that alignments are exact and tie."""
    subject = make_subject()
    generator = torch.Generator().manual_seed(0)

    def whole(weight):
        weight.data.copy_(torch.randint(-1, 2, weight.shape, generator=generator))

    whole(subject.model.head.weight)
    for block in subject.model.blocks:
        whole(block.mlp.fc2.weight)
    subject.model.head.weight.data[7] = subject.model.head.weight.data[3]
    subject.model.blocks[2].mlp.fc2.weight.data.copy_(subject.model.blocks[0].mlp.fc2.weight)
    return subject


def test_ties_go_to_the_lower_block_and_neuron():
    subject = tied_subject()
    expected = plain(subject)
    frame = top_neurons(subject, 5).over()
    for c in range(12):
        rows = frame.filter(pl.col("class") == c)
        best = in_order(expected, c, range(3))[:5]
        assert list(rows.select("block", "neuron").iter_rows()) == best
        assert rows["alignment"].to_list() == [expected[c, b, j] for b, j in best]
    assert frame.filter(pl.col("block") == 2).height < frame.filter(pl.col("block") == 0).height
    shared = shared_neurons(top_neurons(subject, 1))
    lists = [row for row in shared["classes"].to_list() if 3 in row]
    assert lists[0].index(7) == lists[0].index(3) + 1


def test_more_neurons_than_there_are(subject):
    assert neuron_count(subject) == NEURONS
    with pytest.raises(UsageError, match=f"has {NEURONS} neurons"):
        top_neurons(subject, NEURONS + 1)


NAMES = ("tench, Tinca tinca", "crane", "goldfish", "crane, bird", "7", "maillot", "maillot")


@pytest.mark.parametrize(
    ("text", "c"),
    [("0", 0), ("tench", 0), ("TINCA tinca", 0), ("tench, tinca tinca", 0), ("crane", 1),
     ("bird", 3), ("7", 4), ("3", 3)],
)  # fmt: skip
def test_a_class_by_index_name_or_part_of_it(text, c):
    assert find_class(NAMES, text) == c


def test_a_class_that_is_not_there():
    with pytest.raises(UsageError, match="several; give a number: 5 "):
        find_class(NAMES, "maillot")
    with pytest.raises(UsageError, match="like it: goldfish"):
        find_class(NAMES, "goldfisch")
    with pytest.raises(UsageError, match="give 0 to 6 or a name"):
        find_class(NAMES, "99")


def run(*arguments):
    return CliRunner().invoke(cli, ["neurons", *arguments], catch_exceptions=False)


def test_command_top(subject, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"name {c}" for c in range(12)))
    tops = top_neurons(subject, 3)
    out = tmp_path / "top.parquet"
    result = run("top", MODEL, *OPTIONS, "--json", "--top", "3", "--out", str(out),
                 "--class-names", str(names), "--class", "name 5")  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["blocks"] == block_distribution(tops).to_dicts()
    keys = ["class", "place", "block", "neuron", "alignment"]
    expected = tops.over().filter(pl.col("class") == 5).select(keys).to_dicts()
    assert [{k: row[k] for k in keys} for row in found["top"]] == expected
    assert {row["name"] for row in found["top"]} == {"name 5"}
    assert pl.read_parquet(out).select(keys).equals(tops.over().select(keys))
    shown = run("top", MODEL, *OPTIONS, "--top", "2", "--class", "5", "--each-block").stdout
    for block in range(3):
        row = tops.over([block]).filter(pl.col("class") == 5).row(0, named=True)
        assert f"{block}:{row['neuron']} {row['alignment']:+.3f}" in shown
    assert "Block of each class's top key neuron" in run("top", MODEL, *OPTIONS).stdout


def test_command_shared(subject):
    result = run("shared", MODEL, *OPTIONS, "--each-block", "--json")
    parts = [shared_neurons(top_neurons(subject, 1), [b]) for b in range(3)]
    expected = pl.concat(parts).sort("n_classes", descending=True, maintain_order=True)
    assert json.loads(result.stdout) == expected.to_dicts()
    shown = run("shared", MODEL, *OPTIONS, "--each-block").stdout
    first = expected.row(0, named=True)
    assert f"{first['block']}:{first['neuron']}" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["top", MODEL, *OPTIONS, "--class", "99"], "There is no class '99'"),
        (["top", MODEL, *OPTIONS, "--top", "999"], "--top is 999"),
        (["top", ".", "--weights", "random"], "leave out --weights"),
    ],
)
def test_usage_errors(options, message):
    result = run(*options)
    assert result.exit_code == 2
    assert message in result.stderr
