"""Where a task runs on a cluster: its share of a machine, its deadline, its volume, its keys."""

from collections.abc import Iterator
from typing import Any

from kfp import kubernetes
from kfp.dsl import PipelineTask

GPU = "nvidia.com/gpu"
RUNS_CLAIM = "sonorant-runs"
"""The volume claim that checkpoints and finished shards live on, so that a retried pod resumes."""
RUNS_PATH = "/runs"
"""Where the training image expects it ($SONORANT_RUNS there)."""
STORE = "sonorant-s3"
"""The Secret and the ConfigMap that say how to reach the object store."""
STORE_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
STORE_SETTINGS = ("AWS_ENDPOINT_URL", "AWS_REGION")
WEBHOOK = "sonorant-webhook"
"""The Secret whose `url` is told how a run ended."""
CLIENT = "sonorant-client"
"""The Secret whose `key` opens the embedding servers."""


def place(task: PipelineTask, *, cpu: str, memory: str, hours: int, retries: int) -> None:
    """Give a step's pod its share of a machine, a deadline, retries and a volume that outlives it.

    Results are cached by configuration and inputs: data that changes under an unchanged path needs
    `submit --no-cache`.
    """
    task.set_cpu_request(cpu).set_cpu_limit(cpu).set_memory_request(memory).set_memory_limit(memory)
    task.set_retry(retries, backoff_duration="60s", backoff_factor=2, backoff_max_duration="1800s")
    task.set_caching_options(True)
    kubernetes.set_timeout(task, hours * 3600)
    kubernetes.mount_pvc(task, pvc_name=RUNS_CLAIM, mount_path=RUNS_PATH)
    # A corpus may lie in the store's shards.
    with_store(task)


def operate(task: PipelineTask, *, memory: str = "2Gi", minutes: int = 30, retries: int = 2) -> None:
    """Give an operation's pod a small share of a machine, a deadline and retries.

    What it finds outside may change, so its result is never reused; `task.set_caching_options(True)` where it cannot.
    """
    task.set_cpu_request("1").set_cpu_limit("1").set_memory_request(memory).set_memory_limit(memory)
    task.set_retry(retries, backoff_duration="10s", backoff_factor=2, backoff_max_duration="120s")
    task.set_caching_options(False)
    kubernetes.set_timeout(task, minutes * 60)


def with_store(task: PipelineTask) -> None:
    """Let a pod reach the object store. Where the Secret is missing it starts all the same, and says so itself if it
    needs the store."""
    settings, keys = ({name: name for name in names} for names in (STORE_SETTINGS, STORE_KEYS))
    kubernetes.use_config_map_as_env(task, STORE, settings, optional=True)
    kubernetes.use_secret_as_env(task, STORE, keys, optional=True)


def with_webhook(task: PipelineTask) -> None:
    """Let a pod tell how the run ended, where there is somebody to tell."""
    kubernetes.use_secret_as_env(task, WEBHOOK, {"url": "SONORANT_WEBHOOK"}, optional=True)


def with_client_key(task: PipelineTask) -> None:
    """Let a pod ask the embedding servers, where they want a key."""
    kubernetes.use_secret_as_env(task, CLIENT, {"key": "SONORANT_API_KEY"}, optional=True)


def every_task(graph: Any) -> Iterator[Any]:
    """The tasks of a compiled pipeline, also those within loops, conditions and exit handlers."""
    spec = graph.pipeline_spec
    for dag in (spec.root.dag, *(component.dag for component in spec.components.values())):
        yield from dag.tasks.values()
