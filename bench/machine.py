"""What a benchmark ran on, what that machine can do at most, and how its times are taken."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PEAK_SIZES = (1024, 2048, 4096)
PEAK_REPEATS = 5
COPY_BYTES = 1 << 28


def machine_facts(device: str = "cpu") -> dict[str, Any]:
    """Processor, threads, versions and commit: what a figure is worth nothing without."""
    import torch

    from classlens.kernels.cpu_bfloat16 import native_bfloat16

    if device.startswith("cuda"):
        processor: dict[str, Any] = {"processor": torch.cuda.get_device_name(device)}
    else:
        processor = {
            "processor": _cpu_name(),
            "threads": torch.get_num_threads(),
            "native_bfloat16": native_bfloat16(),
        }
    versions = {name: _version(name) for name in ("torch", "triton", "timm", "zarr", "polars")}
    return {
        **processor,
        **{name: found for name, found in versions.items() if found is not None},
        "python": platform.python_version(),
        "commit": _commit(),
    }


def gemm_peak(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of the best of a few large square matrix products.

    Not the data sheet's figure: what this machine, shared as it may be, gives now.
    """
    import torch

    best = 0.0
    for size in PEAK_SIZES if device.startswith("cuda") else PEAK_SIZES[:2]:
        a = torch.randn(size, size, device=device).to(dtype)
        seconds = min(_repeat(lambda a=a: a @ a, device))
        best = max(best, 2 * size**3 / seconds)
    return best


def copy_bandwidth(device: str) -> float:
    """Bytes/s, those read and those written together, of copying 256 MiB."""
    import torch

    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / min(_repeat(lambda: target.copy_(source), device))


def time_in_turn(
    tasks: Mapping[str, Callable[[], object]], rounds: int, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of each task in each round, the tasks in turn within a round.

    A machine that slows down half-way so hits all of them alike. One untimed round goes first.
    """
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for task in tasks.values():
        seconds_of(task, device)
    for _ in range(rounds):
        for name, task in tasks.items():
            seconds[name].append(seconds_of(task, device))
    return seconds


def seconds_of(task: Callable[[], object], device: str = "cpu") -> float:
    """Seconds until the task, and all it queued on the device, is done."""
    _synchronise(device)
    started_s = time.perf_counter()
    task()
    _synchronise(device)
    return time.perf_counter() - started_s


def _repeat(task: Callable[[], object], device: str) -> list[float]:
    seconds_of(task, device)
    return [seconds_of(task, device) for _ in range(PEAK_REPEATS)]


def _synchronise(device: str) -> None:
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def _cpu_name() -> str:
    import torch

    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:  # no Linux
        pass
    return torch.cpu.get_capabilities().get("cpu_name") or platform.processor()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or an installed package
        return "unknown"
