"""What a study must run: every step of every arm and seed, as a graph in which equal work is one piece."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from sonorant.config import EvaluateConfig, PretrainConfig
from sonorant.config.study import Arm, ElsewhereConfig, StudyConfig
from sonorant.params import check_params, merged, parse_rounds, parse_section, parse_takes, read_yaml, second_values
from sonorant.steps.weigh import check_scores

OUTPUTS = {
    "prepare": "corpus",
    "cluster": "units",
    "pretrain": "encoder",
    "ground": "grounded",
    "align": "aligned",
    "publish": "model",
    "evaluate": "report",
}
"""What each step makes."""
ELSEWHERE = "elsewhere"
"""Beside the steps' sections: `prepare` and `evaluate` of another corpus, on which every model is measured too."""
SEEDED = ("pretrain", "ground", "align")
"""The steps that a run's seed goes to; what is fitted to measure them is the same for all."""
PROBES = {"per": "phones", "wer": "text", "cer": "text", "speaker": "speaker", "word": "word", "emotion": "emotion"}
"""The probes that make the scores of these names."""
DRAWN_BY = ("split", "source", "items", "abx_max_items", "abx_max_speakers", "max_changed", "seed")
"""What of `evaluate` says which utterances are measured."""


@dataclass(frozen=True)
class Work:
    """One step on these values and inputs; two pieces with the same key make the same."""

    step: str
    values: Mapping[str, Any]
    inputs: Mapping[str, Work] = field(default_factory=dict)

    @cached_property
    def key(self) -> str:
        """A name for what it makes."""
        inputs = {name: work.key for name, work in self.inputs.items()}
        told = json.dumps([self.step, self.values, inputs], sort_keys=True, default=str)
        return f"{self.step}-{hashlib.sha256(told.encode()).hexdigest()[:12]}"

    def needed(self) -> Iterator[Work]:
        """Everything it needs, and itself last."""
        for work in self.inputs.values():
            yield from work.needed()
        yield self


def read_study(path: Path) -> StudyConfig:
    """The study in a file; ValueError on one line with every fault in it."""
    values = read_yaml(path)
    try:
        study = parse_section("study", StudyConfig, values)
        assert isinstance(study, StudyConfig)
        check_scores(study)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return study


def plan_study(
    study: StudyConfig, beside: Path, params: Mapping[str, Any], seeds: Sequence[int] | None = None
) -> dict[str, list[Work]]:
    """The work whose reports a study needs, by run (arm/seed): seed by seed, arm by arm, so that whatever else the
    machine does falls on all arms alike.

    `beside` is the study's folder, `seeds` are in place of its own. Raises ValueError, on one line with every fault,
    where a section is not what its step wants and where claims cannot be weighed.
    """
    arms = {name: params_of(arm, beside, params, study.begins) for name, arm in study.arms.items()}
    runs = {
        f"{name}/{seed}": reports_of(name, values, seed, study.begins)
        for seed in (study.seeds if seeds is None else seeds)
        for name, values in arms.items()
    }
    check_claims(study, runs)
    return runs


def check_claims(study: StudyConfig, runs: Mapping[str, Sequence[Work]]) -> None:
    """ValueError where two arms of a claim are not measured alike, or one has not a score that it goes by."""
    reports = {run.rpartition("/")[0]: works for run, works in runs.items()}
    faults: dict[str, None] = {}
    lacks: dict[tuple[str, str], dict[str, None]] = {}
    for claim in study.claims:
        arms = (claim.better, claim.than)
        ours, theirs = ([drawn_by(work) for work in reports[arm]] for arm in arms)
        if len(ours) != len(theirs):
            found = f"arms {', '.join(arms)}: found {len(ours)} and {len(theirs)} corpora that they are measured on"
            faults[f"{found}, wanted the same, for a claim compares them: give both {ELSEWHERE} or none"] = None
        for one, other in zip(ours, theirs, strict=False):
            for name in DRAWN_BY:
                if one[name] != other[name]:
                    found = f"arms {', '.join(arms)}: found evaluate.{name} {one[name]!r} and {other[name]!r}"
                    faults[f"{found}, wanted the same, for a claim compares them: set it for both"] = None
        for arm, key in product(arms, claim.by):
            lacking = [lack_of(key, work) for work in reports[arm]]
            if all(lacking):
                lacks.setdefault((lacking[0], key), {})[arm] = None
    for (lack, key), lacking_arms in lacks.items():
        found = f"arms {', '.join(lacking_arms)}: found no {lack}, wanted it, for a claim goes by {key}"
        faults[f"{found}: set it, or let the claim go by another score"] = None
    if faults:
        raise ValueError(f"study: {'; '.join(faults)}")


