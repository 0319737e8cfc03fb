"""The threads around the scoring: order, bounds, errors from every stage, and whose fault it is."""

import threading
import time

import numpy as np
import pytest
import torch
from variants import config

from classlens.extractor import pipeline, run, shards
from classlens.extractor.plan import Unit
from classlens.extractor.prepare import prepare
from classlens.extractor.reducers.protocol import Targets
from classlens.extractor.run import extract, score_batches
from classlens.extractor.schema import Status, committed_units
from classlens.extractor.shards import Decoded
from classlens.extractor.stages import STAGES, StageTimes
from classlens.extractor.store import StagedUnit, verify
from classlens.extractor.transfer import Transfer


class Broken(Exception):
    """The error that a test lets a stage raise."""


# Where each stage does its work.
WORK = {
    "read": (shards, "read_samples"),
    "decode": (pipeline, "decode"),
    "score": (run, "launch"),
    "stage": (run, "stage_results"),
    "commit": (StagedUnit, "commit"),
}


def after(monkeypatch, stage: str, calls: int, then) -> None:
    """From the call after ``calls`` on, ``then()`` comes before the stage's work."""
    owner, name = WORK[stage]
    work, lock, count = getattr(owner, name), threading.Lock(), 0

    def patched(*arguments):
        nonlocal count
        with lock:
            count += 1
            act = count > calls
        if act:
            then()
        return work(*arguments)

    monkeypatch.setattr(owner, name, patched)


def fail(error: type[BaseException]):
    def then():
        raise error

    return then


@pytest.mark.timeout(120)
@pytest.mark.parametrize("error", [Broken, KeyboardInterrupt])
@pytest.mark.parametrize("stage", WORK)
def test_an_error_in_any_stage_ends_the_run_and_loses_nothing(
    make_shards, tmp_path, monkeypatch, stage, error
):
    tars = [str(s) for s in make_shards((2,) * 5, mask=False)]
    settings = config("cls", batch_size=1, decode_threads=2)
    out, calls = tmp_path / "store", {"read": 2, "commit": 1}.get(stage, 5)
    with monkeypatch.context() as patch:
        after(patch, stage, calls, fail(error))
        with pytest.raises(error):
            extract(prepare(settings, tars), out)
    assert not [t for t in threading.enumerate() if t.name.startswith("classlens")]
    done = committed_units(out)
    assert done == list(range(len(done)))
    assert 1 <= len(done) < 5
    summary = extract(prepare(settings, tars), out)
    assert (summary.scored, summary.units_committed) == (10 - 2 * len(done), 5)
    assert verify(out) == []


@pytest.mark.parametrize("stage", WORK)
def test_the_stage_that_held_the_run_back_is_named(make_shards, tmp_path, monkeypatch, stage):
    tars = [str(s) for s in make_shards((4, 4), mask=False)]
    after(monkeypatch, stage, 0, lambda: time.sleep(0.5))
    settings = config("cls", batch_size=2, decode_threads=1)
    summary = extract(prepare(settings, tars), tmp_path / "store")
    assert summary.held_back_by == stage
    assert list(summary.stages) == list(STAGES)
    busy = summary.stages
    # One thread each, so none is busier than the run is long; the scoring thread's four fill it.
    assert all(seconds <= summary.seconds + 0.01 for seconds in busy.values())
    own = busy["wait"] + busy["score"] + busy["stage"]
    assert 0.7 * summary.seconds <= own <= summary.seconds + 0.01
    assert busy[stage] >= 0.5


def test_a_run_that_scores_nothing_was_held_back_by_nothing(make_shards, tmp_path):
    tars = [str(s) for s in make_shards((2,), mask=False)]
    assert extract(prepare(config("cls"), tars), tmp_path / "store").held_back_by
    again = extract(prepare(config("cls"), tars), tmp_path / "store")
    assert (again.scored, again.held_back_by) == (0, "")


def test_decode_time_is_shared_by_its_threads():
    times = StageTimes(decode_threads=4)
    times._seconds |= {"decode": 8.0, "score": 2.0, "stage": 1.0}
    assert times.held_back_by() == "score"
    times._seconds["decode"] = 13.0
    assert times.held_back_by() == "decode"


