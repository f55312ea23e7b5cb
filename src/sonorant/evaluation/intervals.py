"""How far a measure would be elsewhere with other utterances: the bootstrap over utterances or over speakers.

Every measure is kept with the *influence* of each utterance: its derivative by how many copies of the utterance there
are. Resampling utterances (or whole speakers) then moves the measure, to first order, by a sum of influences, whatever
the measure is: a mean, a ratio of sums, an entropy or an ABX error (the linearised bootstrap; Efron and Tibshirani, An
Introduction to the Bootstrap, 1993, section 22.6). Two models measured on the same utterances are compared by the
influences on their difference, which is what pairing them means.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

NUM_DRAWS = 2_000
DRAWS_AT_ONCE = 4_000_000
"""Counts turned into floats in one array."""


@dataclass(frozen=True)
class Estimate:
    """A measure, and by utterance what one more copy of it would add to the measure, to first order; in sum 0."""

    value: float
    influence: Mapping[str, float]


@dataclass(frozen=True)
class Interval:
    """Where a measure lies, and its standard error; nan where there are fewer than two of what is resampled."""

    low: float
    high: float
    error: float

    @property
    def excludes_zero(self) -> bool:
        """Whether all of it is on one side of zero; a difference may then be called one."""
        return self.low > 0 or self.high < 0


def ratio_of_sums(parts: Mapping[str, tuple[float, float]]) -> Estimate:
    """Σ numerator / Σ denominator over utterances, such as edits over words, or hits over 1 for a mean.

    Raises ValueError where there is no utterance or the denominators are 0 in sum.
    """
    total = math.fsum(bottom for _, bottom in parts.values())
    if total == 0:
        raise ValueError(f"ratio: found {len(parts)} utterances with 0 in sum to divide by, wanted some: measure more")
    value = math.fsum(top for top, _ in parts.values()) / total
    return Estimate(value, {name: (top - value * bottom) / total for name, (top, bottom) in parts.items()})


def difference(a: Estimate, b: Estimate) -> Estimate:
    """a - b where both were measured on the same utterances; ValueError where they were not."""
    if a.influence.keys() != b.influence.keys():
        only = len(a.influence.keys() ^ b.influence.keys())
        raise ValueError(
            f"difference: found {only} utterances that only one of the two was measured on, wanted none: measure both "
            "on the same utterances"
        )
    return Estimate(a.value - b.value, {name: u - b.influence[name] for name, u in a.influence.items()})


def mean_of(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of measures of the same utterances, such as one model's with several seeds; ValueError otherwise."""
    first = estimates[0]
    for other in estimates[1:]:
        difference(first, other)
    count = len(estimates)
    influence = {name: math.fsum(one.influence[name] for one in estimates) / count for name in first.influence}
    return Estimate(math.fsum(one.value for one in estimates) / count, influence)


def bootstrap(
    estimate: Estimate,
    *,
    cluster_of: Mapping[str, str] | None = None,
    confidence: float = 0.95,
    num_draws: int = NUM_DRAWS,
    seed: int = 0,
) -> Interval:
    """The interval between the percentiles of resampled values.

    What is drawn with replacement are utterances or, with `cluster_of`, all that have the same name there, such as
    their speaker. Deviations are scaled by √(n / (n - 1)): those of n drawn from n are too small by that.
    """
    sums: dict[str, float] = {}
    for name in sorted(estimate.influence):
        cluster = cluster_of[name] if cluster_of is not None else name
        sums[cluster] = sums.get(cluster, 0.0) + estimate.influence[name]
    count = len(sums)
    if count < 2:
        return Interval(math.nan, math.nan, math.nan)
    influence = np.array([sums[cluster] for cluster in sorted(sums)])
    influence -= influence.mean()  # rounding alone, unless clusters are missing
    draws, at_once = _draw(count, num_draws, seed), max(1, DRAWS_AT_ONCE // count)
    parts = [draws[start : start + at_once] @ influence for start in range(0, num_draws, at_once)]
    moved = np.concatenate(parts) * math.sqrt(count / (count - 1))
    tail = (1 - confidence) / 2
    low, high = np.quantile(moved, [tail, 1 - tail])
    error = math.sqrt(float(np.square(influence).sum()) * count / (count - 1))
    return Interval(estimate.value + float(low), estimate.value + float(high), error)


@lru_cache(maxsize=1)
def _draw(count: int, num_draws: int, seed: int) -> NDArray[np.uint8]:
    """How often each of `count` is drawn, (num_draws, count); kept, for a report asks for the same again and again."""
    rng = np.random.default_rng(seed)
    draws = np.empty((num_draws, count), np.uint8)
    for row in range(num_draws):
        draws[row] = np.bincount(rng.integers(0, count, count), minlength=count)
    return draws
