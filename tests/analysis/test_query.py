"""The commands ``query`` and ``export`` on a small store."""

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner, Result
from polars.testing import assert_frame_equal
from synthetic_store import Store, expected_frame, make_layout, write_store

from classlens.analysis import commands_query, scan
from classlens.cli import cli
from classlens.extractor import schema
from classlens.extractor.schema import Status

RATE = (
    "SELECT block, AVG(CAST(rank = 0 AS INT)) AS rate FROM scores "
    "WHERE stream = 'resid' AND kind = 'patch' GROUP BY block ORDER BY block"
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    path = tmp_path_factory.mktemp("query") / "store"
    layout = make_layout(images_per_unit=[6, 4], topk=2)
    return write_store(path, layout, [6, 4], bad={2: Status.UNDECODABLE})


@pytest.fixture
def own_store(tmp_path: Path) -> Store:
    return write_store(tmp_path / "store", make_layout(images_per_unit=[3]), [3])


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in arguments])


def test_csv_equals_the_number_computed_from_the_raw_arrays(store):
    result = run("query", store.path, RATE, "--format", "csv")
    assert result.exit_code == 0, result.output
    ok = store.arrays["images/status"] == Status.OK
    rank = store.arrays["scores/rank"][ok][:, :, 0, 1:]
    rows = list(csv.reader(io.StringIO(result.stdout)))
    assert rows[0] == ["block", "rate"]
    assert [int(block) for block, _ in rows[1:]] == [0, 1, 2]
    rates = [float(rate) for _, rate in rows[1:]]
    np.testing.assert_allclose(rates, (rank == 0).mean(axis=(0, 2)), rtol=1e-12)
    assert 0 < min(rates) < max(rates) < 1


def test_json(store):
    sql = "SELECT key, status, label FROM images WHERE status <> 'ok'"
    result = run("query", store.path, sql, "--format", "json")
    assert json.loads(result.stdout) == [
        {"key": store.keys[2], "status": "undecodable", "label": None}
    ]


def test_table_shows_every_column_and_says_when_rows_are_left_out(store):
    result = run("query", store.path, "SELECT * FROM scores", "--rows", 3)
    header = result.stdout.splitlines()[1]
    names = [cell.strip() for cell in header.strip("│").split("┆")]
    assert names == scan(store.path).collect_schema().names()
    assert result.stdout.count(store.keys[0]) == 3
    assert "first 3 rows" in result.stderr

    whole = run("query", store.path, "SELECT * FROM classes", "--rows", 10)
    assert "class 9" in whole.stdout
    assert whole.stderr == ""


@pytest.mark.parametrize("form", ["table", "csv", "json", "parquet"])
def test_out_holds_what_stdout_would(store, tmp_path, form):
    out = tmp_path / "answer"
    out.write_text("an older answer")
    result = run("query", store.path, RATE, "--format", form, "--out", out)
    assert (result.exit_code, result.stdout) == (0, "")
    assert [p.name for p in tmp_path.iterdir()] == ["answer"]
    if form == "parquet":
        expected = pl.SQLContext(scores=scan(store.path)).execute(RATE).collect()
        assert_frame_equal(pl.read_parquet(out), expected)
    else:
        assert out.read_text() == run("query", store.path, RATE, "--format", form).stdout


def test_tables_can_be_joined(store):
    sql = (
        "SELECT name, COUNT(*) AS tokens FROM scores JOIN classes ON scores.label = classes.class "
        "JOIN images ON scores.image = images.image WHERE unit = 1 AND block = 0 "
        "AND stream = 'mlp' GROUP BY name ORDER BY name"
    )
    result = run("query", store.path, sql, "--format", "json")
    labels = store.arrays["images/label"][6:10].tolist()
    expected = {f"class {label}": 7 * labels.count(label) for label in labels}
    assert {row["name"]: row["tokens"] for row in json.loads(result.stdout)} == expected


