"""`kill -9` at random moments, then resume: byte for byte the store of an undisturbed run."""

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

from variants import config

from classlens.extractor.schema import committed_units
from classlens.extractor.store import verify

KILLS = 20
# Workers are forked from a server that has torch imported, so that a kill can hit any moment of the
# work rather than of the imports.
workers = multiprocessing.get_context("forkserver")
workers.set_forkserver_preload(["classlens.extractor.run"])


def work(shards: list[str], out: Path, *reduce: str) -> None:
    import torch

    from classlens.extractor.prepare import prepare
    from classlens.extractor.run import extract

    torch.set_num_threads(1)
    extract(prepare(config("cls", batch_size=2, reduce=reduce), shards), out)


def run_to_the_end(shards: list[str], out: Path, *reduce: str) -> float:
    started_s = time.perf_counter()
    process = workers.Process(target=work, args=(shards, out, *reduce))
    process.start()
    process.join()
    assert process.exitcode == 0
    return time.perf_counter() - started_s


def content(store: Path) -> dict[str, bytes]:
    """Every file of a store; commit markers without their timestamps and checksum over these."""
    files = {}
    for path in sorted(p for p in store.rglob("*") if p.is_file()):
        data = path.read_bytes()
        if path.parent.name == "_ledger":
            marker = json.loads(data)
            del marker["time"], marker["checksum"]
            data = json.dumps(marker).encode()
        files[str(path.relative_to(store))] = data
    return files


def test_twenty_kills_lose_and_mix_nothing(make_shards, tmp_path):
    shards = [str(s) for s in make_shards((4,) * 12)]
    run_to_the_end(shards, tmp_path / "warm-up")
    seconds = run_to_the_end(shards, tmp_path / "undisturbed")
    out, random_source = tmp_path / "killed", random.Random(0)
    progress, killed = [], 0
    while killed < KILLS:
        process = workers.Process(target=work, args=(shards, out))
        process.start()
        # Two thirds of the kills before the first commit would prove little: aim at the work.
        process.join(timeout=random_source.uniform(0.25, 0.75) * seconds)
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            killed += 1
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        progress.append(len(committed_units(out)) if out.exists() else 0)
        if process.exitcode == 0 and killed < KILLS:  # finished early: start over, keep counting
            assert content(out) == content(tmp_path / "undisturbed")
            out = out.with_name(f"{out.name}-again")
    run_to_the_end(shards, out)
    assert any(0 < units < 12 for units in progress)
    assert content(out) == content(tmp_path / "undisturbed")
    assert verify(out) == []


def test_two_workers_share_a_store(make_shards, tmp_path):
    shards = [str(s) for s in make_shards((3,) * 8)]
    run_to_the_end(shards, tmp_path / "alone")
    out = tmp_path / "shared"
    pair = [workers.Process(target=work, args=(shards, out)) for _ in range(2)]
    for process in pair:
        process.start()
    for process in pair:
        process.join()
    assert [process.exitcode for process in pair] == [0, 0]
    run_to_the_end(shards, out)  # mends what a worker left to the other one
    assert content(out) == content(tmp_path / "alone")
