"""plots.py: axis titles, chance, marks of significance, colours; static and self-contained SVG."""

import re

import polars as pl
import pytest

from classlens.analysis import plots

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


CHARTS = {
    "rate": lambda: plots.rate_chart(rates()),
    "evolution": lambda: plots.evolution_chart(evolution(control=True)),
    "change_rate": lambda: plots.change_rate_chart(change_rate()),
    "context": lambda: plots.context_chart(context()),
}


def svg(name):
    return plots.to_svg(CHARTS[name](), f"The {name} chart")


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


@pytest.mark.parametrize("name", ["evolution", "change_rate"])
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
    shown = words(plots.to_svg(chart, ""))
    assert "★" not in shown
    assert "model" in shown
    assert "control (random weights)" not in shown
    assert "CLS token" not in shown


def test_streams_keep_their_colours():
    picture = svg("evolution")
    assert plots.STREAM_COLORS["resid"] in picture
    assert plots.STREAM_COLORS["mlp"] in picture
    assert plots.STREAM_COLORS["attn"] not in picture


def filled_points(picture, color):
    """Marks with the fill of significance; the legend has one of each kind too."""
    return len(re.findall(rf'fill="{color}"[^>]*stroke="{plots.STREAM_COLORS["resid"]}"', picture))


@pytest.mark.parametrize(
    ("q_values", "significant", "name"), [(Q_VALUES, 2, "q"), ([None] * 4, 1, "p")]
)
def test_context_fills_significant_points_by_q_or_else_by_p(q_values, significant, name):
    picture = plots.to_svg(plots.context_chart(context(q_values)), "")
    assert filled_points(picture, plots.STREAM_COLORS["resid"]) == significant + 1
    assert filled_points(picture, "#FFFFFF") == 4 - significant + 1
    assert f"class ahead, {name} &lt; 0.05" in words(picture)
