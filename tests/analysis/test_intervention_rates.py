"""interventions.py against plain loops over the raw arrays of small stores; table and figures."""

import json
import re

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner
from synthetic_store import make_layout, tokens_left, write_store

from classlens.analysis.commands_analyze import analyze
from classlens.analysis.evolution import evolution
from classlens.analysis.identifiability import analyze_identifiability, change_rate, rate
from classlens.analysis.interventions import analyze_interventions
from classlens.analysis.plot_style import to_svg
from classlens.analysis.plots_interventions import (
    intervention_blocks_chart,
    intervention_rates_chart,
)
from classlens.analysis.scan import scan
from classlens.extractor.errors import UsageError
from classlens.extractor.schema import Status

UNITS = [12, 9]
CONVENTIONS = ("corrected", "vilas2023")
SOURCES = ("unperturbed", "perturbed", "difference")
PREFIXES = {"cls": ("cls", "register"), "gap": ()}


def make_store(folder, name, *, seed, bad, config, fingerprint=None, **layout):
    """A synthetic store with a config and a fingerprint."""
    layout = make_layout(images_per_unit=UNITS, blocks=4, **{"grid": (2, 3)} | layout)
    store = write_store(folder / name, layout, UNITS, bad=bad, seed=seed)
    group = json.loads((store.path / "zarr.json").read_text())
    attributes = group["attributes"]["classlens"]
    attributes["config"] = {"intervene": None, "intervene_blocks": None, "class_fraction": 0.5}
    attributes["config"] |= config
    attributes["fingerprint"] = {"model": "toy", "images": "12"} | (fingerprint or {})
    (store.path / "zarr.json").write_text(json.dumps(group))
    return store


@pytest.fixture(scope="module", params=PREFIXES)
def stores(request, tmp_path_factory):
    """The unperturbed store, one with a knockout, one without context; not all images in each."""
    folder = tmp_path_factory.mktemp(request.param)
    prefix = {"prefix_kinds": PREFIXES[request.param]}
    return {
        "store": make_store(
            folder, "store", seed=0, bad={2: Status.UNDECODABLE}, config={}, **prefix
        ),
        "knockout": make_store(
            folder,
            "knockout",
            seed=1,
            bad={2: Status.UNDECODABLE, 15: Status.NONFINITE},
            config={"intervene": "self-only", "intervene_blocks": [0, 1]},
            **prefix,
        ),
        "removal": make_store(
            folder,
            "removal",
            seed=2,
            bad={2: Status.UNDECODABLE, 4: Status.NO_TOKENS},
            config={"intervene": "drop-context"},
            tokens_removed=True,
            **prefix,
        ),
    }


def pair(stores, name):
    """Ranks [N, B, T] of resid in both, tokens left [N, T], right predictions [N, 2]."""
    ours, theirs = stores["store"], stores[name]
    both = [
        i
        for i in range(ours.layout.images)
        if ours.arrays["images/status"][i] == theirs.arrays["images/status"][i] == Status.OK
    ]
    rank, changed = (s.arrays["scores/rank"][both, :, 0].astype(int) for s in (ours, theirs))
    there = np.ones(rank[:, 0].shape, bool)
    if name == "removal":
        there = tokens_left(theirs.arrays["images/mask_fraction"], theirs.layout)[both]
    right = [s.arrays["images/prediction"] == s.arrays["images/label"] for s in (ours, theirs)]
    return rank, changed, there, np.column_stack(right)[both]


