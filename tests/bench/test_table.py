import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from classlens.bench.table import BEGIN, END, NO_RESULTS, TABLES, read_results, table, with_tables
from classlens.extractor.errors import UsageError

ROOT = Path(__file__).parent.parent.parent
MACHINE = {"processor": "Abacus", "threads": 2, "native_bfloat16": False, "commit": "1234567"}
README = f"# Title\n\n{BEGIN}\nold\n{END}\n\nthe rest\n"


def write(folder: Path, name: str, benchmark: str, rows: list[dict], **machine) -> None:
    folder.mkdir(exist_ok=True)
    result = {"benchmark": benchmark, "machine": MACHINE | machine, "rows": rows}
    (folder / f"{name}.json").write_text(json.dumps(result))


def run(*arguments) -> int:
    return CliRunner().invoke(table, [str(a) for a in arguments], catch_exceptions=False).exit_code


def test_the_readme_is_current():
    arguments = ["--results", ROOT / "bench/results", "--readme", ROOT / "README.md", "--check"]
    assert run(*arguments) == 0


def test_tables_of_two_results(tmp_path):
    write(tmp_path, "a", "query", [{"query": "one image", "rows": 7092, "store_s": 0.1}])
    rows = [
        {"model": "demo", "dtype": "float16", "equal_ranks": 0.98765, "unnamed": 1, "list": [1]},
        {"model": "demo", "dtype": "bfloat16", "equal_ranks": None},
    ]
    write(tmp_path, "b", "fidelity", rows)
    assert with_tables(README, read_results(tmp_path)) == (
        f"# Title\n\n{BEGIN}\n\n"
        "`classlens bench fidelity` on Abacus (threads 2, native bfloat16 no, commit 1234567):\n\n"
        "| model | dtype | equal ranks |\n"
        "| --- | --- | ---: |\n"
        "| demo | float16 | 98.765% |\n"
        "| demo | bfloat16 | – |\n\n"
        "`classlens bench query` on Abacus (threads 2, native bfloat16 no, commit 1234567):\n\n"
        "| question | rows it concerns | store, s |\n"
        "| --- | ---: | ---: |\n"
        "| one image | 7,092 | 0.100 |\n\n"
        f"{END}\n\nthe rest\n"
    )


def test_results_of_one_machine_share_a_table(tmp_path):
    for name, commit in (("a", "1234567"), ("b", "89abcde")):
        write(tmp_path, name, "query", [{"query": name, "rows": 1}], commit=commit)
    write(tmp_path, "c", "query", [{"query": "c"}], processor="Pascaline")
    write(tmp_path, "d", "query", [{"query": "d"}], processor="Pascaline")
    assert with_tables(README, read_results(tmp_path)) == (
        f"# Title\n\n{BEGIN}\n\n"
        "`classlens bench query` on Abacus (threads 2, native bfloat16 no):\n\n"
        "| question | rows it concerns | commit |\n"
        "| --- | ---: | --- |\n"
        "| a | 1 | 1234567 |\n"
        "| b | 1 | 89abcde |\n\n"
        "`classlens bench query` on Pascaline (threads 2, native bfloat16 no, commit 1234567):\n\n"
        "| question |\n"
        "| --- |\n"
        "| c |\n"
        "| d |\n\n"
        f"{END}\n\nthe rest\n"
    )


def test_check_writes_nothing_and_a_second_run_changes_nothing(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(README)
    here = ("--results", tmp_path / "none", "--readme", readme)
    assert run(*here, "--check") == 1
    assert readme.read_text() == README
    assert run(*here) == 0
    assert NO_RESULTS in readme.read_text()
    assert run(*here, "--check") == 0
    once = readme.read_text()
    assert run(*here) == 0
    assert readme.read_text() == once


@pytest.mark.parametrize("text", ["", BEGIN, f"{END} {BEGIN}", f"{BEGIN} {BEGIN} {END}"])
def test_a_readme_without_the_marks_is_refused(text):
    with pytest.raises(UsageError, match="once each"):
        with_tables(text, [])


@pytest.mark.parametrize("text", ["no json", "[]", '{"benchmark": "query"}'])
def test_a_file_that_is_no_result_is_named(tmp_path, text):
    (tmp_path / "odd.json").write_text(text)
    with pytest.raises(UsageError, match=r"odd\.json"):
        read_results(tmp_path)


def test_an_unknown_benchmark_is_refused(tmp_path):
    write(tmp_path, "a", "guess", [])
    with pytest.raises(UsageError, match=", ".join(TABLES)):
        read_results(tmp_path)
