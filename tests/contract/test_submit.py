"""`python -m pipelines submit` against a server that answers as Kubeflow Pipelines' v2beta1 API does."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest
import yaml

from pipelines.submission import submit_run
from pipelines.train import graph_for
from sonorant.params import read_params
from sonorant.steps import STEPS
from tests.compiled import Compiled
from tests.kfp_server import API, RUN, Kubeflow, assert_is_one_line, command

ROOT = Path(__file__).resolve().parents[2]
PARAMS = ROOT / "params.yaml"


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_run_carries_the_pipeline_and_the_parameters(
    kubeflow: Kubeflow, tmp_path: Path, capsys: pytest.CaptureFixture[str], rounds: int
) -> None:
    config = ("--config", str(PARAMS), "--set", f"rounds={rounds}")
    assert command("submit", "--host", kubeflow.host, *config, "--experiment", "speech") == 0
    assert capsys.readouterr().out.splitlines()[-1] == RUN
    (experiment,) = kubeflow.experiments
    assert experiment["display_name"] == "speech"
    (run,) = kubeflow.runs
    assert run["experiment_id"] == experiment["experiment_id"]
    assert run["display_name"].startswith("sonorant-train")
    parameters = run["runtime_config"]["parameters"]
    assert parameters == graph_for(read_params([PARAMS], [f"rounds={rounds}"]))[1]
    others = {"shares", "store", "alias", "gate"}
    assert set(parameters) == {*STEPS, *others, *({"second_cluster", "second_pretrain"} if rounds == 2 else ())}
    assert command("compile", *config, "--output", str(tmp_path / "train.yaml")) == 0
    pipeline, platform = yaml.safe_load_all((tmp_path / "train.yaml").read_text())
    assert run["pipeline_spec"]["pipeline_spec"] == pipeline
    assert run["pipeline_spec"]["platform_spec"] == platform


def test_an_experiment_is_made_once(kubeflow: Kubeflow) -> None:
    for _ in range(2):
        assert command("submit", "--host", kubeflow.host, "--config", str(PARAMS)) == 0
    assert [e["display_name"] for e in kubeflow.experiments] == ["sonorant"]
    assert len(kubeflow.runs) == 2
    assert kubeflow.calls.count(("POST", f"{API}/experiments")) == 1


def test_caching_can_be_turned_off(kubeflow: Kubeflow) -> None:
    assert command("submit", "--host", kubeflow.host, "--config", str(PARAMS), "--no-cache") == 0
    tasks = Compiled(kubeflow.runs[0]["pipeline_spec"]["pipeline_spec"], {}).tasks()
    is_cached = {name: task.spec["cachingOptions"].get("enableCache", False) for name, task in tasks.items()}
    assert set(STEPS) < set(is_cached)
    assert not any(is_cached.values())


def test_the_token_goes_with_every_request(kubeflow: Kubeflow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KFP_TOKEN", "letters-and-digits")
    assert command("submit", "--host", kubeflow.host, "--config", str(PARAMS)) == 0
    assert kubeflow.authorizations == {"Bearer letters-and-digits"}


@pytest.mark.parametrize(
    ("health", "wanted"),
    [
        ((401, "text/plain", "no"), "HTTP 401.*KFP_TOKEN"),
        ((302, "text/html", "log in"), "HTTP 302.*KFP_TOKEN"),
        ((200, "text/html", "<html>"), "text/html.*check the address"),
        ((404, "text/plain", "no"), "HTTP 404.*check the address"),
        ((503, "text/plain", "no"), "HTTP 503.*check the address"),
    ],
)
def test_a_host_that_is_not_kubeflow_is_refused_before_anything_is_posted(
    kubeflow: Kubeflow, health: tuple[int, str, str], wanted: str
) -> None:
    kubeflow.health = health
    message = command("submit", "--host", kubeflow.host, "--config", str(PARAMS))
    assert_is_one_line(message, kubeflow.host, wanted)
    assert kubeflow.calls == [("GET", f"{API}/healthz")]


def test_a_refusal_is_told_in_the_servers_words(kubeflow: Kubeflow) -> None:
    kubeflow.refusal = (403, {"code": 7, "message": "User 'ada' is not\nauthorized to create", "details": []})
    message = command("submit", "--host", kubeflow.host, "--config", str(PARAMS))
    assert_is_one_line(message, kubeflow.host, r"HTTP 403 \(User 'ada' is not authorized to create\)")


def test_an_unreachable_host_is_named_in_bounded_time() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        host = f"http://127.0.0.1:{closed.getsockname()[1]}"
        start = time.monotonic()
        message = command("submit", "--host", host, "--config", str(PARAMS))
    assert_is_one_line(message, host, "refused")
    # One refused connection and one compilation; kfp's own five attempts would have slept 25 s.
    assert time.monotonic() - start < 10


def test_a_silent_host_is_given_up(kubeflow: Kubeflow, tmp_path: Path) -> None:
    kubeflow.is_silent = True
    package = tmp_path / "train.yaml"
    command("compile", "--config", str(PARAMS), "--output", str(package))
    start = time.monotonic()
    with pytest.raises(ValueError, match="found no answer in 2 s"):
        submit_run(package, {}, host=kubeflow.host, experiment="speech", seconds=2)
    # The two seconds asked for, and room for a busy machine.
    assert time.monotonic() - start < 8


@pytest.mark.parametrize("host", ["localhost:8080", "ftp://localhost", "http://", "http://local host:80"])
def test_an_address_that_is_none_is_refused(host: str) -> None:
    assert_is_one_line(command("submit", "--host", host, "--config", str(PARAMS)), host, "wanted")


def test_wrong_parameters_are_refused_before_the_host_is_asked(kubeflow: Kubeflow, tmp_path: Path) -> None:
    params = read_params([PARAMS])
    params["cluster"]["num_units"] = 0
    config = tmp_path / "params.yaml"
    config.write_text(yaml.safe_dump(params))
    for arguments in (["submit", "--host", kubeflow.host], ["compile"], ["run", "--local"]):
        message = command(*arguments, "--config", str(config))
        assert_is_one_line(message, "cluster.num_units", "found 0, wanted greater than or equal to 2")
    assert kubeflow.calls == []


@pytest.mark.parametrize("image", ["sonorant-train:0.1.0", "sonorant-train"])
def test_an_image_by_tag_is_refused_unless_it_is_wanted(
    kubeflow: Kubeflow, monkeypatch: pytest.MonkeyPatch, image: str
) -> None:
    monkeypatch.setattr("pipelines.__main__.IMAGE", image)
    rollout = ["--candidate", "model@canary", "--store", "s3://s", "--speech", "/runs/speech"]
    for words in (["submit"], ["schedule", "--cron", "0 3 * * 1"], ["canary", "submit", *rollout]):
        message = command(*words, "--host", kubeflow.host)
        assert_is_one_line(message, "$SONORANT_IMAGE", f"found {image}, wanted an image by digest")
    assert kubeflow.calls == []
    assert command("submit", "--host", kubeflow.host, "--config", str(PARAMS), "--unpinned") == 0


def test_a_run_uses_the_service_account_that_is_named(kubeflow: Kubeflow) -> None:
    words = ["submit", "--host", kubeflow.host, "--config", str(PARAMS)]
    assert command(*words) == 0
    assert command(*words, "--service-account", "sonorant-pipeline") == 0
    assert [run.get("service_account") for run in kubeflow.runs] == [None, "sonorant-pipeline"]


COMMANDS = ["compile", "run", "submit", "schedule", "status", "canary", "canary compile", "canary run", "canary submit"]


@pytest.mark.parametrize("words", ["", *COMMANDS])
def test_every_command_explains_itself(capsys: pytest.CaptureFixture[str], words: str) -> None:
    assert command(*words.split(), "--help") == 0
    assert "Usage: python -m pipelines" in capsys.readouterr().out
