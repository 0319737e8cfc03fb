"""identifiability.py and evolution.py against plain loops over the raw arrays of a small store."""

import json

import numpy as np
import polars as pl
import pytest
from scipy.stats import false_discovery_control, wilcoxon
from synthetic_store import make_layout, write_store

from classlens.analysis import frames, statistics
from classlens.analysis.evolution import evolution
from classlens.analysis.identifiability import (
    accuracy,
    analyze_identifiability,
    change_rate,
    context,
    rate,
)
from classlens.analysis.scan import scan, scan_images
from classlens.extractor.errors import UsageError
from classlens.extractor.schema import Status

UNITS = [12, 9]
BAD = {2: Status.UNDECODABLE, 15: Status.NONFINITE}
N = sum(UNITS) - len(BAD)
CONVENTIONS = ("corrected", "vilas2023")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("store"), seed=0)


@pytest.fixture(scope="module")
def control(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("control"), seed=1)


@pytest.fixture(scope="module")
def gap(tmp_path_factory):
    """A store without prefix tokens."""
    return make_store(tmp_path_factory.mktemp("gap"), seed=2, prefix_kinds=())


def make_store(folder, seed, **layout):
    layout = {"prefix_kinds": ("cls", "register"), "grid": (2, 3), "blocks": 4} | layout
    return write_store(
        folder / "store",
        make_layout(images_per_unit=UNITS, **layout),
        UNITS,
        bad=BAD,
        seed=seed,
    )


def good(store):
    """Positions of scored images, and whatever array one wants of them."""
    positions = np.flatnonzero(store.arrays["images/status"] == Status.OK)
    return {path: values[positions] for path, values in store.arrays.items()}


def identifiability(store, stream="resid"):
    """[N, B, T], straight from the ranks."""
    rank = good(store)["scores/rank"][:, :, store.layout.streams.index(stream)]
    return 1 - rank.astype(float) / store.layout.classes


def rank_sums(store, stream, blocks, tokens):
    """Sum of ranks of some tokens in some blocks for each image; the less the better."""
    rank = good(store)["scores/rank"][:, :, store.layout.streams.index(stream)].astype(int)
    return rank[:, blocks][:, :, tokens].sum((1, 2))


def image_tokens(store, convention):
    """Indices of the image tokens a convention counts."""
    tokens = range(store.layout.prefix, store.layout.tokens)
    return [t for t in tokens if not (convention == "vilas2023" and t == 0)]


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("which", ["store", "gap"])
def test_rate(which, convention, request):
    store = request.getfixturevalue(which)
    tokens = image_tokens(store, convention)
    shares = []
    for image in identifiability(store):
        hits = [image[-1, t] == 1.0 for t in tokens]
        shares.append(sum(hits) / len(hits))
    row = rate(scan(store.path), convention=convention, seed=3).row(0, named=True)
    assert row["convention"] == convention
    assert row["rate"] == pytest.approx(100 * np.mean(shares))
    assert row["images"] == pytest.approx(100 * np.mean([s > 0 for s in shares]))
    assert (row["n_images"], row["n_tokens"]) == (N, len(tokens))
    low, high = statistics.bootstrap_interval(100 * np.array(shares)[:, None], seed=3)
    assert (row["rate_low"], row["rate_high"]) == pytest.approx((low.item(), high.item()))


def test_vilas2023_drops_token_0_of_a_gap_model_only(store, gap):
    assert len(image_tokens(gap, "vilas2023")) == len(image_tokens(gap, "corrected")) - 1
    assert image_tokens(store, "vilas2023") == image_tokens(store, "corrected")


def test_accuracy_counts_scored_images_only(store):
    arrays = good(store)
    row = accuracy(scan_images(store.path)).row(0, named=True)
    right = arrays["images/label"] == arrays["images/prediction"]
    assert row["accuracy"] == pytest.approx(100 * right.mean())
    assert row["n_images"] == N


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("which", ["store", "gap"])
def test_change_rate(which, convention, request):
    store = request.getfixturevalue(which)
    logit = good(store)["scores/label_logit"][:, :, 0]
    tokens = image_tokens(store, convention)
    frame = change_rate(scan(store.path), convention=convention)
    for block in range(1, store.layout.blocks):
        risen = [
            logit[i, block, t] > logit[i, block - 1, t] for i in range(len(logit)) for t in tokens
        ]
        row = frame.row(by_predicate=pl.col("block") == block, named=True)
        assert row["change_rate"] == pytest.approx(np.mean(risen))
        assert row["low"] <= row["change_rate"] <= row["high"]
        assert (row["n_images"], row["n_tokens"]) == (N, len(risen))
    assert frame.height == store.layout.blocks - 1


