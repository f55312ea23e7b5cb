"""Intervals against bootstraps that measure anew, exact errors and how often they hold the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sonorant.evaluation.intervals import Estimate, bootstrap, difference, mean_of, ratio_of_sums


def errors_of(num_utterances: int, seed: int) -> dict[str, tuple[float, float]]:
    """Edits and words of utterances, the longer ones with more of both."""
    rng = np.random.default_rng(seed)
    words = rng.integers(3, 30, num_utterances)
    return {f"u{n:03}": (float(rng.binomial(count, 0.3)), float(count)) for n, count in enumerate(words)}


def test_a_ratio_is_that_of_the_sums() -> None:
    found = ratio_of_sums({"a": (1, 4), "b": (3, 4)})
    assert found.value == 0.5
    # One more copy of b, to first order: (4 + 3e) / (8 + 4e) grows by (3 - 0.5 * 4) / 8 e.
    assert found.influence == {"a": -0.125, "b": 0.125}


def test_nothing_to_divide_by_is_refused() -> None:
    for parts in ({}, {"a": (0.0, 0.0)}):
        with pytest.raises(ValueError, match=rf"found {len(parts)} utterances with 0 in sum .* measure more"):
            ratio_of_sums(parts)


def test_the_interval_is_that_of_resampling_and_measuring_anew() -> None:
    parts = errors_of(200, 0)
    tops, bottoms = np.array(list(parts.values())).T
    rng = np.random.default_rng(1)
    rows = rng.integers(0, 200, (20_000, 200))
    anew = tops[rows].sum(1) / bottoms[rows].sum(1)
    found = bootstrap(ratio_of_sums(parts), num_draws=20_000)
    # Draws: a percentile of 20,000 is off by .02 of the error at most, twice; what is not linear, by 1/200 of it.
    tolerance = 0.05 * found.error
    assert found.error == pytest.approx(anew.std() * math.sqrt(200 / 199), rel=0.03)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(anew, [0.025, 0.975])), abs=tolerance)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    hits = 0
    for seed in range(400):
        found = bootstrap(ratio_of_sums(errors_of(40, seed)), num_draws=500, seed=seed)
        hits += found.low <= 0.3 <= found.high
    # 400 times .95, less what 40 utterances cost a percentile interval (2 %), and three deviations of a count (13).
    assert 358 <= hits <= 393


def test_speakers_are_drawn_whole() -> None:
    rng = np.random.default_rng(0)
    own = rng.normal(size=20)
    parts = {f"{speaker}-{n}": (own[speaker] + 0.01 * rng.normal(), 1.0) for speaker in range(20) for n in range(50)}
    cluster_of = {name: name.split("-")[0] for name in parts}
    found = bootstrap(ratio_of_sums(parts), cluster_of=cluster_of)
    # The error of a mean of 20 speakers; over 1,000 utterances taken for independent it would be seven times smaller.
    assert found.error == pytest.approx(own.std(ddof=1) / math.sqrt(20), rel=0.01)
    assert bootstrap(ratio_of_sums(parts)).error < found.error / 6


def test_pairs_share_what_is_hard() -> None:
    rng = np.random.default_rng(0)
    hard = rng.normal(size=100)
    a, b = (
        ratio_of_sums({f"u{n}": (x, 1.0) for n, x in enumerate(hard + shift + 0.01 * rng.normal(size=100))})
        for shift in (0.1, 0.0)
    )
    found = bootstrap(difference(a, b))
    assert found.excludes_zero
    assert found.low < a.value - b.value < found.high
    assert found.error < 0.05 * bootstrap(a).error
    same = bootstrap(difference(a, a))
    assert (same.low, same.high, same.excludes_zero) == (0, 0, False)


def test_models_of_other_utterances_are_not_compared() -> None:
    a, b = ratio_of_sums({"u": (1, 2), "v": (0, 2)}), ratio_of_sums({"u": (1, 2), "w": (0, 2)})
    with pytest.raises(ValueError, match="found 2 utterances that only one of the two was measured on"):
        difference(a, b)


def test_seeds_are_averaged() -> None:
    one, two = Estimate(0.2, {"u": 0.1, "v": -0.1}), Estimate(0.4, {"u": 0.3, "v": -0.3})
    found = mean_of([one, two])
    assert found.value == pytest.approx(0.3)
    assert found.influence == pytest.approx({"u": 0.2, "v": -0.2})


def test_one_utterance_says_nothing_of_others() -> None:
    found = bootstrap(ratio_of_sums({"u": (1, 2)}))
    assert math.isnan(found.low)
    assert not found.excludes_zero


def test_equal_seeds_draw_alike_in_any_order() -> None:
    parts = errors_of(30, 0)
    backwards = dict(reversed(parts.items()))
    assert bootstrap(ratio_of_sums(parts)) == bootstrap(ratio_of_sums(backwards))
    assert bootstrap(ratio_of_sums(parts), seed=1) != bootstrap(ratio_of_sums(parts))
