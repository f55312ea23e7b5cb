"""A server that answers as Kubernetes' API does where Kubeflow Trainer runs: TrainJobs, their pods and logs.

What a job does is `play`, a function that its thread runs; `run_nodes` runs its command, a process a node.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml
from kubeflow_trainer_api import models

GROUP = "trainer.kubeflow.org/v1alpha1"
NOW = "2026-01-05T10:00:00Z"
RUNTIME = Path(__file__).resolve().parents[1] / "k8s" / "components" / "training" / "runtime.yaml"


def unknown_fields(document: Any, known: Any, path: str = "") -> list[str]:
    """Places in a document that the API's model, read from it and written again, has not kept."""
    if isinstance(document, dict) and isinstance(known, dict):
        places = [(f"{path}.{key}", value, known.get(key)) for key, value in document.items()]
    elif isinstance(document, list) and isinstance(known, list) and len(document) == len(known):
        places = [(f"{path}[{i}]", *pair) for i, pair in enumerate(zip(document, known, strict=True))]
    else:
        return [] if document == known else [path]
    return [place for name, value, kept in places for place in unknown_fields(value, kept, name)]


def assert_is_trainjob(document: dict[str, Any]) -> None:
    """ValueError where the API's model refuses a value, AssertionError where it does not know a field."""
    job = models.TrainerV1alpha1TrainJob.from_dict(document)
    assert job is not None
    assert unknown_fields(document, job.to_dict()) == []


@dataclass
class Pod:
    """A node of a job."""

    name: str
    index: int
    phase: str = "Pending"
    lines: list[str] = field(default_factory=list)
    end: dict[str, Any] | None = None

    def say(self, *lines: str) -> None:
        self.lines += lines

    def finish(self, code: int, message: str = "", at: str = NOW) -> None:
        """End its container."""
        self.phase = "Failed" if code else "Succeeded"
        said = {"message": message} if message else {}
        self.end = {"exitCode": code, "reason": "Error" if code else "Completed", "finishedAt": at, **said}


@dataclass
class TrainJob:
    """A job that was created, its pods, and how it ends."""

    document: dict[str, Any]
    pods: list[Pod]
    conditions: list[dict[str, Any]] = field(default_factory=list)
    deleted: threading.Event = field(default_factory=threading.Event)

    @property
    def name(self) -> str:
        name: str = self.document["metadata"]["name"]
        return name

    @property
    def trainer(self) -> dict[str, Any]:
        trainer: dict[str, Any] = self.document["spec"]["trainer"]
        return trainer

    def path_of(self, flag: str) -> Path:
        """What its command is told for an option."""
        return Path(self.trainer["args"][self.trainer["args"].index(flag) + 1])

    def start(self) -> None:
        for pod in self.pods:
            pod.phase = "Running"

    def conclude(self) -> None:
        """Complete or Failed, as its pods are, in the words that JobSet has for it."""
        kind, reason, message = "Complete", "AllJobsCompleted", "jobset completed successfully"
        if any(pod.phase == "Failed" for pod in self.pods):
            kind, reason, message = "Failed", "FailedJobs", "jobset failed due to one or more job failures"
        self.end(kind, reason, message)

    def end(self, kind: str, reason: str, message: str) -> None:
        about = {"reason": reason, "message": message, "lastTransitionTime": NOW}
        self.conditions.append({"type": kind, "status": "True", **about})


def run_nodes(job: TrainJob) -> None:
    """Run its command as its pods would: torchrun's environment, a log, a file for last words; SIGTERM when deleted."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    own = {entry["name"]: entry["value"] for entry in job.trainer.get("env", [])}
    nodes = {"PET_NNODES": str(len(job.pods)), "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": port}
    job.start()
    threads = [
        threading.Thread(target=run_node, args=[job, pod, {**nodes, "PET_NODE_RANK": str(pod.index), **own}])
        for pod in job.pods
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    job.conclude()


def run_node(job: TrainJob, pod: Pod, environment: dict[str, str]) -> None:
    report = job.path_of("--config").with_name(f"report-{pod.index}")
    command = [*job.trainer["command"], *job.trainer["args"]]
    assert command[0] == "python"
    process = subprocess.Popen(
        [sys.executable, *command[1:]],
        env={**os.environ, **environment, "PET_NPROC_PER_NODE": "auto", "SONORANT_REPORT": str(report)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    threading.Thread(target=lambda: job.deleted.wait() and process.send_signal(signal.SIGTERM), daemon=True).start()
    for line in process.stdout:
        pod.say(line.rstrip("\n"))
    code = process.wait(timeout=100)
    pod.finish(code, report.read_text() if report.is_file() else "", time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))


class Trainer(ThreadingHTTPServer):
    """The routes that the SDK asks, with the fields of real answers."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.jobs: dict[str, TrainJob] = {}
        self.created: list[dict[str, Any]] = []
        self.deleted: list[str] = []
        self.play: Callable[[TrainJob], None] = run_nodes
        self.refusals: dict[str, tuple[int, str]] = {}
        """By HTTP method."""
        self.is_away = False
        self.breaks_log = False
        self.reads_log_again = threading.Event()

    def create(self, document: dict[str, Any]) -> TrainJob:
        """A job as the API server and the controllers make it."""
        document["metadata"] |= {"namespace": "sonorant", "creationTimestamp": NOW, "uid": f"{len(self.created)}"}
        name, count = document["metadata"]["name"], document["spec"]["trainer"].get("numNodes", 1)
        job = TrainJob(document, [Pod(f"{name}-node-0-{index}-x{index}z9k", index) for index in range(count)])
        self.jobs[name] = job
        threading.Thread(target=self.play, args=[job], daemon=True).start()
        return job

    def delete(self, name: str) -> None:
        job = self.jobs.pop(name)
        self.deleted.append(name)
        job.deleted.set()