def test_equal_logits_have_not_risen():
    logits = [1.0, 1.0, 1.5, 0.5]
    frame = pl.LazyFrame(
        {
            "image": pl.Series([0] * 4, dtype=pl.Int32),
            "block": pl.Series(range(4), dtype=pl.Int16),
            "stream": ["resid"] * 4,
            "token": [1] * 4,
            "kind": ["patch"] * 4,
            "label_logit": logits,
        }
    )
    assert change_rate(frame)["change_rate"].to_list() == [0.0, 1.0, 0.0]


def test_evolution_summary(store):
    frame = evolution(scan(store.path))
    layout = store.layout
    assert frame.height == layout.blocks * len(layout.streams) * 2
    for row in frame.iter_rows(named=True):
        tokens = [0] if row["group"] == "cls" else list(range(layout.prefix, layout.tokens))
        values = identifiability(store, row["stream"])[:, row["block"], tokens].ravel()
        expected = [values.mean(), *np.quantile(values, [0.25, 0.5, 0.75])]
        assert [row[c] for c in ("mean", "q25", "median", "q75")] == pytest.approx(expected)
        assert (row["n_images"], row["n_tokens"]) == (N, len(values))


def test_evolution_of_a_model_without_cls_has_image_tokens_only(gap):
    assert evolution(scan(gap.path))["group"].unique().to_list() == ["patch"]


def test_corrected_control_test_is_over_image_means(store, control):
    frame = evolution(scan(store.path), scan(control.path))
    for stream in store.layout.streams:
        for group, tokens in {"cls": [0], "patch": range(2, store.layout.tokens)}.items():
            tokens = list(tokens)
            p_values = [
                wilcoxon(
                    rank_sums(control, stream, [b], tokens),
                    rank_sums(store, stream, [b], tokens),
                    alternative="greater",
                ).pvalue
                for b in range(store.layout.blocks)
            ]
            part = frame.filter((pl.col("stream") == stream) & (pl.col("group") == group))
            assert part["p_value"].to_list() == pytest.approx(p_values)
            assert part["q_value"].to_list() == pytest.approx(false_discovery_control(p_values))
            assert part["n_pairs"].to_list() == [N] * store.layout.blocks


def test_vilas2023_control_test_is_over_all_tokens_together(store, control):
    frame = evolution(scan(store.path), scan(control.path), convention="vilas2023")
    tokens = [0, *range(2, store.layout.tokens)]
    for row in frame.filter(pl.col("stream") == "resid").iter_rows(named=True):
        ours, theirs = (
            good(s)["scores/rank"][:, row["block"], 0][:, tokens].ravel().astype(int)
            for s in (store, control)
        )
        assert row["p_value"] == pytest.approx(wilcoxon(theirs, ours, alternative="greater").pvalue)
        assert row["n_pairs"] == len(ours)
        assert row["q_value"] is None


def test_pairs_of_blocks_are_joined(store, control):
    frame = evolution(scan(store.path), scan(control.path), bin_pairs_to=2)
    part = frame.filter((pl.col("stream") == "resid") & (pl.col("group") == "patch"))
    assert part["block"].to_list() == [0, 1]
    for row in part.iter_rows(named=True):
        blocks = [2 * row["block"], 2 * row["block"] + 1]
        assert row["mean"] == pytest.approx(identifiability(store)[:, blocks, 2:].mean())
        tokens = range(2, store.layout.tokens)
        x, y = (rank_sums(s, "resid", blocks, tokens) for s in (control, store))
        assert row["p_value"] == pytest.approx(wilcoxon(x, y, alternative="greater").pvalue)
    assert evolution(scan(store.path), bin_pairs_to=4).equals(evolution(scan(store.path)))
    with pytest.raises(ValueError, match="cannot be joined"):
        evolution(scan(store.path), bin_pairs_to=3)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("class_fraction", [0.5, 0.1])
def test_context(store, convention, class_fraction):
    is_class = good(store)["images/mask_fraction"] / 255 >= class_fraction
    r = identifiability(store)[:, :, store.layout.prefix :]
    frame = context(
        scan(store.path),
        convention=convention,
        class_fraction=class_fraction,
        permutations=99,
        seed=4,
    )
    assert frame["block"].to_list() == list(range(store.layout.blocks))
    deltas = [r[:, b][is_class].mean() - r[:, b][~is_class].mean() for b in frame["block"]]
    assert frame["delta"].to_list() == pytest.approx(deltas)
    pooled = convention == "vilas2023"
    test = statistics.ClassContextTest(
        is_class.sum(1), 6, pooled=pooled, permutations=300 if pooled else 99, seed=4
    )
    test.add(r, is_class)
    assert frame["p_value"].to_list() == test.p_values().tolist()
    assert frame["n_class"].to_list() == [is_class.sum()] * store.layout.blocks
    assert frame["n_context"].to_list() == [(~is_class).sum()] * store.layout.blocks
    if pooled:
        assert frame["q_value"].null_count() == frame.height
        assert all(round(p * 300, 6).is_integer() for p in frame["p_value"])
    else:
        q_values = false_discovery_control(test.p_values())
        assert frame["q_value"].to_list() == pytest.approx(q_values)
        assert frame["p_value"].min() >= 1 / 100


