"""values.py against plain NumPy over the state dict; no weight changes; the command."""

import json

import numpy as np
import polars as pl
import pytest
import scipy.stats
from click.testing import CliRunner

from classlens.analysis.values import (
    analyze_values,
    class_value_cosines,
    load_model,
    read_agreement,
    strongest,
    top_classes,
)
from classlens.cli import cli
from classlens.extractor.errors import ModelError, UsageError
from classlens.extractor.models import _weights_sha256

MODEL = "vit_tiny_patch16_224"
ARGS = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 48,
    "depth": 3,
    "num_heads": 3,
    "num_classes": 12,
    "init_values": 0.1,  # LayerScale stands behind the sublayers and is left out
}
OPTIONS = [f"--model-arg={name}={value}" for name, value in ARGS.items()]


@pytest.fixture(scope="module")
def subject():
    return load_model(MODEL, "random:4", ARGS)


def arrays(subject, block, sublayer):
    """E [C, D] and the value vectors [D, F] as float64."""
    state = subject.model.state_dict()
    name = {"attn": "attn.proj", "mlp": "mlp.fc2"}[sublayer]
    values = state[f"blocks.{block}.{name}.weight"]
    return state["head.weight"].double().numpy(), values.double().numpy()


def plain_cosine(subject, block, sublayer):
    embedding, values = arrays(subject, block, sublayer)
    best = []
    for e in embedding:
        cosines = [e @ v / np.sqrt((e @ e) * (v @ v)) for v in values.T]
        best.append(max(cosines))
    return np.array(best)


def test_cosines_equal_plain_loops_and_no_weight_changes(subject):
    before = _weights_sha256(subject.model)
    cosines = class_value_cosines(subject)
    top_classes(subject, 1, [0, 5])
    strongest(subject, 1)
    assert _weights_sha256(subject.model) == before == subject.weights_sha256
    for sublayer in ("attn", "mlp"):
        assert cosines[sublayer].shape == (3, 12)
        for block in range(3):
            expected = plain_cosine(subject, block, sublayer)
            np.testing.assert_allclose(cosines[sublayer][block], expected, rtol=1e-12)


def test_a_zero_value_vector_has_cosine_zero():
    subject = load_model(MODEL, "random:4", ARGS)
    subject.model.blocks[0].mlp.fc2.weight.data.zero_()
    assert (class_value_cosines(subject)["mlp"][0] == 0).all()


def test_agreement_and_its_test_against_the_control(subject):
    result = analyze_values(MODEL, weights="random:4", model_args=ARGS, control="random:9")
    control = load_model(MODEL, "random:9", ARGS)
    model_rows = result.agreement.filter(pl.col("source") == "model")
    for row in model_rows.iter_rows(named=True):
        ours = plain_cosine(subject, row["block"], row["sublayer"])
        theirs = plain_cosine(control, row["block"], row["sublayer"])
        assert row["cosine"] == pytest.approx(ours.mean())
        assert row["low"] < row["cosine"] < row["high"]
        p_value = scipy.stats.wilcoxon(ours, theirs, alternative="greater").pvalue
        assert row["p_value"] == pytest.approx(p_value)
        assert row["n_classes"] == 12
    control_rows = result.agreement.filter(pl.col("source") == "control")
    assert control_rows["cosine"][0] == pytest.approx(plain_cosine(control, 0, "attn").mean())
    assert control_rows["q_value"].is_null().all()
    assert (result.agreement.height, model_rows.height) == (12, 6)
    for _, rows in model_rows.group_by("sublayer"):
        q_values = scipy.stats.false_discovery_control(rows["p_value"])
        np.testing.assert_allclose(rows["q_value"], q_values)


def test_without_a_control_nothing_is_tested():
    result = analyze_values(MODEL, weights="random:4", model_args=ARGS, control=None)
    assert "p_value" not in result.agreement.columns
    assert result.agreement["source"].unique().to_list() == ["model"]


@pytest.mark.parametrize("sublayer", ["attn", "mlp"])
def test_top_classes_and_strongest_vectors(subject, sublayer):
    embedding, values = arrays(subject, 2, sublayer)
    products = embedding @ values
    found = top_classes(subject, 2, [7, 3], sublayer=sublayer, top=4)
    for j, rows in found.group_by("neuron", maintain_order=True):
        order = sorted(range(12), key=lambda c: -products[c, j[0]])[:4]
        assert rows["class"].to_list() == order
        assert rows["name"].to_list() == [str(c) for c in order]
        np.testing.assert_allclose(rows["product"], products[order, j[0]])
    assert found["neuron"].unique(maintain_order=True).to_list() == [7, 3]
    best = strongest(subject, 2, sublayer=sublayer, top=6)
    by_loop = sorted(range(values.shape[1]), key=lambda j: -max(products[:, j]))[:6]
    assert best == by_loop


def test_what_is_not_there_is_named(subject):
    with pytest.raises(UsageError, match="no block 3; give 0 to 2"):
        top_classes(subject, 3, [0])
    with pytest.raises(UsageError, match="no value vector 192 in mlp of block 0; give 0 to 191"):
        top_classes(subject, 0, [192])
    with pytest.raises(UsageError, match="--top is 13; the model has 12 classes"):
        top_classes(subject, 0, [0], top=13)
    with pytest.raises(UsageError, match="--top is 49; attn has 48 value vectors"):
        strongest(subject, 0, sublayer="attn", top=49)
    with pytest.raises(ModelError, match="GluMlp"):
        load_model("vit_giant_patch14_dinov2", "random:0", ARGS)


def run(*arguments):
    return CliRunner().invoke(
        cli, ["analyze", "values", MODEL, "--weights", "random:4", *OPTIONS, *arguments]
    )


def test_the_command(subject, tmp_path):
    shown = run("--chart", str(tmp_path / "chart.svg"))
    assert shown.exit_code == 0, shown.output
    assert "Class-value agreement, MLP" in shown.output
    assert (tmp_path / "chart.svg").read_text().startswith("<svg")
    printed = run("--json").stdout
    found = json.loads(printed)["agreement"]
    assert len(found) == 12
    (tmp_path / "values.json").write_text(printed)
    assert read_agreement(tmp_path / "values.json").to_dicts() == found
    assert found[0]["cosine"] == pytest.approx(plain_cosine(subject, 0, "attn").mean())


def test_the_command_on_single_value_vectors(subject):
    found = json.loads(run("--neuron", "2:7", "--neuron", "0:1", "--top", "3", "--json").stdout)
    assert [(row["block"], row["neuron"]) for row in found] == [(2, 7)] * 3 + [(0, 1)] * 3
    shown = run("--block", "1", "--top", "2", "--sublayer", "attn")
    assert shown.exit_code == 0, shown.output
    assert "Value vectors of attention, block 1" in shown.output
    found = json.loads(run("--block", "1", "--top", "2", "--json").stdout)
    assert [row["neuron"] for row in found[::5]] == strongest(subject, 1, top=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--neuron", "2-7"], "--neuron takes BLOCK:J"),
        (["--chart", "chart.pdf"], ".svg or .png"),
        (["--neuron", "9:0"], "no block 9"),
    ],
)
def test_wrong_usage_of_the_command(options, message):
    result = run(*options)
    assert result.exit_code == 2
    assert message in result.output
