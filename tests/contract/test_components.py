"""The components and the compiled pipelines are what the signatures of the steps say."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import yaml
from kfp import compiler

import components
from components.image import IMAGE
from pipelines.train import graph_for
from sonorant.config import SECTIONS
from sonorant.params import parse_round, parse_section, read_params
from sonorant.steps import STEPS
from tests.workflow import workflow

ROOT = Path(__file__).resolve().parents[2]
PARAMS = read_params([ROOT / "params.yaml"])


def task_name(step: str, number: int) -> str:
    """What kfp calls a step in a round."""
    return step if number == 1 else f"{step}-{number}"


def parameter_name(step: str, number: int) -> str:
    """The pipeline's parameter that holds a step's section in a round."""
    return step if number == 1 else f"second_{step}"


TASKS = {task_name(task.step, task.round): task for task in workflow(2)}


def compile_with(params: dict[str, Any], folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The compiled pipeline and its Kubernetes document."""
    path = folder / "train.yaml"
    graph, parameters = graph_for(params)
    compiler.Compiler().compile(graph, str(path), pipeline_parameters=parameters)
    pipeline, platform = yaml.safe_load_all(path.read_text())
    return pipeline, platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of two rounds, which hold all that one has."""
    return compile_with({**PARAMS, "rounds": 2}, tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="module")
def pipeline(compiled: tuple[dict[str, Any], dict[str, Any]]) -> dict[str, Any]:
    return compiled[0]


@pytest.fixture(scope="module")
def kubernetes(compiled: tuple[dict[str, Any], dict[str, Any]]) -> dict[str, Any]:
    return compiled[1]


def test_every_step_has_a_component_and_a_task(pipeline: dict[str, Any]) -> None:
    assert set(components.__all__) == set(STEPS)
    assert set(TASKS) == set(pipeline["root"]["dag"]["tasks"])


@pytest.mark.parametrize("name", TASKS)
def test_a_component_has_the_inputs_and_outputs_of_its_step(pipeline: dict[str, Any], name: str) -> None:
    step, component = STEPS[TASKS[name].step], pipeline["components"][f"comp-{name}"]
    inputs = component["inputDefinitions"]
    assert inputs["parameters"] == {"config": {"parameterType": "STRUCT"}}
    found = inputs.get("artifacts", {})
    assert set(found) == set(step.inputs)
    assert {n for n in found if found[n].get("isOptional", False)} == step.optional
    outputs = component["outputDefinitions"]["artifacts"]
    assert outputs.pop("metrics")["artifactType"]["schemaTitle"] == "system.Metrics"
    assert set(outputs) == set(step.outputs)
    assert "parameters" not in component["outputDefinitions"]


@pytest.mark.parametrize("name", STEPS)
def test_a_component_hands_everything_to_its_step_and_holds_no_thought(name: str) -> None:
    """Its body is a docstring, two imports and `run(step, config, metrics, artifact=artifact, …)`."""
    tree = ast.parse((ROOT / "components" / f"{name}.py").read_text())
    (function,) = (node for node in tree.body if isinstance(node, ast.FunctionDef))
    summary, step_import, run_import, call = function.body
    assert ast.unparse(step_import) == f"from sonorant.steps import {name}"
    assert ast.unparse(run_import) == "from sonorant.steps.component import run"
    artifacts = [n for n, role in STEPS[name].artifacts.items() if role != "scratch"]
    arguments = ", ".join([name, "config", "metrics", *(f"{a}={a}" for a in artifacts)])
    assert ast.unparse(call) == f"run({arguments})"
    assert " ".join(ast.literal_eval(summary.value).split()) == STEPS[name].summary


def test_an_artifact_has_one_type_everywhere(pipeline: dict[str, Any]) -> None:
    types: dict[str, set[str]] = {}
    for component in pipeline["components"].values():
        for definitions in (component["inputDefinitions"], component["outputDefinitions"]):
            for artifact, definition in definitions.get("artifacts", {}).items():
                types.setdefault(artifact, set()).add(definition["artifactType"]["schemaTitle"])
    assert {artifact: found for artifact, found in types.items() if len(found) > 1} == {}


@pytest.mark.parametrize("num_rounds", [1, 2])
def test_edges_lead_from_the_last_writer_to_the_reader(tmp_path: Path, num_rounds: int) -> None:
    pipeline, _ = compile_with({**PARAMS, "rounds": num_rounds}, tmp_path)
    wanted = {task_name(task.step, task.round): task for task in workflow(num_rounds)}
    found = pipeline["root"]["dag"]["tasks"]
    assert set(found) == set(wanted)
    for name, task in wanted.items():
        parameter = parameter_name(task.step, task.round)
        assert found[name]["inputs"]["parameters"] == {"config": {"componentInputParameter": parameter}}
        writers = {artifact: task_name(*writer) for artifact, writer in task.reads.items()}
        assert found[name]["inputs"].get("artifacts", {}) == {
            artifact: {"taskOutputArtifact": {"producerTask": writer, "outputArtifactKey": artifact}}
            for artifact, writer in writers.items()
        }
        assert set(found[name].get("dependentTasks", [])) == set(writers.values())


def test_the_second_round_takes_what_second_changes(tmp_path: Path) -> None:
    """Its sections reach it whole, through Kubeflow's whole numbers turned fractions."""
    changes = {"cluster": {"layer": 1, "num_units": 50}, "pretrain": {"optim": {"beta1": 0.8}}}
    params = {**PARAMS, "rounds": 2, "second": changes}
    pipeline, _ = compile_with(params, tmp_path)
    defaults = {n: p["defaultValue"] for n, p in pipeline["root"]["inputDefinitions"]["parameters"].items()}
    for name in changes:
        found = parse_section(name, SECTIONS[name], defaults[f"second_{name}"])
        assert found == parse_round(name, params, 2) != parse_round(name, params, 1)
        assert parse_section(name, SECTIONS[name], defaults[name]) == parse_round(name, params, 1)