def test_class_fraction_of_a_half_counts_exactly_half(tmp_path):
    # 128 of 255 is the least stored fraction that is at least one half.
    store = make_store(tmp_path, seed=0)
    stored = good(store)["images/mask_fraction"]
    n_class = context(scan(store.path), permutations=1)["n_class"][0]
    assert n_class == np.count_nonzero(stored >= 128)


def test_context_without_masks_is_empty(tmp_path):
    store = make_store(tmp_path, seed=0, masks=False)
    frame = context(scan(store.path))
    assert frame.is_empty()
    assert frame.schema == context(scan(make_store(tmp_path / "with", seed=0).path)).schema


def test_batches_are_whole_images_whatever_their_size(store):
    tokens = scan(store.path).filter((pl.col("stream") == "resid") & (pl.col("kind") == "patch"))
    whole = next(frames.batches(tokens, ["rank"]))["rank"]
    small = [b["rank"] for b in frames.batches(tokens, ["rank"], rows=50)]
    assert [len(b) for b in small] == [2] * 9 + [1]
    np.testing.assert_array_equal(np.concatenate(small), whole)
    np.testing.assert_array_equal(whole, good(store)["scores/rank"][:, :, 0, store.layout.prefix :])


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_analyze_puts_everything_together(store, control, convention):
    result = analyze_identifiability(
        store.path, control.path, convention=convention, permutations=99, seed=2
    )
    lazy = scan(store.path)
    assert (result.n_images, result.n_bad, result.classes) == (N, 2, 10)
    model = pl.col("source") == "model"
    expected = {
        "rate": rate(lazy, convention=convention, seed=2),
        "accuracy": accuracy(scan_images(store.path), seed=2),
        "evolution": evolution(lazy, scan(control.path), convention=convention),
        "change_rate": change_rate(lazy, convention=convention, seed=2),
    }
    for name, frame in expected.items():
        assert getattr(result, name).filter(model).drop("source").equals(frame), name
    of_control = rate(scan(control.path), convention=convention, seed=2)
    assert result.rate.filter(~model).drop("source").equals(of_control)
    assert result.context.equals(context(lazy, convention=convention, permutations=99, seed=2))
    assert json.loads(json.dumps(result.to_json(), allow_nan=False))["n_images"] == N


def test_images_without_a_mask_are_no_context(store, tmp_path):
    mixed = make_store(tmp_path, seed=0)
    units = pl.read_parquet(mixed.path / "units.parquet")
    units.with_columns(masks=pl.Series([True, False])).write_parquet(mixed.path / "units.parquet")
    result = analyze_identifiability(mixed.path, permutations=9)
    assert result.context["n_images"][0] == UNITS[0] - 1
    assert analyze_identifiability(store.path, permutations=9).context["n_images"][0] == N


def test_a_control_of_another_shape_or_other_images_is_refused(store, gap, tmp_path):
    with pytest.raises(UsageError, match=r"differs from .* in prefix_kinds"):
        analyze_identifiability(store.path, gap.path)
    other = make_store(tmp_path, seed=1)
    manifest = pl.read_parquet(other.path / "manifest.parquet")
    manifest.with_columns(key="x" + pl.col("key")).write_parquet(other.path / "manifest.parquet")
    with pytest.raises(UsageError, match="do not hold the same images"):
        analyze_identifiability(store.path, other.path)


def test_a_store_without_scores_is_refused(tmp_path):
    layout = make_layout(images_per_unit=[2])
    empty = write_store(tmp_path / "empty", layout, [2], uncommitted=(0,))
    with pytest.raises(UsageError, match="no scored image yet"):
        analyze_identifiability(empty.path)


def test_a_store_without_the_residual_stream_is_refused(tmp_path):
    with pytest.raises(UsageError, match="`--streams` that include resid"):
        analyze_identifiability(make_store(tmp_path, seed=0, streams=("attn", "mlp")).path)


def test_a_model_of_one_block_has_no_change_rate(tmp_path):
    store = make_store(tmp_path, seed=0, blocks=1)
    result = analyze_identifiability(store.path, permutations=9)
    assert result.change_rate.is_empty()
    assert result.evolution["block"].unique().to_list() == [0]
