import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from classlens.bench import fidelity
from classlens.bench.photographs import write_photographs
from classlens.extractor.config import ExtractConfig
from classlens.extractor.errors import UsageError
from classlens.extractor.prepare import prepare

ARGUMENTS = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 48,
    "depth": 2,
    "num_heads": 3,
    "num_classes": 10,
}
CONFIG = ExtractConfig("vit_tiny_patch16_224", ARGUMENTS, "random:1", batch_size=2)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_photographs(tmp_path_factory.mktemp("shards"), 5, 3, classes=10)


def test_agreement_of_known_ranks():
    truth = np.array([0, 0, 1, 7])
    assert fidelity.agreement(truth, truth, 10) == {
        "equal_ranks": 1.0,
        "identifiability_change": 0.0,
        "rank_change_max": 0,
        "rank0_agreement": 1.0,
    }
    found = fidelity.agreement(np.array([0, 1, 1, 4]), truth, 10, "forward_")
    assert found == {
        "forward_equal_ranks": 0.5,
        "forward_identifiability_change": pytest.approx(0.1),
        "forward_rank_change_max": 3,
        "forward_rank0_agreement": 0.75,
    }


def test_the_truth_is_the_float64_models_own_answer(shards):
    prepared = prepare(CONFIG, [str(shards)])
    pixels, labels = fidelity.read_pictures(prepared, 5)
    assert (pixels.shape, pixels.dtype) == ((5, 32, 32, 3), torch.uint8)
    assert labels.tolist() == [0, 1, 2, 3, 4]
    model = prepare(CONFIG, [str(shards)]).subject.model.double()
    geometry = prepared.subject.geometry
    scaled = (pixels.double() / 255 - torch.tensor(geometry.mean)) / torch.tensor(geometry.std)
    with torch.inference_mode():
        logits = model(scaled.permute(0, 3, 1, 2))
    rank = (logits > logits.gather(1, labels[:, None])).sum(dim=1)
    truth = fidelity.true_ranks(prepared, pixels, labels)
    assert truth.shape == (5, 2, 3, 17)
    assert truth[:, -1, 0, 0].tolist() == rank.tolist()


def test_a_row_for_each_dtype_stream_and_kind(shards):
    rows = fidelity.measure(CONFIG, shards, 5, ["float32", "bfloat16"])
    assert [(r["dtype"], r["stream"], r["kind"], r["tokens"]) for r in rows] == [
        (dtype, stream, kind, tokens)
        for dtype in ("float32", "bfloat16")
        for stream in ("resid", "attn", "mlp")
        for kind, tokens in (("cls", 5 * 2), ("patch", 5 * 2 * 16))
    ]
    assert all(row["invalid"] == 0 for row in rows)
    mean = {
        dtype: np.mean([row["equal_ranks"] for row in rows if row["dtype"] == dtype])
        for dtype in ("float32", "bfloat16")
    }
    assert 0.5 < mean["bfloat16"] < mean["float32"] <= 1


def test_what_differs_is_told_apart(shards, monkeypatch):
    def forward_alone_errs(prepared, pixels, labels):
        truth = fidelity.true_ranks(prepared, pixels, labels)
        return (truth + 1) % 10, (truth + 1) % 10

    monkeypatch.setattr(fidelity, "ranks_in_dtype", forward_alone_errs)
    for row in fidelity.measure(CONFIG, shards, 5, ["float16"]):
        assert (row["equal_ranks"], row["forward_equal_ranks"]) == (0, 0)
        assert row["scoring_equal_ranks"] == 1


def test_nothing_is_compared_with_a_truth_that_wavers(shards, monkeypatch):
    runs = iter([np.zeros((5, 2, 3, 17), int), np.ones((2, 2, 3, 17), int)])
    monkeypatch.setattr(fidelity, "true_ranks", lambda *_: next(runs))
    with pytest.raises(AssertionError, match="float64"):
        fidelity.measure(CONFIG, shards, 5, ["float32"])


def test_the_command(monkeypatch):
    def few(model, shards, images):
        write_photographs(shards, images, images, classes=10)
        return CONFIG

    monkeypatch.setattr(fidelity, "draw_pictures", few)
    arguments = ["--images", "3", "--dtype", "float16", "--model", "some model"]
    result = CliRunner().invoke(fidelity.fidelity, [*arguments, "--json"], catch_exceptions=False)
    found = json.loads(result.stdout)
    assert found["benchmark"] == "fidelity"
    assert [row["model"] for row in found["rows"]] == ["some model"] * 6
    table = CliRunner().invoke(fidelity.fidelity, arguments, catch_exceptions=False).stdout
    assert "float16" in table


def test_the_demo_has_no_more_pictures(tmp_path):
    with pytest.raises(UsageError, match="500"):
        fidelity.draw_pictures("demo", tmp_path / "shards", 501)
