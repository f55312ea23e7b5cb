"""dvc.yaml and second/dvc.yaml are what the signatures of the steps say, no more and no less."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from sonorant.steps import STEPS
from tests.workflow import ROUND, Task, workflow

ROOT = Path(__file__).resolve().parents[2]
DVC: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text())
SECOND: dict[str, Any] = yaml.safe_load((ROOT / "second" / "dvc.yaml").read_text())
TASKS = workflow(2)


def with_rounds(value: Any, num_rounds: int) -> Any:
    """A stage with `${rounds}` filled in, as DVC does from params.yaml."""
    return yaml.safe_load(yaml.safe_dump(value).replace("${rounds}", str(num_rounds)))


def stage_of(step: str, number: int, num_rounds: int) -> dict[str, Any]:
    stages = DVC["stages"] if number == 1 else SECOND["stages"]
    found: dict[str, Any] = with_rounds(stages[step], num_rounds)
    return found


def path_of(artifact: str, writer: tuple[str, int]) -> str:
    """An artifact has one name everywhere: parameter, flag and folder."""
    step, number = writer
    return f"artifacts/round-{number}/{artifact}" if step in ROUND else f"artifacts/{artifact}"


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
    assert list(DVC["stages"]) == list(STEPS)
    assert list(SECOND["stages"]) == [task.step for task in TASKS if task.round == 2]
    assert set(SECOND) == {"stages"}


@pytest.mark.parametrize("num_rounds", [1, 2])
def test_a_stage_equals_its_step_and_reads_what_was_written_last(num_rounds: int) -> None:
    for task in workflow(num_rounds):
        check_stage(task, stage_of(task.step, task.round, num_rounds))


def check_stage(task: Task, stage: dict[str, Any]) -> None:
    step = STEPS[task.step]
    assert set(stage) <= {"cmd", "desc", "params", "deps", "outs", "wdir"}
    # Paths in both files are relative to the checkout.
    assert stage.get("wdir", ".") == ("." if task.round == 1 else "..")

    program, command, *words = shlex.split(stage["cmd"])
    flags = dict(zip(words[::2], words[1::2], strict=True))
    assert len(flags) == len(words) // 2, "a flag is given twice"
    assert (program, command) == ("sonorant", task.step)
    assert flags.pop("--config") == "params.yaml"
    assert flags.pop("--round", "1") == str(task.round)

    reads = {artifact: path_of(artifact, writer) for artifact, writer in task.reads.items()}
    writes = {artifact: path_of(artifact, (task.step, task.round)) for artifact in step.outputs}
    assert {flag.removeprefix("--"): path for flag, path in flags.items()} == {**reads, **writes}
    assert sorted(artifacts(stage, "deps")) == sorted(reads.values())
    assert sorted(artifacts(stage, "outs")) == sorted(writes.values())
    assert stage["params"] == [task.step, *([f"second.{task.step}"] if task.round == 2 else [])]


def outs() -> list[str]:
    stages = [*DVC["stages"].values(), *SECOND["stages"].values()]
    return [path for stage in stages for path in artifacts(stage, "outs")]


def test_an_artifact_has_one_writer() -> None:
    assert len(set(outs())) == len(outs()) == sum(len(STEPS[task.step].outputs) for task in TASKS)


def test_metrics_and_plots_lie_in_artifacts() -> None:
    assert set(DVC) <= {"stages", "metrics", "plots"}
    for entry in (*DVC.get("metrics", []), *DVC.get("plots", [])):
        path = entry if isinstance(entry, str) else next(iter(entry))
        assert any(path.startswith(f"{out}/") for out in outs()), path
