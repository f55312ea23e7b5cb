"""The training workflow: speech in, a measured model out."""

from typing import Any

from kfp import dsl, kubernetes

import components
from pipelines.placing import GPU, place
from sonorant.params import TWICE, parse_rounds, second_values


def prepared(config: Any) -> Any:
    """The corpus."""
    task = components.prepare(config=config)
    place(task, cpu="8", memory="16Gi", hours=24, retries=2)
    return task.outputs["corpus"]


def clustered(config: Any, **inputs: Any) -> Any:
    """The units: of MFCC, or of a layer where an encoder is among the inputs."""
    task = components.cluster(config=config, **inputs)
    place(task, cpu="16", memory="32Gi", hours=12, retries=2)
    return task.outputs["units"]


def pretrained(config: Any, **inputs: Any) -> Any:
    """The encoder."""
    task = components.pretrain(config=config, **inputs)
    place(task, cpu="12", memory="64Gi", hours=240, retries=5)
    task.set_accelerator_type(GPU).set_accelerator_limit(1)
    kubernetes.add_toleration(task, key=GPU, operator="Exists", effect="NoSchedule")
    # Loader processes hand batches over in shared memory; a pod has 64 MB of it otherwise.
    kubernetes.empty_dir_mount(task, "shm", mount_path="/dev/shm", medium="Memory", size_limit="16Gi")
    return task.outputs["encoder"]


def published(config: Any, **inputs: Any) -> Any:
    """The model."""
    task = components.publish(config=config, **inputs)
    place(task, cpu="8", memory="32Gi", hours=12, retries=2)
    return task.outputs["model"]


def evaluated(config: Any, **inputs: Any) -> Any:
    """The report."""
    task = components.evaluate(config=config, **inputs)
    place(task, cpu="8", memory="32Gi", hours=12, retries=2)
    return task.outputs["report"]


@dsl.pipeline(name="sonorant-train", description="Speech in, a measured model out.")
def train(prepare: dict, cluster: dict, pretrain: dict, publish: dict, evaluate: dict):
    """Prepare, cluster, pretrain, publish, evaluate; each takes its section of params.yaml."""
    corpus = prepared(prepare)
    units = clustered(cluster, corpus=corpus)
    encoder = pretrained(pretrain, corpus=corpus, units=units)
    model = published(publish, corpus=corpus, encoder=encoder)
    evaluated(evaluate, corpus=corpus, model=model)


@dsl.pipeline(name="sonorant-train-twice", description="Speech in, a measured model of two rounds out.")
def train_twice(
    prepare: dict,
    cluster: dict,
    pretrain: dict,
    second_cluster: dict,
    second_pretrain: dict,
    publish: dict,
    evaluate: dict,
):
    """The same, but a second encoder is trained, on units of a layer of the first (HuBERT's iterations)."""
    corpus = prepared(prepare)
    units = clustered(cluster, corpus=corpus)
    encoder = pretrained(pretrain, corpus=corpus, units=units)
    second_units = clustered(second_cluster, corpus=corpus, encoder=encoder)
    second_encoder = pretrained(second_pretrain, corpus=corpus, units=second_units)
    model = published(publish, corpus=corpus, encoder=second_encoder)
    evaluated(evaluate, corpus=corpus, model=model)


def graph_for(params: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The pipeline of as many rounds as `params` asks for, and its parameters: whole sections, one a task."""
    sections = {name: values for name, values in params.items() if name not in ("rounds", "second")}
    if parse_rounds(params).rounds == 1:
        return train, sections
    return train_twice, {**sections, **{f"second_{name}": second_values(name, params) for name in TWICE}}
