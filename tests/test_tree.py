"""The import rules, and the file tree in the README."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ("kernels", "extractor", "analysis", "bench")  # each may import from those before it


def imported_folders(file: Path) -> set[str]:
    """Our folders that a module imports from, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("classlens.")}
    return found


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_go_down_only(layer):
    allowed = set(LAYERS[: LAYERS.index(layer) + 1])
    for file in (ROOT / layer).rglob("*.py"):
        assert imported_folders(file) <= allowed, file


@pytest.mark.parametrize(
    "module",
    [
        "classlens.analysis.scan",
        "classlens.analysis",
        "classlens.extractor.schema",
        "classlens.extractor.plan",
        "classlens.extractor.ledger",
        "classlens.extractor.commands",
        "classlens.analysis.commands_query",
        "classlens.analysis.commands_analyze",
        "classlens.analysis.commands_perturb",
        "classlens.analysis.commands_composition",
        "classlens.analysis.commands_sublayers",
        "classlens.analysis.composition",
        "classlens.analysis.sublayers",
        "classlens.analysis.commands_neurons",
        "classlens.analysis.neurons.alignment",
        "classlens.analysis.neurons.clip",
        "classlens.analysis.neurons.heatmap_figure",
        "classlens.analysis.neurons.localisation",
        "classlens.analysis.neurons.store_words",
        "classlens.analysis.neurons.class_means",
        "classlens.analysis.neurons.dissection",
        "classlens.analysis.commands_report",
        "classlens.analysis.commands_study",
        "classlens.analysis.study",
        "classlens.bench.reproduce",
        "classlens.bench.demo.command",
        "classlens.bench.certify",
        "classlens.bench.commands",
        "classlens.bench.extract",
        "classlens.bench.fidelity",
        "classlens.bench.kernels",
        "classlens.bench.memory",
        "classlens.bench.query",
        "classlens.bench.rivals",
        "classlens.bench.table",
        "classlens.cli",
    ],
)
def test_imports_no_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_readmes_tree_is_the_tree():
    block = re.search(r"```text\n(cli\.py.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert block is not None
    listed, folders = set(), []
    for line in block[1].splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folders[depth:] = [name]
        listed.add("".join(folders))
    tracked = {
        str(path.relative_to(ROOT))
        for layer in LAYERS
        for path in (ROOT / layer).rglob("*")
        if path.suffix in {".py", ".cpp", ".hpp", ".html", ".css", ".js", ".toml", ".safetensors"}
        and path.name != "__init__.py"
    }
    assert {path for path in listed if not path.endswith("/")} == tracked | {"cli.py"}
