"""The training workflow: speech in, a measured model out."""

from typing import Any

from kfp import dsl, kubernetes

import components
from components import operations
from pipelines.placing import GPU, operate, place, with_store, with_webhook
from sonorant.config import LaunchConfig
from sonorant.params import TWICE, parse_launch, parse_rounds, second_values

NAME = "sonorant-train"
PRODUCTION = "model@production"
NOTHING: dict[str, Any] = {}
NO_SHARES: list[Any] = []
"""What parameters are that a graph does not use."""


def prepared(config: Any, shares: Any) -> Any:
    """The corpus, its rows checked and resampled by as many pods as there are shares."""
    with dsl.ParallelFor(shares, name="shares") as part:
        share = components.convert(config=part)
        place(share, cpu="8", memory="16Gi", hours=24, retries=2)
    task = components.prepare(config=config, shares=dsl.Collected(share.outputs["share"]))
    place(task, cpu="4", memory="16Gi", hours=12, retries=2)
    return task.outputs["corpus"]


def imported(uri: Any) -> Any:
    """A corpus that is there already."""
    return dsl.importer(artifact_uri=uri, artifact_class=dsl.Dataset, reimport=False).output


def clustered(config: Any, **inputs: Any) -> Any:
    """The units: of MFCC, or of a layer where an encoder is among the inputs."""
    task = components.cluster(config=config, **inputs)
    place(task, cpu="16", memory="32Gi", hours=12, retries=2)
    return task.outputs["units"]


def pretrained(config: Any, launch: LaunchConfig, **inputs: Any) -> Any:
    """The encoder."""
    task = components.pretrain(config=config, **inputs)
    # Where a TrainJob's pods do the work, this one copies and waits.
    cpu, memory = ("2", "8Gi") if launch.launcher == "trainjob" else ("12", "64Gi")
    place(task, cpu=cpu, memory=memory, hours=240, retries=5)
    if launch.num_own_gpus:
        task.set_accelerator_type(GPU).set_accelerator_limit(launch.num_own_gpus)
        kubernetes.add_node_selector(task, f"{GPU}.present", "true")
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


def in_service(store: Any) -> Any:
    """The model that the new one is measured against and may replace."""
    digest = operations.resolve(store=store, reference=PRODUCTION)
    operate(digest)
    with_store(digest)
    task = operations.incumbent(store=store, reference=digest.output)
    operate(task, memory="8Gi")
    # A digest names the same bytes for ever; and what is evaluated beside the same model need not be so again.
    task.set_caching_options(True)
    with_store(task)
    return task.outputs["model"]


def released(store: Any, alias: Any, gate: Any, *, model: Any, report: Any) -> None:
    """Into the store, under an alias that services follow, if it is not worse than what is there."""
    verdict = operations.judge(limits=gate, report=report)
    operate(verdict)
    with dsl.If(store != "", name="with a store"), dsl.If(verdict.outputs["Output"] == "pass", name="good enough"):
        task = operations.release(store=store, alias=alias, model=model, report=report)
        operate(task, memory="8Gi")
        with_store(task)


def graph_of(launches: list[LaunchConfig], *, is_imported: bool) -> Any:
    """The pipeline of as many rounds as there are launches, whose corpus is prepared or imported."""

    @dsl.pipeline(name=NAME, description="Speech in, a measured model out.")
    def train(
        cluster: dict,
        pretrain: dict,
        publish: dict,
        evaluate: dict,
        prepare: dict = NOTHING,
        shares: list = NO_SHARES,
        corpus: str = "",
        second_cluster: dict = NOTHING,
        second_pretrain: dict = NOTHING,
        store: str = "",
        alias: str = "production",
        gate: dict = NOTHING,
    ):
        """Each step takes its section of params.yaml; the second round trains on units of a layer of the first's
        encoder (HuBERT's iterations). Where a store is named, a model that passes the gate goes into service."""
        ending = operations.conclude(pipeline=NAME, run=dsl.PIPELINE_JOB_ID_PLACEHOLDER)
        operate(ending)
        with_webhook(ending)
        with dsl.ExitHandler(ending, name="train"):
            speech = imported(corpus) if is_imported else prepared(prepare, shares)
            units = clustered(cluster, corpus=speech)
            encoder = pretrained(pretrain, launches[0], corpus=speech, units=units)
            if len(launches) == 2:
                units = clustered(second_cluster, corpus=speech, encoder=encoder)
                encoder = pretrained(second_pretrain, launches[1], corpus=speech, units=units)
            model = published(publish, corpus=speech, encoder=encoder)
            report = evaluated(evaluate, corpus=speech, model=model, previous=in_service(store))
            released(store, alias, gate, model=model, report=report)

    return train


def graph_for(
    params: dict[str, Any], *, corpus: str = "", num_shares: int = 1, store: str = "", alias: str = "production"
) -> tuple[Any, dict[str, Any]]:
    """The pipeline that `params` asks for, and its parameters: whole sections, one a task.

    `corpus` is the address of one to import instead of preparing it; else so many pods prepare a share each. `store`
    is where a model that passes the gate goes, `alias` the name under which services find it.
    """
    sections = {name: values for name, values in params.items() if name not in ("rounds", "second")}
    sections.setdefault("gate", {})
    num_rounds = parse_rounds(params).rounds
    if num_rounds == 2:
        sections |= {f"second_{name}": second_values(name, params) for name in TWICE}
    if corpus:
        del sections["prepare"]
        sections["corpus"] = corpus
    else:
        parts = [{"index": index, "count": num_shares} for index in range(num_shares)]
        sections["shares"] = [{**sections["prepare"], "part": part} for part in parts]
    sections |= {"store": store, "alias": alias}
    # What Kubernetes must know before there is a pod: the steps themselves read it from their sections.
    pretraining = [sections[name] for name in ("pretrain", "second_pretrain") if name in sections]
    launches = [parse_launch(values) for values in pretraining]
    return graph_of(launches, is_imported=bool(corpus)), sections
