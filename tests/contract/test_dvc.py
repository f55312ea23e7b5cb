"""dvc.yaml is what the signatures of the steps say, no more and no less."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from sonorant.steps import STEPS

ROOT = Path(__file__).resolve().parents[2]
DVC: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text())


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


@pytest.mark.parametrize("name", STEPS)
def test_a_stage_equals_its_step(name: str) -> None:
    step, stage = STEPS[name], DVC["stages"][name]
    assert set(stage) <= {"cmd", "desc", "params", "deps", "outs"}

    program, command, *words = shlex.split(stage["cmd"])
    flags = dict(zip(words[::2], words[1::2], strict=True))
    assert len(flags) == len(words) // 2, "a flag is given twice"
    assert (program, command) == ("sonorant", name)
    assert flags.pop("--config") == "params.yaml"

    given = {flag.removeprefix("--"): path for flag, path in flags.items()}
    wanted = {*step.inputs, *step.outputs}
    assert wanted - step.optional <= set(given) <= wanted
    # An artifact has one name everywhere: parameter, flag and folder.
    for artifact, path in given.items():
        assert path == f"artifacts/{artifact}"
    assert sorted(artifacts(stage, "deps")) == sorted(given[n] for n in step.inputs if n in given)
    assert sorted(artifacts(stage, "outs")) == sorted(given[n] for n in step.outputs)
    assert stage["params"] == [name]


def test_an_artifact_has_one_writer() -> None:
    outs = [path for stage in DVC["stages"].values() for path in artifacts(stage, "outs")]
    assert len(set(outs)) == len(outs)


def test_metrics_and_plots_lie_in_artifacts() -> None:
    outs = [path for stage in DVC["stages"].values() for path in artifacts(stage, "outs")]
    assert set(DVC) <= {"stages", "metrics", "plots"}
    for entry in (*DVC.get("metrics", []), *DVC.get("plots", [])):
        path = entry if isinstance(entry, str) else next(iter(entry))
        assert any(path.startswith(f"{out}/") for out in outs), path
