"""A compiled pipeline read back: its tasks wherever they are nested, and where each input comes from."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from kfp import compiler

from components.image import IMAGE


@dataclass(frozen=True)
class Compiled:
    """A pipeline's intermediate representation and its Kubernetes document."""

    pipeline: dict[str, Any]
    kubernetes: dict[str, Any]

    def executor(self, task: Task) -> dict[str, Any]:
        """The container of a task."""
        found: dict[str, Any] = self.pipeline["deploymentSpec"]["executors"][task.executor]["container"]
        return found

    def pod(self, task: Task) -> dict[str, Any]:
        """What Kubernetes is told of a task's pod."""
        found: dict[str, Any] = self.kubernetes.get(task.executor, {})
        return found

    @property
    def defaults(self) -> dict[str, Any]:
        """The pipeline's parameters that have a default, and it."""
        parameters = self.pipeline["root"]["inputDefinitions"]["parameters"]
        return {name: about["defaultValue"] for name, about in parameters.items() if "defaultValue" in about}

    def tasks(self) -> dict[str, Task]:
        """All tasks that run something, by name; importers too."""
        return {task.name: task for task in self._within(Scope(self.pipeline["root"]["dag"]))}

    def _within(self, scope: Scope) -> Iterator[Task]:
        for name, spec in scope.dag["tasks"].items():
            component = self.pipeline["components"][spec["componentRef"]["name"]]
            if "dag" in component:
                yield from self._within(Scope(component["dag"], spec, scope))
                continue
            given = spec.get("inputs", {})
            yield Task(
                name=name,
                spec=spec,
                component=component,
                parameters={key: self.parameter(source, scope) for key, source in given.get("parameters", {}).items()},
                artifacts={key: self.writers(source, scope) for key, source in given.get("artifacts", {}).items()},
                policies=[around["triggerPolicy"] for around in [spec, *scope.around()] if "triggerPolicy" in around],
            )

    def parameter(self, source: dict[str, Any], scope: Scope) -> str | tuple[str, str] | Any:
        """The pipeline's parameter that a value comes from, a pair (task, output), or a constant."""
        if "runtimeValue" in source:
            return source["runtimeValue"]["constant"]
        if "taskFinalStatus" in source:
            return source
        if "taskOutputParameter" in source:
            output = source["taskOutputParameter"]
            return (output["producerTask"], output["outputParameterKey"])
        name = source["componentInputParameter"]
        if scope.parent is None or scope.task is None:
            return name
        iterator = scope.task.get("parameterIterator", {})
        if iterator.get("itemInput") == name:
            items = iterator["items"]["inputParameter"]
            return f"{self.parameter({'componentInputParameter': items}, scope)}[]"
        return self.parameter(scope.task["inputs"]["parameters"][name], scope.parent)

    def writers(self, source: dict[str, Any], scope: Scope) -> list[tuple[str, str]]:
        """The tasks that an artifact may come from, each with the output's key."""
        if "componentInputArtifact" in source:
            assert scope.parent is not None
            assert scope.task is not None
            return self.writers(scope.task["inputs"]["artifacts"][source["componentInputArtifact"]], scope.parent)
        output = source["taskOutputArtifact"]
        return self.written(scope.dag, output["producerTask"], output["outputArtifactKey"])

    def written(self, dag: dict[str, Any], task: str, key: str) -> list[tuple[str, str]]:
        """The tasks inside a task of `dag` that write its output."""
        component = self.pipeline["components"][dag["tasks"][task]["componentRef"]["name"]]
        if "dag" not in component:
            return [(task, key)]
        selectors = component["dag"]["outputs"]["artifacts"][key]["artifactSelectors"]
        return [
            writer
            for selector in selectors
            for writer in self.written(component["dag"], selector["producerSubtask"], selector["outputArtifactKey"])
        ]


@dataclass(frozen=True)
class Scope:
    """A graph, the task that it is the inside of, and the graph around that."""

    dag: dict[str, Any]
    task: dict[str, Any] | None = None
    parent: Scope | None = None

    def around(self) -> list[dict[str, Any]]:
        """The tasks around, from the inside out."""
        return [] if self.task is None or self.parent is None else [self.task, *self.parent.around()]


@dataclass(frozen=True)
class Task:
    """A task that runs something, and where each of its inputs comes from."""

    name: str
    spec: dict[str, Any]
    component: dict[str, Any] = field(repr=False)
    parameters: dict[str, Any]
    artifacts: dict[str, list[tuple[str, str]]]
    policies: list[dict[str, Any]]
    """When it runs, from the inside out: conditions, and that of an exit handler."""

    @property
    def executor(self) -> str:
        """The label of what it runs."""
        label: str = self.component["executorLabel"]
        return label


def compiled(graph: Any, parameters: dict[str, Any], path: Path) -> Compiled:
    """A pipeline, compiled to a file and read from it."""
    compiler.Compiler().compile(graph, str(path), pipeline_parameters=parameters)
    pipeline, platform = yaml.safe_load_all(path.read_text())
    return Compiled(pipeline, platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"])


def check_pinned(found: Compiled, golden: Path) -> None:
    """Hold a compiled pipeline to the file that pins it: what a cluster is told.

    Renew it with RENEW_GOLDEN=1 and look at the difference. The image is chosen by $SONORANT_IMAGE, the parameters'
    values when it is submitted: neither is the graph's.
    """
    document = copy.deepcopy({"pipeline": found.pipeline, "kubernetes": found.kubernetes})
    for executor in document["pipeline"]["deploymentSpec"]["executors"].values():
        if "container" in executor:
            assert executor["container"].pop("image") == IMAGE
    for parameter in document["pipeline"]["root"]["inputDefinitions"]["parameters"].values():
        parameter.pop("defaultValue", None)
    if os.environ.get("RENEW_GOLDEN"):
        golden.write_text(yaml.safe_dump(document, width=120))
    assert yaml.safe_load(golden.read_text()) == document
