import polars as pl
import pytest
from click.testing import CliRunner

from classlens.cli import cli


@pytest.mark.slow
def test_the_demos_study_meets_its_targets(tmp_path):
    arguments = ["reproduce", "vilas2023", "--demo", "--out", str(tmp_path), "--device", "cpu"]
    done = CliRunner().invoke(cli, arguments, standalone_mode=False)
    assert done.exception is None, done.output
    assert done.return_value == 0
    targets = pl.read_parquet(tmp_path / "targets.parquet")
    assert set(targets["verdict"]) == {"met"}
    assert (tmp_path / "report.html").exists()
