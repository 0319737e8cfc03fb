"""Compiles the C++ sources beside it when they are first needed, and loads them.

A library is kept in the user's cache folder under a hash of sources, compiler and flags; compiling
one takes a second or two, the very first one with the ziglang package a minute.
"""

import ctypes
import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

log = logging.getLogger(__name__)

FLAGS = (
    *("-O3", "-std=c++17", "-shared", "-fPIC", "-pthread", "-ffp-contract=off"),
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mfma", "-mpopcnt"),
)
HEADERS = tuple(sorted(Path(__file__).parent.glob("*.hpp")))


def system_compiler() -> str | None:
    """The C++ compiler of this machine: ``$CXX``, g++ or clang++."""
    names = (os.environ.get("CXX", ""), "g++", "clang++")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def compiler() -> list[str] | None:
    """The command that compiles C++: the system's compiler, else that of the ziglang package."""
    if found := system_compiler():
        return [found]
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "c++"]
    return None


def load(source: Path, flags: Sequence[str] = ()) -> ctypes.CDLL:
    """The library of a source, compiled with ``FLAGS`` and these.

    Raises:
        RuntimeError: there is no compiler, or it fails.
    """
    return ctypes.CDLL(str(build(source, (*FLAGS, *flags))))


def build(source: Path, flags: Sequence[str]) -> Path:
    """The compiled library, from the cache folder where it is there already; errors as `load`."""
    command = compiler()
    if command is None:
        raise RuntimeError(
            f"{source.name} needs a C++ compiler; install g++ or the ziglang package, or pass "
            "impl='torch'"
        )
    version = subprocess.run([*command, "--version"], capture_output=True, check=True).stdout
    sources = b"".join(path.read_bytes() for path in (source, *HEADERS))
    key = hashlib.sha256(sources + version + " ".join(flags).encode()).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "classlens"
    library = cache / f"{source.stem}-{key[:16]}.so"
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            draft = Path(folder) / library.name
            if "ziglang" in command:
                log.warning("Compiling %s; the first time takes a minute.", source.name)
            arguments = [*command, *flags, str(source), "-o", str(draft)]
            found = subprocess.run(arguments, capture_output=True, text=True, check=False)
            if found.returncode != 0:
                raise RuntimeError(
                    f"{command[-1]} cannot compile {source.name} ({found.stderr.strip()[-300:]}); "
                    "pass impl='torch'"
                )
            draft.rename(library)  # whole from the first moment, whoever else compiles
    return library