@pytest.mark.parametrize("name", TASKS)
def test_every_task_has_its_share_of_the_cluster(
    pipeline: dict[str, Any], kubernetes: dict[str, Any], name: str
) -> None:
    container = pipeline["deploymentSpec"]["executors"][f"exec-{name}"]["container"]
    task, pod = pipeline["root"]["dag"]["tasks"][name], kubernetes[f"exec-{name}"]
    assert container["image"] == IMAGE
    resources = container["resources"]
    assert float(resources["resourceCpuLimit"]) >= float(resources["resourceCpuRequest"]) >= 1
    assert resources["resourceMemoryLimit"] == resources["resourceMemoryRequest"]
    assert task["cachingOptions"] == {"enableCache": True}
    retries = task["retryPolicy"]
    assert retries["maxRetryCount"] >= 1
    assert retries["backoffFactor"] > 1
    assert float(retries["backoffDuration"].removesuffix("s")) > 0
    assert int(pod["activeDeadlineSeconds"]) >= 3600
    # Retries go on from checkpoints only if those lie on a volume; the image says SONORANT_RUNS=/runs.
    (mount,) = pod["pvcMount"]
    assert (mount["constant"], mount["mountPath"]) == ("sonorant-runs", "/runs")
    assert "ENV SONORANT_RUNS=/runs" in (ROOT / "docker" / "train.Dockerfile").read_text()


@pytest.mark.parametrize("number", [1, 2])
def test_pretraining_has_a_gpu_and_shared_memory(
    pipeline: dict[str, Any], kubernetes: dict[str, Any], number: int
) -> None:
    executors = pipeline["deploymentSpec"]["executors"]
    accelerators = {
        name: executors[f"exec-{name}"]["container"]["resources"].get("accelerator") for name in TASKS
    }
    gpu = accelerators[task_name("pretrain", number)]
    assert (gpu["resourceType"], gpu["resourceCount"]) == ("nvidia.com/gpu", "1")
    assert {name for name, found in accelerators.items() if found} == {"pretrain", "pretrain-2"}
    pod = kubernetes[f"exec-{task_name('pretrain', number)}"]
    (shared,) = pod["emptyDirMounts"]
    assert (shared["mountPath"], shared["medium"]) == ("/dev/shm", "Memory")
    assert pod["tolerations"] == [{"effect": "NoSchedule", "key": "nvidia.com/gpu", "operator": "Exists"}]


@pytest.mark.parametrize("name", SECTIONS)
def test_a_section_survives_the_pipeline(pipeline: dict[str, Any], name: str) -> None:
    """Kubeflow's dict parameters turn 100 into 100.0; the section read from them is the same."""
    default = pipeline["root"]["inputDefinitions"]["parameters"][name]["defaultValue"]
    assert parse_section(name, SECTIONS[name], default) == parse_section(name, SECTIONS[name], PARAMS[name])


def test_whole_numbers_come_back_and_others_are_refused(tmp_path: Path) -> None:
    defaults = []
    for num_units in (100, 100.5):
        params = {**PARAMS, "cluster": {"num_units": num_units}}
        pipeline, _ = compile_with(params, tmp_path)
        defaults.append(pipeline["root"]["inputDefinitions"]["parameters"]["cluster"]["defaultValue"])
    assert isinstance(defaults[0]["num_units"], float)
    restored = parse_section("cluster", SECTIONS["cluster"], defaults[0])
    assert repr(restored.model_dump()["num_units"]) == "100"
    with pytest.raises(ValueError, match=r"cluster\.num_units: found 100\.5"):
        parse_section("cluster", SECTIONS["cluster"], defaults[1])


@pytest.mark.parametrize("name", SECTIONS)
def test_a_changed_section_reaches_its_own_step_alone(pipeline: dict[str, Any], tmp_path: Path, name: str) -> None:
    changed, _ = compile_with({**PARAMS, "rounds": 2, name: {**PARAMS[name], "seed": 12_345}}, tmp_path)
    before, after = (p["root"]["inputDefinitions"]["parameters"] for p in (pipeline, changed))
    mine = {parameter_name(task.step, task.round) for task in TASKS.values() if task.step == name}
    assert {n for n in after if before[n] != after[n]} == mine
    assert {after[n]["defaultValue"]["seed"] for n in mine} == {12_345}
