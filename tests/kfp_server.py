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
        self.schedules: list[dict[str, Any]] = []
        self.found: list[dict[str, Any] | None] = []
        """What asking for a run finds, one after the other and the last for ever; None: the connection is cut."""
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
        elif url.path == f"{API}/recurringruns":
            self.answer_page("recurringRuns", self.server.schedules, parse_qs(url.query))
        elif url.path == f"{API}/runs":
            newest = self.server.found[-1:]
            self.answer_json(200, {"runs": newest, "total_size": len(newest)} if newest else {})
        elif url.path == f"{API}/runs/{RUN}":
            found = self.server.found.pop(0) if len(self.server.found) > 1 else self.server.found[0]
            if found is None:
                self.close_connection = True
            else:
                self.answer_json(200, found)
        else:
            self.answer_not_found()

    def do_DELETE(self) -> None:
        self.server.schedules.remove(self.schedule(self.note().path.rpartition("/")[2]))
        self.answer_json(200, {})

    def do_POST(self) -> None:
        url = self.note()
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
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
        elif url.path == f"{API}/recurringruns":
            schedule = {
                **body,
                "recurring_run_id": f"8d2b7c1e-0000-4000-8000-{len(self.server.schedules):012d}",
                "created_at": "2026-01-05T10:00:01Z",
                "status": "ENABLED" if body["mode"] == "ENABLE" else "DISABLED",
            }
            self.server.schedules.append(schedule)
            self.answer_json(200, schedule)
        elif url.path.startswith(f"{API}/recurringruns/"):
            name, _, verb = url.path.rpartition("/")[2].partition(":")
            self.schedule(name).update({"enable": {"status": "ENABLED"}, "disable": {"status": "DISABLED"}}[verb])
            self.answer_json(200, {})
        else:
            self.answer_not_found()

    def schedule(self, name: str) -> dict[str, Any]:
        """The schedule with that id."""
        (found,) = (schedule for schedule in self.server.schedules if schedule["recurring_run_id"] == name)
        return found

    def note(self) -> Any:
        url = urlsplit(self.path)
        self.server.calls.append((self.command, url.path))
        self.server.authorizations.add(self.headers.get("Authorization"))
        return url

    def answer_page(self, key: str, items: list[dict[str, Any]], query: dict[str, list[str]]) -> None:
        """A page of a list: two items, however many more were asked for."""
        start = int(query.get("page_token", ["0"])[0] or 0)
        answer: dict[str, Any] = {key: items[start : start + 2], "total_size": len(items)} if items else {}
        if len(items) > start + 2:
            answer["next_page_token"] = str(start + 2)
        self.answer_json(200, answer)

    def answer_not_found(self) -> None:
        self.answer_json(404, {"code": 5, "message": "Not Found", "details": []})

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
