"""Unit metrics against tables worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import mutual_info_score

from sonorant.evaluation.units import (
    Joint,
    collapse,
    confuse,
    count_edits,
    estimate_pnmi,
    estimate_purities,
    measure_use,
)

EXACT = 1e-12  # a handful of float64 additions of numbers below 10


def joint(rows: list[list[int]]) -> Joint:
    """A table of made-up phones."""
    return Joint(tuple("abcdef"[: len(rows)]), np.array(rows))


def test_frames_are_counted_to_the_shorter_of_phones_and_units() -> None:
    phones = [["SIL", "ah", "ah", "n"], ["n", "SIL"]]
    units = [np.array([2, 0, 1, 1, 1]), np.array([1])]
    table = Joint.of_frames(phones, units, num_units=3)
    assert table.phones == ("SIL", "ah", "n")
    assert table.counts.tolist() == [[0, 0, 1], [1, 1, 0], [0, 2, 0]]
    assert table.num_frames == 5
    speech = table.without("SIL")
    assert (speech.phones, speech.counts.tolist()) == (("ah", "n"), [[1, 1, 0], [0, 2, 0]])


def test_purities_and_pnmi_of_a_table_by_hand() -> None:
    # p(y, z) = [[3, 1], [0, 4]] / 8
    table = joint([[3, 1], [0, 4]])
    assert table.phone_purity == pytest.approx(7 / 8, abs=EXACT)
    assert table.cluster_purity == pytest.approx(7 / 8, abs=EXACT)
    # H(y) = ln 2. I = 3/8 ln(3/8 / (1/2 · 3/8)) + 1/8 ln(1/8 / (1/2 · 5/8)) + 4/8 ln(4/8 / (1/2 · 5/8)),
    # in bits 3/8 · 1 + 1/8 log2(2/5) + 1/2 log2(8/5).
    bits = 3 / 8 + np.log2(2 / 5) / 8 + np.log2(8 / 5) / 2
    assert table.pnmi == pytest.approx(bits, abs=EXACT)


def test_phones_are_heard_as_what_their_units_stand_for() -> None:
    # Units stand for a, c, c, nothing (it never occurs) and, evenly of a and b, for b, which is more frequent.
    confusion = confuse(Joint(("a", "b", "c"), np.array([[3, 0, 1, 0, 2], [1, 0, 6, 0, 2], [0, 4, 7, 0, 1]])))
    assert confusion.phones == ("c", "b", "a")  # 12, 9 and 6 frames
    assert confusion.frames.tolist() == [[11, 1, 0], [6, 2, 1], [1, 2, 3]]
    shares = [[11 / 12, 1 / 12, 0], [6 / 9, 2 / 9, 1 / 9], [1 / 6, 2 / 6, 3 / 6]]
    assert np.allclose(confusion.shares, shares, atol=EXACT)
    assert confusion.largest(3, 1) == [("b", "c", 6 / 9), ("a", "b", 2 / 6), ("a", "c", 1 / 6)]
    assert confusion.largest(2, 9) == [("b", "c", 6 / 9), ("b", "a", 1 / 9)]
    assert confusion.largest(9, 12) == [("c", "b", 1 / 12)]  # what is never heard is not named
    assert confusion.largest(9, 13) == []


def test_a_phone_without_frames_is_heard_as_nothing() -> None:
    confusion = confuse(joint([[0, 0], [5, 2]]))
    assert (confusion.phones, confusion.shares.tolist()) == (("b", "a"), [[1.0, 0.0], [0.0, 0.0]])


def test_extremes() -> None:
    perfect = joint([[5, 0, 2], [0, 3, 0]])
    assert perfect.pnmi == pytest.approx(1, abs=EXACT)
    assert perfect.phone_purity == 1
    assert perfect.cluster_purity == pytest.approx(8 / 10, abs=EXACT)
    assert joint([[2, 4], [1, 2]]).pnmi == pytest.approx(0, abs=EXACT)  # independent
    assert joint([[2, 4]]).pnmi == 0  # one phone: nothing to tell


@pytest.mark.parametrize("silence", [True, False])
def test_influence_is_the_derivative_of_pnmi_by_an_utterances_copies(silence: bool) -> None:
    rng = np.random.default_rng(0)
    phones = {name: rng.choice(["SIL", "ah", "n"], 12).tolist() for name in "abcd"}
    units = {name: rng.integers(0, 5, 12) for name in phones}
    tables = {name: Joint.of_frames([phones[name]], [units[name]], 5) for name in phones}
    if not silence:
        tables = {name: table.without("SIL") for name, table in tables.items()}
    whole = Joint(tables["a"].phones, np.sum([table.counts for table in tables.values()], axis=0))
    found = estimate_pnmi(whole, phones, units)
    assert found.value == whole.pnmi
    many = 10**9  # counts are whole: this many copies of all, and one more of one

    def moved(name: str, by: int) -> float:
        return Joint(whole.phones, whole.counts * many + by * tables[name].counts).pnmi

    for name, value in found.influence.items():
        step = 1_000
        # Central differences: rounding, 1e-16 over the step of 1e-6.
        assert value == pytest.approx((moved(name, step) - moved(name, -step)) / (2 * step / many), abs=1e-9)
    assert sum(found.influence.values()) == pytest.approx(0, abs=EXACT)


def test_purities_are_shares_of_frames() -> None:
    phones = {"u": ["SIL", "ah", "ah", "ah"], "v": ["n", "n", "ah", "SIL"]}
    units = {"u": np.array([0, 1, 1, 2]), "v": np.array([2, 2, 2, 1])}
    table = Joint.of_frames(phones.values(), units.values(), 3)
    phone, cluster = estimate_purities(table, phones, units)
    assert (phone.value, cluster.value) == (table.phone_purity, table.cluster_purity)
    # 0 → SIL, 1 → ah, 2 → ah or n, of which the first is taken; right: 4 of 4 in u, 1 of 4 in v, in all 5 of 8.
    assert phone.influence == {"u": pytest.approx((4 - 2.5) / 8), "v": pytest.approx((1 - 2.5) / 8)}
    speech = table.without("SIL")
    assert estimate_purities(speech, phones, units)[0].value == speech.phone_purity


@given(st.lists(st.lists(st.integers(0, 9), min_size=4, max_size=4), min_size=2, max_size=5))
def test_pnmi_agrees_with_scikit_learn(rows: list[list[int]]) -> None:
    table = joint(rows)
    phones = table.counts.sum(axis=1)
    if (phones > 0).sum() < 2:
        assert table.pnmi == 0
        return
    p = phones[phones > 0] / phones.sum()
    expected = mutual_info_score(None, None, contingency=table.counts) / -(p * np.log(p)).sum()
    assert table.pnmi == pytest.approx(expected, abs=1e-9)  # two orders of summing at most 20 terms


def test_use_by_hand() -> None:
    # 0 0 0 1 | 1 1 2 2: one second each.
    use = measure_use([np.array([0, 0, 0, 1]), np.array([1, 1, 2, 2])], seconds=2.0)
    assert use.num_active == 3
    # Frames: 0 three times, 1 three times, 2 twice.
    entropy = -(2 * 3 / 8 * np.log2(3 / 8) + 2 / 8 * np.log2(2 / 8))
    assert use.perplexity == pytest.approx(2**entropy, abs=EXACT)
    assert use.bitrate == pytest.approx(8 / 2 * entropy, abs=EXACT)
    # Runs 0, 1 | 1, 2, never joined across utterances: frequencies 1/4, 1/2, 1/4, so 1.5 bits; 4 in 2 s.
    assert use.bitrate_dedup == pytest.approx(3.0, abs=EXACT)
    # With durations (0, 3), (1, 1), (1, 2), (2, 2): all differ, 2 bits.
    assert use.bitrate_dedup_durations == pytest.approx(4.0, abs=EXACT)
    assert use.repetition_rate == pytest.approx(1 / 2, abs=EXACT)


def test_a_constant_sequence_carries_nothing() -> None:
    use = measure_use([np.full(50, 7)], seconds=1.0)
    assert (use.num_active, use.perplexity, use.bitrate, use.bitrate_dedup) == (1, 1, 0, 0)
    assert use.repetition_rate == pytest.approx(0.98, abs=EXACT)


@given(st.lists(st.integers(0, 3)))
def test_collapse_can_be_undone_and_leaves_no_repeats(tokens: list[int]) -> None:
    units: NDArray[np.int64] = np.array(tokens, dtype=np.int64)
    kept, durations = collapse(units)
    assert np.repeat(kept, durations).tolist() == tokens
    assert (kept[1:] != kept[:-1]).all()


def test_nothing_to_measure_is_refused() -> None:
    with pytest.raises(ValueError, match="found 0 frames in 1 s, wanted some"):
        measure_use([np.zeros(0, np.int64)], seconds=1.0)


@pytest.mark.parametrize(
    ("units", "others", "edits", "length"),
    [
        ([3, 3, 5, 5, 5, 7], [3, 5, 7, 7], 0, 3),  # other durations
        ([3, 5, 7], [3, 6, 7], 1, 3),
        ([3, 5, 7], [5, 7, 9], 2, 3),
        ([3, 5], [], 2, 2),
        ([12, 3], [1, 23], 2, 2),  # units are not read as digits
    ],
)
def test_edits_are_counted_between_units_without_repeats(
    units: list[int], others: list[int], edits: int, length: int
) -> None:
    assert count_edits(np.array(units, np.int64), np.array(others, np.int64)) == (edits, length)
