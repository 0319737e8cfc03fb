"""bench attribution: all ways agree before they are timed; a wrong one stops it."""

import json

import pytest
import torch
from click.testing import CliRunner

from classlens.bench import attribution
from classlens.bench.commands import bench
from classlens.extractor.config import ExtractConfig
from classlens.extractor.models import load_subject

ARGUMENTS = ("img_size=32", "patch_size=8", "embed_dim=48", "depth=2", "num_heads=3")


def test_rows_of_the_benchmark():
    arguments = [f"--model-arg={argument}" for argument in (*ARGUMENTS, "num_classes=10")]
    options = ["--model", "vit_tiny_patch16_224", "--images", "3", "--tokens", "2", "--rounds", "2"]
    result = CliRunner().invoke(bench, ["attribution", *options, *arguments, "--json"])
    assert result.exception is None, result.output
    found = json.loads(result.stdout)
    assert found["benchmark"] == "attribution"
    rows = {row["way"]: row for row in found["rows"]}
    assert list(rows) == ["forward", "closed form", "cls rows", "every token"]
    assert rows["closed form"]["times_closed_form"] == 1
    assert rows["forward"]["of_forward"] == 1
    assert rows["forward"]["attribution_seconds"] == 0
    assert 0 < rows["closed form"]["attribution_seconds"] < rows["closed form"]["seconds"]
    assert rows["every token"]["extrapolated_from"] == "1 image, 2 of 17 tokens, all blocks"
    # 17 backward passes of each of 3 images, one image and 2 tokens timed.
    assert rows["every token"]["seconds"] > 3 * min(rows["every token"]["all_seconds"])


def test_a_wrong_closed_form_is_not_timed(monkeypatch):
    model_args = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    subject = load_subject(ExtractConfig("vit_tiny_patch16_224", model_args, weights="random:0"))
    space = subject.space.to(dtype=torch.float32)
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([4, 900])
    attribution.check(subject.model, space, images, labels)
    right = attribution.closed_form
    monkeypatch.setattr(attribution, "closed_form", lambda *given: 1.01 * right(*given))
    with pytest.raises(AssertionError, match="closed form"):
        attribution.check(subject.model, space, images, labels)


def test_every_token_gives_the_gradient_of_that_tokens_loss():
    model_args = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    subject = load_subject(ExtractConfig("vit_tiny_patch16_224", model_args, weights="random:0"))
    images, labels = torch.randn(1, 3, 32, 32), torch.tensor([3])
    watch = attribution.Stopwatch("cpu")
    found = attribution.every_token(subject.model, images, labels, [0, 5], watch)
    assert found.shape == (2, 2, 3, 17)
    assert watch.seconds > 0
    cls = attribution.cls_rows(subject.model, images, labels, watch)
    torch.testing.assert_close(found[:, 0, :, 1:], cls[0])
    assert not torch.allclose(found[:, 1], found[:, 0])
