"""Exemplars, averages, histograms and areas do not depend on how and when units were made."""

import os
import random
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from samples import sample, write_tar
from test_kill_and_resume import content, run_to_the_end, work, workers
from test_neurons import settings

from classlens.analysis.neurons import class_means, dissection, exemplars
from classlens.extractor import run
from classlens.extractor.dissect import dissect
from classlens.extractor.engine import make_engine
from classlens.extractor.prepare import attributes, prepare, prepare_again, tables
from classlens.extractor.run import extract, fill
from classlens.extractor.schema import MANIFEST_FILE, committed_units
from classlens.extractor.store import Store, verify

IMAGES, BLOCKS = 24, 3
FINE = {"patch_size": 2}
"""256 patches, of which 32 are drawn."""


def shards_of(folder: Path, counts) -> list[str]:
    folder.mkdir()
    samples = [sample(i) for i in range(IMAGES)]
    starts = np.cumsum([0, *counts])
    return [
        str(write_tar(folder / f"{i}.tar", samples[start : start + count]))
        for i, (start, count) in enumerate(zip(starts, counts, strict=False))
    ]


def with_args(**model_args):
    plain = settings()
    return replace(plain, model_args=plain.model_args | model_args)


def all_read(store: Path, dissected: Path | None = None) -> list[np.ndarray]:
    """Whatever can be read of the neurons of a store, images by their keys."""
    keys = dict(pl.read_parquet(store / MANIFEST_FILE).select("image", "key").iter_rows())
    means = class_means.class_means(store)
    found = [means.classes, means.counts, means.means]
    for block in range(BLOCKS):
        values, images, codes = exemplars.exemplar_codes(store, block)
        found += [values, np.vectorize(keys.get)(images), codes, exemplars.histogram(store, block)]
        if dissected is not None:
            areas = dissection.areas(dissected, block)
            found += [areas.classes, areas.intersection, areas.active, areas.covered]
    return found


def assert_equal(found, expected) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert np.array_equal(a, b)


@pytest.mark.parametrize("model_args", [{}, FINE], ids=["all patches", "drawn patches"])
def test_grouping_and_order_of_units_change_nothing(tmp_path, model_args):
    # Batches of four stay the same, so that activations are the same to the last bit.
    configured, results = with_args(**model_args), []
    for name, counts in (("one", (24,)), ("three", (12, 4, 8)), ("six", (4,) * 6)):
        prepared = prepare(configured, shards_of(tmp_path / name, counts))
        for order in (1, -1) if name == "three" else (1,):
            out = tmp_path / f"store-{name}-{order}"
            store = Store.open_or_create(
                out, prepared.layout, tables(prepared), attributes(prepared)
            )
            units = prepared.plan.units[::order]
            fill(store, prepared, units, make_engine(prepared), run.Silent())
            assert verify(out) == []
            dissected = out.with_name(out.name + "-dissected")
            _, values = exemplars.thresholds(out, 0.9)
            dissect(prepare_again(out), out, values, 0.9, dissected)
            results.append(all_read(out, dissected))
    for other in results[1:]:
        assert_equal(other, results[0])
    per_image = 32 if model_args else 16
    assert (exemplars.histogram(out, 0).sum(axis=1) == IMAGES * per_image).all()


def test_kills_lose_and_mix_nothing(make_shards, tmp_path):
    shards = [str(s) for s in make_shards((4,) * 8)]
    run_to_the_end(shards, tmp_path / "warm-up", "neurons")
    seconds = run_to_the_end(shards, tmp_path / "undisturbed", "neurons")
    out, random_source, killed = tmp_path / "killed", random.Random(1), 0
    while killed < 5:
        process = workers.Process(target=work, args=(shards, out, "neurons"))
        process.start()
        process.join(timeout=random_source.uniform(0.3, 0.8) * seconds)
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        killed += 1
        if out.exists() and len(committed_units(out)) == 8:
            break
    run_to_the_end(shards, out, "neurons")
    assert content(out) == content(tmp_path / "undisturbed")
    assert_equal(all_read(out), all_read(tmp_path / "undisturbed"))


def test_an_interrupted_dissection_goes_on(make_shards, tmp_path, monkeypatch):
    shards = [str(s) for s in make_shards((4,) * 4)]
    store, whole, out = tmp_path / "store", tmp_path / "whole", tmp_path / "interrupted"
    extract(prepare(settings(), shards), store)
    _, values = exemplars.thresholds(store, 0.9)
    dissect(prepare_again(store), store, values, 0.9, whole)
    accumulate, calls = run.accumulate, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        accumulate(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(run, "accumulate", failing)
        with pytest.raises(KeyboardInterrupt):
            dissect(prepare_again(store), store, values, 0.9, out)
    assert 0 < len(committed_units(out)) < 4
    assert dissect(prepare_again(store), store, values, 0.9, out).units_committed == 4
    assert content(out) == content(whole)
