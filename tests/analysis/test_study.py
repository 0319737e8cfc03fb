"""Studies of small random models, from a file to a page."""

import json
import math
import shutil

import polars as pl
import pytest
from click.testing import CliRunner
from safetensors.torch import save_file
from samples import sample, write_tar

from classlens.analysis.identifiability import analyze_identifiability
from classlens.analysis.study import plan, runner
from classlens.analysis.study.measures import MEASURES, Reading
from classlens.analysis.study.parse import parse_study
from classlens.analysis.study.plan import Target
from classlens.analysis.study.runner import Place, run_study
from classlens.analysis.study.verdicts import findings_frame, judge, missing, rows
from classlens.cli import cli
from classlens.extractor.config import ExtractConfig
from classlens.extractor.models import load_subject
from classlens.extractor.store import verify

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
MODEL_ARGS = ", ".join(f"{key} = {value}" for key, value in {**SMALL, "num_classes": 10}.items())
STUDY = f"""
[study]
name = "small"
shards = ["shards"]
permutations = 20

[[run]]
name = "a"
model = "vit_tiny_patch16_224"
weights = "random:1"
model_args = {{ {MODEL_ARGS} }}

[[run]]
name = "a-random"
control_of = "a"
weights = "random:2"

[[run]]
name = "broken"
model = "vit_tiny_patch16_224"
weights = "absent.safetensors"
model_args = {{ {MODEL_ARGS} }}

[[run]]
name = "b"
model = "vit_tiny_patch16_224"
weights = "b.safetensors"
model_args = {{ {MODEL_ARGS} }}

[[probe]]
name = "probed"
of = "a"
train = ["absent-shards"]

[[target]]
id = "rate"
measure = "identifiability_rate"
runs = {{ a = 0.0, a-random = 1000.0, broken = 1.0, b = 0.0 }}
tolerance = 100
source = "nowhere"
reason = "all rates lie within"

[[target]]
id = "change"
run = "a"
measure = "block_change_rate"
first_block = 1
values = [0.5, 2.0, 0.5]
tolerance = 0.5

[[target]]
id = "probe"
run = "probed"
measure = "probe_top1"
stream = "attn"
block = 2
value = 0.5
tolerance = 0.1

[[claim]]
id = "more than nothing"
says = "Every image of A is predicted right."
source = "§1"
check = "greater"
of = {{ run = "a", measure = "accuracy" }}
than = 101
contradicted = "Nothing is above 100 %."

[[claim]]
id = "rises"
says = "Identifiability lies above none"
runs = ["a", "broken"]
check = "greater"
of = {{ measure = "mean_identifiability" }}
than = {{ run = "a-random", measure = "mean_identifiability" }}
factor = 0.01
"""


