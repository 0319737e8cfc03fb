"""plots.py, plots_sublayers.py: axis titles, chance, marks of significance; self-contained SVG."""

import re

import polars as pl
import pytest

from classlens.analysis import plot_style, plots, plots_sublayers

BLOCKS = range(4)
Q_VALUES = [0.5, 0.01, 0.2, 0.001]


def rates():
    columns = ("rate", "rate_low", "rate_high", "images", "images_low", "images_high")
    return pl.DataFrame(
        {
            "name": ["a <model>", "its control"],
            "source": ["model", "control"],
            "chance": [0.1, 0.1],
            **{c: [60.0 + i, 0.5 + i] for i, c in enumerate(columns)},
        }
    )


def evolution(*, control, groups=("cls", "patch")):
    rows = [
        {
            "source": source,
            "stream": stream,
            "group": group,
            "block": block,
            "mean": 0.6,
            "q25": 0.5,
            "q75": 0.7,
            **({"p_value": 0.001, "q_value": Q_VALUES[block]} if control else {}),
        }
        for source in (("model", "control") if control else ("model",))
        for stream in ("resid", "mlp")
        for group in groups
        for block in BLOCKS
    ]
    return pl.DataFrame(rows)


def change_rate():
    return pl.DataFrame(
        {
            "source": ["model"] * 3 + ["control"] * 3,
            "block": [1, 2, 3] * 2,
            "change_rate": [0.6, 0.7, 0.8, 0.5, 0.5, 0.5],
            "low": [0.55] * 6,
            "high": [0.85] * 6,
        }
    )


def context(q_values=Q_VALUES):
    return pl.DataFrame(
        {
            "block": BLOCKS,
            "delta": [-0.01, 0.03, 0.02, 0.05],
            "low": [-0.02, 0.02, -0.01, 0.04],
            "high": [0.0, 0.04, 0.05, 0.06],
            "null": [0.001] * 4,
            "p_value": [0.5, 0.2, 0.01, 0.3],
            "q_value": pl.Series(q_values, dtype=pl.Float64),
        }
    )


def sublayer_rates(*, mid=True, groups=("cls", "patch")):
    lines = [("corrected", "attn", "resid"), ("vilas2023", "attn", "resid")]
    lines += [("vilas2023", "mlp", "resid"), *([("corrected", "mlp", "mid")] if mid else [])]
    return pl.DataFrame(
        [
            {
                "convention": convention,
                "sublayer": sublayer,
                "baseline": baseline,
                "group": group,
                "block": block,
                "change_rate": 0.6,
                "low": 0.5,
                "high": 0.7,
            }
            for convention, sublayer, baseline in lines
            for group in groups
            for block in (1, 2, 3)
        ]
    )


def differences(by, streams):
    return pl.concat(
        context().drop("null").with_columns(pl.lit(stream).alias(by)) for stream in streams
    )


PERCENT = {"prev": 40.0, "attn": 5.0, "mlp": 15.0, "several": 30.0, "comp": 10.0}


def composition(groups=("all", "cls", "patch")):
    rows = [
        {"split": split, "group": group, "block": block, "source": source, "percent": percent}
        for split, percents in {"overlapping": {"prev": 99.0}, "exclusive": PERCENT}.items()
        for group in groups
        for block in (1, 2, 3)
        for source, percent in percents.items()
    ]
    return pl.DataFrame(rows)


CHARTS = {
    "rate": lambda: plots.rate_chart(rates()),
    "evolution": lambda: plots.evolution_chart(evolution(control=True)),
    "change_rate": lambda: plots.change_rate_chart(change_rate()),
    "context": lambda: plots.context_chart(context()),
    "sublayer_rate": lambda: plots_sublayers.sublayer_rate_chart(sublayer_rates()),
    "sublayer_context": lambda: plots_sublayers.sublayer_context_chart(
        differences("sublayer", ("attn", "mlp"))
    ),
    "composition": lambda: plots_sublayers.composition_chart(composition()),
    "correct_wrong": lambda: plots_sublayers.correct_minus_wrong_chart(
        differences("stream", ("resid", "attn", "mlp"))
    ),
}


def svg(name):
    return plot_style.to_svg(CHARTS[name](), f"The {name} chart")


def texts(picture):
    return re.findall(r"<text[^>]*>([^<]*)</text>|<tspan[^>]*>([^<]*)</tspan>", picture)


def words(picture):
    return [a or b for a, b in texts(picture)]


@pytest.mark.parametrize(
    ("name", "titles"),
    {
        "rate": ["image tokens with rank 0, mean over images (%)", "tick: chance"],
        "evolution": ["identifiability r", "block (0-based)", "CLS token", "image tokens"],
        "change_rate": ["share of image tokens rising", "block (0-based)"],
        "context": ["Δ identifiability r, class − context", "block (0-based)"],
        "sublayer_rate": [
            "share of tokens rising",
            "block (0-based)",
            "CLS token",
            "MLP output (mlp)",
        ],
        "sublayer_context": ["Δ change of label logit, class − context", "block (0-based)"],
        "composition": ["% of tokens", "block (0-based)", "CLS token", "image tokens"],
        "correct_wrong": ["Δ identifiability r of CLS, correct − wrong", "block (0-based)"],
    }.items(),
)
def test_axes_have_titles(name, titles):
    shown = words(svg(name))
    assert [t for t in titles if t not in shown] == []


