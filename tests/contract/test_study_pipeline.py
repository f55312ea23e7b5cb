"""A study's pipeline: every run of every arm has its own sections, and every report is weighed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.study import graph_for_study
from sonorant.params import read_params
from tests.compiled import Compiled, Task, compiled

ROOT = Path(__file__).resolve().parents[2]
RUNS, MEASURES = ROOT / "recipes" / "runs", ROOT / "recipes" / "measures"
CONFIGS = {
    "targets": [RUNS / "study.yaml"],
    "granularity": [RUNS / "study.yaml"],
    "online-clustering": [RUNS / "study.yaml"],
    "alignment": [RUNS / "study.yaml", MEASURES / "transcripts.yaml"],
    "schedules": [RUNS / "digits.yaml", MEASURES / "elsewhere.yaml"],
}
SHAPES = {"online-clustering": 2, "alignment": 2}
"""How many chains of steps the arms of a study go through, where there are several."""


def of(name: str, folder: Path) -> tuple[Compiled, dict[str, Any]]:
    graph, parameters = graph_for_study(ROOT / "recipes" / "studies" / f"{name}.yaml", read_params(CONFIGS[name]))
    return compiled(graph, parameters, folder / "study.yaml"), parameters


def step_of(task: Task) -> str:
    """kfp numbers tasks of one component."""
    return task.name.rstrip("0123456789").rstrip("-")


@pytest.mark.parametrize("name", CONFIGS)
def test_every_run_has_its_sections_and_every_report_is_weighed(name: str, tmp_path: Path) -> None:
    found, parameters = of(name, tmp_path)
    study = yaml.safe_load((ROOT / "recipes" / "studies" / f"{name}.yaml").read_text())
    runs = [run for number in (1, 2, 3) for run in parameters.get(f"runs_{number}", [])]
    assert {run["evaluate"]["label"] for run in runs} == {f"{arm}/{seed}" for seed in range(3) for arm in study["arms"]}
    assert len(runs) == 3 * len(study["arms"])
    assert sum(f"runs_{number}" in parameters for number in (1, 2, 3)) == SHAPES.get(name, 1)
    for run in runs:
        seeds = {run[section]["seed"] for section in ("pretrain", "ground", "align") if section in run}
        assert seeds == {int(run["evaluate"]["label"].rpartition("/")[2])}
    tasks = found.tasks()
    weighed = [source for task in tasks.values() if step_of(task) == "weigh" for source in task.artifacts["reports"]]
    assert sorted(weighed) == sorted((n, "report") for n, task in tasks.items() if step_of(task) == "evaluate")
    chained = [task.artifacts.get("before", []) for task in tasks.values() if step_of(task) == "weigh"]
    assert sorted(map(len, chained)) == [0] + [1] * (len(chained) - 1)


@pytest.mark.parametrize("name", CONFIGS)
def test_training_runs_where_there_are_gpus(name: str, tmp_path: Path) -> None:
    found, _ = of(name, tmp_path)
    training = [task for task in found.tasks().values() if step_of(task) in ("pretrain", "ground", "align")]
    assert training
    for task in training:
        assert found.executor(task)["resources"]["accelerator"]["resourceType"] == "nvidia.com/gpu"


def test_arms_that_differ_in_the_corpus_are_refused(tmp_path: Path) -> None:
    arms = {"one": {}, "two": {"params": {"prepare": {"min_seconds": 3.0}}}}
    claims = [{"says": "two beat one", "better": "two", "than": "one", "by": ["pnmi"]}]
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({"question": "?", "arms": arms, "measures": ["pnmi"], "claims": claims}))
    params = read_params(CONFIGS["targets"])
    with pytest.raises(ValueError, match="study: found arms that differ in prepare, wanted one for all") as told:
        graph_for_study(path, params)
    assert "\n" not in str(told.value)
