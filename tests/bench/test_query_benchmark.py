import json

import numpy as np
import polars as pl
import pytest
import zarr
from click.testing import CliRunner

from classlens.bench import machine, query
from classlens.extractor.errors import ConfigMismatchError
from classlens.extractor.store import verify


def test_the_store_is_whole_and_of_the_shape_that_is_promised(tmp_path, monkeypatch):
    monkeypatch.setattr(query, "UNIT_IMAGES", 8)
    store = query.write_store(tmp_path / "store", 20)
    assert verify(store) == []
    rank = np.asarray(zarr.open_array(str(store / "scores/rank"))[:20])
    assert rank.shape == (20, 12, 3, 197)
    mean = 1 - rank[:, :, 0].mean(axis=(0, 2)) / 1000
    assert mean[0] == pytest.approx(0.5, abs=0.05)  # chance
    assert (np.diff(mean) > 0).all()
    with pytest.raises(ConfigMismatchError, match="synthetic_images"):
        query.write_store(tmp_path / "store", 21)


def test_every_question_is_answered_by_both(tmp_path):
    arguments = ["--images", "9", "--rounds", "1", "--out", str(tmp_path), "--json"]
    result = CliRunner().invoke(query.query, arguments, catch_exceptions=False)
    found = json.loads(result.stdout)
    assert found["benchmark"] == "query"
    assert found["machine"]["commit"]
    rows = {row["query"]: row for row in found["rows"]}
    assert list(rows) == list(query.QUERIES)
    assert {name: row["rows"] for name, row in rows.items()} == {
        "rate by block": 9 * 12 * 196,
        "CLS by block": 9 * 12,
        "one image": 12 * 3 * 197,
        "mean by block and stream": 9 * 12 * 3 * 196,
        "top-1 share by place": 9 * 196,
    }
    assert all(row["store_s"] > 0 and row["parquet_s"] > 0 for row in rows.values())
    assert rows["one image"]["parquet_bytes"] == (tmp_path / "scores.parquet").stat().st_size


def test_a_different_answer_is_not_timed(tmp_path, monkeypatch):
    query.measure(tmp_path, 9, 1)
    parquet = tmp_path / "scores.parquet"
    frame = pl.read_parquet(parquet)
    frame[-1, "identifiability"] = frame[-1, "identifiability"] - 0.001  # one place of one rank
    frame.write_parquet(parquet)
    monkeypatch.setattr(machine, "time_in_turn", None)
    with pytest.raises(AssertionError, match="value mismatch for column"):
        query.measure(tmp_path, 9, 1)