def run(data, out, text=STUDY, **options):
    return run_study(parse_study(text, "small.toml"), Place(data, out, "cpu"), **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Data, output folder, result and lines said of the study, run once."""
    data, out = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("out")
    (data / "shards").mkdir()
    write_tar(data / "shards/0.tar", [sample(i) for i in range(5)])
    write_tar(data / "shards/1.tar", [sample(i) for i in range(5, 8)])
    model_args = {**SMALL, "num_classes": 10}
    made = load_subject(ExtractConfig("vit_tiny_patch16_224", model_args, "random:3"))
    save_file(made.model.state_dict(), data / "b.safetensors")
    said = []
    return data, out, run(data, out, say=said.append), said


@pytest.fixture
def data(finished):
    return finished[0]


@pytest.fixture
def out(finished, tmp_path):
    """A copy of the finished study's output."""
    return shutil.copytree(finished[1], tmp_path / "out")


@pytest.fixture
def no_pages(monkeypatch):
    """Pages take seconds to draw."""

    def written(stores, page, *arguments, **options):
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text("a page")

    monkeypatch.setattr("classlens.analysis.report.write_report", written)


def states(result) -> dict[str, str]:
    return {outcome.step: outcome.state for outcome in result.outcomes}


def test_one_failing_run_does_not_lose_the_others(finished):
    _, out, result, said = finished
    assert states(result) == {
        "extract a": "done",
        "extract a-random": "done",
        "extract broken": "failed",
        "extract b": "done",
        "probe probed": "failed",
        "identifiability of a": "done",
        "identifiability of a-random": "done",
        "identifiability of broken": "left out",
        "identifiability of b": "done",
        "page on a": "done",
        "page on broken": "left out",
        "page on b": "done",
    }
    assert len(said) == len(result.outcomes)
    assert result.exit_code == 7  # that of the first failure: a model that cannot be loaded
    for name in ("a", "a-random", "b"):
        assert verify(out / "stores" / name) == []
    verdicts = {(f.target.id, f.target.arguments.get("block")): f for f in result.findings}
    assert verdicts["rate, a", None].verdict == "met"
    assert verdicts["rate, a-random", None].verdict == "not met"
    assert verdicts["rate, b", None].verdict == "met"
    broken = verdicts["rate, broken", None]
    assert (broken.verdict, broken.corrected) == ("not measured", None)
    assert "absent.safetensors" in broken.reason
    assert [verdicts["change", b].verdict for b in (1, 2)] == ["met", "not met"]
    assert verdicts["change", 3].reason == "there is nothing for block 3"  # of 3 blocks
    assert "absent-shards" in verdicts["probe", 2].reason


def test_numbers_are_those_of_the_analysis_in_both_conventions(finished):
    _, out, result, _ = finished
    [rate] = [f for f in result.findings if f.target.id == "rate, a"]
    for convention in ("corrected", "vilas2023"):
        expected = analyze_identifiability(
            out / "stores/a", out / "stores/a-random", convention=convention, permutations=20
        )
        model = expected.rate.filter(pl.col("source") == "model")
        assert getattr(rate, convention) == model["rate"].item()
        change = expected.change_rate.filter(pl.col("source") == "model", pl.col("block") == 1)
        [ours] = [f for f in result.findings if f.target.arguments.get("block") == 1]
        assert getattr(ours, convention) == change["change_rate"].item()


def test_claims_are_judged_by_the_analyses(finished):
    _, out, result, _ = finished
    by_id = {finding.claim.id: finding for finding in result.claims}
    accuracy = analyze_identifiability(out / "stores/a", permutations=20).accuracy["accuracy"]
    claim = by_id["more than nothing"]
    assert claim.verdict == "contradicted"
    assert claim.numbers.startswith(f"accuracy: {accuracy.item():.4g} [")
    assert claim.contradiction.startswith(
        "The paper (§1): Every image of A is predicted right. Not"
    )
    assert claim.contradiction.endswith("against 101. Nothing is above 100 %.")
    assert by_id["rises, a"].verdict == "holds"
    assert "in 3 of 3 blocks" in by_id["rises, a"].numbers
    assert by_id["rises, broken"].verdict == "not measured"
    assert "absent.safetensors" in by_id["rises, broken"].numbers


def test_what_is_done_is_not_done_again(finished, out, monkeypatch):
    data, _, first, _ = finished

    def forbidden(*arguments, **options):
        raise AssertionError("done again")

    monkeypatch.setattr("classlens.extractor.run.extract", forbidden)
    monkeypatch.setattr("classlens.analysis.report.write_report", forbidden)
    monkeypatch.setitem(runner.ANALYSES, "identifiability", forbidden)
    again = run(data, out)
    assert states(again) == states(first)
    assert again.findings == first.findings
    assert again.claims == first.claims


def test_a_changed_setting_is_noticed(data, out, no_pages):
    result = run(data, out, STUDY.replace('"random:2"', '"random:5"'))
    assert states(result)["extract a-random"] == "failed"  # the store has other weights
    assert states(result)["extract a"] == "done"
    fewer = run(data, out, STUDY.replace("permutations = 20", "permutations = 30"))
    assert states(fewer)["extract a-random"] == "done"
    kept = json.loads((out / "results/a.identifiability.json").read_text())
    assert kept["inputs"]["permutations"] == 30


def test_a_store_that_is_gone_is_made_again(data, out, tmp_path, no_pages):
    (out / "stores/b").rename(tmp_path / "elsewhere")
    assert states(run(data, out))["extract b"] == "done"
    assert verify(out / "stores/b") == []


def test_only_one_run(data, tmp_path, no_pages):
    out = tmp_path / "out"
    result = run(data, out, only="b")
    done = {step for step, state in states(result).items() if state == "done"}
    assert done == {"extract b", "identifiability of b", "page on b"}
    reasons = {f.target.id: f.reason for f in result.findings}
    assert reasons["rate, b"] == ""
    assert reasons["rate, a"] == "a has not been run"
    assert result.exit_code == 0
    with pytest.raises(runner.UsageError, match="no step 'c'; it has a, a-random, broken, b"):
        run(data, out, only="c")


def test_settings_that_classlens_does_not_have_fail_their_run_alone(data, tmp_path, monkeypatch):
    monkeypatch.setitem(plan.SETTINGS, "from_tomorrow", str)
    text = STUDY.replace('weights = "random:2"', 'from_tomorrow = "x"')
    result = run(data, tmp_path / "out", text, only="a-random")
    failed = next(o for o in result.outcomes if o.step == "extract a-random")
    assert (failed.state, failed.exit_code) == ("failed", 2)
    assert "cannot extract with from_tomorrow" in failed.note


ROWS = [
    {"source": "model", "sublayer": "mlp", "group": "all", "block": b, "x": x}
    for b, x in enumerate((1.0, 3.0, 2.0))
]


def picked(measure, key, column, **arguments):
    rows = [{**row, column: row["x"]} for row in ROWS]
    return MEASURES[measure].read({key: rows}, sublayer="mlp", **arguments).value


def test_measures_over_blocks_pick_the_peak_its_block_or_the_last():
    for measure, key, column in (
        ("class_value_cosine", "agreement", "cosine"),
        ("key_value_agreement", "agreement", "agreement"),
        ("memory_composition", "composition", "composed"),
    ):
        found = [picked(measure, key, column, pick=p) for p in ("peak", "peak_block", "last")]
        assert found == [3.0, 1, 2.0]
    with pytest.raises(LookupError, match="pick is 'first', which is none of peak"):
        picked("class_value_cosine", "agreement", "cosine", pick="first")
    with pytest.raises(LookupError, match="nothing for sublayer mlp"):
        MEASURES["class_value_cosine"].read({"agreement": []}, sublayer="mlp", pick="last")


def test_other_measures_take_the_row_that_is_asked_for():
    rates = [
        {"measure": "rate", "source": "perturbed", "value": 7.0},
        {"measure": "accuracy", "source": "perturbed", "value": 8.0},
        {"measure": "rate", "source": "unperturbed", "value": 9.0},
    ]
    assert measured("intervention_rate", {"rates": rates}, state="perturbed") == 7.0
    other = measured("intervention_rate", {"rates": rates}, state="perturbed", of="accuracy")
    assert other == 8.0
    assert measured("intervention_rate", {"rates": rates}, state="unperturbed") == 9.0
    auc = [{"test": "negative", "method": "chefer", "auc": 0.8}]
    assert measured("perturbation_auc", {"auc": auc}, test="negative", method="chefer") == 0.8
    probes = [{"source": "probe", "stream": "attn", "group": "patch", "block": 2, "rate": 58.0}]
    assert measured("probe_top1", {"comparison": probes}, stream="attn", block=2) == 0.58
    change = {"change_rate": [{"sublayer": "attn", "group": "cls", "block": 1, "change_rate": 0.6}]}
    found = measured("sublayer_change_rate", change, sublayer="attn", group="cls", block=1)
    assert found == 0.6
    context = {"context": [{"sublayer": "attn", "block": 1, "delta": 0.2}]}
    assert measured("class_context_logit_difference", context, sublayer="attn", block=1) == 0.2


def measured(measure, result, **arguments):
    return MEASURES[measure].read(result, **arguments).value


def test_intervals_and_p_values_come_with_the_numbers():
    row = {"source": "model", "rate": 5.0, "rate_low": 4.0, "rate_high": 6.0, "images": 9.0}
    rate = MEASURES["identifiability_rate"].read({"rate": [row]})
    assert rate == Reading(5.0, 4.0, 6.0)
    context = {"block": 1, "delta": 0.2, "low": 0.1, "high": 0.3, "p_value": 0.01, "q_value": 0.02}
    later = {"block": 0, "delta": 0.1, "low": None, "high": None, "p_value": 0.5, "q_value": None}
    series = MEASURES["class_context_difference"].read({"context": [context, later]})
    assert list(series.items()) == [(0, Reading(0.1, p=0.5)), (1, Reading(0.2, 0.1, 0.3, 0.02))]
    absent = {"test": "negative", "method": "chefer", "auc": None}
    with pytest.raises(LookupError, match="no such number"):
        MEASURES["perturbation_auc"].read({"auc": [absent]}, test="negative", method="chefer")


def test_a_difference_of_areas_can_be_asked_for_either_way_round():
    row = {"test": "negative", "difference": -0.2, "low": -0.3, "high": 0.1}
    result = {"differences": [{"first": "chefer", "second": "random", **row}]}
    measure = MEASURES["perturbation_difference"]
    as_kept = measure.read(result, test="negative", first="chefer", second="random")
    assert as_kept == Reading(-0.2, -0.3, 0.1)
    turned = measure.read(result, test="negative", first="random", second="chefer")
    assert turned == Reading(0.2, -0.1, 0.3)
    with pytest.raises(LookupError, match="nothing for test positive"):
        measure.read(result, test="positive", first="random", second="chefer")


def finding(value, ours, tolerance=0.1, **arguments):
    target = Target("t", "r", "m", value, tolerance, arguments=arguments)
    values = {} if ours is None else {"vilas2023": ours, "corrected": ours + 1}
    return judge(target, values, "" if ours is not None else "nothing there")


def test_the_tolerance_is_inclusive_and_their_convention_is_judged():
    assert finding(1.0, 1.5, 0.5).verdict == "met"
    assert finding(1.0, 0.5, 0.5).verdict == "met"
    assert finding(1.0, math.nextafter(1.5, 2), 0.5).verdict == "not met"
    assert finding(1.0, float("nan"), 0.5).verdict == "not met"
    assert judge(Target("t", "r", "m", 1, 1), {"corrected": 1.0}).verdict == "not measured"


def test_a_series_is_one_row_with_its_worst_block():
    findings = [
        finding(0.5, 0.55, block=1),
        finding(0.5, 0.9, block=2),
        finding(0.5, None, block=3),
    ]
    [row] = rows(findings)
    assert (row.block, row.verdict) == ("2", "not met, 1 of 3 blocks")
    [row] = rows(findings[:1])
    assert (row.block, row.verdict) == ("1", "met")
    [row] = rows(findings[2:])
    assert row.verdict == "not measured"
    assert missing(findings) == ["1 not measured: nothing there"]


def test_the_frame_has_a_row_for_every_target():
    frame = findings_frame([finding(0.5, 0.55, block=1), finding(0.5, None)])
    assert frame["block"].to_list() == [1, None]
    assert frame["verdict"].to_list() == ["met", "not measured"]
    assert frame["difference"][0] == pytest.approx(0.05)
    assert json.loads(frame["arguments"][0]) == {"block": 1}


def test_the_command_ends_with_table_parquet_and_page(data, out):
    file = data / "small.toml"
    file.write_text(STUDY)
    done = CliRunner().invoke(cli, ["study", str(file), "--out", str(out), "--device", "cpu"],
                              standalone_mode=False)  # fmt: skip
    assert done.exception is None, done.output
    assert done.return_value == 7
    assert "not measured" in done.stdout
    assert "failed: extract broken" in done.stderr
    frame = pl.read_parquet(out / "targets.parquet")
    assert frame.height == 8
    page = (out / "report.html").read_text()
    for text in ("rate, a-random", "nowhere", "all rates lie within", "absent.safetensors", "<svg"):
        assert text in page
    for text in ("Contradicted.", "Nothing is above 100 %.", "Identifiability lies above none"):
        assert text in page
        assert text.rstrip(".").lower().split()[0] in done.stdout.lower()
    claims = pl.read_parquet(out / "claims.parquet")
    assert claims["verdict"].to_list() == ["contradicted", "holds", "not measured"]
    assert 'href="pages/a.html"' in page
    assert "broken.html" not in page
    assert (out / "pages/a.html").exists()
    again = CliRunner().invoke(
        cli, ["study", str(file), "--out", str(out), "--device", "cpu", "--json"]
    )
    listed = json.loads(again.stdout)
    assert {row["verdict"] for row in listed["targets"]} == {"met", "not met", "not measured"}
    assert [row["id"] for row in listed["claims"]] == claims["id"].to_list()


def test_reproduce_wants_data_or_the_demo(tmp_path):
    for extra, message in (([], "--data"), (["--demo", "--models", "a"], "leave out")):
        done = CliRunner().invoke(
            cli, ["reproduce", "vilas2023", "--out", str(tmp_path / "o"), *extra],
            standalone_mode=False,
        )  # fmt: skip
        assert done.return_value == 2
        assert message in done.stderr
