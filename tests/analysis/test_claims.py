"""Verdicts on claims, from numbers made up for the purpose."""

import math

import pytest

from classlens.analysis.study.claims import (
    ClaimFinding,
    Judged,
    claim_counts,
    claims_frame,
    judge_claim,
)
from classlens.analysis.study.measures import Reading
from classlens.analysis.study.plan import Claim, Term

ONE = Term("r", "accuracy")


def claim(check="greater", **given):
    return Claim(id="c", says="So it is.", check=check, of=ONE, **given)


def series(*values, first=0, **given):
    return {first + i: Reading(value, **given) for i, value in enumerate(values)}


@pytest.mark.parametrize(
    ("of", "than", "factor", "verdict"),
    [
        (Reading(2.0), 1.0, 1.0, "holds"),
        (Reading(1.0), 1.0, 1.0, "contradicted"),  # equal is not greater
        (Reading(math.nextafter(1.0, 2)), 1.0, 1.0, "holds"),
        (Reading(2.0), Reading(1.0), 2.0, "contradicted"),
        (Reading(2.0), Reading(1.0), 1.9, "holds"),
        (Reading(2.0, 0.5, 3.0), 1.0, 1.0, "undecided"),
        (Reading(0.5, 0.2, 1.0), 1.0, 1.0, "undecided"),
        (Reading(2.0, 1.5, 3.0), 1.0, 1.0, "holds"),
        (Reading(2.0, 1.5, 3.0), 1.0, 4.0, "contradicted"),
        (Reading(2.0, 0.5, 3.0), Reading(1.0), 1.0, "holds"),  # only a number can lie inside
    ],
)
def test_greater_compares_two_numbers(of, than, factor, verdict):
    assert judge_claim(claim(factor=factor), of, than).verdict == verdict


def test_the_numbers_that_were_compared_are_said():
    found = judge_claim(claim(factor=10), Reading(25.0, 20.0, 30.0), Reading(1.0, 0.5, 1.5))
    assert found.numbers == "25 [20, 30] against 1 [0.5, 1.5] (asked: above 10 times that)"
    found = judge_claim(claim(), series(0.0, 0.2, 0.3, p=0.01), 0.0)
    assert found == Judged(
        "holds", "in 2 of 3 blocks, not in 0; mean 0.1667 against 0; p < 0.05 in 3 of 3 blocks"
    )


@pytest.mark.parametrize(
    ("of", "than", "verdict"),
    [
        (series(1.0, 2.0, 0.0), 0.5, "holds"),
        (series(1.0, 0.0), 0.5, "contradicted"),  # half of the blocks are not most
        (series(1.0, 2.0, 3.0), series(0.0, 3.0, 1.0), "holds"),
        (series(1.0, 2.0, 3.0), series(3.0, 1.0, first=1), "contradicted"),  # in block 2 only
        (Reading(1.5), series(1.0, 1.0, 2.0), "holds"),
    ],
)
def test_greater_in_most_blocks(of, than, verdict):
    assert judge_claim(claim(), of, than).verdict == verdict


def test_blocks_must_meet():
    with pytest.raises(LookupError, match="no block with both"):
        judge_claim(claim(), series(1.0), series(1.0, first=5))


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ((1, 2, 3), "holds"),
        ((1, 3, 3), "contradicted"),
        ((3, 2, 1), "contradicted"),
        ((1, 2, 1.5, 3, 2.5, 4, 3.5, 5), "holds"),  # thirds 1.5, 2.75, 4.5 of 3, 2, 3 blocks
        ((0, 5, 1, 2, 3), "contradicted"),  # 2.5, 1, 2.5
    ],
)
def test_rises_compares_thirds(values, verdict):
    assert judge_claim(claim("rises"), series(*values)).verdict == verdict


def test_thirds_need_three_blocks():
    with pytest.raises(LookupError, match="three blocks"):
        judge_claim(claim("rises"), series(1, 2))


@pytest.mark.parametrize(
    ("peak", "blocks", "verdict"),
    [(7, 12, "contradicted"), (8, 12, "holds"), (11, 12, "holds"), (5, 8, "contradicted"),
     (6, 8, "holds"), (1, 2, "contradicted")],
)  # fmt: skip
def test_peaks_late_is_the_last_third(peak, blocks, verdict):
    late = judge_claim(claim("peaks late"), series(*(float(b == peak) for b in range(blocks))))
    assert late.verdict == verdict
    assert f"in block {peak} of 0 to {blocks - 1}" in late.numbers


def test_a_series_from_block_1_counts_block_0():
    late = judge_claim(claim("peaks late"), series(0, 0, 0, 1, 0, first=1))  # block 4 of 0 to 5
    assert late.verdict == "holds"


def finding(verdict, theirs=None, **given):
    judged = {"corrected": Judged(verdict, "1 against 2")}
    judged["vilas2023"] = theirs or judged["corrected"]
    return ClaimFinding(claim(**given), judged)


def test_a_contradiction_is_a_plain_sentence():
    assert finding("holds").contradiction == ""
    assert finding("undecided").contradiction == ""
    found = finding("contradicted", source="§5", contradicted="For a reason.")
    assert found.contradiction == (
        "The paper (§5): So it is. Not so here: accuracy: 1 against 2. For a reason."
    )


def test_what_their_code_computes_is_added_where_it_is_judged_otherwise():
    assert finding("holds").numbers == "accuracy: 1 against 2"
    assert finding("holds", Judged("holds", "1 against 3")).numbers == "accuracy: 1 against 2"
    other = finding("holds", Judged("contradicted", "1 against 3"))
    assert other.verdict == "holds"
    assert other.numbers == "accuracy: 1 against 2. As vilas2023, contradicted: 1 against 3"


def test_the_frame_has_a_row_for_every_claim():
    findings = [
        finding("contradicted", Judged("holds", "3 against 2")),
        ClaimFinding(claim(), {}, "r has not been run"),
    ]
    assert claim_counts(findings) == "1 contradicted, 1 not measured"
    first, second = claims_frame(findings).to_dicts()
    assert (first["verdict"], first["verdict_vilas2023"]) == ("contradicted", "holds")
    assert (first["numbers"], first["numbers_vilas2023"]) == ("1 against 2", "3 against 2")
    assert (second["verdict"], second["numbers"]) == ("not measured", None)
    assert second["reason"] == "r has not been run"
