"""The components and the compiled pipeline are what the signatures of the steps say."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import yaml
from kfp import compiler

import components
from components.image import IMAGE
from pipelines.train import train
from sonorant.config import SECTIONS
from sonorant.params import parse_section, read_params
from sonorant.steps import STEPS

ROOT = Path(__file__).resolve().parents[2]
PARAMS = read_params([ROOT / "params.yaml"])
WRITERS = {artifact: step.name for step in STEPS.values() for artifact in step.outputs}


def compile_with(params: dict[str, Any], folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The compiled pipeline and its Kubernetes document."""
    path = folder / "train.yaml"
    compiler.Compiler().compile(train, str(path), pipeline_parameters=params)
    pipeline, platform = yaml.safe_load_all(path.read_text())
    return pipeline, platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    return compile_with(PARAMS, tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="module")
def pipeline(compiled: tuple[dict[str, Any], dict[str, Any]]) -> dict[str, Any]:
    return compiled[0]


@pytest.fixture(scope="module")
def kubernetes(compiled: tuple[dict[str, Any], dict[str, Any]]) -> dict[str, Any]:
    return compiled[1]


def test_every_step_has_a_component_and_a_task(pipeline: dict[str, Any]) -> None:
    assert set(components.__all__) == set(STEPS) == set(pipeline["root"]["dag"]["tasks"])


@pytest.mark.parametrize("name", STEPS)
def test_a_component_has_the_inputs_and_outputs_of_its_step(pipeline: dict[str, Any], name: str) -> None:
    step, component = STEPS[name], pipeline["components"][f"comp-{name}"]
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


@pytest.mark.parametrize("name", STEPS)
def test_edges_lead_from_writer_to_reader(pipeline: dict[str, Any], name: str) -> None:
    step, task = STEPS[name], pipeline["root"]["dag"]["tasks"][name]
    assert task["inputs"]["parameters"] == {"config": {"componentInputParameter": name}}
    edges = task["inputs"].get("artifacts", {})
    assert set(step.inputs) - step.optional <= set(edges) <= set(step.inputs)
    for artifact, source in edges.items():
        assert source == {
            "taskOutputArtifact": {"producerTask": WRITERS[artifact], "outputArtifactKey": artifact}
        }
    assert set(task.get("dependentTasks", [])) == {WRITERS[artifact] for artifact in edges}


@pytest.mark.parametrize("name", STEPS)
def test_every_step_has_its_share_of_the_cluster(
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


def test_pretraining_has_a_gpu_and_shared_memory(
    pipeline: dict[str, Any], kubernetes: dict[str, Any]
) -> None:
    executors = pipeline["deploymentSpec"]["executors"]
    accelerators = {
        name: executors[f"exec-{name}"]["container"]["resources"].get("accelerator") for name in STEPS
    }
    gpu = accelerators.pop("pretrain")
    assert (gpu["resourceType"], gpu["resourceCount"]) == ("nvidia.com/gpu", "1")
    assert set(accelerators.values()) == {None}
    pod = kubernetes["exec-pretrain"]
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
def test_a_changed_section_reaches_its_own_task_alone(
    pipeline: dict[str, Any], tmp_path: Path, name: str
) -> None:
    changed, _ = compile_with({**PARAMS, name: {**PARAMS[name], "seed": 12_345}}, tmp_path)
    before, after = (p["root"]["inputDefinitions"]["parameters"] for p in (pipeline, changed))
    assert [n for n in SECTIONS if before[n] != after[n]] == [name]
    assert after[name]["defaultValue"]["seed"] == 12_345
    readers = [
        n
        for n, task in changed["root"]["dag"]["tasks"].items()
        if task["inputs"]["parameters"]["config"]["componentInputParameter"] == name
    ]
    assert readers == [name]
