"""Curves, areas and intervals against loops over images; files; the chart and the command."""

import json

import numpy as np
import polars as pl
import pytest

from classlens.analysis.commands_perturb import parse_blocks
from classlens.analysis.perturbation import (
    NOTE,
    area,
    read_result,
    summarise,
    write_result,
)
from classlens.analysis.plot_style import to_svg
from classlens.analysis.plots_attribution import perturbation_chart
from classlens.extractor.errors import UsageError
from classlens.extractor.perturb import SCHEMA

FACTS = {"store": "s", "model": "toy", "convention": "corrected", "blocks": "all", "seed": 0}
IMAGES, PATCHES = [4, 9, 11, 30], 4
METHODS = ("chefer", "class-embedding")


def answers(kept=range(PATCHES + 1), images=IMAGES, seed=0):
    """Random answers; the last count is the same for all methods and tests."""
    rng = np.random.default_rng(seed)
    with_all = dict(zip(images, rng.random(len(images)) < 0.8, strict=True))
    with_all[images[0]] = True
    rows = [
        (
            image,
            method,
            test,
            count,
            bool(with_all[image] if count == PATCHES else rng.random() < 0.5),
        )
        for method in METHODS
        for test in ("negative", "positive")
        for count in kept
        for image in images
    ]
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")


def naive_accuracy(frame, method, test, count):
    rows = frame.filter(
        (pl.col("method") == method) & (pl.col("test") == test) & (pl.col("kept") == count)
    )
    return sum(rows["right"].to_list()) / rows.height


def naive_corrected(frame, method, test, kept):
    accuracy = [naive_accuracy(frame, method, test, count) for count in kept]
    total = 0.0
    for i in range(len(kept) - 1):
        total += (kept[i + 1] - kept[i]) / PATCHES * (accuracy[i] + accuracy[i + 1]) / 2
    return total / accuracy[-1]


def naive_vilas2023(frame, method, test):
    accuracy = [naive_accuracy(frame, method, test, count) for count in range(1, PATCHES)]
    return sum(accuracy) / (max(accuracy) * PATCHES)


@pytest.mark.parametrize("kept", [[0, 1, 2, 3, 4], [0, 3, 4]])
def test_curves_and_corrected_areas(kept):
    frame = answers(kept)
    result = summarise(frame.sample(fraction=1, shuffle=True, seed=1), FACTS)
    assert (result.n_images, result.n_patches) == (4, 4)
    assert result.curves.height == 4 * len(kept)
    for row in result.curves.iter_rows(named=True):
        expected = naive_accuracy(frame, row["method"], row["test"], row["kept"])
        assert row["accuracy"] == pytest.approx(expected)
        assert row["low"] <= row["accuracy"] <= row["high"]
        assert row["share"] == row["kept"] / 4
    for row in result.auc.iter_rows(named=True):
        expected = naive_corrected(frame, row["method"], row["test"], kept)
        assert row["auc"] == pytest.approx(expected)
    for row in result.differences.iter_rows(named=True):
        one, other = (
            naive_corrected(frame, row[name], row["test"], kept) for name in ("first", "second")
        )
        assert row["difference"] == pytest.approx(one - other)


def test_vilas2023_takes_the_inner_counts_over_the_largest():
    frame = answers()
    result = summarise(frame, {**FACTS, "convention": "vilas2023"})
    for row in result.auc.iter_rows(named=True):
        assert row["auc"] == pytest.approx(naive_vilas2023(frame, row["method"], row["test"]))
    with pytest.raises(UsageError, match="without --steps"):
        summarise(answers([0, 2, 4]), {**FACTS, "convention": "vilas2023"})


def test_areas_of_known_curves():
    kept = np.arange(50)
    perfect, line = np.ones(50), kept / 49
    assert area(perfect, kept, "corrected") == pytest.approx(1)
    assert area(line, kept, "corrected") == pytest.approx(0.5)
    assert area(perfect, kept, "vilas2023") == pytest.approx(48 / 49)
    assert area(line, kept, "vilas2023") == pytest.approx(sum(range(1, 49)) / (48 * 49))
    assert np.isnan(area(np.zeros(50), kept, "corrected"))


def test_differences_are_paired():
    # Both methods are right about the same images, so their difference has no spread at all.
    frame = answers()
    same = pl.concat(
        [
            frame.filter(pl.col("method") == "chefer").with_columns(
                method=pl.lit(method, SCHEMA["method"])
            )
            for method in METHODS
        ]
    )
    result = summarise(same, FACTS)
    assert result.differences.select("difference", "low", "high").unique().rows() == [(0, 0, 0)]
    assert (result.auc["high"] > result.auc["low"]).all()


@pytest.mark.parametrize("suffix", [".parquet", ".json"])
def test_files_give_the_result_back(suffix, tmp_path):
    frame = answers()
    result = summarise(frame, FACTS)
    path = tmp_path / f"found{suffix}"
    write_result(path, frame, result)
    back = read_result(path)
    assert back.facts == FACTS
    assert (back.n_images, back.n_patches) == (4, 4)
    for name in ("curves", "auc", "differences"):
        ours, theirs = getattr(result, name), getattr(back, name)
        assert ours.columns == theirs.columns
        for column in ours.columns:
            assert ours[column].to_list() == pytest.approx(theirs[column].to_list(), nan_ok=True)
    if suffix == ".json":
        assert json.loads(path.read_text())["note"] == NOTE
    else:
        assert pl.read_parquet(path).columns == list(SCHEMA)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"\.parquet .* or \.json"):
        write_result(tmp_path / "x.csv", answers(), summarise(answers(), FACTS))
    for name, content in (("a.json", "[]"), ("b.parquet", "no"), ("c.json", "{}")):
        (tmp_path / name).write_text(content)
        with pytest.raises(UsageError, match="no result of `classlens perturb`"):
            read_result(tmp_path / name)
    answers().write_parquet(tmp_path / "d.parquet")
    with pytest.raises(UsageError, match="no result of `classlens perturb`"):
        read_result(tmp_path / "d.parquet")
    with pytest.raises(UsageError, match="No image was perturbed"):
        summarise(pl.DataFrame(schema=SCHEMA), FACTS)


def test_blocks_are_numbers_and_ranges():
    assert parse_blocks(None, 12) is None
    assert parse_blocks("0,3,5-7", 12) == [0, 3, 5, 6, 7]
    for wrong in ("12", "x", "", "3-", "5-2", "-1"):
        with pytest.raises(UsageError, match="--blocks"):
            parse_blocks(wrong, 12)


def test_the_chart_names_axes_tests_and_areas():
    result = summarise(answers(), FACTS)
    svg = to_svg(perturbation_chart(result), "Curves")
    for text in ("accuracy (%)", "image tokens kept (%)", "negative test", "positive test"):
        assert text in svg
    for row in result.auc.iter_rows(named=True):
        assert f"{row['method']}: {row['auc']:.3f} [{row['low']:.3f}" in svg
