"""The components and the compiled pipelines are what the signatures of the steps say."""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import components
from components.image import IMAGE
from pipelines.train import graph_for
from sonorant.config import SECTIONS, Takes
from sonorant.params import parse_round, parse_section, read_params
from sonorant.steps import SHARED, STEPS, weigh
from sonorant.steps.component import PAGES
from tests.compiled import Compiled, Task, check_pinned, compiled
from tests.workflow import ALL, workflow

ROOT = Path(__file__).resolve().parents[2]
PARAMS = read_params([ROOT / "params.yaml"])
GOLDEN = Path(__file__).with_name("train.golden.yaml")
DECLARED = {**SHARED, **STEPS, weigh.name: weigh}
CORPUS = "s3://speech/corpora/one"


def task_name(step: str, number: int) -> str:
    """What kfp calls a step in a round."""
    return step if number == 1 else f"{step}-{number}"


def parameter_name(step: str, number: int) -> str:
    """The pipeline's parameter that holds a step's section in a round."""
    return step if number == 1 else f"second_{step}"


STEP_OF = {name: name for name in SHARED} | {task_name(task.step, task.round): task.step for task in workflow(2)}
"""The step that a task runs, of all tasks of two rounds that run one."""


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """The pipeline of two rounds, which hold all that one has."""
    graph, parameters = graph_for({**PARAMS, "rounds": 2}, num_shares=2)
    return compiled(graph, parameters, tmp_path_factory.mktemp("compiled") / "train.yaml")


@pytest.fixture(scope="module")
def tasks(train: Compiled) -> dict[str, Task]:
    return train.tasks()


def test_every_step_has_a_component_and_a_task(tasks: dict[str, Task]) -> None:
    assert set(components.__all__) == set(DECLARED)
    assert set(STEP_OF) <= set(tasks)


@pytest.mark.parametrize("name", STEP_OF)
def test_a_component_has_the_inputs_and_outputs_of_its_step(tasks: dict[str, Task], name: str) -> None:
    step, component = DECLARED[STEP_OF[name]], tasks[name].component
    inputs = component["inputDefinitions"]
    assert inputs["parameters"] == {"config": {"parameterType": "STRUCT"}}
    found = inputs.get("artifacts", {})
    assert set(found) == set(step.inputs)
    assert {n for n in found if found[n].get("isOptional", False)} == step.optional
    assert {n for n in found if found[n].get("isArtifactList", False)} == {
        n for n in step.inputs if step.artifacts[n] == "ins"
    }
    outputs = component["outputDefinitions"]["artifacts"]
    shown = {n: outputs[n]["artifactType"]["schemaTitle"] for n in set(outputs) - set(step.outputs)}
    # Kubeflow's page shows these two.
    assert shown == {"metrics": "system.Metrics", **({"page": "system.HTML"} if "report" in step.outputs else {})}
    assert set(step.outputs) <= set(outputs)
    assert "parameters" not in component["outputDefinitions"]


@pytest.mark.parametrize("name", DECLARED)
def test_a_component_hands_everything_to_its_step_and_holds_no_thought(name: str) -> None:
    """Its body is a docstring, two imports and `run(step, config, metrics, artifact=artifact, …)`."""
    tree = ast.parse((ROOT / "components" / f"{name}.py").read_text())
    (function,) = (node for node in tree.body if isinstance(node, ast.FunctionDef))
    summary, step_import, run_import, call = function.body
    assert ast.unparse(step_import) == f"from sonorant.steps import {name}"
    assert ast.unparse(run_import) == "from sonorant.steps.component import run"
    artifacts = [n for n, role in DECLARED[name].artifacts.items() if role != "scratch"]
    artifacts += ["page"] if PAGES.keys() & set(DECLARED[name].outputs) else []
    arguments = ", ".join([name, "config", "metrics", *(f"{a}={a}" for a in artifacts)])
    assert ast.unparse(call) == f"run({arguments})"
    assert " ".join(ast.literal_eval(summary.value).split()) == DECLARED[name].summary


