"""What seeds and utterances say of a claim: intervals by hand, and how often they hold the truth."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest

from sonorant.evaluation.claims import Finding, Verdict, together, weigh
from sonorant.evaluation.intervals import Estimate, ratio_of_sums
from sonorant.evaluation.measures import EVERY_MEASURE, System

HIGHER, LOWER = EVERY_MEASURE["pnmi"], EVERY_MEASURE["probe_per"]
# The 97.5 % points of Student's t with 1, 2 and 8 degrees of freedom, and of the normal, from printed tables.
T1, T2, T8, NORMAL = 12.7062, 4.30265, 2.30600, 1.95996


def system(value: float, influence: Mapping[str, float] | None = None, key: str = "pnmi") -> System:
    """A model of which one score is known, and perhaps each utterance's influence on it."""
    return System("model", "this model", "", {key: value}, {key: Estimate(value, influence)} if influence else {})


def found(ours: Mapping[int, System], theirs: Mapping[int, System]) -> Finding:
    """That `a` has a higher PNMI than `b`."""
    return weigh("a beats b", "a", "b", HIGHER, {"a": ours, "b": theirs})


def test_seeds_alone_make_students_interval() -> None:
    finding = found(
        {0: system(0.5), 1: system(0.7), 2: system(0.9)}, {0: system(0.4), 1: system(0.5), 2: system(0.6)}
    )
    # Differences .1, .2 and .3: their variance is .01.
    assert finding.by_seed == pytest.approx({0: 0.1, 1: 0.2, 2: 0.3})
    reach = T2 * math.sqrt(0.01 / 3)
    assert (finding.value, finding.low, finding.high) == pytest.approx((0.2, 0.2 - reach, 0.2 + reach), rel=1e-5)
    assert finding.verdict == "cannot tell"


def test_the_variance_of_utterances_is_added_with_welchs_freedom() -> None:
    # One of the arms moves with the utterances, by u and v in turn: a mean of two has the error √(.02² + .02²) · √2.
    moving = {"u": 0.02, "v": -0.02}
    still = {"u": 0.0, "v": 0.0}
    error = 0.04
    # Seeds that differ by so much that their mean has the same error: the freedom is 2 · (2 / 1)² = 8.
    apart = error * math.sqrt(3)
    ours = {seed: system(0.5 + shift, moving) for seed, shift in enumerate((-apart, 0.0, apart))}
    theirs = dict.fromkeys(range(3), system(0.3, still))
    finding = found(ours, theirs)
    reach = T8 * error * math.sqrt(2)
    assert (finding.value, finding.high - finding.value) == pytest.approx((0.2, reach), rel=1e-5)
    assert finding.verdict == "supports"


def test_what_moves_both_arms_alike_adds_nothing() -> None:
    shared = {"u": 0.3, "v": -0.3}
    ours = {seed: system(0.5 + 0.01 * seed, shared) for seed in range(3)}
    finding = found(ours, dict.fromkeys(range(3), system(0.3, shared)))
    assert finding.high - finding.value == pytest.approx(T2 * 0.01 / math.sqrt(3), rel=1e-5)


def test_where_one_arm_has_no_influences_seeds_are_all_there_is() -> None:
    ours = {seed: system(0.5 + 0.01 * seed, {"u": 0.3, "v": -0.3}) for seed in range(3)}
    finding = found(ours, dict.fromkeys(range(3), system(0.3)))
    assert finding.high - finding.value == pytest.approx(T2 * 0.01 / math.sqrt(3), rel=1e-5)


def test_equal_seeds_leave_the_utterances() -> None:
    ours, theirs = system(0.5, {"u": 0.02, "v": -0.02}), system(0.3, {"u": 0.0, "v": 0.0})
    finding = found({0: ours, 1: ours}, {0: theirs, 1: theirs})
    assert finding.high - finding.value == pytest.approx(NORMAL * 0.04, rel=1e-5)


def test_nothing_moves_what_is_equal_everywhere() -> None:
    finding = found(dict.fromkeys(range(3), system(0.5)), dict.fromkeys(range(3), system(0.5)))
    assert (finding.low, finding.value, finding.high, finding.verdict) == (0, 0, 0, "cannot tell")


@pytest.mark.parametrize(("sign", "verdict"), [(1, "supports"), (-1, "contradicts")])
def test_lower_is_better_where_it_is(sign: int, verdict: Verdict) -> None:
    lower = {seed: system(0.30 + 0.001 * seed, key="probe_per") for seed in range(3)}
    higher = {seed: system(0.50, key="probe_per") for seed in range(3)}
    arms = {"good": lower, "bad": higher}
    better, than = ("good", "bad") if sign > 0 else ("bad", "good")
    finding = weigh("", better, than, LOWER, arms)
    assert finding.value == pytest.approx(sign * 0.199)
    assert finding.by_seed == pytest.approx({0: sign * 0.2, 1: sign * 0.199, 2: sign * 0.198})
    assert finding.verdict == verdict


