"""The quality gate: is the new model at least as good as the one in service?"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sonorant.artifacts import read_record
from sonorant.config.release import GateConfig
from sonorant.evaluation.estimates import FILE, read_estimates
from sonorant.evaluation.intervals import Estimate, bootstrap, difference
from sonorant.params import parse_section

ERRORS = ("abx_across_any", "abx_within_any")
"""The ABX errors that count: lower is better."""


@dataclass(frozen=True)
class Verdict:
    """Whether the model passes, why, and the scores that were compared."""

    word: Literal["pass", "fail"]
    reason: str
    scores: Mapping[str, float]


def judge(limits: Mapping[str, Any], report: Path) -> Verdict:
    """The verdict on the model that `report` measures, also printed on one line.

    The model in service is `previous` in the same report, so both were measured on the same speech; where it is not
    there, nothing is in service and the model passes. limits: a GateConfig's values.
    Raises ValueError where the folder is no report or the limits are none.
    """
    config = parse_section("gate", GateConfig, limits)
    assert isinstance(config, GateConfig)
    record, measured = read_record(report, "report"), read_scores(report)
    ours, theirs = measured.get("model"), measured.get("previous")
    if ours is None or (theirs is None) != ("previous" not in record["inputs"]):
        raise ValueError(
            f"report {report}: found scores of {sorted(measured)}, wanted those of the model and of every model it was "
            "given: run `evaluate` again"
        )
    if theirs is None:
        verdict = Verdict("pass", "nothing in service", {})
    else:
        apart = read_differences(report, measured) if config.evidence == "interval" else {}
        verdict = compare(config, ours, theirs, apart)
    print(f"gate: {verdict.word}: {verdict.reason}", flush=True)
    return verdict


def read_scores(report: Path) -> dict[str, dict[str, float]]:
    """A report's scores by system and name."""
    path = report / "metrics.json"
    try:
        return {system: dict(scores) for system, scores in json.loads(path.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        raise ValueError(f"{path}: found no scores by system, wanted what `evaluate` writes: run it again") from None


def read_differences(report: Path, measured: Mapping[str, Mapping[str, float]]) -> dict[str, Estimate]:
    """What the model's scores are above those of the one in service, where the report knows it by utterance.

    A report without estimates, as `evaluate` once wrote them, knows it of none.
    """
    if not (report / FILE).exists():
        return {}
    ours, theirs = (read_estimates(report, system, measured[system]) for system in ("model", "previous"))
    return {name: difference(ours[name], theirs[name]) for name in ours.keys() & theirs.keys()}


def compare(
    config: GateConfig, ours: Mapping[str, float], theirs: Mapping[str, float], apart: Mapping[str, Estimate]
) -> Verdict:
    """The verdict on the scores `ours` against `theirs`; what was not measured of both cannot pass.

    apart: differences by score, ours less theirs; a score that is not among them is judged by its value.
    """
    bounds = {"pnmi": (1, config.max_pnmi_loss), **dict.fromkeys(ERRORS, (-1, config.max_abx_rise))}
    scores: dict[str, float] = {}
    told, passed = [], True
    for name, (sign, slack) in bounds.items():
        found, former = ours.get(name, math.nan), theirs.get(name, math.nan)
        pair = {name: found, f"{name}_in_service": former}
        scores |= {key: score for key, score in pair.items() if math.isfinite(score)}
        # What is written 0.39 and 0.38 differs by a little more than 0.01 in binary.
        least = -slack - 1e-9
        is_good = sign * (found - former) >= least  # False of NaN
        relation = "at least" if sign > 0 else "at most"
        wanted = f"{relation} {former - sign * slack:.4f}" if math.isfinite(former) else "the one in service's measured"
        line = f"{name} {found:.4f}, wanted {wanted}"
        if config.evidence == "interval" and math.isfinite(found - former):
            interval = bootstrap(apart[name]) if name in apart else None
            if interval is None or math.isnan(interval.error):
                line += ", by the score alone, for the report has no interval of it"
            else:
                line += f", differs by {found - former:+.4f} (95 %: {interval.low:+.4f} … {interval.high:+.4f})"
                if not is_good and max(sign * interval.low, sign * interval.high) >= least:
                    line, is_good = f"{line}, which is not shown to be worse", True
        told.append(line if is_good else f"{line} (worse or not measured)")
        passed = passed and is_good
    return Verdict("pass" if passed else "fail", "; ".join(told), scores)
