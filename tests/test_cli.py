import json
import subprocess
import sys

import pytest
from click.testing import CliRunner
from samples import Sample

from classlens.cli import COMMANDS, cli

MODEL = ["--model", "vit_tiny_patch16_224", "--weights", "random:1", "--batch-size", "4"]
for argument in ("img_size=32", "patch_size=8", "embed_dim=48", "depth=2", "num_heads=3"):
    MODEL += ["--model-arg", argument]
MODEL += ["--model-arg", "num_classes=10"]


def run(*arguments) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli, [str(a) for a in arguments], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result.return_value or 0, result.stdout, result.stderr


def test_help_is_quick_and_imports_nothing_heavy():
    code = (
        "import sys, time; started = time.perf_counter(); from classlens.cli import cli\n"
        "cli(['--help'], standalone_mode=False)\n"
        "heavy = {'torch', 'zarr', 'polars', 'timm', 'altair'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for name in COMMANDS:
        assert name in shown.stdout
    assert "Exit codes" in shown.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name):
    code, out, _ = run(name, "--help")
    assert code == 0
    assert "Usage:" in out


def test_extract_query_and_look_after_a_store(make_shards, tmp_path):
    shards, store = make_shards((5, 3))[0].parent, tmp_path / "store"
    code, out, _ = run("extract", shards, *MODEL, "--out", store, "--dry-run", "--json")
    assert (code, json.loads(out)["images"]) == (0, 8)
    assert not store.exists()
    code, out, _ = run("extract", shards, *MODEL, "--out", store, "--json")
    assert (code, json.loads(out)["status"]) == (0, {"ok": 8})
    assert run("extract", shards, *MODEL, "--out", store)[0] == 0

    code, out, _ = run("info", store)
    assert "10" in out
    assert "scores/rank" in out
    assert json.loads(run("status", store, "--json")[1])["units_committed"] == 2
    assert run("verify", store)[0] == 0
    sql = "SELECT COUNT(*) AS n FROM scores WHERE kind = 'patch' AND stream = 'resid'"
    code, out, _ = run("query", store, sql, "--format", "json")
    assert json.loads(out)[0]["n"] == 8 * 2 * 16


def test_an_extraction_says_what_would_be_faster(make_shards, tmp_path, monkeypatch):
    monkeypatch.setattr("classlens.kernels.cpu_bfloat16.native_bfloat16", lambda: True)
    monkeypatch.setattr("classlens.kernels.tiles.has_units", lambda units, dtype: True)
    monkeypatch.setattr("classlens.kernels.cpp.compiler", lambda: None)
    shards = make_shards((3,))[0].parent
    command = ["extract", shards, *MODEL, "--device", "cpu"]
    assert "as fast: --dtype bfloat16" in run(*command, "--out", tmp_path / "float32")[1]
    out = run(*command, "--dtype", "bfloat16", "--out", tmp_path / "bfloat16")[1]
    assert "twice as fast by kernels that need a C++ compiler: install g++" in out


def test_probes_make_a_store_that_every_command_reads(make_shards, tmp_path):
    train, test = make_shards((20, 6))
    store, probes, page = tmp_path / "store", tmp_path / "probes", tmp_path / "report.html"
    command = ["probe", train, "--test", test, *MODEL, "--out", probes]
    code, out, _ = run(*command, "--memory", "0.001", "--dry-run", "--json")
    plan = json.loads(out)
    assert (code, plan["train_images"], plan["test_images"], plan["probes"]) == (0, 20, 6, 102)
    assert plan["train_passes"] == plan["test_passes"] > 1
    assert plan["bytes"] <= plan["memory_bytes"] == 1_000_000
    assert not probes.exists()
    code, out, _ = run(*command)
    assert code == 0
    assert "1 x 20 training and 1 x 6 test images to pass" in out
    assert "10 classes have fewer than 10 training images, 0 of them none" in out
    assert "6 of 6 images scored" in out
    code, out, _ = run(*command, "--json")
    assert json.loads(out)["store"]["units_committed"] == 1

    assert run("verify", probes)[0] == 0
    assert "ridge probes, alpha 1, 20 training images" in run("info", probes)[1]
    sql = "SELECT COUNT(*) AS n FROM scores WHERE kind = 'patch' AND stream = 'resid'"
    assert json.loads(run("query", probes, sql, "--format", "json")[1])[0]["n"] == 6 * 2 * 16
    code, out, _ = run("analyze", "identifiability", probes, "--permutations", "5", "--json")
    assert json.loads(out)["corrected"]["n_images"] == 6
    assert run("extract", test, *MODEL, "--out", store)[0] == 0
    options = ["--images", "1", "--permutations", "5", "--out", page]
    assert run("report", store, probes, "--probe", probes, *options)[0] == 0
    assert page.read_text().count("<h3>Linear probes beside the class embedding</h3>") == 1

    code, _, error = run(*command, "--alpha", "2")
    assert code == 5
    assert "probe" in error
    code, _, error = run("probe", test, "--test", test, *MODEL, "--out", tmp_path / "other")
    assert code == 2
    assert "the first is image0020" in error
    assert run(*command, "--memory", "0.000001")[0] == 2


def test_exit_codes(make_shards, tmp_path):
    def spoil(samples: list[Sample]) -> None:
        samples[1].members["jpg"] = b"no picture"

    shards, store = make_shards((4,), change=spoil), tmp_path / "store"
    code, out, _ = run("extract", *shards, *MODEL, "--out", store)
    assert code == 3
    assert "not scored: 1 undecodable" in out
    code, _, error = run("extract", *shards, *MODEL, "--out", store, "--topk", "2")
    assert code == 5
    assert "topk" in error
    next((store / "scores/rank").rglob("c/0/*/*/0")).write_bytes(b"gone")
    code, out, _ = run("verify", store, "--json")
    assert code == 6
    assert json.loads(out)[0]["unit"] == 0
    assert run("verify", store, "--repair")[0] == 6
    assert run("extract", *shards, *MODEL, "--out", store)[0] == 3
    assert run("verify", store)[0] == 0

    shards[0].write_bytes(shards[0].read_bytes()[:-2000])
    code, _, error = run("extract", *shards, *MODEL, "--out", store)
    assert code == 4
    assert "shard-0.tar" in error
    code, _, error = run("extract", tmp_path, "--model", "resnet18", "--out", store)
    assert code == 4
    shards = make_shards((4,))
    model = ["--model", "resnet18", "--weights", "random"]
    code, _, error = run("extract", *shards, *model, "--out", store)
    assert code == 7
    assert "Vision Transformer" in error
    assert run("extract", *shards, *MODEL, "--out", store, "--streams", "q")[0] == 2
