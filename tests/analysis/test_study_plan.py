import json
from importlib.resources import files

import pytest

from classlens.analysis.study.parse import load_study, parse_study
from classlens.analysis.study.plan import Claim, Target, Term
from classlens.bench.demo.command import demo_config
from classlens.extractor.config import ExtractConfig
from classlens.extractor.errors import UsageError

GOOD = """
[study]
name = "mine"
shards = ["shards"]

[[run]]
name = "b16"
model = "vit_base_patch16_224"
geometry = "squash"
streams = ["resid"]

[[run]]
name = "random"
control_of = "b16"
weights = "random:1"

[[perturb]]
name = "curves"
of = "b16"
steps = 7
probe = "probes"

[[probe]]
name = "probes"
of = "b16"
train = ["train"]

[[target]]
id = "rate"
run = "b16"
measure = "identifiability_rate"
value = 60
tolerance = 1.5
source = "table 1"

[[target]]
id = "change"
measure = "block_change_rate"
first_block = 1
runs = { b16 = [0.5, 0.6], random = [0.5] }
tolerance = 0.03

[[claim]]
id = "far above chance"
says = "So it is"
run = "b16"
check = "greater"
of = { measure = "identifiability_rate" }
than = { run = "random", measure = "identifiability_rate" }
factor = 10

[[claim]]
id = "late"
says = "It is late"
source = "§2"
runs = ["b16", "random"]
check = "peaks late"
of = { measure = "key_value_agreement", sublayer = "mlp" }
contradicted = "It is early."
"""


def test_a_study_is_read():
    study = parse_study(GOOD, "mine.toml")
    assert (study.name, study.title, study.seed, study.permutations) == ("mine", "mine", 0, 1000)
    assert [run.name for run in study.runs] == ["b16", "random"]
    config = ExtractConfig(**study.run("b16").settings)
    assert (config.geometry, config.streams) == ("squash", ("resid",))
    assert study.run("b16").shards == ("shards",)
    probes, test = study.steps  # the test ranks by the probes
    assert (probes.kind, probes.of, probes.options) == ("probe", "b16", {"train": ["train"]})
    assert (test.kind, test.of, test.options) == ("perturb", "b16", {"steps": 7, "probe": "probes"})
    assert study.targets[0] == Target("rate", "b16", "identifiability_rate", 60, 1.5, "table 1")
    series = [(t.id, t.run, t.value, t.arguments) for t in study.targets[1:]]
    assert series == [
        ("change, b16", "b16", 0.5, {"block": 1}),
        ("change, b16", "b16", 0.6, {"block": 2}),
        ("change, random", "random", 0.5, {"block": 1}),
    ]


def test_claims_are_read():
    chance, *late = parse_study(GOOD, "mine.toml").claims
    assert chance == Claim(
        id="far above chance",
        says="So it is",
        check="greater",
        of=Term("b16", "identifiability_rate"),
        than=Term("random", "identifiability_rate"),
        factor=10,
    )
    assert [claim.id for claim in late] == ["late, b16", "late, random"]
    of = Term("random", "key_value_agreement", {"sublayer": "mlp"})
    assert (late[1].of, late[1].check, late[1].than) == (of, "peaks late", None)
    assert (late[1].source, late[1].contradicted) == ("§2", "It is early.")


def test_a_control_has_the_settings_of_its_run_but_for_its_own():
    study = parse_study(GOOD, "mine.toml")
    settings = dict(study.run("b16").settings)
    assert study.run("random").settings == settings | {"weights": "random:1"}
    assert study.control("b16") == study.run("random")
    assert study.control("random") is None