def test_an_artifact_has_one_type_everywhere(tasks: dict[str, Task]) -> None:
    types: dict[str, set[str]] = {}
    for task in tasks.values():
        if task.name not in STEP_OF:
            continue
        for definitions in (task.component["inputDefinitions"], task.component["outputDefinitions"]):
            for artifact, definition in definitions.get("artifacts", {}).items():
                name = artifact.removesuffix("s") if definition.get("isArtifactList") else artifact
                types.setdefault(name, set()).add(definition["artifactType"]["schemaTitle"])
    assert {artifact: found for artifact, found in types.items() if len(found) > 1} == {}
    assert types["share"] == types["corpus"] == {"system.Dataset"}
    assert types["encoder"] == types["model"] == {"system.Model"}


@pytest.mark.parametrize("num_rounds", [1, 2])
@pytest.mark.parametrize(
    "takes", [ALL, Takes(), Takes(publish="grounded"), Takes(publish="aligned")], ids=lambda t: "-".join(t.steps)
)
def test_edges_lead_from_the_last_writer_to_the_reader(tmp_path: Path, num_rounds: int, takes: Takes) -> None:
    params = {**PARAMS, "rounds": num_rounds, "takes": takes.model_dump()}
    tasks = compiled(*graph_for(params), tmp_path / "train.yaml").tasks()
    wanted = {task_name(task.step, task.round): task for task in workflow(num_rounds, takes)}
    assert {name for name in tasks if name in STEP_OF} == {*SHARED, *wanted}
    for name, task in wanted.items():
        assert tasks[name].parameters == {"config": parameter_name(task.step, task.round)}
        edges = {given: [(task_name(made.step, made.round), made.artifact)] for given, made in task.reads.items()}
        optional = DECLARED[task.step].optional - set(edges)
        assert {a: w for a, w in tasks[name].artifacts.items() if a not in optional} == edges
    assert tasks["convert"].parameters == {"config": "shares[]"}
    assert tasks["convert"].artifacts == {}
    assert tasks["prepare"].artifacts == {"shares": [("convert", "share")]}


def test_an_existing_corpus_is_imported_in_place_of_a_prepared_one(tmp_path: Path) -> None:
    graph, parameters = graph_for(PARAMS, corpus=CORPUS)
    found = compiled(graph, parameters, tmp_path / "train.yaml")
    tasks = found.tasks()
    assert {"convert", "prepare"} & set(tasks) == set()
    assert {"prepare", "shares"} & set(parameters) == set()
    writers = {writer for task in tasks.values() for writer, _ in task.artifacts.get("corpus", [])}
    assert writers == {"importer"}
    importer = found.pipeline["deploymentSpec"]["executors"]["exec-importer"]["importer"]
    assert importer["typeSchema"]["schemaTitle"] == "system.Dataset"
    assert tasks["importer"].parameters == {"uri": "corpus"}
    assert found.defaults["corpus"] == CORPUS


@pytest.mark.parametrize("num_shares", [1, 3])
def test_shares_are_the_section_and_a_part_each(tmp_path: Path, num_shares: int) -> None:
    found = compiled(*graph_for(PARAMS, num_shares=num_shares), tmp_path / "train.yaml")
    convert = SHARED["convert"]
    sections = [parse_section("prepare", convert.config, values) for values in found.defaults["shares"]]
    assert [section.part.index for section in sections] == list(range(num_shares))  # type: ignore[attr-defined]
    wanted = parse_section("prepare", SECTIONS["prepare"], PARAMS["prepare"])
    assert {section.part.count for section in sections} == {num_shares}  # type: ignore[attr-defined]
    for section in sections:
        assert SECTIONS["prepare"].model_validate(section.model_dump(exclude={"part"})) == wanted


