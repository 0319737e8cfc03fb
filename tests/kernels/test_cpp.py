"""C++ sources are compiled once, and what goes wrong is said."""

import sys
from pathlib import Path

import pytest
import torch

from classlens.kernels import (
    class_scores_cpu,
    cpp,
    key_topk_avx512,
    neuron_sums_avx512,
    tiles,
    vit_block_cpu,
)
from classlens.kernels.reductions import compiler_found

SOURCES = [
    *((class_scores_cpu.SOURCE, (*cpp.FLAGS, *flags)) for flags in tiles.FLAGS.values()),
    *((vit_block_cpu.SOURCE, (*cpp.FLAGS, *flags)) for flags in tiles.FLAGS.values()),
    (key_topk_avx512.SOURCE, cpp.FLAGS),
    (neuron_sums_avx512.SOURCE, cpp.FLAGS),
]
needs_compiler = pytest.mark.skipif(cpp.compiler() is None, reason="needs a C++ compiler")


@needs_compiler
@pytest.mark.parametrize(("source", "flags"), SOURCES, ids=lambda value: getattr(value, "stem", ""))
def test_a_source_is_compiled_once_without_a_warning(
    source: Path, flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    # GCC 12 warns of its own headers' undefined operands.
    strict = (
        *flags,
        "-Wall",
        "-Wextra",
        "-Wno-uninitialized",
        "-Wno-maybe-uninitialized",
        "-Wno-unknown-warning-option",  # Clang knows not the one before
        "-Werror",
    )
    built = cpp.build(source, strict)
    first = built.stat().st_mtime_ns
    assert cpp.build(source, strict) == built
    assert built.stat().st_mtime_ns == first
    assert cpp.build(source, flags) != built
    with pytest.raises(RuntimeError, match=rf"cannot compile {source.name}.*pass impl='torch'"):
        cpp.build(source, ("-no-such-flag",))
    assert len(list((tmp_path / "classlens").iterdir())) == 2


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cpp.compiler() is None
    assert not compiler_found(torch.device("cpu"))
    assert compiler_found(torch.device("cuda"))
    with pytest.raises(RuntimeError, match=r"needs a C\+\+ compiler; install g\+\+ or the ziglang"):
        cpp.load(key_topk_avx512.SOURCE)


def test_the_ziglang_package_is_the_last_resort(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "ziglang")
    monkeypatch.setenv("CXX", sys.executable)
    assert cpp.compiler() == [cpp.system_compiler()] == [sys.executable]
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX")
    assert cpp.compiler() == [sys.executable, "-m", "ziglang", "c++"]
    assert not compiler_found(torch.device("cpu"))