def expected_rates(stores, name, convention, weights=None):
    """Each measure of both sources and of the difference, by loops over images and tokens."""
    rank, changed, there, right = pair(stores, name)
    prefix = stores["store"].layout.prefix
    weights = np.ones(len(rank)) if weights is None else weights
    published = convention == "vilas2023"
    rates, images = [], []
    for source, ranks in enumerate((rank, changed)):
        shares, with_one, hits, tokens, of_images = 0.0, 0.0, 0.0, 0.0, 0.0
        for n, weight in enumerate(weights):
            counted = [t for t in range(ranks.shape[2]) if there[n, t]]
            if published and source == 0:
                counted = [t for t in counted if t >= max(prefix, 1)]
            elif not published:
                counted = [t for t in counted if t >= prefix]
            if not counted:
                continue
            identified = sum(ranks[n, -1, t] == 0 for t in counted)
            shares += weight * identified / len(counted)
            hits += weight * identified
            tokens += weight * len(counted)
            with_one += weight * (identified > 0)
            of_images += weight
        rates.append(100 * (hits / tokens if published and source == 0 else shares / of_images))
        images.append(100 * with_one / of_images)
    accuracy = (100 * weights @ right / weights.sum()).tolist()
    return [[a, b, b - a] for a, b in (rates, images, accuracy)]


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("name", ["knockout", "removal"])
def test_rates(stores, name, convention):
    result = analyze_interventions(
        stores["store"].path, [stores[name].path], convention=convention, seed=3
    )
    rates = result.rates
    assert rates["source"].to_list() == [*SOURCES] * 3
    assert rates["convention"].unique().to_list() == [convention]
    expected = np.array(expected_rates(stores, name, convention))
    np.testing.assert_allclose(rates["value"].to_numpy().reshape(3, 3), expected)
    rng = np.random.default_rng(3)
    n = len(pair(stores, name)[0])
    drawn = []
    for _ in range(1000):
        times_drawn = np.bincount(rng.integers(n, size=n), minlength=n).astype(float)
        drawn.append(expected_rates(stores, name, convention, times_drawn))
    for column, quantile in (("low", 0.025), ("high", 0.975)):
        found = rates[column].to_numpy().reshape(3, 3)
        np.testing.assert_allclose(found, np.quantile(drawn, quantile, axis=0))


def test_the_published_code_counts_cls_in_one_and_not_in_the_other(stores):
    _, _, there, _ = pair(stores, "removal")
    prefix = stores["store"].layout.prefix
    of_patches = int(there[:, prefix:].sum())
    counted = {}
    for convention in CONVENTIONS:
        result = analyze_interventions(
            stores["store"].path, [stores["removal"].path], convention=convention
        )
        of_rate = result.rates.filter(pl.col("measure") == "rate")
        counted[convention] = of_rate["n_tokens"].to_list()
    assert counted["corrected"] == [of_patches, of_patches, None]
    dropped = 0 if prefix else int(there[:, 0].sum())
    assert counted["vilas2023"] == [of_patches - dropped, int(there.sum()), None]


@pytest.mark.parametrize("name", ["knockout", "removal"])
def test_blocks(stores, name):
    result = analyze_interventions(stores["store"].path, [stores[name].path])
    rank, changed, there, _ = pair(stores, name)
    layout = stores["store"].layout
    groups = {"patch": range(layout.prefix, layout.tokens)}
    groups |= {"cls": [0]} if layout.prefix else {}
    assert set(result.blocks["group"]) == set(groups)
    for (group, block, source), row in result.blocks.group_by("group", "block", "source"):
        row = row.row(0, named=True)
        values = {}
        for ranks, of in ((rank, "unperturbed"), (changed, "perturbed")):
            tokens = [
                1 - ranks[n, block, t] / layout.classes
                for n in range(len(ranks))
                for t in groups[group]
                if there[n, t]
            ]
            values[of] = np.mean(tokens)
            assert row["n_tokens"] == len(tokens)
        values["difference"] = values["perturbed"] - values["unperturbed"]
        assert row["mean"] == pytest.approx(values[source])
        assert row["low"] <= row["mean"] <= row["high"]


def test_several_stores_stand_below_each_other(stores):
    paths = [stores["knockout"].path, stores["removal"].path]
    result = analyze_interventions(stores["store"].path, paths)
    assert result.rates["name"].unique(maintain_order=True).to_list() == ["knockout", "removal"]
    texts = result.rates["intervention"].unique(maintain_order=True).to_list()
    assert texts == ["self-only in blocks 0, 1", "drop-context, class fraction 0.5"]
    one = analyze_interventions(stores["store"].path, paths[1:])
    assert one.rates.equals(result.rates.filter(pl.col("name") == "removal"))
    assert one.blocks.equals(result.blocks.filter(pl.col("name") == "removal"))
    again = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert again["rates"] == result.rates.to_dicts()


