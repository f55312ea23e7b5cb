"""What a step is: a typed function whose signature is its declaration.

The command line is made from the signature; the DVC stage and the Kubeflow component are held to it by
contract tests. Around the function, `@step` does what every step needs: it checks the configuration and the
inputs, gives the function a fresh folder for each output, and moves the folders into place only when the
function has returned. So a step that is killed leaves nothing where an artifact should be. Where `launch` says so, it
has other processes do all that.

Every artifact is a folder. In it `artifact.json` says which step made it, from which configuration and
inputs, and the digest of its files, and the same of all that these were made from; it holds no time and no host, so the
same work gives the same bytes.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import shutil
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

from sonorant import __version__
from sonorant.artifacts import (
    check_replaceable,
    digest_folder,
    is_absent,
    let_read,
    put_in_place,
    read_record,
    staging_place,
    write_record,
)
from sonorant.config import SECTIONS, LaunchConfig, Section
from sonorant.launch import Work, do_elsewhere, is_elsewhere
from sonorant.params import parse_section

Role = Literal["in", "ins", "out", "scratch"]
In = Annotated[Path, "in"]
"""An artifact the step reads."""
Ins = Annotated[list[Path], "ins"]
"""Artifacts of one kind that the step reads, in any number; the parameter is named for the artifact, with an s."""
Out = Annotated[Path, "out"]
"""An artifact the step writes: an empty folder while the step runs."""
Scratch = Annotated[Path, "scratch"]
"""A folder that outlives a kill and belongs to this configuration and these inputs: checkpoints, shards."""

Metrics = dict[str, float]
LIBRARIES = ("torch", "torchaudio", "numpy", "faiss-cpu", "faiss-gpu", "lhotse", "espeakng-loader")


@dataclass(frozen=True)
class Step:
    """A declared step; calling it runs it."""

    name: str
    summary: str
    config: type[Section]
    artifacts: Mapping[str, Role]
    optional: frozenset[str]
    function: Callable[..., Metrics] = field(repr=False)

    @property
    def inputs(self) -> list[str]:
        """Names of the artifacts it reads."""
        return [name for name, role in self.artifacts.items() if role in ("in", "ins")]

    @property
    def section(self) -> str:
        """The section of the parameters that configures it: its own, or that which its configuration adds to."""
        return next((name for name, section in SECTIONS.items() if issubclass(self.config, section)), self.name)

    @property
    def outputs(self) -> list[str]:
        """Names of the artifacts it writes."""
        return [name for name, role in self.artifacts.items() if role == "out"]

    def __call__(
        self,
        config: Section | Mapping[str, Any],
        /,
        *,
        scratch: Path | str | None = None,
        **paths: Path | str | Sequence[Path | str] | None,
    ) -> Metrics:
        """Run the step and return its metrics.

        Raises ValueError where the configuration, an input or a path is not what it should be.
        """
        section = config if isinstance(config, Section) else parse_section(self.section, self.config, config)
        assert isinstance(section, self.config)
        unknown = set(paths) - set(self.inputs) - set(self.outputs)
        missing = {n for n in (*self.inputs, *self.outputs) if not paths.get(n)} - self.optional
        if unknown or missing:
            raise ValueError(
                f"{self.name}: found paths {sorted(paths)}, wanted {[*self.inputs, *self.outputs]}: "
                f"{'leave out ' + str(sorted(unknown)) if unknown else 'add ' + str(sorted(missing))}"
            )
        inputs = {n: several(read) for n in self.inputs if (read := paths.get(n))}
        # Kubeflow cannot leave an input out when it runs; what is not there comes as a folder that says so.
        for name in self.optional & {name for name, folders in inputs.items() if all(map(is_absent, folders))}:
            del inputs[name]
        outputs = {n: Path(str(paths[n])) for n in self.outputs}
        for name, path in outputs.items():
            check_replaceable(path, name, [path for folders in inputs.values() for path in folders])
        given = {name: [read_record(folder, name) for folder in folders] for name, folders in inputs.items()}
        record = {
            "step": self.name,
            "sonorant": __version__,
            "config": section.model_dump(mode="json"),
            "inputs": self.singled({name: [about["digest"] for about in records] for name, records in given.items()}),
        }
        key = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]
        launch: LaunchConfig | None = getattr(section, "launch", None)
        if launch and is_elsewhere(launch):
            assert scratch is None, "other processes choose it themselves"
            assert "ins" not in self.artifacts.values()
            params = {self.section: {name: value for name, value in section.written().items() if name != "launch"}}
            singles = {name: folder for name, (folder,) in inputs.items()}
            do_elsewhere(launch, Work(self.name, key, record, params, singles, outputs, scratch_root()))
            return dict(read_record(*next((path, name) for name, path in outputs.items()))["metrics"])
        # torchrun starts one process a rank; the first one owns the folders.
        is_first = os.environ.get("RANK", "0") == "0"
        staged = {n: staging_place(p) for n, p in outputs.items()}
        arguments: dict[str, Any] = {**dict.fromkeys(self.inputs), **self.singled(inputs), **staged}
        if "scratch" in self.artifacts:
            arguments["scratch"] = Path(scratch) if scratch else scratch_root() / f"{self.name}-{key}"
            arguments["scratch"].mkdir(parents=True, exist_ok=True)
        if not is_first:
            return self.function(section, **arguments)
        try:
            for path in staged.values():
                shutil.rmtree(path, ignore_errors=True)
                path.mkdir(parents=True)
            metrics = self.function(section, **arguments)
            record["libraries"] = library_versions()
            record["lineage"] = lineage_of([about for records in given.values() for about in records])
            for name, path in staged.items():
                about = {"artifact": name, "metrics": metrics, "digest": digest_folder(path)}
                write_record(path, {**record, **about})
                let_read(path)
            for name, path in staged.items():
                put_in_place(path, outputs[name])
        finally:
            for path in staged.values():
                shutil.rmtree(path, ignore_errors=True)
        if "scratch" in self.artifacts and scratch is None:
            shutil.rmtree(arguments["scratch"], ignore_errors=True)
        return metrics

    def singled(self, found: Mapping[str, list[Any]]) -> dict[str, Any]:
        """What was found for each input, of those that are one artifact the only item."""
        return {name: items if self.artifacts[name] == "ins" else items[0] for name, items in found.items()}


def step(function: Callable[..., Metrics]) -> Step:
    """Declare a step from a function `name(config: ItsConfig, *, artifact: In, …: Out) -> Metrics`."""
    hints = typing.get_type_hints(function, include_extras=True)
    artifacts: dict[str, Role] = {}
    optional = set()
    parameters = list(inspect.signature(function).parameters.values())
    for parameter in parameters[1:]:
        hint = hints[parameter.name]
        if typing.get_origin(hint) in (typing.Union, types.UnionType):
            hint = next(h for h in typing.get_args(hint) if h is not type(None))
            optional.add(parameter.name)
        artifacts[parameter.name] = typing.get_args(hint)[1]
    summary = (inspect.getdoc(function) or "").split("\n\n")[0].replace("\n", " ")
    config = hints[parameters[0].name]
    return Step(function.__name__, summary, config, artifacts, frozenset(optional), function)


def several(given: Path | str | Sequence[Path | str]) -> list[Path]:
    """One path or many, as many."""
    return [Path(given)] if isinstance(given, Path | str) else [Path(path) for path in given]


def scratch_root() -> Path:
    """Where steps keep what must outlive a kill: $SONORANT_RUNS, else ./runs."""
    return Path(os.environ.get("SONORANT_RUNS", "runs"))


def lineage_of(inputs: Collection[Mapping[str, Any]]) -> dict[str, Any]:
    """By digest, what made each input, each input's input, and so on: step, configuration and the inputs' digests."""
    lineage: dict[str, Any] = {}
    for record in inputs:
        made = {key: record[key] for key in ("step", "config", "inputs") if key in record}
        lineage |= {**record.get("lineage", {}), record["digest"]: made}
    return lineage


def library_versions() -> dict[str, str]:
    """Versions of the libraries whose change may change a result."""
    versions = {}
    for library in LIBRARIES:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return versions
