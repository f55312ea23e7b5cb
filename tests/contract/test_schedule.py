"""`python -m pipelines schedule`: runs by the clock."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.submission import with_seconds
from pipelines.train import graph_for
from sonorant.params import read_params
from tests.kfp_server import API, Kubeflow, assert_is_one_line, command

PARAMS = Path(__file__).resolve().parents[2] / "params.yaml"


def schedule(kubeflow: Kubeflow, *arguments: str) -> str | int | None:
    return command("schedule", "--host", kubeflow.host, "--config", str(PARAMS), *arguments)


def test_a_schedule_carries_the_pipeline_its_parameters_and_the_time(
    kubeflow: Kubeflow, capsys: pytest.CaptureFixture[str]
) -> None:
    assert schedule(kubeflow, "--cron", "0 3 * * 1", "--name", "weekly", "--no-cache") == 0
    (made,) = kubeflow.schedules
    assert capsys.readouterr().out.splitlines()[-1] == made["recurring_run_id"]
    assert (made["display_name"], made["mode"], made["no_catchup"], int(made["max_concurrency"])) == (
        "weekly",
        "ENABLE",
        True,
        1,
    )
    # Kubeflow's first field is the second.
    assert made["trigger"] == {"cron_schedule": {"cron": "0 0 3 * * 1"}}
    assert made["runtime_config"]["parameters"] == graph_for(read_params([PARAMS]))[1]
    pipeline = made["pipeline_spec"]["pipeline_spec"]
    assert pipeline["pipelineInfo"]["name"] == "sonorant-train"
    tasks = [t for c in [{"dag": pipeline["root"]["dag"]}, *pipeline["components"].values()] if "dag" in c
             for t in c["dag"]["tasks"].values()]  # fmt: skip
    assert tasks
    assert not any(task.get("cachingOptions", {}).get("enableCache") for task in tasks)
    assert [experiment["display_name"] for experiment in kubeflow.experiments] == ["sonorant"]


def test_schedules_are_listed_paused_resumed_and_deleted(
    kubeflow: Kubeflow, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two", "three"):  # the server's pages hold two
        assert schedule(kubeflow, "--cron", "30 0 3 * * 1", "--name", name) == 0
    assert schedule(kubeflow, "--pause", "three") == 0
    capsys.readouterr()
    assert schedule(kubeflow, "--list") == 0
    rows = [line.split("\t")[:3] for line in capsys.readouterr().out.splitlines()]
    assert rows == [[name, "30 0 3 * * 1", "enabled"] for name in ("one", "two")] + [
        ["three", "30 0 3 * * 1", "disabled"]
    ]
    assert schedule(kubeflow, "--resume", "three") == 0
    assert schedule(kubeflow, "--delete", "one") == 0
    assert {s["display_name"]: s["status"] for s in kubeflow.schedules} == {"two": "ENABLED", "three": "ENABLED"}


def test_a_name_is_given_once(kubeflow: Kubeflow) -> None:
    assert schedule(kubeflow, "--cron", "0 3 * * 1", "--name", "weekly") == 0
    assert_is_one_line(schedule(kubeflow, "--cron", "0 4 * * 1", "--name", "weekly"), "weekly", "--delete weekly first")
    assert len(kubeflow.schedules) == 1


def test_a_name_that_is_none_is_told_with_those_there_are(kubeflow: Kubeflow) -> None:
    assert schedule(kubeflow, "--cron", "0 3 * * 1", "--name", "weekly") == 0
    assert_is_one_line(schedule(kubeflow, "--delete", "daily"), "daily", r"found only \['weekly'\]")
    assert len(kubeflow.schedules) == 1


@pytest.mark.parametrize("cron", ["", "* * * *", "0 3 * * 1 2 3", "@weekly", "0 3 * * $(date)", "0;3 * * * *"])
def test_a_time_that_is_none_is_refused_before_the_host_is_asked(kubeflow: Kubeflow, cron: str) -> None:
    assert_is_one_line(schedule(kubeflow, "--cron", cron), "--cron", "wanted minute, hour")
    assert kubeflow.calls == []


@pytest.mark.parametrize(
    ("given", "taken"),
    [("*/5 * * * *", "0 */5 * * * *"), ("0 9 ? * 2-6", "0 0 9 ? * 2-6"), ("15 0 9 ? * MON", "15 0 9 ? * MON")],
)
def test_five_fields_begin_with_the_minute(given: str, taken: str) -> None:
    assert with_seconds(given) == taken


@pytest.mark.parametrize("arguments", [[], ["--list", "--delete", "weekly"], ["--cron", "0 3 * * 1", "--list"]])
def test_one_thing_is_asked_at_a_time(kubeflow: Kubeflow, arguments: list[str]) -> None:
    assert_is_one_line(schedule(kubeflow, *arguments), "schedule", "wanted one: choose")
    assert kubeflow.calls == []


def test_a_refusal_is_told_in_the_servers_words(kubeflow: Kubeflow) -> None:
    kubeflow.refusal = (400, {"code": 3, "message": "Schedule cron is not supported", "details": []})
    message = schedule(kubeflow, "--cron", "0 3 * * 1")
    assert_is_one_line(message, kubeflow.host, r"HTTP 400 \(Schedule cron is not supported\), wanted a new schedule")
    assert ("POST", f"{API}/recurringruns") not in kubeflow.calls  # the experiment came first