def test_stores_that_do_not_pair_are_refused(stores, tmp_path):
    store, knockout = stores["store"].path, stores["knockout"].path
    with pytest.raises(UsageError, match="No perturbed stores"):
        analyze_interventions(store, [])
    with pytest.raises(UsageError, match="is itself extracted with --intervene"):
        analyze_interventions(knockout, [store])
    with pytest.raises(UsageError, match="of the model as it is"):
        analyze_interventions(store, [store])
    changed = {"config": {"intervene": "self-only"}, "seed": 1, "bad": {}}
    prefix = {"prefix_kinds": stores["store"].layout.prefix_kinds}
    other = make_store(tmp_path, "a", fingerprint={"model": "b", "dtype": "x"}, **changed, **prefix)
    with pytest.raises(UsageError, match=r"differs from .* in model, dtype"):
        analyze_interventions(store, [other.path])
    other = make_store(tmp_path, "b", grid=(3, 2), **changed, **prefix)
    with pytest.raises(UsageError, match=r"differs from .* in grid"):
        analyze_interventions(store, [other.path])
    other = make_store(tmp_path, "c", streams=("attn",), **changed, **prefix)
    with pytest.raises(UsageError, match="lacks the residual stream"):
        analyze_interventions(store, [other.path])
    other = make_store(tmp_path, "d", **changed, **prefix)
    manifest = pl.read_parquet(other.path / "manifest.parquet")
    manifest.with_columns(key="x" + pl.col("key")).write_parquet(other.path / "manifest.parquet")
    with pytest.raises(UsageError, match="do not hold the same images"):
        analyze_interventions(store, [other.path])


def test_analyses_of_whole_images_refuse_removed_tokens_or_leave_them_out(stores):
    store, removal = stores["store"], stores["removal"]
    with pytest.raises(UsageError, match="classlens analyze interventions"):
        analyze_identifiability(removal.path)
    with pytest.raises(UsageError, match="tokens_removed"):
        analyze_identifiability(store.path, removal.path)
    with pytest.raises(UsageError, match="were removed and have no scores"):
        change_rate(scan(removal.path))
    ok = removal.arrays["images/status"] == Status.OK
    rank = removal.arrays["scores/rank"][ok][:, :, 0, removal.layout.prefix :]
    there = rank[:, -1] != 65_535
    shares = [(r[t] == 0).mean() for r, t in zip(rank[:, -1], there, strict=True) if t.any()]
    row = rate(scan(removal.path)).row(0, named=True)
    assert (row["rate"], row["n_images"]) == (pytest.approx(100 * np.mean(shares)), len(shares))
    means = evolution(scan(removal.path)).filter(stream="resid", group="patch").sort("block")
    for block, mean in enumerate(means["mean"]):
        assert mean == pytest.approx((1 - rank[:, block][there] / 10).mean())
    assert analyze_identifiability(stores["knockout"].path, permutations=9).n_images == 19


def test_command(stores):
    paths = [str(stores[name].path) for name in ("store", "knockout", "removal")]
    run = CliRunner().invoke(analyze, ["interventions", *paths], catch_exceptions=False)
    assert run.exit_code == 0
    words = " ".join(run.output.split())
    for title in ("knockout (self-only in blocks 0, 1)", "removal (drop-context, class fraction"):
        assert title in words
    result = analyze_interventions(paths[0], paths[1:])
    row = result.rates.row(0, named=True)
    assert f"{row['value']:.2f} [{row['low']:.2f}, {row['high']:.2f}]" in words
    run = CliRunner().invoke(
        analyze,
        ["interventions", *paths, "--convention", "both", "--json"],
        catch_exceptions=False,
    )
    results = json.loads(run.stdout)
    assert set(results) == set(CONVENTIONS)
    assert results["corrected"] == result.to_json()


def test_charts_name_what_they_show(stores):
    paths = [stores["knockout"].path, stores["removal"].path]
    result = analyze_interventions(stores["store"].path, paths)
    pictures = [
        to_svg(intervention_rates_chart(result.rates), "rates"),
        to_svg(intervention_blocks_chart(result.blocks), "blocks"),
    ]
    for picture in pictures:
        words = re.findall(r"<text[^>]*>([^<]*)</text>", picture)
        assert {"knockout", "removal", "unperturbed", "perturbed"} <= set(words)
        assert "href" not in re.sub(r"xmlns(:xlink)?=", "", picture)
    assert "image tokens with rank 0 (%)" in pictures[0]
    assert "identifiability r" in pictures[1]
    assert "chance" in pictures[1]
