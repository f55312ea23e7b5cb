"""dvc.yaml and optional/dvc.yaml are what the signatures of the steps say, no more and no less."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from sonorant.config import Takes
from sonorant.steps import STEPS
from tests.workflow import ALL, ROUND, Made, Task, workflow

ROOT = Path(__file__).resolve().parents[2]
DVC: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text())
OPTIONAL: dict[str, Any] = yaml.safe_load((ROOT / "optional" / "dvc.yaml").read_text())
TASKS = workflow(2)
AFTER = ("ground", "align")


def is_optional(task: Task) -> bool:
    return task.round == 2 or task.step in AFTER


def stage_of(task: Task, num_rounds: int, takes: Takes) -> dict[str, Any]:
    """A stage with what DVC fills in from params.yaml."""
    text = yaml.safe_dump((OPTIONAL if is_optional(task) else DVC)["stages"][task.step])
    values = {"rounds": num_rounds, **{f"takes.{name}": value for name, value in takes.model_dump().items()}}
    for name, value in values.items():
        text = text.replace(f"${{{name}}}", str(value))
    assert "$" not in text
    found: dict[str, Any] = yaml.safe_load(text)
    return found


def path_of(made: Made, num_rounds: int) -> str:
    """An artifact has one name everywhere: parameter, flag and folder."""
    if made.step in (*ROUND, *AFTER):
        return f"artifacts/round-{made.round if made.step in ROUND else num_rounds}/{made.artifact}"
    return f"artifacts/{made.artifact}"


def artifacts(stage: dict[str, Any], kind: str) -> list[str]:
    """Paths under `deps` or `outs`; an output may carry options, but none that changes what a stage is."""
    paths = []
    for entry in stage.get(kind, []):
        if isinstance(entry, dict):
            ((path, options),) = entry.items()
            assert set(options) <= {"desc", "remote", "push"}, f"{path}: {options}"
            entry = path
        paths.append(entry)
    return paths


def test_a_stage_is_a_step() -> None:
    assert list(DVC["stages"]) == [step for step in STEPS if step not in AFTER]
    assert list(OPTIONAL["stages"]) == [task.step for task in TASKS if is_optional(task)]
    assert set(OPTIONAL) == {"vars", "stages"}


@pytest.mark.parametrize("num_rounds", [1, 2])
@pytest.mark.parametrize(
    "takes", [ALL, Takes(), Takes(publish="grounded"), Takes(publish="aligned")], ids=lambda t: "-".join(t.steps)
)
def test_a_stage_equals_its_step_and_reads_what_was_written_last(num_rounds: int, takes: Takes) -> None:
    for task in workflow(num_rounds, takes):
        check_stage(task, stage_of(task, num_rounds, takes), num_rounds)


def check_stage(task: Task, stage: dict[str, Any], num_rounds: int) -> None:
    step = STEPS[task.step]
    assert set(stage) <= {"cmd", "desc", "params", "deps", "outs", "wdir"}
    # Paths in both files are relative to the checkout.
    assert stage.get("wdir", ".") == (".." if is_optional(task) else ".")

    program, command, *words = shlex.split(stage["cmd"])
    flags = dict(zip(words[::2], words[1::2], strict=True))
    assert len(flags) == len(words) // 2, "a flag is given twice"
    assert (program, command) == ("sonorant", task.step)
    assert flags.pop("--config") == "params.yaml"
    assert flags.pop("--round", "1") == str(task.round)

    reads = {given: path_of(made, num_rounds) for given, made in task.reads.items()}
    writes = {name: path_of(Made(task.step, task.round, name), num_rounds) for name in step.outputs}
    assert {flag.removeprefix("--"): path for flag, path in flags.items()} == {**reads, **writes}
    assert sorted(artifacts(stage, "deps")) == sorted(reads.values())
    assert sorted(artifacts(stage, "outs")) == sorted(writes.values())
    assert stage["params"] == [task.step, *([f"second.{task.step}"] if task.round == 2 else [])]


def outs() -> list[str]:
    stages = [*DVC["stages"].values(), *OPTIONAL["stages"].values()]
    return [path for stage in stages for path in artifacts(stage, "outs")]


def test_an_artifact_has_one_writer() -> None:
    assert len(set(outs())) == len(outs()) == sum(len(STEPS[task.step].outputs) for task in TASKS)


def test_metrics_and_plots_lie_in_artifacts() -> None:
    assert set(DVC) <= {"stages", "metrics", "plots"}
    for entry in (*DVC.get("metrics", []), *DVC.get("plots", [])):
        path = entry if isinstance(entry, str) else next(iter(entry))
        assert any(path.startswith(f"{out}/") for out in outs()), path