def test_a_study_of_some_models_keeps_what_belongs_to_them():
    more = GOOD + '[[run]]\nname = "other"\nmodel = "vit_small_patch16_224"\n'
    study = parse_study(more, "mine.toml")
    assert [run.name for run in study.limited_to(("other",)).runs] == ["other"]
    kept = study.limited_to(("b16",))
    assert [run.name for run in kept.runs] == ["b16", "random"]
    assert (kept.steps, kept.targets) == (study.steps, study.targets)
    assert kept.claims == study.claims
    assert study.limited_to(("other",)).claims == ()
    with pytest.raises(UsageError, match="no model 'x'; it has b16, other"):
        study.limited_to(("x",))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[study]", "[study", "no valid TOML .*line 2"),
        ("[study]", "[studies]", r"\[studies\]: unknown table; a study has"),
        ('name = "mine"', "", r"line 2, \[study\]: lacks name"),
        ('shards = ["shards"]', "shads = []", r"line 2, \[study\]: unknown field 'shads'"),
        ('shards = ["shards"]', "", r"line 6, \[run\]: has no shards"),
        ('shards = ["shards"]', 'shards = ["pack:x"]', r"\[run\]: reads 'pack:x', which no"),
        ('geometry = "squash"', 'gemetry = "x"', r"line 6, \[run\]: unknown field 'gemetry'"),
        ('geometry = "squash"', 'geometry = "x"', "geometry = 'x' does not fit; give 'timm' or"),
        ('geometry = "squash"', "topk = true", "topk = True does not fit; give a whole number"),
        ('["resid"]', '["q"]', "settings that do not fit: --streams takes"),
        ('model = "vit_base_patch16_224"', "", r"line 6, \[run\]: has no model"),
        ('name = "random"', 'name = "b16"', r"line 12, \[run\]: 'b16' is taken already"),
        ('control_of = "b16"', 'control_of = "b17"', r"line 12, \[run\]: refers to 'b17'"),
        ('control_of = "b16"', 'control_of = "b16"\nperturbed_of = "b16"', "leave one out"),
        ('of = "b16"\nsteps', 'of = "x"\nsteps', r"line 17, \[perturb\]: is of 'x'"),
        (
            'probe = "probes"',
            'probe = "b16"',
            r"line 17, \[perturb\]: has probe 'b16', which",
        ),
        ('name = "curves"', 'name = "b16"', r"\[perturb\]: is called 'b16' as a run is"),
        ('run = "b16"\nm', 'run = "b17"\nm', r"line 28, \[target\]: is of 'b17', which is"),
        ('"identifiability_rate"', '"rate"', r"\[target\]: has no known measure; known are id"),
        ("value = 60", "", "needs run with value or values, or runs"),
        ("value = 60", "block = 3\nvalue = 60", "unknown field 'block'"),
        ("value = 60", 'value = "60"', "value = '60' does not fit; give a number"),
        ('name = "random"', 'name = "a/b"', r"line 12, \[run\]: name 'a/b' names files"),
        ('streams = ["resid"]', "streams = [1]", r"streams = \[1\] does not fit"),
        ("value = 60", "values = [60]", "no first_block, or a measure without block"),
        ("first_block = 1", "", r"line 36, \[target\]: has values of blocks, but no first_block"),
        ("[0.5, 0.6]", "0.5", r"\[target\]: lacks block, which its measure takes"),
        ("[0.5, 0.6]", '"x"', "has 'x', which is no number"),
        ("tolerance = 0.03", "", r"line 36, \[target\]: lacks tolerance"),
        ('id = "change"', 'id = "rate"', r"line 36, \[target\]: 'rate' is taken already"),
        ("factor = 10", "fctor = 10", r"line 43, \[claim\]: unknown field 'fctor'"),
        ("factor = 10", "factor = 0", r"line 43, \[claim\]: factor is above 0"),
        (
            "factor = 10",
            'factor = "x"',
            r"line 43, \[claim\]: factor = 'x' does not fit",
        ),
        ('says = "So it is"', "", r"line 43, \[claim\]: lacks says"),
        (
            'id = "late"',
            'id = "far above chance"',
            r"line 52, \[claim\]: 'far above chance' is",
        ),
        (
            '"peaks late"',
            '"late"',
            "line 52, .claim.: check = 'late' does not fit; give 'gre",
        ),
        ('"greater"', '"rises"', "takes than with the check greater, and with no other"),
        ('than = { run = "random", measure = "identifiability_rate" }', "", "takes than with the"),
        (
            '"identifiability_rate" }\nf',
            '"rate" }\nf',
            "than.measure is 'rate', which is unkn",
        ),
        (
            '{ run = "random", measure',
            '{ run = "c", measure',
            "than.run is 'c', which is no run",
        ),
        (
            'than = { run = "random", measure = "identifiability_rate" }',
            "than = true",
            "than = True does not fit; give a number or { run, measure",
        ),
        ('run = "b16"\ncheck', "check", "of.run is None, which is no run"),
        ('run = "b16"\ncheck', 'run = "b16"\nruns = ["b16"]\ncheck', "run, or runs with at least"),
        ('runs = ["b16", "random"]', "runs = []", "run, or runs with at least one"),
        (
            ', sublayer = "mlp"',
            ', layer = "mlp"',
            "of.layer is unknown; key_value_agreem",
        ),
        (', sublayer = "mlp"', "", "of lacks sublayer, which its measure takes"),
        (
            ', sublayer = "mlp"',
            ', sublayer = "mlp", pick = "last"',
            "of must be of all blocks",
        ),
    ],
)
def test_what_is_wrong_is_named_with_its_place(old, new, message):
    assert old in GOOD
    with pytest.raises(UsageError, match=message) as caught:
        parse_study(GOOD.replace(old, new, 1), "mine.toml")
    assert str(caught.value).startswith("mine.toml")
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        load_study(tmp_path / "absent.toml")


