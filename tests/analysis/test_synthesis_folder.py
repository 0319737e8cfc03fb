"""Folder, rates, sheet and command of synthesised images."""

import json
import math

import click
import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner
from PIL import Image

from classlens.analysis.neurons.synthesis import run
from classlens.analysis.neurons.synthesis.commands_synthesize import numbers, parse_neurons
from classlens.analysis.neurons.synthesis.folder import RESULTS_FILE, SCHEMA, Folder, read_results
from classlens.analysis.neurons.synthesis.objectives import Target
from classlens.analysis.neurons.synthesis.rates import rates, strongest, wilson
from classlens.analysis.neurons.synthesis.sheet import FRAME, PALE, RED, SIDE, contact_sheet
from classlens.analysis.neurons.synthesis.synthesize import Checkpoint, Seen
from classlens.cli import cli
from classlens.extractor.errors import ConfigMismatchError, StoreError, UsageError

NAMES = ("zero", "one", "two")
TARGETS = [Target(2, ((1, 3), (0, 4)), "class2"), Target(0, ((0, 9),), "class0")]


def fake_look(targets, pixels):
    """Takes every image for the class of its first pixel."""
    predicted = pixels[:, 0, 0, 0].astype(np.int64)
    labels = np.repeat([t.label for t in targets], len(pixels) // len(targets))
    rank = np.where(predicted == labels, 0, np.arange(len(pixels)) + 3)
    return Seen(predicted, rank / 8, rank, 10.0 - np.arange(len(pixels)), np.array([0.25, 0.75]))


def checkpoint(*predicted, steps=250):
    pixels = np.zeros((len(predicted), 6, 6, 3), np.uint8)
    pixels[:, 0, 0, 0] = predicted
    return Checkpoint(steps, pixels, seconds=8.0)


def test_rows_say_what_was_made_and_what_it_was_taken_for():
    rows = run.rows_of("topk", TARGETS, checkpoint(2, 1, 1, 0), fake_look, NAMES)
    assert [(r["target"], r["image"], r["label"], r["predicted"], r["rank"]) for r in rows] == [
        ("class2", 0, 2, 2, 0),
        ("class2", 1, 2, 1, 4),
        ("class0", 0, 0, 1, 5),
        ("class0", 1, 0, 0, 0),
    ]
    assert rows[1] == {
        "variant": "topk", "target": "class2", "label": 2, "name": "two", "block": 1, "neuron": 3,
        "keys": "1:3 0:4", "image": 1, "steps": 250, "predicted": 1, "predicted_name": "one",
        "probability": 0.5, "rank": 4, "activation": 9.0, "similarity": 0.25, "seconds": 2.0,
        "file": "topk/class2-1-250.png",
    }  # fmt: skip
    assert [r["similarity"] for r in rows] == [0.25, 0.25, 0.75, 0.75]
    alone = run.rows_of("top1", TARGETS, checkpoint(2, 0), fake_look, NAMES)
    assert [r["similarity"] for r in alone] == [None, None]


def test_rates_count_images_by_variant_and_steps():
    rows = run.rows_of("topk", TARGETS, checkpoint(2, 1, 1, 0), fake_look, NAMES)
    rows += run.rows_of("topk", TARGETS, checkpoint(2, 2, 0, 0, steps=500), fake_look, NAMES)
    rows += run.rows_of("top1", TARGETS, checkpoint(1, 1), fake_look, NAMES)
    found = rates(pl.DataFrame(rows, schema=SCHEMA)).rows_by_key(
        ("variant", "steps"), named=True, unique=True
    )
    first, last, other = found["topk", 250], found["topk", 500], found["top1", 250]
    assert (first["targets"], first["images"], first["right"], first["share"]) == (2, 4, 2, 0.5)
    assert (first["top5"], first["activation"], first["seconds"]) == (0.75, 8.5, 2.0)
    assert (last["right"], last["share"], last["top5"]) == (4, 1.0, 1.0)
    assert (other["right"], other["share"], other["similarity"]) == (0, 0.0, None)
    assert (first["low"], first["high"]) == wilson(2, 4)
    assert strongest(pl.DataFrame(rows, schema=SCHEMA), "topk", 2)["file"].to_list() == [
        "topk/class2-0-500.png",
        "topk/class2-1-500.png",
    ]


@pytest.mark.parametrize(("right", "trials"), [(0, 7), (7, 7), (61, 100)])
def test_wilsons_interval(right, trials):
    z, share = 1.959963984540054, right / trials
    middle = (share + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    half /= 1 + z**2 / trials
    assert wilson(right, trials) == pytest.approx((middle - half, middle + half), abs=1e-9)


def test_a_folder_keeps_images_and_rows(tmp_path):
    folder = Folder(tmp_path / "out", {"seed": 0, "size": (6, 6)})
    assert folder.finished("top1") == set()
    made = checkpoint(2, 1)
    folder.add(run.rows_of("top1", TARGETS, made, fake_look, NAMES), list(made.pixels))
    again = Folder(tmp_path / "out", {"seed": 0, "size": (6, 6)})
    assert again.finished("top1") == {"class0", "class2"}
    assert again.finished("topk") == set()
    for row in again.results.iter_rows(named=True):
        with Image.open(folder.path / row["file"]) as picture:
            assert np.asarray(picture)[0, 0, 0] == row["predicted"]
    (folder.path / "top1/class2-0-250.png").unlink()
    assert again.finished("top1") == {"class0"}
    again.add(run.rows_of("top1", TARGETS, made, fake_look, NAMES), list(made.pixels))
    assert read_results(folder.path).equals(folder.results)
    with pytest.raises(ConfigMismatchError, match="seed was 0, is 1"):
        Folder(tmp_path / "out", {"seed": 1, "size": (6, 6)})
    (folder.path / RESULTS_FILE).write_bytes(b"")
    with pytest.raises(StoreError, match=RESULTS_FILE):
        Folder(tmp_path / "out", {"seed": 0, "size": (6, 6)})


def test_a_sheet_frames_failures_red(tmp_path):
    folder = Folder(tmp_path / "out", {})
    made = checkpoint(2, 1)
    folder.add(run.rows_of("top1", TARGETS, made, fake_look, NAMES), list(made.pixels))
    sheet = contact_sheet(folder.path, folder.results)  # class 0, taken for 1; then class 2
    wide = SIDE + 2 * FRAME
    red, pale = (tuple(bytes.fromhex(color[1:])) for color in (RED, PALE))

    def framed(color):
        found = (np.asarray(sheet) == color).all(2)
        rows, columns = np.nonzero(found & (np.roll(found, wide - 1, 1)))
        return set(columns.tolist()), len(rows)

    (columns, height), (right_columns, right_height) = framed(red), framed(pale)
    assert height >= wide
    assert right_height >= wide
    assert min(right_columns) > max(columns) - wide


SMALL = ["vit_tiny_patch16_224", "--weights", "random:1"]
for argument in ("img_size=32", "patch_size=8", "embed_dim=48", "depth=2", "num_heads=3",
                 "num_classes=10"):  # fmt: skip
    SMALL += ["--model-arg", argument]


def synthesize(out, *arguments, model=SMALL):
    command = ["neurons", "synthesize", *model, "--out", str(out), "--steps", "1,2", *arguments]
    result = CliRunner().invoke(cli, command, standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result.return_value or 0, result.stdout, result.stderr


def test_the_command_makes_goes_on_and_refuses(tmp_path, monkeypatch):
    out = tmp_path / "out"
    variants = ("--variant", "top1", "--variant", "topk-diverse")
    code, printed, _ = synthesize(out, *variants, "--classes", "0,3", "--json")
    assert code == 0
    shown = {(row["variant"], row["steps"]): row for row in json.loads(printed)}
    assert {key: row["images"] for key, row in shown.items()} == {
        ("top1", 1): 2, ("top1", 2): 2, ("topk-diverse", 1): 6, ("topk-diverse", 2): 6,
    }  # fmt: skip
    results = read_results(out)
    assert all((out / file).exists() for file in results["file"])
    assert (out / "topk-diverse-2.png").exists()

    made = []
    ascend = run.ascend

    def counted(subject, targets, *rest, **options):
        made.extend(target.name for target in targets)
        return ascend(subject, targets, *rest, **options)

    monkeypatch.setattr(run, "ascend", counted)
    code, printed, _ = synthesize(out, "--classes", "0,3,5")
    assert (code, made) == (0, ["class5"])
    assert "re-classified" in printed
    assert read_results(out).filter(pl.col("target") != "class5").equals(results)
    for changed in (("--seed", "1"), ("--tokens", "cls"), ("--strength", "0.5")):
        code, _, error = synthesize(out, *changed)
        assert (code, "other settings" in error) == (5, True)


def test_a_killed_run_goes_on(tmp_path, monkeypatch):
    ascend, batches = run.ascend, []

    def dies(subject, targets, *rest, **options):
        batches.append(targets)
        for n, point in enumerate(ascend(subject, targets, *rest, **options)):
            if len(batches) == 2 and n == 1:
                raise KeyboardInterrupt
            yield point

    command = ("--classes", "0-3", "--batch-size", "2")
    monkeypatch.setattr(run, "ascend", dies)
    with pytest.raises(click.Abort):
        synthesize(tmp_path / "killed", *command)
    assert read_results(tmp_path / "killed")["target"].n_unique() == 2
    assert synthesize(tmp_path / "killed", *command)[0] == 0
    monkeypatch.setattr(run, "ascend", ascend)
    synthesize(tmp_path / "whole", *command)
    killed, whole = (read_results(tmp_path / name).drop("seconds") for name in ("killed", "whole"))
    assert killed.equals(whole)
    for file in whole["file"]:
        images = [np.asarray(Image.open(tmp_path / n / file)) for n in ("killed", "whole")]
        np.testing.assert_array_equal(*images)


def test_single_neurons(tmp_path):
    code, _, _ = synthesize(tmp_path / "out", "--neurons", "1:7,0:2")
    assert code == 0
    rows = read_results(tmp_path / "out").filter(pl.col("steps") == 2)
    assert sorted(zip(rows["block"], rows["neuron"], strict=True)) == [(0, 2), (1, 7)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--neurons", "1:7", "--classes", "1"), "leave out --classes"),
        (("--neurons", "1:7", "--variant", "topk"), "topk variants"),
        (("--neurons", "1"), "BLOCK:INDEX"),
        (("--classes", "10"), "0 to 9"),
        (("--classes", "x"), "--classes takes numbers"),
        (("--model-arg", "class_token=false", "--model-arg", 'global_pool="avg"', "--tokens",
          "cls"), "no CLS token"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)  # fmt: skip
def test_what_does_not_fit_is_refused(tmp_path, arguments, message):
    code, _, error = synthesize(tmp_path / "out", *arguments)
    assert code == 2
    assert message in error
    assert not (tmp_path / "out").exists()


def test_lists_of_numbers():
    assert numbers("3,5-7,6", "--classes") == [3, 5, 6, 7]
    assert parse_neurons("10:56, 1:2,10:56") == [(10, 56), (1, 2)]
    for text in ("", "0", "5-3", "1,-2"):
        with pytest.raises(UsageError):
            numbers(text, "--steps", least=1)
