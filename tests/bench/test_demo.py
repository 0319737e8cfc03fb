"""The demo from beginning to end, and its store against the float64 specification."""

import io
import json
from itertools import islice

import numpy as np
import polars as pl
import pytest
import torch
import zarr
from click.testing import CliRunner
from PIL import Image

from classlens.bench.demo.command import demo_config
from classlens.bench.demo.model_card import WEIGHTS
from classlens.cli import cli
from classlens.extractor.engine import choose_forward
from classlens.extractor.models import load_subject
from classlens.extractor.plan import read_member
from classlens.extractor.scorer import Scorer
from classlens.kernels.bounds import rank_bracket
from classlens.kernels.reference import logits_reference


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    result = CliRunner().invoke(cli, ["demo", "--out", str(folder)], catch_exceptions=False)
    assert result.exit_code == 0
    assert "Mean class identifiability" in result.stdout
    return folder


@pytest.mark.parametrize("batches", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_every_number_of_the_demo_equals_the_specification(out, batches):
    config = demo_config(str(WEIGHTS))
    subject = load_subject(config)
    scorer = Scorer(
        subject,
        [],
        dtype=torch.float32,
        device="cpu",
        convention="corrected",
        forward=choose_forward(config, subject, 500),
    )
    store = out / "model"
    paths = ("rank", "label_logit", "label_logprob")
    stored = {p: np.asarray(zarr.open_array(str(store / "scores" / p))[...]) for p in paths}
    units = pl.read_parquet(store / "units.parquet").select("unit", "shard")
    manifest = pl.read_parquet(store / "manifest.parquet").join(units, on="unit")
    assert manifest.height == 500
    for rows in islice(manifest.sort("image").iter_slices(config.batch_size), batches):
        images = [Image.open(io.BytesIO(data)) for data in _image_bytes(rows)]
        pixels = np.stack([np.asarray(subject.geometry.crop(image)) for image in images])
        labels = torch.from_numpy(rows["label"].to_numpy().copy()).long()
        places = rows["image"].to_numpy()
        with torch.inference_mode():
            walked = scorer.walk(torch.from_numpy(pixels), wanted=frozenset(config.streams))
            sites = [found for _, found in walked]
        for block, found in enumerate(sites):
            for stream, name in enumerate(config.streams):
                x = found[name].double()
                rank, logit, logprob = (stored[p][places, block, stream] for p in paths)
                low, high = rank_bracket(x, subject.space, labels, torch.float32)
                assert (low.numpy() <= rank).all()
                assert (rank <= high.numpy()).all()
                logits = logits_reference(x, subject.space)
                at_label = labels[:, None, None].expand(*x.shape[:2], 1)
                expected = logits.gather(2, at_label)[..., 0]
                # Half a unit in the last place of float16, and a little for float32 products.
                np.testing.assert_allclose(logit, expected, rtol=2**-11 + 1e-5, atol=1e-4)
                expected -= logits.logsumexp(2)
                np.testing.assert_allclose(logprob, expected, rtol=2**-11 + 1e-5, atol=1e-4)


def test_the_query_of_the_readme_equals_the_raw_arrays(out):
    sql = (
        "SELECT block, AVG(CAST(rank = 0 AS INT)) AS rate FROM scores "
        "WHERE stream = 'resid' AND kind = 'patch' GROUP BY block ORDER BY block"
    )
    arguments = ["query", str(out / "model"), sql, "--format", "json"]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    rank = np.asarray(zarr.open_array(str(out / "model/scores/rank"))[...])
    expected = (rank[:, :, 0, 1:] == 0).mean(axis=(0, 2))
    assert [row["rate"] for row in json.loads(result.stdout)] == pytest.approx(expected.tolist())


def test_identifiability_rises_far_above_the_random_control(out):
    means = {}
    for name in ("model", "random-weights"):
        rank = np.asarray(zarr.open_array(str(out / name / "scores/rank"))[...])
        means[name] = 1 - rank[:, :, 0, 1:].mean(axis=(0, 2)) / 100
    assert means["model"][-1] > means["model"][0] + 0.2
    assert np.abs(means["random-weights"] - 0.5).max() < 0.1


def test_the_report_is_one_file_that_fetches_nothing(out):
    page = (out / "report.html").read_text()
    assert "<svg" in page
    assert 'src="http' not in page
    assert 'href="http' not in page


def _image_bytes(rows: pl.DataFrame) -> list[bytes]:
    members = rows.select("shard", "offset", "size").iter_rows()
    return [read_member(shard, offset, size) for shard, offset, size in members]