def shipped(name):
    return load_study(files("classlens.analysis.study") / name)


def test_the_papers_study_has_all_its_runs():
    study = shipped("vilas2023.toml")
    models = [run.name for run in study.runs if run.depends_on is None]
    assert models == [
        "vit_b_32", "vit_b_16", "vit_large_16", "vit_miil_16", "vit_cifar_16",
        "deit_ensemble_16", "vit_gap_16",
    ]  # fmt: skip
    assert {run.control_of for run in study.runs} == {None, "vit_b_32", "vit_b_16"}
    geometry = {name: study.run(name).settings.get("geometry", "timm") for name in models}
    assert [name for name in models if geometry[name] == "timm"] == [
        "vit_miil_16",
        "deit_ensemble_16",
    ]
    assert {run.settings.get("intervene") for run in study.runs if run.perturbed_of} == {
        "self-only", "no-cls", "drop-context", "drop-class",
    }  # fmt: skip
    assert [step.kind for step in study.steps] == ["probe", "perturb"]
    assert study.steps[1].options == {"probe": study.steps[0].name}


def test_the_papers_numbers_are_those_it_printed():
    by_id = {}
    for target in shipped("vilas2023.toml").targets:
        assert target.tolerance >= 0
        assert target.source
        assert target.reason
        by_id.setdefault(target.id, []).append(target)
    assert by_id["rate, vit_b_32"][0].value == 60.726173
    change = by_id["block change rate, vit_large_16"]
    assert [t.arguments["block"] for t in change] == list(range(1, 24))
    assert change[-1].value == 0.995
    # The paper's block 11 is block 10 here.
    assert by_id["class-value cosine, MLP, block of the largest, vit_b_32"][0].value == 10
    logits = by_id["attention's logit difference, class - context, vit_b_32"]
    assert (logits[0].arguments["block"], logits[0].value) == (1, 0.007023)


def test_the_demos_model_is_the_demos():
    run = shipped("demo.toml").run("model")
    ours = ExtractConfig(**{**run.settings, "streams": ("resid", "attn", "mlp"), "reduce": ()})
    assert json.dumps(ours.to_json()) == json.dumps(demo_config("model.safetensors").to_json())
