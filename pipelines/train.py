"""The training workflow: speech in, a measured model out."""

from kfp import dsl, kubernetes
from kfp.dsl import PipelineTask

import components

GPU = "nvidia.com/gpu"
RUNS_CLAIM = "sonorant-runs"
"""The volume claim that checkpoints and finished shards live on, so that a retried pod resumes."""
RUNS_PATH = "/runs"
"""Where the training image expects it ($SONORANT_RUNS there)."""


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


@dsl.pipeline(name="sonorant-train", description="Speech in, a measured model out.")
def train(prepare: dict, cluster: dict, pretrain: dict, publish: dict, evaluate: dict):
    """Prepare, cluster, pretrain, publish, evaluate; each takes its section of params.yaml."""
    prepared = components.prepare(config=prepare)
    place(prepared, cpu="8", memory="16Gi", hours=24, retries=2)

    clustered = components.cluster(config=cluster, corpus=prepared.outputs["corpus"])
    place(clustered, cpu="16", memory="32Gi", hours=12, retries=2)

    pretrained = components.pretrain(
        config=pretrain, corpus=prepared.outputs["corpus"], units=clustered.outputs["units"]
    )
    place(pretrained, cpu="12", memory="64Gi", hours=240, retries=5)
    pretrained.set_accelerator_type(GPU).set_accelerator_limit(1)
    kubernetes.add_toleration(pretrained, key=GPU, operator="Exists", effect="NoSchedule")
    # Loader processes hand batches over in shared memory; a pod has 64 MB of it otherwise.
    kubernetes.empty_dir_mount(pretrained, "shm", mount_path="/dev/shm", medium="Memory", size_limit="16Gi")

    published = components.publish(
        config=publish, corpus=prepared.outputs["corpus"], encoder=pretrained.outputs["encoder"]
    )
    place(published, cpu="8", memory="32Gi", hours=12, retries=2)

    evaluated = components.evaluate(
        config=evaluate, corpus=prepared.outputs["corpus"], model=published.outputs["model"]
    )
    place(evaluated, cpu="8", memory="32Gi", hours=12, retries=2)
