"""The study workflow: every arm with every seed at once, and what they say of the claims."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kfp import dsl

import components
from components import operations
from pipelines.placing import operate, place, with_webhook
from pipelines.train import clustered, evaluated, published, trained
from sonorant.config import LaunchConfig
from sonorant.params import parse_launch
from sonorant.studies.plan import OUTPUTS, SEEDED, Work, plan_study, read_study

MOST_GROUPS = 3
NOTHING: dict[str, Any] = {}
NO_RUNS: list[Any] = []
"""What parameters are that a graph does not use."""


@dataclass
class Group:
    """Runs that go through the same steps; each has a section for every step of its own."""

    steps: tuple[tuple[str, str], ...]
    """The name of a run's section, and its step, in order."""
    takes: Mapping[str, Mapping[str, str]]
    """By section's name, where each input comes from: another section of the run, or what all arms share."""
    launches: Mapping[str, LaunchConfig]
    runs: list[dict[str, Any]] = field(default_factory=list)


def graph_for_study(
    path: Path, params: Mapping[str, Any], seeds: Sequence[int] | None = None
) -> tuple[Any, dict[str, Any]]:
    """The pipeline of a study and its parameters.

    Raises ValueError where a section is not what it should be, or where arms differ in the corpus or its units.
    """
    study = read_study(path)
    shared: dict[str, Mapping[str, Any]] = {}
    groups: dict[Any, Group] = {}
    for reports in plan_study(study, path.parent, params, seeds).values():
        add_run(reports, shared, groups)
    parameters: dict[str, Any] = {"study": study.model_dump(mode="json", exclude_none=True), **shared}
    parameters |= {f"runs_{number}": group.runs for number, group in enumerate(groups.values(), start=1)}
    return graph_of(path.stem, study.question, list(groups.values()), set(shared)), parameters


def add_run(reports: Sequence[Work], shared: dict[str, Mapping[str, Any]], groups: dict[Any, Group]) -> None:
    """Put the run that ends in these reports into the group of its like."""
    works = list({work.key: work for report in reports for work in report.needed()}.values())
    names: dict[str, str] = {}
    for work in works:
        same = sum(one.step == work.step for one in works[: works.index(work)])
        names[work.key] = f"{work.step}_{same + 1}" if same else work.step
    own = [work for work in works if not is_shared(work)]
    for work in works:
        if is_shared(work) and shared.setdefault(names[work.key], work.values) != work.values:
            raise ValueError(
                f"study: found arms that differ in {work.step}, wanted one for all of them on a cluster: run them with "
                "`sonorant study`"
            )
    steps = tuple((names[work.key], work.step) for work in own)
    takes = {names[work.key]: {kind: names[need.key] for kind, need in work.inputs.items()} for work in own}
    launches = {names[w.key]: parse_launch(w.step, w.values) for w in own if w.step in SEEDED}
    shape = str((steps, takes, launches))
    run = {names[work.key]: dict(work.values) for work in own}
    groups.setdefault(shape, Group(steps, takes, launches)).runs.append(run)


def is_shared(work: Work) -> bool:
    """Whether all arms have this work in common: a corpus, or units of one."""
    return work.step == "prepare" or (work.step == "cluster" and "encoder" not in work.inputs)


def graph_of(name: str, question: str, groups: Sequence[Group], shared: set[str]) -> Any:
    """The pipeline: what is shared, a loop over each group's runs, and what the reports show."""
    if len(groups) > MOST_GROUPS:
        raise ValueError(
            f"study {name}: found arms that go through {len(groups)} chains of steps, wanted at most {MOST_GROUPS} on "
            "a cluster: run it with `sonorant study`"
        )

    @dsl.pipeline(name=f"sonorant-study-{name}", description=question)
    def study_of_claims(
        study: dict,
        prepare: dict,
        cluster: dict,
        runs_1: list,
        runs_2: list = NO_RUNS,
        runs_3: list = NO_RUNS,
        prepare_2: dict = NOTHING,
    ):
        """Every run takes the sections of its item; the corpus and its units are made once for all."""
        ending = operations.conclude(pipeline=f"sonorant-study-{name}", run=dsl.PIPELINE_JOB_ID_PLACEHOLDER)
        operate(ending)
        with_webhook(ending)
        with dsl.ExitHandler(ending, name="study"):
            made = {"prepare": converted(prepare)}
            made["cluster"] = clustered(cluster, corpus=made["prepare"])
            if "prepare_2" in shared:
                made["prepare_2"] = converted(prepare_2)
            findings: dict[str, Any] = {}
            for number, (group, runs) in enumerate(zip(groups, (runs_1, runs_2, runs_3), strict=False), start=1):
                with dsl.ParallelFor(runs, name=f"runs-{number}") as run:
                    reports = reports_in(group, run, made)
                for report in reports:
                    task = components.weigh(config=study, reports=dsl.Collected(report), **findings)
                    place(task, cpu="2", memory="8Gi", hours=2, retries=2)
                    findings = {"before": task.outputs["findings"]}

    return study_of_claims


def converted(config: Any) -> Any:
    """A corpus."""
    task = components.prepare(config=config)
    place(task, cpu="8", memory="16Gi", hours=24, retries=2)
    return task.outputs["corpus"]


def reports_in(group: Group, run: Any, made: Mapping[str, Any]) -> list[Any]:
    """What a run's `evaluate` steps say, after all of its steps."""
    done = dict(made)
    for name, step in group.steps:
        config = getattr(run, name)
        inputs = {kind: done[source] for kind, source in group.takes[name].items()}
        if step in SEEDED:
            done[name] = trained(getattr(components, step), config, group.launches[name], **inputs)[OUTPUTS[step]]
        else:
            done[name] = PLACED[step](config, **inputs)
    return [done[name] for name, step in group.steps if step == "evaluate"]


PLACED = {"cluster": clustered, "publish": published, "evaluate": evaluated}