def drawn_by(report: Work) -> dict[str, Any]:
    """What says which utterances a report is of."""
    return EvaluateConfig.model_validate(report.values).model_dump(include=set(DRAWN_BY))


def lack_of(key: str, report: Work) -> str:
    """The setting without which a report does not have a score; empty where no setting keeps it from it."""
    config, encoder = EvaluateConfig.model_validate(report.values), report.inputs["model"].inputs["encoder"]
    trained = {task for phase in encoder.values["phases"] for task in phase["weights"]}
    kind, _, name = key.partition("_")
    if kind == "probe" and PROBES[name] not in config.probes:
        return f"evaluate.probes.{PROBES[name]}"
    if key.startswith("unit_edits_") and not config.max_changed:
        return "evaluate.max_changed above 0"
    is_grounded = encoder.step == "ground" and "grounding" in trained
    if key.startswith(("speech_to_image_", "image_to_speech_")) and not is_grounded:
        return "grounding among what ground.phases weigh with takes.publish grounded"
    if kind == "training" and not trained & {"codebooks", "contrast"}:
        return f"codebooks or contrast among what {encoder.step}.phases weigh"
    return ""


def params_of(arm: Arm, beside: Path, params: Mapping[str, Any], begins: str) -> dict[str, Any]:
    """The sections of an arm: the common ones, its recipe's, its own; each laid over those before.

    `beside` is the study's folder. Where grounding begins from nothing, it does so with pretraining's encoder, and
    there is no other to align or to publish.
    """
    recipe = read_yaml(beside / arm.recipe) if arm.recipe else {}
    found = merged([params, recipe, arm.params])
    if begins == "ground":
        publish = parse_takes(found).publish
        found["takes"] = {"align": "grounded", "publish": "aligned" if publish == "aligned" else "grounded"}
        ground, pretrain = found.get("ground"), found.get("pretrain")
        if isinstance(ground, dict) and isinstance(pretrain, dict):
            found["ground"] = {**ground, "encoder": pretrain.get("encoder", {})}
    return found


def reports_of(name: str, params: Mapping[str, Any], seed: int, begins: str) -> list[Work]:
    """The work whose reports say how an arm does with a seed: on its corpus and, where there is one, elsewhere.

    Two rounds share the updates of one. Raises ValueError, on one line with every fault, where a section is not what
    its step wants.
    """
    try:
        check_params({key: values for key, values in params.items() if key != ELSEWHERE})
        if ELSEWHERE in params:
            parse_section(ELSEWHERE, ElsewhereConfig, params[ELSEWHERE])
    except ValueError as error:
        raise ValueError(f"study: arm {name}: {error}") from None
    takes, is_twice = parse_takes(params), parse_rounds(params).rounds == 2

    def work(step: str, values: Mapping[str, Any], **inputs: Work) -> Work:
        return Work(step, {**values, "seed": seed} if step in SEEDED else dict(values), inputs)

    corpus = work("prepare", params["prepare"])
    units = work("cluster", params["cluster"], corpus=corpus)
    made: dict[str, Work] = {}
    if begins == "ground":
        made["grounded"] = work("ground", params["ground"], corpus=corpus, units=units)
    else:
        first = halved(params["pretrain"]) if is_twice else params["pretrain"]
        made["encoder"] = work("pretrain", first, corpus=corpus, units=units)
        if is_twice:
            units = work("cluster", second_values("cluster", params), corpus=corpus, encoder=made["encoder"])
            second = halved(second_values("pretrain", params))
            made["encoder"] = work("pretrain", second, corpus=corpus, units=units)
        if "ground" in takes.steps:
            given = {"corpus": corpus, "units": units, "encoder": made["encoder"]}
            made["grounded"] = work("ground", params["ground"], **given)
    if "align" in takes.steps:
        given = {"corpus": corpus, "units": units, "encoder": made[takes.align]}
        made["aligned"] = work("align", params["align"], **given)
    model = work("publish", params["publish"], corpus=corpus, encoder=made[takes.publish])
    label = {"label": f"{name}/{seed}"}
    reports = [work("evaluate", {**params["evaluate"], **label}, corpus=corpus, model=model)]
    if ELSEWHERE in params:
        other = work("prepare", params[ELSEWHERE]["prepare"])
        measured = {**params[ELSEWHERE].get("evaluate", {}), **label}
        reports.append(work("evaluate", measured, corpus=other, model=model))
    return reports


def halved(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """A section with half of its updates: two rounds make as many as one does in the other arms."""
    wanted = PretrainConfig.model_validate(values).num_updates
    return {**values, "num_updates": max(1, wanted // 2)}


def ordered(reports: Sequence[Work]) -> list[Work]:
    """All that these need, each piece once, in an order in which it can be done."""
    return list({work.key: work for report in reports for work in report.needed()}.values())
