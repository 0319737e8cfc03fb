"""composition.py against plain loops over the raw arrays of a small store."""

import json

import numpy as np
import polars as pl
import pytest
from synthetic_store import make_layout, write_store

from classlens.analysis import statistics
from classlens.analysis.composition import analyze_composition, composition
from classlens.analysis.scan import scan
from classlens.extractor.errors import UsageError
from classlens.extractor.schema import Status

UNITS = [8, 6]
BAD = {2: Status.UNDECODABLE, 11: Status.NONFINITE}
N = sum(UNITS) - len(BAD)
CONVENTIONS = ("corrected", "vilas2023")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def gap(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("gap"), seed=1, prefix_kinds=())


def make_store(folder, seed=0, **layout):
    """Three classes, so that every set of sources occurs."""
    defaults = {"prefix_kinds": ("cls", "register"), "blocks": 4, "classes": 3}
    layout = make_layout(images_per_unit=UNITS, **defaults | layout)
    return write_store(folder / "store", layout, UNITS, bad=BAD, seed=seed)


def plain_categories(top1, streams, block, token, convention):
    """The overlapping categories and the exclusive one of a token, by the definition."""
    after = top1[block, streams.index("resid"), token]
    prev = top1[block - 1, streams.index("resid"), token]
    attn = top1[block, streams.index("attn"), token]
    mlp = top1[block, streams.index("mlp"), token]
    equal = {name for name, c in [("prev", prev), ("attn", attn), ("mlp", mlp)] if c == after}
    if convention == "vilas2023":
        is_comp = (after != prev) and (after != attn) and (after != attn)
    else:
        is_comp = not equal
    exclusive = next(iter(equal)) if len(equal) == 1 else "several" if equal else "comp"
    return equal | ({"comp"} if is_comp else set()), exclusive


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("which", ["store", "gap"])
def test_composition(which, convention, request):
    store = request.getfixturevalue(which)
    layout = store.layout
    top1 = store.arrays["scores/top1"][store.arrays["images/status"] == Status.OK]
    groups = {"all": range(layout.tokens), "patch": range(layout.prefix, layout.tokens)}
    if layout.prefix:
        groups["cls"] = range(1)
    frame = composition(scan(store.path), convention=convention, seed=6)
    seen = set()
    for group, tokens in groups.items():
        for block in range(1, layout.blocks):
            found = [
                [plain_categories(image, layout.streams, block, t, convention) for t in tokens]
                for image in top1
            ]
            seen |= {frozenset(overlapping) for image in found for overlapping, _ in image}
            part = frame.filter((pl.col("group") == group) & (pl.col("block") == block))
            for row in part.iter_rows(named=True):
                source = row["source"]
                per_image = [
                    np.mean(
                        [
                            source == one if row["split"] == "exclusive" else source in many
                            for many, one in image
                        ]
                    )
                    for image in found
                ]
                assert row["percent"] == pytest.approx(100 * np.mean(per_image))
                low, high = statistics.bootstrap_interval(
                    100 * np.array(per_image)[:, None], seed=6
                )
                assert (row["low"], row["high"]) == pytest.approx((low.item(), high.item()))
                assert (row["n_images"], row["n_tokens"]) == (N, N * len(tokens))
    # Every set of sources occurred, so the case can tell right from wrong.
    assert len(seen) == 8
    parts = 4 + (5 if convention == "corrected" else 0)
    assert frame.height == len(groups) * (layout.blocks - 1) * parts


def test_the_exclusive_split_sums_to_100_and_the_overlapping_one_need_not(store):
    frame = composition(scan(store.path))
    sums = frame.group_by("split", "group", "block").agg(pl.col("percent").sum())
    exclusive = sums.filter(pl.col("split") == "exclusive")["percent"].to_list()
    assert exclusive == pytest.approx([100.0] * len(exclusive))
    assert sums.filter(pl.col("split") == "overlapping")["percent"].max() > 100


def test_conventions_differ_in_comp_by_the_tokens_of_the_mlp_alone(store):
    frames = {c: composition(scan(store.path), convention=c) for c in CONVENTIONS}

    def percent(convention, split, source):
        wanted = (pl.col("split") == split) & (pl.col("source") == source)
        return frames[convention].filter(wanted)["percent"].to_numpy()

    for source in ("prev", "attn", "mlp"):
        np.testing.assert_array_equal(
            percent("corrected", "overlapping", source), percent("vilas2023", "overlapping", source)
        )
    np.testing.assert_allclose(
        percent("vilas2023", "overlapping", "comp"),
        percent("corrected", "overlapping", "comp") + percent("corrected", "exclusive", "mlp"),
    )
    assert set(frames["vilas2023"]["split"]) == {"overlapping"}


def test_batches_do_not_change_the_result(store, monkeypatch):
    whole = composition(scan(store.path))
    monkeypatch.setattr("classlens.analysis.frames.batches.__defaults__", (70,))
    assert composition(scan(store.path)).equals(whole)


def test_mid_in_the_store_changes_nothing(tmp_path):
    store = make_store(tmp_path, streams=("resid", "mid", "attn", "mlp"))
    top1 = store.arrays["scores/top1"][store.arrays["images/status"] == Status.OK]
    frame = composition(scan(store.path))
    row = frame.filter(
        (pl.col("group") == "all") & (pl.col("source") == "mlp") & (pl.col("block") == 2)
    ).row(by_predicate=pl.col("split") == "overlapping", named=True)
    assert row["percent"] == pytest.approx(100 * (top1[:, 2, 0] == top1[:, 2, 3]).mean())


def test_a_model_of_one_block_has_no_composition(tmp_path):
    assert analyze_composition(make_store(tmp_path, blocks=1).path).composition.is_empty()


def test_what_a_store_lacks_is_named_with_the_remedy(tmp_path):
    with pytest.raises(UsageError, match="`--streams` that include mlp"):
        analyze_composition(make_store(tmp_path / "a", streams=("resid", "attn")).path)
    with pytest.raises(UsageError, match="`--topk 1`"):
        analyze_composition(make_store(tmp_path / "b", topk=0).path)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_analyze_returns_the_frame_and_counts(store, convention):
    result = analyze_composition(store.path, convention=convention, seed=2)
    assert result.composition.equals(composition(scan(store.path), convention=convention, seed=2))
    assert (result.n_images, result.n_bad) == (N, 2)
    assert json.loads(json.dumps(result.to_json(), allow_nan=False))["convention"] == convention
