"""sublayers.py against plain loops over the raw arrays of a small store."""

import json

import numpy as np
import polars as pl
import pytest
from scipy.stats import false_discovery_control
from synthetic_store import make_layout, write_store

from classlens.analysis import statistics
from classlens.analysis.scan import scan
from classlens.analysis.sublayers import (
    analyze_sublayers,
    cls_correct_minus_wrong,
    missing_sublayers,
    sublayer_change_rate,
    sublayer_context,
)
from classlens.extractor.errors import UsageError
from classlens.extractor.schema import Status

UNITS = [8, 6]
BAD = {2: Status.UNDECODABLE, 11: Status.NONFINITE}
N = sum(UNITS) - len(BAD)
ALL_STREAMS = ("resid", "mid", "attn", "mlp")
CONVENTIONS = ("corrected", "vilas2023")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def gap(tmp_path_factory):
    """A store without prefix tokens."""
    return make_store(tmp_path_factory.mktemp("gap"), seed=2, prefix_kinds=())


@pytest.fixture(scope="module")
def without_mid(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("no_mid"), streams=("resid", "attn", "mlp"))


def make_store(folder, seed=0, **layout):
    """Few different logits, so that many are equal; a quarter of the predictions right."""
    defaults = {"streams": ALL_STREAMS, "prefix_kinds": ("cls", "register"), "blocks": 4}
    layout = make_layout(images_per_unit=UNITS, **defaults | layout)
    rng = np.random.default_rng(seed)
    shape = (layout.images, layout.blocks, len(layout.streams), layout.tokens)
    label = rng.integers(0, layout.classes, layout.images).astype(np.int32)
    right = rng.random(layout.images) < 0.4
    content = {
        "scores/label_logit": (rng.integers(-6, 7, shape) / 2).astype(np.float16),
        "images/label": label,
        "images/prediction": np.where(right, label, (label + 1) % layout.classes).astype(np.int32),
    }
    return write_store(folder / "store", layout, UNITS, bad=BAD, seed=seed, content=content)


def good(store):
    """The arrays, cut to scored images."""
    positions = np.flatnonzero(store.arrays["images/status"] == Status.OK)
    return {path: values[positions] for path, values in store.arrays.items()}


def plain_change(store, image, block, sublayer, token, convention):
    """Logit of a sublayer less that of its baseline, by the definition."""
    logit = good(store)["scores/label_logit"][image]
    streams = store.layout.streams
    after = float(logit[block, streams.index(sublayer), token])
    if sublayer == "mlp" and convention == "corrected":
        return after - float(logit[block, streams.index("mid"), token])
    return after - float(logit[block - 1, streams.index("resid"), token])


def plain_changes(store, sublayer, convention):
    """The same for all images, blocks from 1 on, and image tokens: [N, B, G]."""
    layout = store.layout
    return np.array(
        [
            [
                [
                    plain_change(store, image, block, sublayer, token, convention)
                    for token in range(layout.prefix, layout.tokens)
                ]
                for block in range(1, layout.blocks)
            ]
            for image in range(N)
        ]
    )


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("which", ["store", "gap"])
def test_change_rate(which, convention, request):
    store = request.getfixturevalue(which)
    layout = store.layout
    # Neither convention drops the first patch of a model without CLS here.
    groups = {"patch": list(range(layout.prefix, layout.tokens))}
    if layout.prefix:
        groups["cls"] = [0]
    frame = sublayer_change_rate(scan(store.path), convention=convention, seed=3)
    for sublayer in ("attn", "mlp"):
        for group, tokens in groups.items():
            per_image = np.empty((N, layout.blocks - 1))
            for image in range(N):
                for block in range(1, layout.blocks):
                    risen = [
                        plain_change(store, image, block, sublayer, token, convention) > 0
                        for token in tokens
                    ]
                    per_image[image, block - 1] = sum(risen) / len(risen)
            part = frame.filter((pl.col("sublayer") == sublayer) & (pl.col("group") == group))
            assert part["block"].to_list() == list(range(1, layout.blocks))
            assert part["change_rate"].to_list() == pytest.approx(per_image.mean(0))
            low, high = statistics.bootstrap_interval(per_image, seed=3)
            assert part["low"].to_list() == pytest.approx(low)
            assert part["high"].to_list() == pytest.approx(high)
            assert set(part["n_images"]) == {N}
            assert set(part["n_tokens"]) == {N * len(tokens)}
    assert frame.height == 2 * len(groups) * (layout.blocks - 1)
    assert set(frame["convention"]) == {convention}