def test_reader_and_writer_stay_within_their_bounds(make_shards, tmp_path, monkeypatch):
    tars = [str(s) for s in make_shards((6,) * 4, mask=False)]
    lock, decoded, scored, staged, committed = threading.Lock(), 0, 0, 0, 0
    ahead, in_memory = [], []
    decode, stage, commit = pipeline.decode, run.stage_results, StagedUnit.commit
    start = StagedUnit.__init__

    def counting_decode(*arguments):
        nonlocal decoded
        with lock:
            decoded += 1
            ahead.append(decoded - scored)
        return decode(*arguments)

    def slow_stage(images, *arguments):
        nonlocal scored
        time.sleep(0.02)
        stage(images, *arguments)
        with lock:
            scored += len(images)

    def counting_start(*arguments):
        nonlocal staged
        start(*arguments)
        staged += 1
        in_memory.append(staged - committed)

    def slow_commit(*arguments):
        nonlocal committed
        time.sleep(0.05)
        commit(*arguments)
        committed += 1

    monkeypatch.setattr(pipeline, "decode", counting_decode)
    monkeypatch.setattr(run, "stage_results", slow_stage)
    monkeypatch.setattr(StagedUnit, "__init__", counting_start)
    monkeypatch.setattr(StagedUnit, "commit", slow_commit)
    extract(prepare(config("cls", batch_size=2), tars), tmp_path / "store")
    batches = pipeline.BATCHES_AHEAD + 1  # and the one being scored
    assert 2 * pipeline.BATCHES_AHEAD <= max(ahead) <= 2 * batches
    assert max(in_memory) == pipeline.UNITS_IN_MEMORY


class Labels:
    """In the place of a scorer: gives the labels back, and notes when it was called."""

    accumulator = None

    def __init__(self, calls: list[str]) -> None:
        self.calls = calls

    def score(self, pixels: torch.Tensor, targets: Targets) -> dict[str, torch.Tensor]:
        assert len(pixels) == len(targets.labels) == len(targets.images)
        self.calls.append(f"score {targets.labels.tolist()}")
        return {"labels": targets.labels}


class Done:
    def __init__(self, image: Decoded) -> None:
        self.image = image

    def result(self) -> Decoded:
        return self.image


@pytest.mark.parametrize("ahead", [0, 1])
def test_results_come_in_order_with_the_next_batch_launched(tmp_path, ahead):
    unit, calls = Unit(0, tmp_path, 0, 0, 6, masks=False), []
    statuses = [Status.OK, Status.OK, Status.UNDECODABLE, Status.OK] + 2 * [Status.LABEL_INVALID]
    images = [Done(Decoded(i, 10 + i, status)) for i, status in enumerate(statuses)]
    batches = [
        pipeline.Batch(unit, None, 0, torch.zeros(2, 4, 4, 3), images[i : i + 2], i == 4)
        for i in (0, 2, 4)
    ]
    transfer = Transfer("cpu")
    transfer.ahead = ahead
    found = []
    for batch, results in score_batches(batches, Labels(calls), transfer, StageTimes(1)):
        calls.append("stage")
        found.append((batch, {path: value.tolist() for path, value in results.items()}))
    assert [batch for batch, _ in found] == batches
    assert [results for _, results in found] == [{"labels": [10, 11]}, {"labels": [13]}, {}]
    first, second = "score [10, 11]", "score [13]"
    if ahead:
        assert calls == [first, second, "stage", "stage", "stage"]
    else:
        assert calls == [first, "stage", second, "stage", "stage"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_pixels_and_results_survive_their_way_to_a_gpu():
    transfer = Transfer("cuda")
    pending = []
    for i in range(8):
        host = transfer.host_pixels(64, 224, 224)
        host.numpy()[...] = np.random.default_rng(i).integers(0, 256, host.shape, np.uint8)
        on_device = transfer.to_device(host)
        assert on_device.is_cuda
        pending.append((host.numpy().copy(), transfer.to_host({"pixels": 255 - on_device})))
    for pixels, results in pending:
        assert np.array_equal(results()["pixels"], 255 - pixels)
