"""`python -m pipelines status`: what became of a run."""

from __future__ import annotations

from typing import Any

import pytest

from tests.kfp_server import API, RUN, Kubeflow, assert_is_one_line, command


def task(name: str, state: str, seconds: int = 0, **more: Any) -> dict[str, Any]:
    """A task as the API lists it: one that has not begun ends before it starts, in 1970."""
    ended = state in ("SUCCEEDED", "FAILED")
    return {
        "run_id": RUN,
        "task_id": f"id-of-{name}",
        "display_name": name,
        "create_time": "2026-01-05T10:00:02Z",
        "start_time": f"2026-01-05T10:00:{2 + len(name):02d}Z",
        "end_time": f"2026-01-05T10:{seconds // 60:02d}:{2 + len(name) + seconds % 60:02d}Z"
        if ended
        else "1970-01-01T00:00:00Z",
        "state": state,
        **more,
    }


def run(state: str, *tasks: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A run as the API gives it."""
    return {
        "experiment_id": "0a3d9a9c-4c56-4b4f-9d4e-0c8c3b1f0d11",
        "run_id": RUN,
        "display_name": "sonorant-train 2026-01-05",
        "storage_state": "AVAILABLE",
        "created_at": "2026-01-05T10:00:01Z",
        "scheduled_at": "2026-01-05T10:00:01Z",
        "finished_at": "2026-01-05T11:02:04Z" if state in ("SUCCEEDED", "FAILED") else "1970-01-01T00:00:00Z",
        "state": state,
        "run_details": {"task_details": list(tasks)},
        **more,
    }


DONE = run(
    "SUCCEEDED",
    task("root", "SUCCEEDED"),
    task("root-driver", "SUCCEEDED"),
    task("prepare", "SUCCEEDED", 150),
    task("prepare-driver", "SUCCEEDED"),
    task("executor", "SUCCEEDED"),
)
POD = {"child_tasks": [{"pod_name": "sonorant-train-x7k2p-1234"}]}
BROKEN = run(
    "FAILED",
    task("prepare", "SUCCEEDED", 150),
    task("cluster", "FAILED", 20, **POD),
    task("cluster-driver", "SUCCEEDED"),
    task("pretrain-driver", "FAILED", 1, error={"code": 13, "message": "image\nnot found"}),
    error={"code": 13, "message": "child 'cluster' failed"},
)
GOING = run("RUNNING", task("prepare", "SUCCEEDED", 150), task("cluster", "RUNNING"), task("pretrain", "PENDING"))


def status(kubeflow: Kubeflow, *arguments: str) -> str | int | None:
    return command("status", RUN, "--host", kubeflow.host, *arguments)


def test_a_run_that_succeeded(kubeflow: Kubeflow, capsys: pytest.CaptureFixture[str]) -> None:
    kubeflow.found = [DONE]
    assert status(kubeflow) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"sonorant-train 2026-01-05, {RUN}: SUCCEEDED, 1 h 2 min 3 s",
        "  prepare  SUCCEEDED, 2 min 30 s",
    ]


def test_a_run_that_failed_names_the_fault_or_the_pod_that_tells_it(
    kubeflow: Kubeflow, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kubeflow leaves the fault of a task out (pipelines issue 14007) but for few; the pod it names."""
    kubeflow.found = [BROKEN]
    assert status(kubeflow) == 1
    assert capsys.readouterr().out.splitlines() == [
        f"sonorant-train 2026-01-05, {RUN}: FAILED, 1 h 2 min 3 s, child 'cluster' failed",
        "  prepare          SUCCEEDED, 2 min 30 s",
        "  cluster          FAILED, 20 s, see kubectl logs sonorant-train-x7k2p-1234",
        "  pretrain-driver  FAILED, 1 s, image not found",
    ]


def test_a_run_that_goes_on(kubeflow: Kubeflow, capsys: pytest.CaptureFixture[str]) -> None:
    kubeflow.found = [GOING]
    assert status(kubeflow) == 3
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines[1:]] == [
        "  prepare   SUCCEEDED",
        "  cluster   RUNNING",
        "  pretrain  PENDING",
    ]


def test_the_latest_run_is_found(kubeflow: Kubeflow, capsys: pytest.CaptureFixture[str]) -> None:
    kubeflow.found = [DONE]
    assert command("status", "latest", "--host", kubeflow.host) == 0
    assert RUN in capsys.readouterr().out
    kubeflow.found = []
    assert_is_one_line(command("status", "latest", "--host", kubeflow.host), kubeflow.host, "found no run")


def test_waiting_ends_with_the_run_and_outlives_a_cut_connection(
    kubeflow: Kubeflow, capsys: pytest.CaptureFixture[str]
) -> None:
    kubeflow.found = [GOING, None, GOING, BROKEN]
    assert status(kubeflow, "--wait", "--every", "0.1") == 1
    assert "FAILED" in capsys.readouterr().out.splitlines()[0]
    assert kubeflow.calls.count(("GET", f"{API}/runs/{RUN}")) >= 4


def test_waiting_is_bounded(kubeflow: Kubeflow) -> None:
    kubeflow.found = [GOING]
    assert status(kubeflow, "--wait", "--timeout", "0.3", "--every", "0.1") == 3
    kubeflow.health = (503, "text/plain", "no")
    assert_is_one_line(status(kubeflow, "--wait", "--every", "0.1"), kubeflow.host, "HTTP 503")


def test_a_run_that_is_none_is_told(kubeflow: Kubeflow) -> None:
    message = command("status", "5c3d1d6e-0000", "--host", kubeflow.host)
    assert_is_one_line(message, "5c3d1d6e-0000", "HTTP 404")