def test_conventions_differ_in_the_baseline_of_the_mlp_only(store):
    frames = {c: sublayer_change_rate(scan(store.path), convention=c) for c in CONVENTIONS}
    for sublayer, same in {"attn": True, "mlp": False}.items():
        parts = [f.filter(pl.col("sublayer") == sublayer) for f in frames.values()]
        assert parts[0].drop("convention").equals(parts[1].drop("convention")) == same
    assert frames["corrected"].select("sublayer", "baseline").unique().sort("sublayer").rows() == [
        ("attn", "resid"),
        ("mlp", "mid"),
    ]
    assert set(frames["vilas2023"]["baseline"]) == {"resid"}


def test_equal_logits_have_not_risen(tmp_path):
    layout = make_layout(images_per_unit=[1], blocks=2, streams=("resid", "attn"), grid=(1, 3))
    logit = np.zeros((1, 2, 2, 4), np.float16)
    logit[0, 1, 1] = [0, 0, 2**-24, -1]  # equal, equal, larger by the least float16, smaller
    store = write_store(tmp_path / "store", layout, [1], content={"scores/label_logit": logit})
    frame = sublayer_change_rate(scan(store.path))
    assert frame.select("group", "change_rate").rows() == [("cls", 0.0), ("patch", 1 / 3)]


def test_batches_do_not_change_the_rates(store, monkeypatch):
    whole = sublayer_change_rate(scan(store.path))
    monkeypatch.setattr("classlens.analysis.frames.batches.__defaults__", (70,))
    assert sublayer_change_rate(scan(store.path)).equals(whole)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("which", ["store", "gap"])
def test_context_of_logit_changes(which, convention, request):
    store = request.getfixturevalue(which)
    is_class = good(store)["images/mask_fraction"] / 255 >= 0.5
    frame = sublayer_context(scan(store.path), convention=convention, permutations=49, seed=4)
    pooled = convention == "vilas2023"
    for sublayer in ("attn", "mlp"):
        changes = plain_changes(store, sublayer, convention)
        deltas = [
            changes[:, b][is_class].mean() - changes[:, b][~is_class].mean() for b in range(3)
        ]
        part = frame.filter(pl.col("sublayer") == sublayer)
        assert part["block"].to_list() == [1, 2, 3]
        assert part["delta"].to_list() == pytest.approx(deltas)
        test = statistics.ClassContextTest(
            is_class.sum(1), 6, pooled=pooled, permutations=300 if pooled else 49, seed=4
        )
        test.add(changes, is_class)
        assert part["p_value"].to_list() == test.p_values().tolist()
        assert set(part["n_class"]) == {is_class.sum()}
        assert set(part["n_images"]) == {N}
        if pooled:
            assert part["q_value"].null_count() == 3
        else:
            q_values = false_discovery_control(test.p_values())
            assert part["q_value"].to_list() == pytest.approx(q_values)


def test_context_without_masks_is_empty_and_images_without_a_mask_are_no_context(tmp_path):
    bare = make_store(tmp_path / "bare", masks=False)
    assert analyze_sublayers(bare.path, permutations=9).context.is_empty()
    mixed = make_store(tmp_path / "mixed")
    units = pl.read_parquet(mixed.path / "units.parquet")
    units.with_columns(masks=pl.Series([True, False])).write_parquet(mixed.path / "units.parquet")
    context = analyze_sublayers(mixed.path, permutations=9).context
    assert set(context["n_images"]) == {UNITS[0] - 1}


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_correct_minus_wrong_of_the_cls_token(store, convention):
    arrays, layout = good(store), store.layout
    correct = arrays["images/label"] == arrays["images/prediction"]
    frame = cls_correct_minus_wrong(
        scan(store.path), convention=convention, permutations=49, seed=5
    )
    assert frame["stream"].unique(maintain_order=True).to_list() == list(ALL_STREAMS)
    for s, stream in enumerate(layout.streams):
        r = 1 - arrays["scores/rank"][:, :, s, 0] / layout.classes
        part = frame.filter(pl.col("stream") == stream)
        assert part["block"].to_list() == list(range(layout.blocks))
        assert part["delta"].to_list() == pytest.approx(r[correct].mean(0) - r[~correct].mean(0))
        test = statistics.correct_minus_wrong(
            r, correct, permutations=49, convention=convention, seed=5
        )
        assert part["p_value"].to_list() == pytest.approx(test.p_values)
        assert part["low"].to_list() == pytest.approx(test.low)
        if convention == "corrected":
            q_values = false_discovery_control(test.p_values)
            assert part["q_value"].to_list() == pytest.approx(q_values)
        else:
            assert part["q_value"].null_count() == layout.blocks
    counts = (int(correct.sum()), int((~correct).sum()))
    assert set(frame.select("n_correct", "n_wrong").rows()) == {counts}
    assert min(counts) > 1