class Handler(BaseHTTPRequestHandler):
    server: Trainer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        parts, query = url.path.strip("/").split("/"), parse_qs(url.query)
        if self.is_refused():
            return
        if url.path == f"/apis/{GROUP}/clustertrainingruntimes/sonorant-torch":
            self.answer(200, yaml.safe_load(RUNTIME.read_text()))
        elif parts[-2] == "trainjobs" and parts[-1] in self.server.jobs:
            job = self.server.jobs[parts[-1]]
            self.answer(200, {**job.document, "status": {"conditions": job.conditions} if job.conditions else {}})
        elif url.path == "/api/v1/namespaces/sonorant/pods":
            name = query["labelSelector"][0].split(",")[0].removeprefix("jobset.sigs.k8s.io/jobset-name=")
            found = self.server.jobs.get(name)
            pods = [pod_document(name, pod) for pod in found.pods] if found else []
            self.answer(200, {"apiVersion": "v1", "kind": "PodList", "metadata": {}, "items": pods})
        elif parts[-1] == "log":
            self.answer_log(parts[-2], query)
        else:
            self.answer_status(404, "NotFound", f'"{parts[-1]}" not found')

    def do_POST(self) -> None:
        document = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.is_refused():
            return
        if document["metadata"]["name"] in self.server.jobs:
            self.answer_status(409, "AlreadyExists", f'trainjobs "{document["metadata"]["name"]}" already exists')
            return
        self.server.created.append(json.loads(json.dumps(document)))
        try:
            assert_is_trainjob(document)
        except (AssertionError, ValueError) as error:
            self.answer_status(400, "BadRequest", f"strict decoding error: {error}")
            return
        self.answer(201, self.server.create(document).document)

    def do_DELETE(self) -> None:
        name = self.path.rpartition("/")[2]
        if self.is_refused():
            return
        if name in self.server.jobs:
            self.server.delete(name)
            self.answer(200, {"apiVersion": "v1", "kind": "Status", "status": "Success"})
        else:
            self.answer_status(404, "NotFound", f'trainjobs "{name}" not found')

    def is_refused(self) -> bool:
        """Whether nobody answers, or the answer is no."""
        self.close_connection = True
        if self.server.is_away:
            return True
        refusal = self.server.refusals.get(self.command)
        if refusal:
            self.answer_status(*refusal[:1], "Forbidden", refusal[1])
        return bool(refusal)

    def answer_log(self, name: str, query: dict[str, list[str]]) -> None:
        """A pod's log; followed until the pod has ended or is gone."""
        assert query["container"] == ["node"]
        job, pod = next((job, pod) for job in self.server.jobs.values() for pod in job.pods if pod.name == name)
        follow, sent = query.get("follow") == ["True"], 0
        if not self.server.breaks_log:
            self.server.reads_log_again.set()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        # Line by line, as the API server does: what comes in one piece, the client shows at its end.
        self.send_header("Transfer-Encoding", "chunked")
        self.send_header("Connection", "close")
        self.end_headers()
        lines = pod.lines[-int(query["tailLines"][0]) :] if "tailLines" in query else pod.lines
        while True:
            is_over = pod.end is not None or job.deleted.is_set()
            while sent < len(lines):
                data = f"{lines[sent]}\n".encode()
                self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
                sent += 1
                if follow and self.server.breaks_log:
                    self.server.breaks_log = False
                    return
            if is_over or not follow:
                self.wfile.write(b"0\r\n\r\n")
                return
            time.sleep(0.02)

    def answer_status(self, code: int, reason: str, message: str) -> None:
        about = {"apiVersion": "v1", "kind": "Status", "metadata": {}, "status": "Failure"}
        self.answer(code, {**about, "message": message, "reason": reason, "code": code})

    def answer(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Connection", "close")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


def pod_document(job: str, pod: Pod) -> dict[str, Any]:
    """A pod as Kubernetes describes it."""
    labels = {
        "jobset.sigs.k8s.io/jobset-name": job,
        "jobset.sigs.k8s.io/replicatedjob-name": "node",
        "batch.kubernetes.io/job-completion-index": str(pod.index),
    }
    about = {"name": "node", "image": "sonorant-train:0.1.0", "imageID": "", "ready": False, "restartCount": 0}
    state = {"terminated": pod.end} if pod.end else {"running": {"startedAt": NOW}}
    return {
        "metadata": {"name": pod.name, "namespace": "sonorant", "labels": labels, "creationTimestamp": NOW},
        "spec": {"containers": [{"name": "node", "image": "sonorant-train:0.1.0"}]},
        "status": {
            "phase": pod.phase,
            "containerStatuses": [] if pod.phase == "Pending" else [{**about, "state": state}],
        },
    }


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Trainer]:
    """A server that runs, and a kubeconfig that leads to it."""
    server = Trainer()
    address = f"http://127.0.0.1:{server.server_port}"
    path = tmp_path / "kubeconfig"
    path.write_text(
        yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "test",
                "clusters": [{"name": "test", "cluster": {"server": address}}],
                "users": [{"name": "test", "user": {"token": "letters"}}],
                "contexts": [
                    {"name": "test", "context": {"cluster": "test", "user": "test", "namespace": "sonorant"}}
                ],
            }
        )
    )
    # The client has read $KUBECONFIG when it was imported.
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(path))
    thread = threading.Thread(target=server.serve_forever, args=[0.05])
    thread.start()
    yield server
    for name in tuple(server.jobs):
        server.delete(name)
    server.shutdown()
    thread.join()
    server.server_close()
