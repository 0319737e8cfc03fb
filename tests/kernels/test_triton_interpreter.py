import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SUITE = Path(__file__).with_name("interpreted_class_scores.py")


@pytest.mark.timeout(900)
def test_the_kernel_is_right_under_the_interpreter(pytestconfig: pytest.Config) -> None:
    """All of `interpreted_class_scores.py`, whose tests count the launches of the kernel."""
    command = [sys.executable, "-m", "pytest", str(SUITE), "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        command,
        cwd=pytestconfig.rootpath,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"^(\d+) passed", done.stdout, re.MULTILINE)
    assert passed is not None, done.stdout
    assert int(passed[1]) >= 24
    assert "skipped" not in done.stdout


def test_this_process_is_not_interpreted() -> None:
    from triton.runtime.jit import JITFunction

    from classlens.kernels.class_scores_triton import _class_scores_kernel

    assert isinstance(_class_scores_kernel, JITFunction)
