import json

import pytest
from click.testing import CliRunner

from classlens.bench import memory
from classlens.extractor.plan import expand_shards, make_plan


def test_a_shard_under_many_names_is_as_many_units(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "UNIT_IMAGES", 3)
    shards = memory.repeat_shard(tmp_path / "shards", 4)
    plan = make_plan(expand_shards([str(shards)]))
    assert [unit.images for unit in plan.units] == [3] * 4
    assert len({path.stat().st_ino for path in shards.glob("*.tar")}) == 1


def test_a_trajectory_knows_its_slope(monkeypatch):
    monkeypatch.setattr(memory, "resident_mib", lambda field: 100 + 0.25 * trajectory.done)
    trajectory = memory.Trajectory()
    trajectory.started(1000)
    for _ in range(200):
        trajectory.advanced(5, scored=True)
    assert len(trajectory.samples) == memory.SAMPLES
    assert [trajectory.at(share) for share in (0.1, 0.5, 1.0)] == [125, 225, 350]
    assert trajectory.slope() == pytest.approx(0.25)


def test_one_row_of_an_extraction_in_its_own_process(monkeypatch):
    monkeypatch.setattr(memory, "UNIT_IMAGES", 50)
    arguments = ["--images", "500", "--json"]
    result = CliRunner().invoke(memory.memory, arguments, catch_exceptions=False)
    found = json.loads(result.stdout)
    assert found["benchmark"] == "memory"
    (row,) = found["rows"]
    assert row["images"] == 500
    assert 50 < row["planned_mib"] < row["mib_at_100_percent"] <= row["peak_mib"]
    assert row["trajectory"][-1] == {"images": 500, "mib": row["mib_at_100_percent"]}
