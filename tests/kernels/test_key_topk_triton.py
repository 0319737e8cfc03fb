"""The top-k kernel under Triton's interpreter, and compiled ahead of time."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from test_triton_compile import GFX942, SM_80, SM_90, SM_100, TYPES, bytes_spilled  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from classlens.kernels.key_topk_triton import _key_topk_kernel, compile_options  # noqa: E402

SUITE = Path(__file__).with_name("interpreted_key_topk.py")


@pytest.mark.timeout(900)
def test_the_kernel_is_right_under_the_interpreter(pytestconfig: pytest.Config) -> None:
    """All of `interpreted_key_topk.py`, whose tests count the launches of the kernel."""
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
    assert int(passed[1]) >= 20
    assert "skipped" not in done.stdout


# F: heads and MLP of ViT-B, the MLP of ViT-L, and one that is no power of two.
@pytest.mark.slow
@pytest.mark.parametrize("target", [SM_80, SM_90, SM_100, GFX942], ids=lambda t: str(t.arch))
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("width", [768, 3072, 4096, 5120, 16_384])
def test_nothing_spills(target: GPUTarget, dtype, width: int, tmp_path: Path) -> None:
    signature = {
        "x_ptr": f"*{TYPES[dtype]}",
        "best_ptr": "*i32",
        "stride_m": "i32",
        "WIDTH": "constexpr",
        "TOPK": "constexpr",
        "PLACES": "constexpr",
    }
    constants = {"WIDTH": width, "TOPK": 5, "PLACES": triton.next_power_of_2(width)}
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(3)}
    source = ASTSource(_key_topk_kernel, signature, constants, aligned)
    kernel = triton.compile(source, target=target, options=compile_options(width))
    assert bytes_spilled(kernel, tmp_path / "kernel.cubin") == 0