def test_correct_minus_wrong_needs_a_cls_token_and_both_kinds_of_images(gap, tmp_path):
    assert cls_correct_minus_wrong(scan(gap.path)).is_empty()
    layout = make_layout(images_per_unit=[3])
    label = np.arange(3, dtype=np.int32)
    content = {"images/label": label, "images/prediction": label}
    perfect = write_store(tmp_path / "store", layout, [3], content=content)
    frame = cls_correct_minus_wrong(scan(perfect.path))
    assert frame.is_empty()
    assert "delta" in frame.columns


def test_without_mid_only_the_corrected_mlp_is_missing(without_mid):
    result = analyze_sublayers(without_mid.path, permutations=9)
    assert list(result.missing) == ["mlp"]
    assert "`--streams resid,mid,attn,mlp`" in result.missing["mlp"]
    assert set(result.change_rate["sublayer"]) == {"attn"}
    assert set(result.context["sublayer"]) == {"attn"}
    assert not result.correct_minus_wrong.is_empty()
    published = analyze_sublayers(without_mid.path, convention="vilas2023")
    assert published.missing == {}
    assert set(published.change_rate["sublayer"]) == {"attn", "mlp"}


@pytest.mark.parametrize(
    ("streams", "convention", "missing", "remedy"),
    [
        (("resid", "mlp"), "vilas2023", ["attn"], "resid,attn,mlp"),
        (("resid", "mid", "mlp"), "corrected", ["attn"], "resid,mid,attn,mlp"),
        (("resid", "attn"), "vilas2023", ["mlp"], "resid,attn,mlp"),
        (("resid", "attn"), "corrected", ["mlp"], "resid,mid,attn,mlp"),
        (("resid",), "corrected", ["attn", "mlp"], "resid,attn"),
        (ALL_STREAMS, "corrected", [], ""),
    ],
)
def test_missing_streams_are_named_with_the_remedy(streams, convention, missing, remedy):
    found = missing_sublayers(streams, convention)
    assert list(found) == missing
    if missing:
        assert f"`--streams {remedy}`" in found[missing[0]]


def test_a_store_with_the_residual_stream_alone_has_empty_frames(tmp_path):
    store = make_store(tmp_path, streams=("resid",))
    result = analyze_sublayers(store.path, permutations=9)
    assert list(result.missing) == ["attn", "mlp"]
    assert result.change_rate.is_empty()
    assert result.context.is_empty()


def test_a_store_without_the_residual_stream_is_refused(tmp_path):
    with pytest.raises(UsageError, match="`--streams` that include resid"):
        analyze_sublayers(make_store(tmp_path, streams=("attn", "mlp")).path)


def test_a_model_of_one_block_has_no_changes(tmp_path):
    result = analyze_sublayers(make_store(tmp_path, blocks=1).path, permutations=9)
    assert result.change_rate.is_empty()
    assert result.context.is_empty()
    assert set(result.correct_minus_wrong["block"]) == {0}


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_analyze_puts_everything_together(store, convention):
    result = analyze_sublayers(store.path, convention=convention, permutations=29, seed=2)
    lazy = scan(store.path)
    options = {"convention": convention, "seed": 2}
    assert (result.n_images, result.n_bad) == (N, 2)
    assert result.permutations == (300 if convention == "vilas2023" else 29)
    assert result.change_rate.equals(sublayer_change_rate(lazy, **options))
    assert result.context.equals(sublayer_context(lazy, permutations=29, **options))
    assert result.correct_minus_wrong.equals(
        cls_correct_minus_wrong(lazy, permutations=29, **options)
    )
    assert json.loads(json.dumps(result.to_json(), allow_nan=False))["n_bad"] == 2
