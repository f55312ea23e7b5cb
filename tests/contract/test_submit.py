"""`python -m pipelines submit` against a server that answers as Kubeflow Pipelines' v2beta1 API does."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml

from pipelines.__main__ import main
from pipelines.submission import submit_run
from pipelines.train import graph_for
from sonorant.params import read_params
from sonorant.steps import STEPS
from tests.compiled import Compiled

ROOT = Path(__file__).resolve().parents[2]
PARAMS = ROOT / "params.yaml"
API = "/apis/v2beta1"


class Kubeflow(ThreadingHTTPServer):
    """The routes a submission needs, with the fields and the omissions (no empty list) of real answers."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.calls: list[tuple[str, str]] = []
        self.authorizations: set[str | None] = set()
        self.experiments: list[dict[str, Any]] = []
        self.runs: list[dict[str, Any]] = []
        self.health: tuple[int, str, str] = (200, "application/json", '{"multi_user": false}')
        self.refusal: tuple[int, dict[str, Any]] | None = None
        self.silence = threading.Event()
        self.is_silent = False

    @property
    def host(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Kubeflow

    def do_GET(self) -> None:
        url = self.note()
        if url.path == f"{API}/healthz":
            self.answer(*self.server.health)
        elif url.path == f"{API}/experiments":
            (predicate,) = json.loads(parse_qs(url.query)["filter"][0])["predicates"]
            found = [e for e in self.server.experiments if e["display_name"] == predicate["stringValue"]]
            self.answer_json(200, {"experiments": found, "total_size": len(found)} if found else {})
        else:
            self.answer_json(404, {"code": 5, "message": "Not Found", "details": []})

    def do_POST(self) -> None:
        url = self.note()
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.server.is_silent:
            self.server.silence.wait()
        elif self.server.refusal:
            self.answer_json(*self.server.refusal)
        elif url.path == f"{API}/experiments":
            experiment = {
                "experiment_id": "0a3d9a9c-4c56-4b4f-9d4e-0c8c3b1f0d11",
                "display_name": body["display_name"],
                "created_at": "2026-01-05T10:00:00Z",
                "namespace": body.get("namespace", ""),
                "storage_state": "AVAILABLE",
            }
            self.server.experiments.append(experiment)
            self.answer_json(200, experiment)
        elif url.path == f"{API}/runs":
            self.server.runs.append(body)
            self.answer_json(
                200,
                {
                    "run_id": "5c3d1d6e-8a8e-4d0f-b7a5-2f8f7d3f6a22",
                    "experiment_id": body["experiment_id"],
                    "display_name": body["display_name"],
                    "created_at": "2026-01-05T10:00:01Z",
                    "scheduled_at": "2026-01-05T10:00:01Z",
                    "storage_state": "AVAILABLE",
                    "state": "PENDING",
                },
            )
        else:
            self.answer_json(404, {"code": 5, "message": "Not Found", "details": []})

    def note(self) -> Any:
        url = urlsplit(self.path)
        self.server.calls.append((self.command, url.path))
        self.server.authorizations.add(self.headers.get("Authorization"))
        return url

    def answer_json(self, status: int, body: dict[str, Any]) -> None:
        self.answer(status, "application/json", json.dumps(body))

    def answer(self, status: int, kind: str, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def kubeflow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kubeflow]:
    for variable in ("KF_PIPELINES_ENDPOINT", "KFP_TOKEN", "KF_PIPELINES_OVERRIDE_EXPERIMENT_NAME"):
        monkeypatch.delenv(variable, raising=False)
    server = Kubeflow()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.silence.set()
    server.shutdown()
    server.server_close()


def command(*arguments: str) -> str | int | None:
    """Exit status of `python -m pipelines …`; a message stands for status 1 with that message on stderr."""
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    return stop.value.code


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_run_carries_the_pipeline_and_the_parameters(
    kubeflow: Kubeflow, tmp_path: Path, capsys: pytest.CaptureFixture[str], rounds: int
) -> None:
    config = ("--config", str(PARAMS), "--set", f"rounds={rounds}")
    assert command("submit", "--host", kubeflow.host, *config, "--experiment", "speech") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "5c3d1d6e-8a8e-4d0f-b7a5-2f8f7d3f6a22"
    (experiment,) = kubeflow.experiments
    assert experiment["display_name"] == "speech"
    (run,) = kubeflow.runs
    assert run["experiment_id"] == experiment["experiment_id"]
    assert run["display_name"].startswith("sonorant-train")
    parameters = run["runtime_config"]["parameters"]
    assert parameters == graph_for(read_params([PARAMS], [f"rounds={rounds}"]))[1]
    assert set(parameters) == {"shares", *STEPS, *({"second_cluster", "second_pretrain"} if rounds == 2 else ())}
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


def assert_is_one_line(message: object, thing: str, pattern: str) -> None:
    """The message is one line that names the thing and matches the pattern."""
    assert isinstance(message, str)
    assert "\n" not in message
    assert thing in message
    assert re.search(pattern, message), message
