"""The step `weigh`: what the reports of a study's arms and seeds say of its claims."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sonorant.artifacts import read_record
from sonorant.config.study import StudyConfig
from sonorant.steps.step import In, Ins, Metrics, Out, step

if TYPE_CHECKING:
    from sonorant.evaluation.claims import Weighed
    from sonorant.evaluation.measures import Measure, System

FILE = "findings.json"
REPORTS = "reports"
READ = ("artifact.json", "metrics.json", "estimates.npz", "training.csv")
"""The files that are read of a report."""


@step
def weigh(config: StudyConfig, *, reports: Ins, findings: Out, before: In | None = None) -> Metrics:
    """Lay the reports of a study's arms and seeds side by side and say of each claim what they show.

    Each report is called arm/seed by its `evaluate.label`; of several with one label, the first that has a score has
    it. `before` is what `weigh` made of reports that come before these. Writes study.html, findings.json and, for those
    that come after, what it read of each report. The metrics returned are the claims' differences.
    """
    from sonorant.evaluation.report.study import render_studies

    known = [] if before is None else sorted((before / REPORTS).iterdir())
    for number, folder in enumerate([*known, *reports]):
        kept = findings / REPORTS / f"{number:05d}"
        kept.mkdir(parents=True)
        for name in READ:
            shutil.copyfile(folder / name, kept / name)
    weighed = weighed_of(config, "study", sorted((findings / REPORTS).iterdir()), {})
    write_findings(findings, weighed)
    (findings / "study.html").write_text(render_studies([weighed]))
    found = {f"{f.better}_{f.than}_{f.measure.key}": f.value for f in weighed.findings}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def weighed_of(config: StudyConfig, name: str, reports: Sequence[Path], failed: Mapping[str, str]) -> Weighed:
    """The study's outcome from its reports; `failed` says of some runs why they have none.

    Raises ValueError where a report has no label of this study, or a score is not what it should be.
    """
    from sonorant.evaluation.claims import Weighed, together, weigh

    check_scores(config)
    measures = [measure_named(key) for key in config.measures]
    runs: dict[str, dict[int, System]] = {arm: {} for arm in config.arms}
    settings: set[str] = set()
    for folder in reports:
        record = read_record(folder, "report")
        arm, _, seed = str(record["config"].get("label", "")).rpartition("/")
        if arm not in runs or not seed.isdecimal():
            found = record["config"].get("label")
            raise ValueError(
                f"report {folder}: found the label {found!r}, wanted arm/seed with an arm of {sorted(runs)}: set "
                "evaluate.label"
            )
        system, number = read_system(folder), int(seed)
        settings |= set(setting_of(record))
        if number in runs[arm]:
            system = joined(runs[arm][number], system)
        runs[arm][number] = system
    by_claim = [
        [weigh(claim.says, claim.better, claim.than, measure_named(key), runs) for key in claim.by]
        for claim in config.claims
    ]
    keys = [measure.key for measure in measures]
    scores = {
        arm: {k: {seed: s.scores[k] for seed, s in sorted(own.items()) if k in s.scores} for k in keys}
        for arm, own in runs.items()
    }
    return Weighed(
        name,
        config.question,
        config.paper,
        "; ".join(sorted(settings)),
        {key: arm.title or key for key, arm in config.arms.items()},
        measures,
        {arm: {k: found for k, found in own.items() if found} for arm, own in scores.items()},
        config.published,
        [finding for findings in by_claim for finding in findings],
        together([findings[0].verdict for findings in by_claim]),
        failed,
    )


def check_scores(config: StudyConfig) -> None:
    """ValueError where a study names a score that there is not, or claims that one is better that has no direction."""
    for key in config.measures:
        measure_named(key)
    for key in (key for claim in config.claims for key in claim.by):
        if not measure_named(key).better:
            raise ValueError(f"claims: found the score {key}, wanted one that has a better direction: name another")


def measure_named(key: str) -> Measure:
    """The measure of a score; ValueError where there is none."""
    from sonorant.evaluation.measures import EVERY_MEASURE

    if key not in EVERY_MEASURE:
        raise ValueError(f"measures: found the score {key}, wanted one of {', '.join(EVERY_MEASURE)}: respell it")
    return EVERY_MEASURE[key]


def read_system(folder: Path) -> System:
    """What a report measured of its model, and how its online codes were at the end of training."""
    import csv

    from sonorant.steps.comparing import read_system

    system = read_system(folder)
    with (folder / "training.csv").open() as file:
        last = list(csv.DictReader(file))[-1:]
    scores = dict(system.scores)
    for row in last:
        for name in ("active_codes", "perplexity"):
            found = [float(value) for key, value in row.items() if value and key.endswith(f"/{name}")]
            scores |= {f"training_{name}": found[0]} if found else {}
    return dataclasses.replace(system, scores=scores)


def joined(first: System, second: System) -> System:
    """The scores of both; where both have one, the first's."""
    return dataclasses.replace(
        first,
        scores={**second.scores, **first.scores},
        estimates={
            **{name: one for name, one in second.estimates.items() if name not in first.scores}, **first.estimates
        },
    )  # fmt: skip


def setting_of(record: Mapping[str, Any]) -> list[str]:
    """How much each step that trained did, from the lineage of a report."""
    made = record.get("lineage", {}).values()
    return [f"{one['step']}: {one['config']['num_updates']} updates" for one in made if "num_updates" in one["config"]]


def write_findings(folder: Path, weighed: Weighed) -> None:
    """As JSON, which `read_findings` reads: null is what is not a number."""
    text = json.dumps(without_nan(dataclasses.asdict(weighed)), indent=1, ensure_ascii=False, allow_nan=False)
    staged = folder / f".{FILE}.partial"
    staged.write_text(text + "\n")
    staged.replace(folder / FILE)


def without_nan(value: Any) -> Any:
    """The same with None for what no JSON has a number for."""
    if isinstance(value, Mapping):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_findings(folder: Path) -> Weighed:
    """What `write_findings` wrote; ValueError where that is not what lies there."""
    from sonorant.evaluation.claims import Finding, Weighed
    from sonorant.evaluation.measures import Measure

    def number(value: float | None) -> float:
        return math.nan if value is None else value

    def numbered(runs: Mapping[str, float | None]) -> dict[int, float]:
        return {int(seed): number(value) for seed, value in runs.items()}

    def finding(one: Mapping[str, Any]) -> Finding:
        numbers = {name: number(one[name]) for name in ("value", "low", "high")}
        return Finding(**{**one, **numbers, "measure": Measure(**one["measure"]), "by_seed": numbered(one["by_seed"])})

    path = folder / FILE
    try:
        values = json.loads(path.read_text())
        values["measures"] = [Measure(**one) for one in values["measures"]]
        values["findings"] = [finding(one) for one in values["findings"]]
        scores = values["scores"].items()
        values["scores"] = {arm: {key: numbered(runs) for key, runs in own.items()} for arm, own in scores}
        return Weighed(**values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: found no findings ({type(error).__name__}), wanted those of this version: run its study again "
            "or delete its folder"
        ) from None
