"""Ranks in the pods of a Kubeflow Trainer v2 TrainJob.

The pods see the work through the volume that also holds the checkpoints: its inputs are copied to `jobs/STEP-KEY`
there, the outputs appear beside them. The job's name is made of the same key, so a component that is tried again finds
the job that is still running, and watches that.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sonorant.artifacts import put_in_place, staging_place
from sonorant.config import LaunchConfig
from sonorant.launch.stopping import Stop, stop_requests
from sonorant.launch.work import Work

if TYPE_CHECKING:
    from kubeflow.trainer import TrainerClient

POLL = 5.0
"""Seconds between two looks at the job."""
PATIENCE = 300.0
"""How long the API server may be out of reach before the job is given up; it goes on, and is found again."""
DELETION = 180.0
"""How long a job's pods may take to go: the runtime gives their ranks two minutes to write a checkpoint."""
NUM_LINES = 5


def run_job(launch: LaunchConfig, work: Work) -> None:
    """Have the work done by a TrainJob, new or already running, and put its outputs in place."""
    shared = work.runs.resolve() / "jobs" / f"{work.step}-{work.key}"
    there = share(work, shared)
    if not there.is_done():
        with stop_requests() as stop:
            job = Job(launch, there)
            try:
                job.run(stop)
            except ConnectionError as error:
                raise ValueError(
                    f"{job.where}: found no answer ({error}), wanted the API server: run the same again when it is "
                    "there; if the job runs, it goes on meanwhile and is found"
                ) from None
            if stop and not there.is_done():
                stop.leave()
    for name, path in there.outputs.items():
        staged = staging_place(work.outputs[name])
        shutil.rmtree(staged, ignore_errors=True)
        shutil.copytree(path, staged, copy_function=link_or_copy)
        put_in_place(staged, work.outputs[name])
    shutil.rmtree(shared, ignore_errors=True)


def share(work: Work, folder: Path) -> Work:
    """The work with its artifacts in a folder that the pods see; what is there already is not copied again."""
    folder.mkdir(parents=True, exist_ok=True)
    inputs = {name: folder / name for name in work.inputs}
    for name, place in inputs.items():
        if not place.exists():
            copy = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder))
            shutil.copytree(work.inputs[name], copy, copy_function=link_or_copy, dirs_exist_ok=True)
            try:
                copy.rename(place)
            except OSError:
                # Another component has done the same meanwhile.
                shutil.rmtree(copy)
                if not place.exists():
                    raise
    return replace(work, inputs=inputs, outputs={name: folder / name for name in work.outputs})


