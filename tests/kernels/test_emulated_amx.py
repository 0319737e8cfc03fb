import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from classlens.kernels import cpp
from classlens.kernels.tiles import has_units

TESTS = Path(__file__).parents[1]
SUITES = [
    TESTS / "kernels/test_class_scores_cpu.py",
    TESTS / "kernels/test_vit_block_cpu.py",
    TESTS / "extractor/test_fused_blocks.py",
]


@pytest.mark.skipif(
    has_units("amx", torch.bfloat16), reason="the tile registers themselves are tested"
)
@pytest.mark.skipif(
    not has_units("avx512", torch.bfloat16) or cpp.compiler() is None,
    reason="needs AVX512_BF16 and a C++ compiler",
)
@pytest.mark.timeout(900)
def test_the_kernels_are_right_in_emulated_tile_registers(
    pytestconfig: pytest.Config, tmp_path: Path
) -> None:
    """All tests of the kernels, but for those of what a CPU says of itself."""
    command = [sys.executable, "-m", "pytest", *map(str, SUITES), "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-p", "emulated_amx", "-k", "not capabilities"],
        cwd=pytestconfig.rootpath,
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counts = re.search(r"^(\d+) passed, (\d+) skipped", done.stdout, re.MULTILINE)
    assert counts is not None, done.stdout
    passed, skipped = map(int, counts.groups())
    assert passed > 150
    left_out = re.findall(r"^SKIPPED \[(\d+)\] .*: needs avx512 ", done.stdout, re.MULTILINE)
    assert skipped == sum(map(int, left_out))