def test_the_second_round_takes_what_second_changes(tmp_path: Path) -> None:
    """Its sections reach it whole, through Kubeflow's whole numbers turned fractions."""
    changes = {"cluster": {"layer": 1, "num_units": 50}, "pretrain": {"optim": {"beta1": 0.8}}}
    params = {**PARAMS, "rounds": 2, "second": changes}
    defaults = compiled(*graph_for(params), tmp_path / "train.yaml").defaults
    for name in changes:
        found = parse_section(name, SECTIONS[name], defaults[f"second_{name}"])
        assert found == parse_round(name, params, 2) != parse_round(name, params, 1)
        assert parse_section(name, SECTIONS[name], defaults[name]) == parse_round(name, params, 1)


def leaves(values: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where each single value lies in nested mappings and lists."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else None
    if not values or items is None:
        yield path
    else:
        for key, value in items:
            yield from leaves(value, (*path, key))


def changed(values: Any, path: tuple[Any, ...], value: Any) -> Any:
    """The same with another value at one place."""
    values = copy.deepcopy(values)
    at = values
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return values


LEAVES = [path for path in leaves(PARAMS) if path[0] not in ("rounds", "takes")]


@pytest.mark.parametrize("path", LEAVES, ids=lambda path: ".".join(map(str, path)))
def test_a_parameter_reaches_the_tasks_that_own_it_and_no_other(
    train: Compiled, tasks: dict[str, Task], path: tuple[Any, ...]
) -> None:
    """One value of params.yaml is changed: exactly its owners are handed something else than before."""
    _, before = graph_for({**PARAMS, "rounds": 2}, num_shares=2)
    params = changed({**PARAMS, "rounds": 2}, path, {"seed": 5} if path == ("second", "pretrain") else "changed")
    _, after = graph_for(params, num_shares=2)

    def handed(task: Task, parameters: dict[str, Any]) -> list[Any]:
        names = [source.removesuffix("[]") for source in task.parameters.values() if isinstance(source, str)]
        return [parameters[name] for name in names if name in parameters]

    found = {name for name, task in tasks.items() if handed(task, before) != handed(task, after)}
    owners = {
        "gate": {"judge"},
        "prepare": {"convert", "prepare"},
        "cluster": {"cluster", "cluster-2"},
        "pretrain": {"pretrain", "pretrain-2"},
        "second": {f"{path[1]}-2"} if len(path) > 1 else set(),
    }
    wanted = owners.get(path[0], {path[0]})
    # What `second` lays over a value hides it from the second round.
    hidden = {f"{path[0]}-2"} if is_overlaid(PARAMS["second"].get(path[0], {}), path[1:]) else set()
    assert found == wanted - hidden
    assert set(before) == set(after) == set(train.defaults) & set(before)


def is_overlaid(values: Any, path: tuple[Any, ...]) -> bool:
    """Whether these values say something at that place."""
    for key in path:
        if not isinstance(values, dict) or key not in values:
            return False
        values = values[key]
    return True


@pytest.mark.parametrize("name", STEP_OF)
def test_every_task_has_its_share_of_the_cluster(train: Compiled, tasks: dict[str, Task], name: str) -> None:
    task = tasks[name]
    container, pod = train.executor(task), train.pod(task)
    assert container["image"] == IMAGE
    resources = container["resources"]
    assert float(resources["resourceCpuLimit"]) >= float(resources["resourceCpuRequest"]) >= 1
    assert resources["resourceMemoryLimit"] == resources["resourceMemoryRequest"]
    assert task.spec["cachingOptions"] == {"enableCache": True}
    retries = task.spec["retryPolicy"]
    assert retries["maxRetryCount"] >= 1
    assert retries["backoffFactor"] > 1
    assert float(retries["backoffDuration"].removesuffix("s")) > 0
    assert int(pod["activeDeadlineSeconds"]) >= 3600
    # Retries go on from checkpoints only if those lie on a volume; the image says SONORANT_RUNS=/runs.
    (mount,) = pod["pvcMount"]
    assert (mount["constant"], mount["mountPath"]) == ("sonorant-runs", "/runs")
    # What it reads may lie in the store; where there is none it runs all the same.
    assert store_keys(train, task) == KEYS
    assert all(entry["optional"] for entry in pod["secretAsEnv"])
    assert "SONORANT_RUNS=/runs" in (ROOT / "docker" / "train.Dockerfile").read_text()


@pytest.mark.parametrize(
    ("launch", "wanted"),
    [
        ({}, "1"),
        ({"launcher": "torchrun", "num_gpus": 8}, "8"),
        ({"num_gpus": 0}, None),
        # The pods that a TrainJob makes have them.
        ({"launcher": "trainjob", "num_gpus": 8, "num_nodes": 2}, None),
    ],
)
def test_pretraining_has_the_gpus_that_its_launcher_needs(
    tmp_path: Path, launch: dict[str, Any], wanted: str | None
) -> None:
    params = {**PARAMS, "rounds": 2, "pretrain": {**PARAMS["pretrain"], "launch": launch}}
    params["second"] = {**PARAMS["second"], "pretrain": {"launch": {"launcher": "process", "num_gpus": 3}}}
    if launch.get("num_nodes", 1) > 1:
        params["second"]["pretrain"]["launch"]["num_nodes"] = 1
    found = compiled(*graph_for(params), tmp_path / "train.yaml")
    counts = []
    for name in ("pretrain", "pretrain-2"):
        accelerator = found.executor(found.tasks()[name])["resources"].get("accelerator")
        counts.append(accelerator and accelerator["resourceCount"])
        pod = found.pod(found.tasks()[name])
        assert bool(accelerator) == ("tolerations" in pod) == ("nodeSelector" in pod)
    assert counts == [wanted, "3"]


TRAINING = ("pretrain", "pretrain-2", "ground", "align")


@pytest.mark.parametrize("name", TRAINING)
def test_training_has_a_gpu_and_shared_memory(train: Compiled, tasks: dict[str, Task], name: str) -> None:
    accelerators = {name: train.executor(tasks[name])["resources"].get("accelerator") for name in STEP_OF}
    gpu = accelerators[name]
    assert gpu
    assert (gpu["resourceType"], gpu["resourceCount"]) == ("nvidia.com/gpu", "1")
    assert {name for name, found in accelerators.items() if found} == set(TRAINING)
    pod = train.pod(tasks[name])
    (shared,) = pod["emptyDirMounts"]
    assert (shared["mountPath"], shared["medium"]) == ("/dev/shm", "Memory")
    assert pod["tolerations"] == [{"effect": "NoSchedule", "key": "nvidia.com/gpu", "operator": "Exists"}]
    assert pod["nodeSelector"] == {"labels": {"nvidia.com/gpu.present": "true"}}


OPERATIONS = {"resolve": True, "incumbent": True, "judge": False, "release": True, "conclude": False}
"""What a run does beside its steps, and whether that needs the store."""


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_not_reused_and_reaches_what_it_needs(
    train: Compiled, tasks: dict[str, Task], name: str
) -> None:
    task = tasks[name]
    assert train.executor(task)["image"] == IMAGE
    # What is in service today was not yesterday; only what a digest names stays.
    assert task.spec["cachingOptions"].get("enableCache", False) == (name == "incumbent")
    assert int(train.pod(task)["activeDeadlineSeconds"]) <= 3600
    assert store_keys(train, task) == (KEYS if OPERATIONS[name] else {})


def test_nothing_but_the_steps_and_the_operations_runs(tasks: dict[str, Task]) -> None:
    assert set(tasks) == {*STEP_OF, *OPERATIONS}


KEYS = {key: key for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}


def store_keys(train: Compiled, task: Task) -> dict[str, str]:
    """The object store's keys in a pod's environment, each with its name in the Secret."""
    return {entry["envVar"]: entry["secretKey"] for entry in secrets(train, task, "sonorant-s3")}


def secrets(train: Compiled, task: Task, name: str) -> list[dict[str, str]]:
    """What of a Kubernetes secret a pod finds in its environment."""
    entries = train.pod(task).get("secretAsEnv", [])
    return [pair for entry in entries if secret_name(entry) == name for pair in entry["keyToEnv"]]


def secret_name(entry: dict[str, Any]) -> str:
    """The name of the secret, which kfp writes in either of two ways."""
    name: str = entry.get("secretName") or entry["secretNameParameter"]["runtimeValue"]["constant"]
    return name


def test_a_new_model_is_measured_against_the_one_in_service_and_goes_there_if_it_passes(tasks: dict[str, Task]) -> None:
    assert tasks["resolve"].parameters == {"store": "store", "reference": "model@production"}
    assert tasks["incumbent"].parameters == {"store": "store", "reference": ("resolve", "Output")}
    assert tasks["evaluate"].artifacts["previous"] == [("incumbent", "model")]
    assert tasks["judge"].artifacts == {"report": [("evaluate", "report")]}
    assert tasks["judge"].parameters == {"limits": "gate"}
    released = tasks["release"]
    assert released.artifacts == {"model": [("publish", "model")], "report": [("evaluate", "report")]}
    assert released.parameters == {"store": "store", "alias": "alias"}
    conditions = [policy["condition"] for policy in released.policies if "condition" in policy]
    assert len(conditions) == 2
    assert "judge-Output'] == 'pass'" in conditions[0]
    assert "store'] != ''" in conditions[1]


def test_however_a_run_ends_it_is_told(train: Compiled, tasks: dict[str, Task]) -> None:
    """Everything else is in one group that the exit handler waits for, failed or not."""
    root = train.pipeline["root"]["dag"]["tasks"]
    assert len(root) == 2
    ending = tasks["conclude"]
    assert ending.spec["triggerPolicy"] == {"strategy": "ALL_UPSTREAM_TASKS_COMPLETED"}
    assert set(ending.spec["dependentTasks"]) == set(root) - {"conclude"}
    assert "taskFinalStatus" in str(ending.spec["inputs"]["parameters"]["status"])
    (webhook,) = secrets(train, ending, "sonorant-webhook")
    assert webhook["envVar"] == "SONORANT_WEBHOOK"
    assert [entry["optional"] for entry in train.pod(ending)["secretAsEnv"]] == [True]


@pytest.mark.parametrize("name", SECTIONS)
def test_a_section_survives_the_pipeline(train: Compiled, name: str) -> None:
    """Kubeflow's dict parameters turn 100 into 100.0; the section read from them is the same."""
    section = SECTIONS[name]
    assert parse_section(name, section, train.defaults[name]) == parse_section(name, section, PARAMS[name])


def test_whole_numbers_come_back_and_others_are_refused(tmp_path: Path) -> None:
    defaults = []
    for num_units in (100, 100.5):
        params = {**PARAMS, "cluster": {"num_units": num_units}}
        defaults.append(compiled(*graph_for(params), tmp_path / "train.yaml").defaults["cluster"])
    assert isinstance(defaults[0]["num_units"], float)
    restored = parse_section("cluster", SECTIONS["cluster"], defaults[0])
    assert repr(restored.model_dump()["num_units"]) == "100"
    with pytest.raises(ValueError, match=r"cluster\.num_units: found 100\.5"):
        parse_section("cluster", SECTIONS["cluster"], defaults[1])


def test_the_compiled_pipeline_is_pinned(train: Compiled) -> None:
    check_pinned(train, GOLDEN)


def test_no_secret_is_a_parameter(train: Compiled) -> None:
    """Keys come as Kubernetes secrets: no parameter is named like one, and no text of the package holds one."""
    names = train.pipeline["root"]["inputDefinitions"]["parameters"]
    assert not [name for name in names if re.search("secret|password|token|key|credential", name, re.IGNORECASE)]
    for executor in train.pipeline["deploymentSpec"]["executors"].values():
        environment = executor.get("container", {}).get("env", [])
        assert not [entry for entry in environment if re.search("SECRET|KEY|TOKEN", entry["name"])]