@pytest.mark.parametrize(
    ("sql", "reason"),
    [
        ("SELECT banana FROM scores", 'unable to find column "banana"'),
        ("SELECT rank FROM bananas", "relation 'bananas' was not found"),
        ("SELEC rank FROM scores", "Expected: an SQL statement"),
        ("SELECT SUM(stream) FROM scores", "not supported for dtype"),
        ("SELECT rank FROM scores WHERE label = 'dog'", "cannot compare string with numeric"),
    ],
)
def test_a_wrong_query_gets_one_sentence_with_the_columns(store, tmp_path, sql, reason):
    result = run("query", store.path, sql, "--format", "csv", "--out", tmp_path / "answer.csv")
    assert result.exit_code == 2
    assert reason in result.stderr
    assert "scores(image, key, label, " in result.stderr
    assert "classes(class, name)" in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert not list(tmp_path.iterdir())


def test_parquet_needs_a_file(store):
    result = run("query", store.path, RATE, "--format", "parquet")
    assert result.exit_code == 2
    assert "--out" in result.stderr


@pytest.mark.parametrize("command", [["query", RATE], ["export", "--parquet", "all.parquet"]])
def test_a_damaged_store_has_its_own_exit_code(own_store, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    spec = next(s for s in schema.all_arrays(own_store.layout) if s.path == "scores/rank")
    (own_store.path / schema.shard_file(spec, 0)).unlink()
    result = run(command[0], own_store.path, *command[1:])
    assert result.exit_code == 6
    assert "lacks scores/rank/c/0" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["store"]


@pytest.mark.parametrize("table", ["manifest", "units", "classes"])
def test_a_missing_table_is_named(own_store, table):
    (own_store.path / f"{table}.parquet").unlink()
    result = run("query", own_store.path, "SELECT key, shard FROM images")
    assert result.exit_code == 6
    assert f"lacks {table}.parquet" in result.stderr


def test_no_store(tmp_path):
    assert run("query", tmp_path, RATE).exit_code == 6
    assert run("query", tmp_path / "nothing", RATE).exit_code == 2


def test_export_holds_every_row_and_column(store, tmp_path, monkeypatch):
    monkeypatch.setattr(commands_query, "EXPORT_ROW_GROUP", 100)
    out = tmp_path / "all.parquet"
    result = run("export", store.path, "--parquet", out)
    assert result.exit_code == 0, result.output
    assert_frame_equal(pl.read_parquet(out), expected_frame(store))
    assert "567 rows" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["all.parquet"]


def test_export_of_some_streams(store, tmp_path):
    out = tmp_path / "some.parquet"
    assert run("export", store.path, "--parquet", out, "--streams", "mlp, resid").exit_code == 0
    expected = expected_frame(store).filter(pl.col("stream").is_in(["mlp", "resid"]))
    assert_frame_equal(pl.read_parquet(out), expected)

    result = run("export", store.path, "--parquet", out, "--streams", "mlp,mid")
    assert result.exit_code == 2
    assert "no stream 'mid'; it has resid, attn, mlp" in result.stderr
    assert_frame_equal(pl.read_parquet(out), expected)


def test_export_into_no_folder(store, tmp_path):
    result = run("export", store.path, "--parquet", tmp_path / "nowhere" / "all.parquet")
    assert result.exit_code == 2
    assert "cannot be written" in result.stderr


@pytest.mark.parametrize("form", ["csv", "json"])
def test_a_reader_that_stops_early_hears_no_complaint(store, form):
    program = [sys.executable, "-c", "from classlens.cli import main; main()"]
    command = [*program, "query", str(store.path), "SELECT * FROM scores", "--format", form]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_help_needs_neither_polars_nor_zarr():
    code = (
        "import sys; import classlens.analysis.commands_query; "
        "assert not {'polars', 'zarr', 'numpy', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert "GROUP BY" in run("query", "--help").stdout
    assert "--streams" in run("export", "--help").stdout
