"""What runs with several seeds say of a claim that one arm is better than another.

For each seed the two arms' scores of the same utterances are subtracted. Two things may move the mean of these
differences: other seeds, of which the spread over seeds tells, and other utterances, of which the influences tell
(sonorant.evaluation.intervals). Their variances are added, and the interval is Student's with the degrees of freedom
of Welch and Satterthwaite (Biometrics Bulletin 2, 1946): those of the seeds where the seeds are what moves it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from sonorant.evaluation.intervals import bootstrap, difference, mean_of
from sonorant.evaluation.measures import Measure, System

Verdict = Literal["supports", "contradicts", "cannot tell"]


@dataclass(frozen=True)
class Finding:
    """By how much one arm's score is better than another's, above 0 where it is as the claim says, and its interval.

    nan is what is not known, such as the interval of one seed.
    """

    says: str
    better: str
    than: str
    measure: Measure
    value: float
    low: float
    high: float
    by_seed: Mapping[int, float]
    verdict: Verdict


@dataclass(frozen=True)
class Weighed:
    """A study's outcome: every arm's scores by seed, what was found on each claim, and all of them in one word.

    titles: arms by key, in their order; scores: by arm and measure's key, each seed's; published: the paper's numbers
    by arm; failed: by run, why it has no scores.
    """

    name: str
    question: str
    paper: str
    setting: str
    titles: Mapping[str, str]
    measures: Sequence[Measure]
    scores: Mapping[str, Mapping[str, Mapping[int, float]]]
    published: Mapping[str, Mapping[str, float]]
    findings: Sequence[Finding]
    verdict: Verdict
    failed: Mapping[str, str]


def weigh(
    says: str, better: str, than: str, measure: Measure, runs: Mapping[str, Mapping[int, System]]
) -> Finding:
    """The finding on one score from every arm's runs by seed; seeds that only one of the two has are left out.

    A score that is not a number is not left out with its seed: nothing is known then.
    """
    assert measure.better, "StudyConfig's claims are checked"
    sign, key = (1.0 if measure.better == "higher" else -1.0), measure.key
    ours, theirs = runs[better], runs[than]
    seeds = [s for s in sorted(ours.keys() & theirs.keys()) if key in ours[s].scores and key in theirs[s].scores]
    by_seed = {seed: sign * (ours[seed].scores[key] - theirs[seed].scores[key]) for seed in seeds}
    if not by_seed:
        return Finding(says, better, than, measure, math.nan, math.nan, math.nan, by_seed, "cannot tell")
    value, error, freedom = statistics.mean(by_seed.values()), math.nan, 1.0
    if len(seeds) > 1:
        of_seeds = statistics.variance(by_seed.values()) / len(seeds)
        of_utterances = 0.0
        if all(key in arm[seed].estimates for arm in (ours, theirs) for seed in seeds):
            apart = [difference(ours[seed].estimates[key], theirs[seed].estimates[key]) for seed in seeds]
            found = bootstrap(mean_of(apart)).error
            of_utterances = 0.0 if math.isnan(found) else found**2
        both = of_seeds + of_utterances
        error = math.sqrt(both)
        freedom = (len(seeds) - 1) * (both / of_seeds) ** 2 if of_seeds > 0 else math.inf
    reach = half_width(error, freedom)
    low, high = value - reach, value + reach
    return Finding(says, better, than, measure, value, low, high, by_seed, verdict_of(low, high))


def half_width(error: float, freedom: float, confidence: float = 0.95) -> float:
    """Half of Student's interval about a value with this standard error; nan where that is not a number."""
    from scipy import stats

    if not error > 0:
        return error
    tail = 0.5 + confidence / 2
    return error * float(stats.norm.ppf(tail) if math.isinf(freedom) else stats.t.ppf(tail, freedom))


def verdict_of(low: float, high: float) -> Verdict:
    """What an interval says; of one that ends at zero nothing can be told."""
    return "supports" if low > 0 else "contradicts" if high < 0 else "cannot tell"


def together(verdicts: Sequence[Verdict]) -> Verdict:
    """Of several claims: supported where all are, contradicted where one is and none of the others is supported."""
    if all(verdict == "supports" for verdict in verdicts):
        return "supports"
    if "contradicts" in verdicts and "supports" not in verdicts:
        return "contradicts"
    return "cannot tell"
