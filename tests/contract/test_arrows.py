"""Who may import whom, read from the sources: every import counts, also those inside functions."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "sonorant"

LIBRARY = {
    "config",
    "soft_dtw",
    "data",
    "models",
    "tasks",
    "training",
    "clustering",
    "inference",
    "evaluation",
}
ARROWS = {
    "artifacts": set(),
    "store": {"artifacts"},
    "config": set(),
    "soft_dtw": set(),
    "data": {"config", "artifacts", "store"},
    "models": {"config", "data.frames"},
    "tasks": {"models", "soft_dtw", "data.frames", "config"},
    "training": {"tasks", "models", "data", "config"},
    "clustering": {"models", "data", "config"},
    "inference": {"config", "data.audio", "data.frames", "data.windows", "models"},
    "evaluation": {"data.frames"},
    "launch": {"artifacts", "config"},
    "steps": LIBRARY | {"params", "artifacts", "launch"},
    "studies": {"steps", "evaluation", "launch", "params", "config"},
    "params": {"config"},
    "client": set(),
    "release": {
        "artifacts",
        "config",
        "params",
        "store",
        "client",
        "inference",
        "data",
        # What a report holds of each utterance, and what of a difference that shows.
        "evaluation.estimates",
        "evaluation.intervals",
    },
    "cli": {"steps", "studies", "config", "params", "client", "store", "data"},
    "__main__": {"cli"},
}
"""Rooms of the package and what of it they may import beside themselves."""
OUTSIDE = {
    "components": {"sonorant.steps", "sonorant.release"},
    "pipelines": {"components", "sonorant.config", "sonorant.params", "sonorant.studies.plan"},
    "serving": {"sonorant.inference"},
}
"""Folders that run from the checkout, and what of ours they may import beside themselves."""
TENSORS_AND_NUMBERS = {"Tensor", "torch", "float", "int", "bool", "str", "Literal", "tuple", "list"}


def imports(path: Path, package: str) -> Iterator[str]:
    """Dotted names of what a file imports, relative ones resolved against its `package`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def lies_in(name: str, room: str) -> bool:
    """Whether a dotted name is that of the room or of something in it."""
    return name == room or name.startswith(f"{room}.")


def is_ours(name: str) -> bool:
    """Whether a dotted name leads to a room: the root package itself holds the version alone."""
    return any(lies_in(name, room) for room in (*OUTSIDE, *(f"sonorant.{p.stem}" for p in PACKAGE.iterdir())))


def files_of(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*.py"))


def forbidden(path: Path, package: str, room: str, allowed: set[str]) -> list[str]:
    return [
        name
        for name in imports(path, package)
        if is_ours(name) and not any(lies_in(name, other) for other in {room, *allowed})
    ]


@pytest.mark.parametrize("path", files_of(PACKAGE), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_room_of_the_package_imports_only_what_the_table_allows(path: Path) -> None:
    relative = path.relative_to(PACKAGE)
    room = relative.parts[0].removesuffix(".py")
    package = ".".join(["sonorant", *relative.parts[:-1]])
    if room == "__init__":
        assert not [name for name in imports(path, package) if is_ours(name)]
        return
    assert room in ARROWS, f"{relative} lies in no room of the table: add the room to design and table"
    assert forbidden(path, package, f"sonorant.{room}", {f"sonorant.{other}" for other in ARROWS[room]}) == []


@pytest.mark.parametrize(
    "path", [p for folder in OUTSIDE for p in files_of(ROOT / folder)], ids=lambda p: str(p.relative_to(ROOT))
)
def test_a_folder_outside_imports_only_what_the_table_allows(path: Path) -> None:
    relative = path.relative_to(ROOT)
    room = relative.parts[0]
    assert forbidden(path, ".".join(relative.parts[:-1]), room, OUTSIDE[room]) == []


TASK_FILES = [p for p in files_of(PACKAGE / "tasks") if p.name not in ("__init__.py", "task.py")]


@pytest.mark.parametrize("path", TASK_FILES, ids=lambda p: p.name)
def test_loss_functions_take_tensors(path: Path) -> None:
    """No public function of a task's file takes a model, a batch or a configuration."""
    for function in ast.parse(path.read_text()).body:
        if isinstance(function, ast.FunctionDef) and not function.name.startswith("_"):
            arguments = function.args
            for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
                where = f"{function.name}: {argument.arg}"
                assert argument.annotation is not None, f"{where} has no annotation"
                names = {node.id for node in ast.walk(argument.annotation) if isinstance(node, ast.Name)}
                assert names <= TENSORS_AND_NUMBERS, f"{where} is no tensor and no number"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from sonorant.training import loop", ["sonorant.training.loop"]),
        ("def f():\n    import sonorant.steps.prepare", ["sonorant.steps.prepare"]),
        ("from sonorant import steps", ["sonorant.steps"]),
        ("from ..models import encoder", ["sonorant.models.encoder"]),
        ("from sonorant import __version__\nimport torch", []),
        ("from sonorant.config import Section\nfrom . import frames", []),
    ],
)
def test_a_forbidden_import_is_found(tmp_path: Path, source: str, found: list[str]) -> None:
    path = tmp_path / "module.py"
    path.write_text(source)
    assert forbidden(path, "sonorant.data", "sonorant.data", {"sonorant.config"}) == found