@pytest.mark.parametrize("name", CHARTS)
def test_svg_is_static_and_refers_to_nothing_outside(name):
    picture = svg(name)
    assert picture.startswith(f'<svg role="img" aria-label="The {name} chart"')
    without_namespaces = re.sub(r'xmlns(:xlink)?="[^"]*"', "", picture)
    assert not re.search(r"https?:|href|<script|@import|<image", without_namespaces)


def test_bars_carry_their_numbers_and_interval():
    shown = words(svg("rate"))
    assert "60.00 [61.00, 62.00]" in shown
    assert "a &lt;model&gt;" in shown


@pytest.mark.parametrize("name", ["evolution", "change_rate", "sublayer_rate"])
def test_chance_is_a_dotted_line_at_one_half_and_named(name):
    chart = CHARTS[name]().to_dict()
    rows = [row for data in chart["datasets"].values() for row in data]
    chance = [row for row in rows if row["source" if "source" in row else "color"] == "chance"]
    assert {row.get("mean", row.get("change_rate")) for row in chance} == {0.5}
    assert "chance" in words(svg(name))


def test_stars_mark_blocks_with_small_q():
    stars = [word for word in words(svg("evolution")) if word == "★"]
    assert len(stars) == 2 * 2 * sum(q < 0.05 for q in Q_VALUES)


def test_without_a_control_there_are_no_stars_and_no_control_in_the_legend():
    chart = plots.evolution_chart(evolution(control=False, groups=("patch",)))
    shown = words(plot_style.to_svg(chart, ""))
    assert "★" not in shown
    assert "model" in shown
    assert "control (random weights)" not in shown
    assert "CLS token" not in shown


def test_streams_keep_their_colours():
    picture = svg("evolution")
    assert plot_style.STREAM_COLORS["resid"] in picture
    assert plot_style.STREAM_COLORS["mlp"] in picture
    assert plot_style.STREAM_COLORS["attn"] not in picture


def filled_points(picture, color):
    """Marks with the fill of significance; the legend has one of each kind too."""
    return len(
        re.findall(rf'fill="{color}"[^>]*stroke="{plot_style.STREAM_COLORS["resid"]}"', picture)
    )


@pytest.mark.parametrize(
    ("q_values", "significant", "name"), [(Q_VALUES, 2, "q"), ([None] * 4, 1, "p")]
)
def test_context_fills_significant_points_by_q_or_else_by_p(q_values, significant, name):
    picture = plot_style.to_svg(plots.context_chart(context(q_values)), "")
    assert filled_points(picture, plot_style.STREAM_COLORS["resid"]) == significant + 1
    assert filled_points(picture, "#FFFFFF") == 4 - significant + 1
    assert f"class ahead, {name} &lt; 0.05" in words(picture)


def drawn_rows(chart):
    return [row for data in chart.to_dict()["datasets"].values() for row in data]


def test_attention_is_drawn_once_and_the_mlp_with_both_baselines():
    rows = drawn_rows(CHARTS["sublayer_rate"]())
    lines = {(row["color"], row["line"]) for row in rows if row["color"] != "chance"}
    own, block = plots_sublayers.OWN_INPUT, plots_sublayers.BLOCK_INPUT
    assert lines == {("attn", own), ("mlp", own), ("mlp", block)}
    assert len(rows) == (3 + 2) * 2 * 3  # with chance in both panels


def test_without_mid_the_mlp_has_the_published_baseline_only():
    frame = sublayer_rates(mid=False, groups=("patch",))
    rows = drawn_rows(plots_sublayers.sublayer_rate_chart(frame))
    lines = {row["line"] for row in rows if row["color"] == "mlp"}
    assert lines == {plots_sublayers.BLOCK_INPUT}
    assert {row["row"] for row in rows} == {"image tokens"}


def test_composition_draws_the_exclusive_split_of_cls_and_image_tokens():
    rows = drawn_rows(CHARTS["composition"]())
    assert {row["column"] for row in rows} == {"CLS token", "image tokens"}
    for group in ("CLS token", "image tokens"):
        for block in (1, 2, 3):
            bar = [r for r in rows if (r["column"], r["block"]) == (group, block)]
            assert [r["percent"] for r in bar] == list(PERCENT.values())
            assert [r["order"] for r in bar] == list(range(5))
    assert plot_style.STREAM_COLORS["mlp"] in svg("composition")


def test_panels_of_differences_have_the_colours_of_their_streams():
    picture = svg("correct_wrong")
    for stream in ("resid", "attn", "mlp"):
        assert plot_style.STREAM_COLORS[stream] in picture
        assert plot_style.STREAM_TITLES[stream] in words(picture)
    assert words(picture).count("correct ahead, q &lt; 0.05") == 3
