"""A server that answers as Kubeflow Pipelines' v2beta1 API does, and `python -m pipelines` against it."""

from __future__ import annotations

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from pipelines.__main__ import main

API = "/apis/v2beta1"
RUN = "5c3d1d6e-8a8e-4d0f-b7a5-2f8f7d3f6a22"


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


def command(*arguments: str) -> str | int | None:
    """Exit status of `python -m pipelines …`; a message stands for status 1 with that message on stderr."""
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    return stop.value.code


def assert_is_one_line(message: object, thing: str, pattern: str) -> None:
    """The message is one line that names the thing and matches the pattern."""
    assert isinstance(message, str)
    assert "\n" not in message
    assert thing in message
    assert re.search(pattern, message), message