def link_or_copy(source: str, target: str) -> None:
    """One file under two names where that can be, else two files."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


class Job:
    """A TrainJob: made or found, watched, and taken away."""

    def __init__(self, launch: LaunchConfig, work: Work) -> None:
        self.launch, self.work = launch, work
        self.name = f"sonorant-{work.step}-{work.key}"
        self.client = connect(launch)
        self.namespace: str = self.client.backend.namespace
        self.log = Log(self.client, self.name, work.step)

    def run(self, stop: Stop) -> None:
        """See it through to Complete and delete it.

        Raises ValueError where it fails or takes too long. Told to stop, it deletes the job and returns: the pods are
        told so, and keep a checkpoint.
        """
        status = self.status()
        if status in ("Failed", "Complete"):
            # Its outputs are gone, or it had none.
            self.delete()
            status = None
        if status is None:
            self.create()
        self.say("is there already" if status else "is created")
        status = self.watch(stop)
        if status == "Failed":
            # The pods stay, for whoever wants to look at them.
            raise ValueError(
                f"{self.where}: found it Failed ({self.reason()}), wanted Complete: do what it says, and run the same "
                "again; it goes on from the last checkpoint"
            )
        self.delete()
        if status is None and not stop:
            raise ValueError(
                f"{self.where}: found it unfinished after launch.hours {self.launch.hours:g}, wanted Complete: "
                "raise launch.hours, or look with `kubectl describe` why it waits, and run the same again"
            )
        if status == "Complete" and not self.work.is_done():
            raise ValueError(
                f"{self.where}: found it Complete, but nothing in {next(iter(self.work.outputs.values()))}: mount the "
                f"volume that holds {self.work.runs} at the same path in the pods of runtime {self.launch.runtime}"
            )

    @property
    def where(self) -> str:
        """What messages call it."""
        return f"TrainJob {self.namespace}/{self.name}"

    def say(self, words: str) -> None:
        """Tell whoever reads this pod's log."""
        print(f"{self.work.step}: {self.where} {words}", file=sys.stderr, flush=True)

    def create(self) -> None:
        """Submit it."""
        from kubeflow.trainer import CustomTrainerContainer
        from kubeflow.trainer.options import ActiveDeadlineSeconds, Labels, Name, TrainerArgs, TrainerCommand

        launch, shared = self.launch, next(iter(self.work.outputs.values())).parent
        config = self.work.write_params(shared / "params.json")
        resources = {"cpu": launch.cpu, "memory": launch.memory}
        trainer = CustomTrainerContainer(
            image=launch.image or "",
            num_nodes=launch.num_nodes,
            resources_per_node=resources | ({"gpu": str(launch.num_gpus)} if launch.num_gpus else {}),
            env={"SONORANT_RUNS": str(self.work.runs.resolve())},
        )
        labels = {"name": "sonorant", "component": self.work.step, "managed-by": "sonorant"}
        options = [
            Name(self.name),
            Labels({f"app.kubernetes.io/{key}": value for key, value in labels.items()}),
            # Should nobody be left to delete it.
            ActiveDeadlineSeconds(max(1, round(launch.hours * 3600))),
            TrainerCommand(["python", "-m", "sonorant.launch.ranks"]),
            # Kubeflow Trainer tells a pod the other nodes in its environment; for this the SDK has no word.
            TrainerArgs(["--nproc-per-node", str(launch.processes_per_node), *self.work.command(config)]),
        ]
        try:
            self.client.train(runtime=launch.runtime, trainer=trainer, options=options)
        except (RuntimeError, TimeoutError, ValueError) as error:
            raise ValueError(
                f"{self.where}: found it refused ({cause_of(error)}), wanted it created: correct that"
            ) from None

    def status(self) -> str | None:
        """Created, Running, Complete, Failed, or None where there is no such job."""
        from kubernetes.client import ApiException  # type: ignore[import-untyped]

        try:
            return str(self.client.get_job(self.name).status)
        except RuntimeError as error:
            if isinstance(error.__cause__, ApiException):
                if error.__cause__.status == 404:
                    return None
                if error.__cause__.status in (401, 403):
                    raise ValueError(
                        f"{self.where}: found no leave to read it ({cause_of(error)}), wanted the rights of "
                        "ServiceAccount sonorant-pipeline: run as that"
                    ) from None
            raise ConnectionError(cause_of(error)) from None
        except TimeoutError as error:
            raise ConnectionError(str(error)) from None

    def watch(self, stop: Stop) -> str | None:
        """Wait until it is Complete or Failed, showing the first node's log; None where told to stop, or late."""
        start = heard = time.monotonic()
        before = ""
        while time.monotonic() - start < self.launch.hours * 3600:
            try:
                status = self.status()
            except ConnectionError as error:
                if time.monotonic() - heard > PATIENCE:
                    raise ConnectionError(f"for {PATIENCE:g} s: {error}") from None
            else:
                heard = time.monotonic()
                if status is None:
                    raise ValueError(f"{self.where}: found it deleted by somebody, wanted Complete: run the same again")
                if status != before:
                    self.say(f"is {status}")
                    before = status
                self.log.follow()
                if status in ("Complete", "Failed"):
                    self.log.finish()
                    return status
            if stop.wait(POLL):
                self.say("is deleted, as this was told to stop")
                break
        return None

    def delete(self) -> None:
        """Take it away, and wait until it is gone and its pods too, which may be writing a checkpoint."""
        from kubernetes.client import ApiException

        try:
            self.client.delete_job(self.name)
        except RuntimeError as error:
            if not (isinstance(error.__cause__, ApiException) and error.__cause__.status == 404):
                raise ValueError(f"{self.where}: found it not to be deleted ({cause_of(error)}): delete it") from None
        deadline = time.monotonic() + DELETION
        while self.status() is not None or self.pods():
            if time.monotonic() > deadline:
                raise ValueError(
                    f"{self.where}: found it still there {DELETION:g} s after it was deleted, wanted it gone: "
                    "see with `kubectl describe` what holds it"
                )
            time.sleep(min(POLL, 1.0))

    def reason(self) -> str:
        """How the pod that failed first ended, and its last words."""
        failed = [(end.finished_at, pod, end) for pod in self.pods() for end in ends_of(pod) if end.exit_code]
        if not failed:
            return "; ".join(filter(None, [self.condition(), self.log.last_words()])) or "no pod says why"
        _, pod, end = min(failed, key=lambda item: (item[0], item[1].metadata.name))
        words = end.message or self.last_words(pod.metadata.name)
        return f"pod {pod.metadata.name} exited with {end.exit_code}, {end.reason}: {' '.join(words.split())}"

    def pods(self) -> list[Any]:
        """Its pods, as the cluster describes them."""
        selector = f"jobset.sigs.k8s.io/jobset-name={self.name}"
        with answers():
            core = self.client.backend.core_api
            pods: list[Any] = core.list_namespaced_pod(self.namespace, label_selector=selector).items
        return pods

    def last_words(self, pod: str) -> str:
        """What a pod said last."""
        with answers():
            said = self.client.backend.core_api.read_namespaced_pod_log(
                pod, self.namespace, container="node", tail_lines=NUM_LINES
            )
        return " | ".join(line for line in said.splitlines() if line.strip())

    def condition(self) -> str:
        """What Kubeflow Trainer says of its failure, such as a deadline that has passed."""
        with answers():
            found = self.client.backend.custom_api.get_namespaced_custom_object(
                "trainer.kubeflow.org", "v1alpha1", self.namespace, "trainjobs", self.name
            )
        conditions = found.get("status", {}).get("conditions", [])
        return "; ".join(f"{c['reason']}: {c['message']}" for c in conditions if c["type"] == "Failed")


