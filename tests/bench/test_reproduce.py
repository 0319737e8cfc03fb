import polars as pl
import pytest
from click.testing import CliRunner

from classlens.cli import cli


@pytest.mark.slow
def test_the_demos_study_meets_its_targets_and_judges_every_claim(tmp_path):
    arguments = ["reproduce", "vilas2023", "--demo", "--out", str(tmp_path), "--device", "cpu"]
    done = CliRunner().invoke(cli, arguments, standalone_mode=False)
    assert done.exception is None, done.output
    assert done.return_value == 0
    targets = pl.read_parquet(tmp_path / "targets.parquet")
    assert set(targets["verdict"]) == {"met"}
    claims = pl.read_parquet(tmp_path / "claims.parquet")
    verdicts = dict(claims.select("id", "verdict").iter_rows())
    assert set(verdicts.values()) == {"holds", "contradicted", "undecided"}
    for claim in (
        "rate far above random weights",
        "identifiability rises",
        "self-only destroys identifiability",
        "class tokens above context tokens",
        "key-value agreement above a random class",
        "attribution beats random, positive test",
    ):
        assert verdicts[claim] == "holds"
    assert verdicts["projection above linear probes"] == "contradicted"
    page = (tmp_path / "report.html").read_text()
    assert page.count("<b>Contradicted.</b>") == list(verdicts.values()).count("contradicted")
