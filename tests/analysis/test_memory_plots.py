"""plots_memories.py: panels, lines, units, marks; drawn without a warning."""

import re

import polars as pl
import pytest

from classlens.analysis import plot_style, plots_memories
from classlens.analysis.plot_style import to_svg

BLOCKS = range(3)


def agreement():
    rows = [
        {"sublayer": sublayer, "block": block}
        | {
            f"{name}{end}": 10.0 * (block + 1) * scale + shift
            for name, scale in (("agreement", 1), ("control", 0.1))
            for end, shift in (("", 0), ("_low", -0.5), ("_high", 0.5))
        }
        for sublayer in ("attn", "mlp")
        for block in BLOCKS
    ]
    return pl.DataFrame(rows)


def composition(groups):
    rows = [
        {"sublayer": s, "block": b, "group": g, "composed": 5.0 + b, "low": 4.0, "high": 9.0}
        for s in ("attn", "mlp")
        for g in groups
        for b in BLOCKS
    ]
    return pl.DataFrame(rows)


def cosines(sources):
    rows = [
        {"source": source, "sublayer": s, "block": b, "cosine": 0.2, "low": 0.1, "high": 0.3}
        | ({"q_value": 0.01 if b == 1 else 0.5} if source == "model" and len(sources) > 1 else {})
        for source in sources
        for s in ("attn", "mlp")
        for b in BLOCKS
    ]
    return pl.DataFrame(rows)


def words(picture):
    return [" ".join(re.sub("<[^>]+>", " ", t).split()) for t in picture.split("<text")[1:]]


def joined(chart):
    picture = to_svg(chart, "what it shows")
    assert 'aria-label="what it shows"' in picture
    return picture, " | ".join(words(picture))


def test_agreement_names_panels_lines_and_units():
    picture, text = joined(plots_memories.agreement_chart(agreement()))
    for word in ("attention", "MLP", "image's class", "random class", "(%)", "block (0-based)"):
        assert word in text.replace("&#39;", "'").replace("&apos;", "'")
    for color in (
        *(plot_style.STREAM_COLORS[s] for s in ("attn", "mlp")),
        plot_style.CONTROL_COLOR,
    ):
        assert color in picture


@pytest.mark.parametrize("groups", [("all", "cls", "patch"), ("all", "patch")])
def test_composition_has_a_line_for_each_group(groups):
    _, text = joined(plots_memories.composition_chart(composition(groups)))
    assert "all tokens" in text
    assert ("CLS token" in text) == ("cls" in groups)


def test_correct_minus_wrong_says_what_is_compared():
    rows = [
        {"sublayer": s, "block": b, "delta": 3.0, "low": 1.0, "high": 5.0, "p_value": 0.01}
        | {"q_value": 0.01 if b == 1 else 0.5}
        for s in ("attn", "mlp")
        for b in BLOCKS
    ]
    picture, text = joined(plots_memories.correct_minus_wrong_chart(pl.DataFrame(rows)))
    for word in ("agreement of CLS (points), correct − wrong", "correct ahead, q", "attention"):
        assert word in text
    assert plot_style.STREAM_COLORS["mlp"] in picture


def test_cosines_are_starred_where_above_the_control():
    picture, text = joined(plots_memories.class_value_chart(cosines(("model", "control"))))
    assert "random weights" in text
    assert picture.count("★") == 2  # one block of each sublayer
    assert "starred: q &lt; 0.05" in text
    picture, text = joined(plots_memories.class_value_chart(cosines(("model",))))
    assert "random weights" not in text
    assert "★" not in picture