def ends_of(pod: Any) -> list[Any]:
    """How its containers ended that have."""
    statuses = pod.status.container_statuses or []
    return [status.state.terminated for status in statuses if status.state and status.state.terminated]


class Log:
    """The first node's log, shown as it is written; every line once, also where the connection breaks."""

    def __init__(self, client: TrainerClient, job: str, step: str) -> None:
        self.client, self.job, self.step = client, job, step
        self.shown: dict[str, int] = {}
        self.lines: list[str] = []
        self.thread: threading.Thread | None = None

    def follow(self) -> None:
        """Go on showing it, in a thread, if that does not go on already."""
        if self.thread is None or not self.thread.is_alive():
            self.thread = threading.Thread(target=self.show, daemon=True)
            self.thread.start()

    def finish(self, seconds: float = 10) -> None:
        """Wait, so long at most, until all is shown."""
        if self.thread is not None:
            self.thread.join(seconds)

    def show(self) -> None:
        """Show what the node that is there now says, until it ends."""
        try:
            pod = next((s.pod_name for s in self.client.get_job(self.job).steps if s.name == "node-0"), None)
            if pod is None:
                return
            seen = self.shown.get(pod, 0)
            for number, line in enumerate(self.client.get_job_logs(self.job, step="node-0", follow=True), start=1):
                if number > seen:
                    print(line, file=sys.stderr, flush=True)
                    self.shown[pod] = number
                    self.lines = [*self.lines[1 - NUM_LINES :], line]
        except (RuntimeError, TimeoutError):
            # The connection broke, or the pod has gone: whoever watches the job will know.
            return

    def last_words(self) -> str:
        """What was shown last."""
        return " | ".join(line for line in self.lines if line.strip())


def connect(launch: LaunchConfig) -> TrainerClient:
    """Kubeflow Trainer, as this pod's service account or the kubeconfig's user."""
    try:
        from kubeflow.common.types import KubernetesBackendConfig
        from kubeflow.trainer import TrainerClient
    except ImportError as error:
        raise ValueError(
            f"launch.launcher trainjob: found no module {error.name}, wanted Kubeflow's SDK: "
            "pip install 'sonorant[pipelines]'"
        ) from None
    from kubernetes.config import ConfigException  # type: ignore[import-untyped]

    try:
        return TrainerClient(KubernetesBackendConfig(namespace=launch.namespace))
    except ConfigException as error:
        raise ValueError(
            f"launch.launcher trainjob: found no way to a cluster ({error}), wanted a pod with a service account, "
            "or a kubeconfig: run it there, or set launch.launcher torchrun"
        ) from None


@contextmanager
def answers() -> Iterator[None]:
    """ConnectionError where the API server does not answer, or with no."""
    from kubernetes.client import ApiException
    from urllib3.exceptions import HTTPError

    try:
        yield
    except (ApiException, HTTPError) as error:
        raise ConnectionError(cause_of(error)) from None


def cause_of(error: BaseException) -> str:
    """What lies behind an error of the SDK's, in the server's words where it has spoken."""
    cause: Any = error.__cause__ or error
    body = getattr(cause, "body", None)
    try:
        said: Mapping[str, Any] = json.loads(body) if body else {}
    except ValueError:
        said = {}
    status = f"HTTP {cause.status}, " if getattr(cause, "status", None) else ""
    return " ".join(f"{status}{said.get('message') or getattr(cause, 'reason', None) or cause}".split())
