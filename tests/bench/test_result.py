import json

import pytest

from classlens.bench.result import print_result

WIDE = {f"images_per_s_of_kind_{i}": 1234.5678 + i for i in range(12)}
MACHINE = {"processor": "P", "threads": 2}


def lines(capsys, rows: list[dict]) -> list[str]:
    print_result({"benchmark": "b", "machine": MACHINE, "rows": rows}, as_json=False)
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_rows_that_are_wider_than_a_screen_stand_beside_each_other(capsys, count):
    model = {"model": "vit_base_patch16_224"}
    *table, machine = lines(capsys, [{**model, **WIDE, "seconds": {"forward": [1]}}] * count)
    assert len(table) == 1 + len(WIDE) + (count == 3)  # its names of models are in two lines
    assert table[-1].split() == ["images", "per", "s", "of", "kind", "11", *["1,246"] * count]
    assert max(len(line) for line in table) <= 80
    assert machine == "processor P  threads 2"


def test_short_rows_stand_below_each_other(capsys):
    out = lines(capsys, [{"impl": name, "seconds": 0.5} for name in ("amx", "torch", "whole")])
    assert [line.split() for line in out[1:-1]] == [
        ["impl", "seconds"],
        ["─" * len(out[2].strip())],
        *[[name, "0.5"] for name in ("amx", "torch", "whole")],
        [],
    ]


def test_json_has_everything(capsys):
    result = {"benchmark": "b", "machine": MACHINE, "rows": [{"seconds": {"forward": [1]}}]}
    print_result(result, as_json=True)
    assert json.loads(capsys.readouterr().out) == result
