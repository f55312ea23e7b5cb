"""The operations' components, and the rollout as it is compiled."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

from components import operations
from components.image import IMAGE
from pipelines.canary import NAME, serve_canary
from sonorant.config.release import CanaryConfig
from sonorant.params import parse_section
from tests.compiled import Compiled, Task, check_pinned, compiled
from tests.kfp_server import Kubeflow, assert_is_one_line, command

ROOT = Path(__file__).resolve().parents[2]
GIVEN = ("--candidate", "model@sha256:1234", "--store", "s3://sonorant", "--speech", "/runs/speech")


@pytest.fixture(scope="module")
def rollout(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    return compiled(serve_canary, {}, tmp_path_factory.mktemp("compiled") / "canary.yaml")


@pytest.fixture(scope="module")
def tasks(rollout: Compiled) -> dict[str, Task]:
    return rollout.tasks()


@pytest.mark.parametrize("name", operations.__all__)
def test_an_operation_holds_no_thought(name: str) -> None:
    """Its body is a docstring, imports, and statements without a choice, a loop or a rescue."""
    tree = ast.parse((ROOT / "components" / "operations" / f"{name}.py").read_text())
    (function,) = (node for node in tree.body if isinstance(node, ast.FunctionDef))
    assert function.name == name
    assert ast.get_docstring(function)
    thoughts = (ast.If, ast.IfExp, ast.For, ast.While, ast.Try, ast.BoolOp, ast.Compare, ast.comprehension, ast.With)
    assert [ast.unparse(node) for node in ast.walk(function) if isinstance(node, thoughts)] == []
    imported = {node.module for node in ast.walk(function) if isinstance(node, ast.ImportFrom)} - {"pathlib"}
    assert {module.rpartition(".")[0] for module in imported} == {"sonorant.release"}


def test_every_operation_is_listed() -> None:
    files = {path.stem for path in (ROOT / "components" / "operations").glob("*.py")} - {"__init__"}
    assert files == set(operations.__all__)


def test_production_gets_the_model_only_after_the_check_of_the_canary(tasks: dict[str, Task]) -> None:
    assert set(tasks) == {"resolve", "stage", "await-model", "check", "promote", "end-canary"}
    after = {name: set(task.spec.get("dependentTasks", [])) for name, task in tasks.items() if name != "end-canary"}
    assert after == {
        "resolve": set(),
        "stage": {"resolve"},
        "await-model": {"stage"},
        "check": {"resolve", "stage", "await-model"},
        "promote": {"stage", "check"},
    }
    digest = ("stage", "Output")
    assert [tasks[name].parameters["digest"] for name in ("await-model", "promote")] == [digest, digest]
    assert tasks["check"].artifacts == {"model": [("stage", "model")]}
    assert tasks["check"].parameters["incumbent"] == ("resolve", "Output")
    addresses = {name: tasks[name].parameters["url"] for name in ("await-model", "promote")}
    assert addresses == {"await-model": "canary", "promote": "production"}


def test_however_a_rollout_ends_the_canary_follows_production_and_it_is_told(tasks: dict[str, Task]) -> None:
    ending = tasks["end-canary"]
    assert [policy["strategy"] for policy in ending.policies] == ["ALL_UPSTREAM_TASKS_COMPLETED"]
    assert "taskFinalStatus" in ending.parameters["status"]
    assert (ending.parameters["store"], ending.parameters["pipeline"]) == ("store", NAME)


def test_a_task_has_what_it_needs_and_nothing_is_reused(rollout: Compiled, tasks: dict[str, Task]) -> None:
    secrets: dict[str, set[str]] = {}
    for name, task in tasks.items():
        container, pod = rollout.executor(task), rollout.pod(task)
        assert container["image"] == IMAGE
        assert container["resources"]["resourceMemoryLimit"] == container["resources"]["resourceMemoryRequest"]
        assert not task.spec.get("cachingOptions", {}).get("enableCache", False)
        assert int(pod["activeDeadlineSeconds"]) >= 1800
        # A Secret that is missing must not keep a pod that can do without from starting.
        assert all(secret["optional"] for secret in pod.get("secretAsEnv", []))
        secrets[name] = {secret["secretName"] for secret in pod.get("secretAsEnv", [])}
        settings = {about["configMapName"] for about in pod.get("configMapAsEnv", [])}
        assert settings == secrets[name] & {"sonorant-s3"}
    assert secrets == {
        "resolve": {"sonorant-s3"},
        "stage": {"sonorant-s3"},
        "await-model": {"sonorant-client"},
        "check": {"sonorant-client"},
        "promote": {"sonorant-s3", "sonorant-client"},
        "end-canary": {"sonorant-s3", "sonorant-webhook"},
    }
    (mount,) = rollout.pod(tasks["check"])["pvcMount"]
    assert (mount["constant"], mount["mountPath"]) == ("sonorant-runs", "/runs")


def test_the_compiled_rollout_is_pinned(rollout: Compiled) -> None:
    check_pinned(rollout, Path(__file__).with_name("canary.golden.yaml"))


def test_a_rollout_is_submitted_with_its_limits(kubeflow: Kubeflow, tmp_path: Path) -> None:
    more = ("--set", "canary.num_requests=50", "--canary-url", "http://canary:8000")
    assert command("canary", "submit", "--host", kubeflow.host, *GIVEN, *more) == 0
    (run,) = kubeflow.runs
    parameters: dict[str, Any] = run["runtime_config"]["parameters"]
    assert parameters.pop("limits") == CanaryConfig(num_requests=50).model_dump(mode="json")
    assert parameters == {
        "candidate": "model@sha256:1234",
        "store": "s3://sonorant",
        "speech": "/runs/speech",
        "canary": "http://canary:8000",
        "production": "http://sonorant-serving.sonorant:8000",
    }
    assert run["display_name"].startswith(NAME)
    assert command("canary", "compile", "--output", str(tmp_path / "canary.yaml")) == 0
    assert (tmp_path / "canary.yaml").stat().st_size > 0


def test_limits_come_through_kubeflow_whole() -> None:
    """Its dict parameters turn 30 into 30.0."""
    values = {name: float(value) for name, value in CanaryConfig().model_dump().items()}
    assert parse_section("canary", CanaryConfig, values) == CanaryConfig()


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("canary.num_request=5", "canary.num_request: found an unknown key"),
        ("canary.max_slowdown=0.5", "canary.max_slowdown: found 0.5, wanted greater than or equal to 1"),
        ("cluster.num_units=5", "wanted canary alone"),
    ],
)
def test_wrong_limits_are_refused_before_the_host_is_asked(kubeflow: Kubeflow, override: str, wanted: str) -> None:
    message = command("canary", "submit", "--host", kubeflow.host, *GIVEN, "--set", override)
    assert_is_one_line(message, override.split("=")[0].split(".")[0], wanted)
    assert kubeflow.calls == []
