"""The training workflow: speech in, a measured model out."""

from collections.abc import Mapping
from typing import Any

from kfp import dsl, kubernetes

import components
from components import operations
from pipelines.placing import GPU, operate, place, with_store, with_webhook
from sonorant.config import LaunchConfig, Takes
from sonorant.params import OPTIONAL, TWICE, parse_launch, parse_rounds, parse_takes, second_values

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


def trained(component: Any, config: Any, launch: LaunchConfig, **inputs: Any) -> Any:
    """What a step that trains has made."""
    task = component(config=config, **inputs)
    # Where a TrainJob's pods do the work, this one copies and waits.
    cpu, memory = ("2", "8Gi") if launch.launcher == "trainjob" else ("12", "64Gi")
    place(task, cpu=cpu, memory=memory, hours=240, retries=5)
    if launch.num_own_gpus:
        task.set_accelerator_type(GPU).set_accelerator_limit(launch.num_own_gpus)
        kubernetes.add_node_selector(task, f"{GPU}.present", "true")
        kubernetes.add_toleration(task, key=GPU, operator="Exists", effect="NoSchedule")
    # Loader processes hand batches over in shared memory; a pod has 64 MB of it otherwise.
    kubernetes.empty_dir_mount(task, "shm", mount_path="/dev/shm", medium="Memory", size_limit="16Gi")
    return task.outputs


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


def graph_of(launches: Mapping[str, LaunchConfig], takes: Takes, *, is_imported: bool) -> Any:
    """The pipeline of the steps that have a launch, by the parameters with their sections; the corpus is prepared or
    imported."""

    @dsl.pipeline(name=NAME, description="Speech in, a measured model out.")
    def train(
        cluster: dict,
        pretrain: dict,
        publish: dict,
        evaluate: dict,
        ground: dict = NOTHING,
        align: dict = NOTHING,
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
            made = trained(components.pretrain, pretrain, launches["pretrain"], corpus=speech, units=units)
            if "second_pretrain" in launches:
                units = clustered(second_cluster, corpus=speech, encoder=made["encoder"])
                launch = launches["second_pretrain"]
                made = trained(components.pretrain, second_pretrain, launch, corpus=speech, units=units)
            encoders = {"encoder": made["encoder"]}
            given = {"corpus": speech, "units": units}
            if "ground" in launches:
                made = trained(components.ground, ground, launches["ground"], encoder=encoders["encoder"], **given)
                encoders["grounded"] = made["grounded"]
            if "align" in launches:
                made = trained(components.align, align, launches["align"], encoder=encoders[takes.align], **given)
                encoders["aligned"] = made["aligned"]
            model = published(publish, corpus=speech, encoder=encoders[takes.publish])
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
    takes = parse_takes(params)
    idle = {"rounds", "second", "takes", *OPTIONAL} - set(takes.steps)
    sections = {name: values for name, values in params.items() if name not in idle}
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
    training = [name for name in ("pretrain", "second_pretrain", *OPTIONAL) if name in sections]
    launches = {name: parse_launch(name.replace("_", "."), sections[name]) for name in training}
    return graph_of(launches, takes, is_imported=bool(corpus)), sections