def test_seeds_that_one_arm_lacks_are_left_out() -> None:
    ours = {0: system(0.9), 1: system(0.5), 2: system(0.6), 4: System("model", "", "", {})}
    theirs = {1: system(0.4), 2: system(0.4), 3: system(0.0), 4: system(0.0)}
    finding = found(ours, theirs)
    assert finding.by_seed == pytest.approx({1: 0.1, 2: 0.2})
    assert finding.high - finding.value == pytest.approx(T1 * math.sqrt(0.005 / 2), rel=1e-5)


def test_one_seed_cannot_tell() -> None:
    finding = found({0: system(0.9, {"u": 0.0, "v": 0.0})}, {0: system(0.1, {"u": 0.0, "v": 0.0})})
    assert finding.value == pytest.approx(0.8)
    assert math.isnan(finding.low)
    assert math.isnan(finding.high)
    assert finding.verdict == "cannot tell"


def test_no_seed_in_common_cannot_tell() -> None:
    finding = found({0: system(0.9)}, {1: system(0.1)})
    assert (math.isnan(finding.value), finding.by_seed, finding.verdict) == (True, {}, "cannot tell")


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_a_score_that_is_no_number_is_not_hidden(score: float) -> None:
    ours = {seed: system(0.9 if seed else score) for seed in range(3)}
    finding = found(ours, dict.fromkeys(range(3), system(0.1)))
    assert not math.isfinite(finding.value)
    assert math.isnan(finding.low)
    assert finding.verdict == "cannot tell"


def test_arms_of_other_utterances_are_refused() -> None:
    ours = dict.fromkeys(range(2), system(0.9, {"u": 0.1, "v": -0.1}))
    theirs = dict.fromkeys(range(2), system(0.1, {"u": 0.1, "w": -0.1}))
    with pytest.raises(ValueError, match="found 2 utterances that only one of the two was measured on"):
        found(ours, theirs)


@pytest.mark.parametrize(
    ("verdicts", "all_of_them"),
    [
        (["supports", "supports"], "supports"),
        (["supports", "cannot tell"], "cannot tell"),
        (["supports", "contradicts"], "cannot tell"),
        (["contradicts", "cannot tell"], "contradicts"),
        (["contradicts"], "contradicts"),
        (["cannot tell", "cannot tell"], "cannot tell"),
    ],
)
def test_claims_together(verdicts: list[Verdict], all_of_them: Verdict) -> None:
    assert together(verdicts) == all_of_them
    assert together(verdicts[::-1]) == all_of_them


NUM_STUDIES, NUM_UTTERANCES = 1_000, 40


def arms_of(
    rng: np.random.Generator, apart: float, num_seeds: int, of_seeds: float, of_utterances: float, of_both: float
) -> dict[str, dict[int, System]]:
    """Two arms' scores, `apart` from one another, of the same utterances, some of which are harder than others.

    What moves the difference: the seed, the utterance, and which seed meets which utterance; standard deviations.
    """
    hard = rng.normal(0, 1, NUM_UTTERANCES)
    arms: dict[str, dict[int, System]] = {}
    for arm, shift in (("a", apart), ("b", 0.0)):
        own = hard + shift + rng.normal(0, of_utterances / math.sqrt(2), NUM_UTTERANCES)
        arms[arm] = {}
        for seed in range(num_seeds):
            moved = own + rng.normal(0, of_seeds / math.sqrt(2))
            moved += rng.normal(0, of_both / math.sqrt(2), NUM_UTTERANCES)
            estimate = ratio_of_sums({f"u{n}": (value, 1.0) for n, value in enumerate(moved)})
            arms[arm][seed] = System("model", "", "", {"pnmi": estimate.value}, {"pnmi": estimate})
    return arms


@pytest.mark.parametrize(
    ("num_seeds", "of_seeds", "of_utterances", "of_both"),
    [(3, 0.1, 0.0, 0.0), (3, 0.1, 0.6, 0.0), (3, 0.1, 2.0, 0.0), (2, 0.1, 0.6, 0.3), (5, 0.1, 0.6, 0.3)],
    ids=["seeds", "both", "utterances", "two seeds", "five seeds"],
)
def test_the_interval_holds_the_truth_as_often_as_it_says(
    num_seeds: int, of_seeds: float, of_utterances: float, of_both: float
) -> None:
    rng = np.random.default_rng(0)
    held = told = 0
    for _ in range(NUM_STUDIES):
        noise = (num_seeds, of_seeds, of_utterances, of_both)
        true = weigh("", "a", "b", HIGHER, arms_of(rng, 0.2, *noise))
        held += true.low <= 0.2 <= true.high
        null = weigh("", "a", "b", HIGHER, arms_of(rng, 0.0, *noise))
        told += null.verdict != "cannot tell"
    # .95 of 1,000, and three deviations of such a count: 21. Outside are the seeds' variance alone, the utterances'
    # alone and both with the seeds' degrees of freedom.
    assert 929 <= held <= 971
    assert 29 <= told <= 71


def test_a_difference_that_is_large_is_told() -> None:
    rng = np.random.default_rng(0)
    verdicts = [weigh("", "a", "b", HIGHER, arms_of(rng, 1.0, 3, 0.1, 0.6, 0.0)).verdict for _ in range(200)]
    # Eight standard errors; t of a few degrees of freedom is 4.3 at most.
    assert verdicts.count("supports") >= 190
    assert "contradicts" not in verdicts
