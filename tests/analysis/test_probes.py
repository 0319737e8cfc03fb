"""Probes beside projections: plain sums over the arrays, pairing, the chart, the report's part."""

import json

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner
from synthetic_store import make_layout, write_store
from test_report import make_store, parsed

from classlens.analysis import plot_style
from classlens.analysis.commands_report import report
from classlens.analysis.plots_probes import probe_chart
from classlens.analysis.probes import compare_probe
from classlens.analysis.report import write_report
from classlens.analysis.statistics import bootstrap_interval
from classlens.extractor.errors import UsageError
from classlens.extractor.schema import Status

UNITS = [6, 4]
PROBE = {"alpha": 1.0, "per_class": 10, "train_images": 1234}


def made(path, *, seed=0, probe=False, weights="w", bad=None, **layout):
    """A synthetic store, marked as one of linear probes or not."""
    store = write_store(
        path, make_layout(images_per_unit=UNITS, **layout), UNITS, bad=bad, seed=seed
    )
    mark(path, probe, weights)
    return store


def mark(path, probe, weights):
    group = json.loads((path / "zarr.json").read_text())
    attributes = group["attributes"]["classlens"]
    attributes["fingerprint"] = {"weights_sha256": weights}
    if probe:
        attributes["probe"] = PROBE
    (path / "zarr.json").write_text(json.dumps(group))


def test_means_and_intervals_are_over_images_that_both_have_scored(tmp_path):
    store = made(tmp_path / "store", bad={1: Status.UNDECODABLE})
    streams = ("mlp", "mid", "resid")
    bad = {8: Status.NONFINITE}
    probes = made(tmp_path / "probes", seed=1, probe=True, bad=bad, streams=streams)
    frame = compare_probe(store.path, probes.path, seed=3)
    images = [0, 2, 3, 4, 5, 6, 7, 9]
    cells = []
    for source, one in (("projection", store), ("probe", probes)):
        rank = one.arrays["scores/rank"][images].astype(float)
        for stream in ("resid", "mlp"):
            for group, tokens in (("cls", slice(0, 1)), ("patch", slice(1, None))):
                of_group = rank[:, :, one.layout.streams.index(stream), tokens]
                for measure, values_NBT in {
                    "": 1 - of_group / one.layout.classes,
                    "rate_": 100.0 * (of_group == 0),
                }.items():
                    values_NB = values_NBT.mean(2)
                    low, high = bootstrap_interval(values_NB, seed=3)
                    rows = frame.filter(
                        pl.col("source") == source,
                        pl.col("stream") == stream,
                        pl.col("group") == group,
                    )
                    assert rows["block"].to_list() == [0, 1, 2]
                    name = "rate" if measure else "mean"
                    np.testing.assert_allclose(rows[name], values_NB.mean(0), rtol=1e-12)
                    np.testing.assert_allclose(rows[f"{measure}low"], low, rtol=1e-12)
                    np.testing.assert_allclose(rows[f"{measure}high"], high, rtol=1e-12)
                    assert set(rows["n_images"]) == {8}
                    assert set(rows["n_tokens"]) == {1 if group == "cls" else 6}
                cells.append(rows.height)
    assert frame.height == sum(cells)


def test_stores_that_do_not_pair_are_refused(tmp_path):
    store = made(tmp_path / "store")
    probes = made(tmp_path / "probes", probe=True)
    with pytest.raises(UsageError, match="was made by `classlens extract`; name one that"):
        compare_probe(store.path, store.path)
    with pytest.raises(UsageError, match="was made by `classlens probe`; name one that"):
        compare_probe(probes.path, probes.path)
    other = made(tmp_path / "weights", probe=True, weights="v")
    with pytest.raises(UsageError, match="probes other weights"):
        compare_probe(store.path, other.path)
    grid = made(tmp_path / "grid", probe=True, grid=(3, 3))
    with pytest.raises(UsageError, match=r"differs from .* in grid; run `classlens probe`"):
        compare_probe(store.path, grid.path)
    keys = made(tmp_path / "keys", probe=True)
    manifest = pl.read_parquet(keys.path / "manifest.parquet")
    manifest.with_columns(key="other-" + pl.col("key")).write_parquet(
        keys.path / "manifest.parquet"
    )
    with pytest.raises(UsageError, match="do not hold the same images"):
        compare_probe(store.path, keys.path)


@pytest.mark.parametrize("prefix", [("cls",), ()])
def test_the_chart_has_both_lines_with_bands_and_chance(tmp_path, prefix):
    store = made(tmp_path / "store", prefix_kinds=prefix)
    probes = made(tmp_path / "probes", seed=1, probe=True, prefix_kinds=prefix)
    chart = probe_chart(compare_probe(store.path, probes.path))
    picture = plot_style.to_svg(chart, "Probes")
    for words in ("linear probe", "class-embedding projection", "chance", "identifiability r"):
        assert words in picture
    assert ("CLS token" in picture) == bool(prefix)
    [rows] = [data for data in chart.to_dict()["datasets"].values() if "line" in data[0]]
    panels = 3 * (1 + len(prefix))
    for line in ("linear probe", "class-embedding projection", "chance"):
        of_line = [row for row in rows if row["line"] == line]
        assert len(of_line) == 3 * panels
        assert all(row["mean"] == 0.5 for row in of_line) == (line == "chance")
        assert all(row["low"] is not None for row in of_line) == (line != "chance")
    assert picture.count(plot_style.PROBE_COLOR) > 2 * panels


def test_the_report_sets_probes_beside_the_stores_of_their_model(tmp_path):
    store = make_store(tmp_path / "store", seed=0, shards=False)
    other = make_store(tmp_path / "other", seed=1, shards=False)
    probes = make_store(tmp_path / "probes", seed=2, shards=False)
    mark(store.path, False, "w")
    mark(other.path, False, "v")
    mark(probes.path, True, "w")
    out = tmp_path / "report.html"
    stores = [str(s.path) for s in (store, other, probes)]
    arguments = [*stores, "--probe", str(probes.path), "--out", str(out)]
    result = CliRunner().invoke(report, [*arguments, "--images", "0", "--permutations", "5"])
    assert result.exit_code == 0, result.output
    page = out.read_text()
    assert page.count("<h3>Linear probes beside the class embedding</h3>") == 1
    assert page.index("Linear probes beside") < page.index("<h2>other</h2>")
    text = " ".join(" ".join(parsed(page).text).replace("\xa0", " ").split())
    assert "n = 20 images that both stores have scored" in text
    assert "α = 1 on the raw activations of 1,234 other images, at most 10 a class" in text
    frame = compare_probe(store.path, probes.path).filter(pl.col("stream") == "resid")
    for row in frame.iter_rows(named=True):
        assert f"{row['mean']:.3f} [{row['low']:.3f}, {row['high']:.3f}]" in text
        assert f"{row['rate']:.2f} [{row['rate_low']:.2f}, {row['rate_high']:.2f}]" in text
    for probe in (other.path, store.path):
        with pytest.raises(UsageError):
            write_report([store.path], out, probe=probe, n_images=0, permutations=5)


def test_a_store_of_probes_is_reported_as_such(tmp_path):
    probes = make_store(tmp_path / "probes", seed=2, shards=False)
    mark(probes.path, True, "w")
    page = write_report([probes.path], tmp_path / "r.html", n_images=0, permutations=5).read_text()
    assert "linear probes, α = 1, 1,234 training images" in page
    assert "Linear probes beside" not in page
