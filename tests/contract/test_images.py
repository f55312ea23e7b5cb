"""The images' recipes, read: what is pinned, who runs, what stays outside. `make test-images` builds and tries them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = {"serve": ["serve", "store"], "train": ["train", "synthesis", "pipelines"]}
NOT_SERVED = {"kfp", "kubeflow", "kubernetes", "dvc", "lhotse", "numba", "scipy", "matplotlib", "triton"}


def pins(path: Path) -> dict[str, str]:
    """Package and version of every line that pins one."""
    return dict(re.findall(r"^([a-z0-9._-]+)==([^ \n]+)", path.read_text(), re.M))


def requirements(name: str) -> Path:
    return ROOT / "docker" / f"requirements-{name}.txt"


def asked(extras: list[str]) -> set[str]:
    """The packages that the project and some of its extras name, extras of extras included."""
    lines = list(PROJECT["dependencies"])
    for extra in extras:
        lines += PROJECT["optional-dependencies"][extra]
    found = [Requirement(line) for line in lines]
    inner = [extra for one in found if one.name == "sonorant" for extra in one.extras]
    names = {canonicalize_name(one.name) for one in found if one.name != "sonorant"}
    return names | asked(sorted(inner)) if inner else names


def instructions(name: str) -> list[tuple[str, str]]:
    """A Dockerfile's instructions in order, lines that go on joined, comments left out."""
    lines = (ROOT / "docker" / f"{name}.Dockerfile").read_text().splitlines()
    text = "\n".join(line for line in lines if not line.startswith("#")).replace("\\\n", " ")
    return [(word, " ".join(rest.split())) for word, rest in re.findall(r"^ *([A-Z]+) (.*)$", text, re.M)]


def final_stage(name: str) -> list[tuple[str, str]]:
    found = instructions(name)
    last = max(index for index, (word, _) in enumerate(found) if word == "FROM")
    return found[last:]


@pytest.mark.parametrize("name", ["serve", "train", "build", "setuptools"])
def test_every_requirement_is_pinned_with_its_hash(name: str) -> None:
    text = requirements(name).read_text()
    entries = re.split(r"\n(?! )", text.strip())
    for entry in entries:
        assert re.match(r"[a-z0-9._-]+==\S+ (; .* )?\\\n    --hash=sha256:[0-9a-f]{64}", entry), entry[:200]
    assert "://" not in text


@pytest.mark.parametrize("name", ["serve", "train", "build", "setuptools"])
def test_the_versions_are_those_of_constraints(name: str) -> None:
    wanted = pins(ROOT / "constraints.txt")
    # The wheel's own builder is no dependency of ours.
    builder = {"hatchling", "trove-classifiers"} if name == "build" else set()
    found = {package: version for package, version in pins(requirements(name)).items() if package not in builder}
    differing = {p: (v, wanted.get(p)) for p, v in found.items() if wanted.get(p) != v}
    assert not differing, f"found {differing}, wanted constraints.txt's: make lock"


@pytest.mark.parametrize(("name", "extras"), EXTRAS.items())
def test_the_extras_packages_are_all_there(name: str, extras: list[str]) -> None:
    lacking = asked(extras) - set(pins(requirements(name)))
    assert not lacking, f"found no {lacking} in {requirements(name).name}, wanted all of {extras}: make lock"


@pytest.mark.parametrize(("name", "extras"), EXTRAS.items())
def test_make_lock_renews_them(name: str, extras: list[str]) -> None:
    [line] = [line for line in (ROOT / "Makefile").read_text().splitlines() if line.endswith(requirements(name).name)]
    assert re.findall(r"--extra (\S+)", line) == extras


def test_the_server_has_no_training_libraries() -> None:
    assert not NOT_SERVED & set(pins(requirements("serve")))
    assert set(pins(requirements("train"))) >= NOT_SERVED


@pytest.mark.parametrize("name", ["serve", "train"])
def test_installs_check_hashes_or_take_nothing_from_an_index(name: str) -> None:
    stages = [rest for word, rest in instructions(name) if word == "RUN"]
    commands = [command for rest in stages for command in rest.split("&&")]
    installs = [command for command in commands if re.search(r"\bpip\b.*\b(install|wheel)\b", command)]
    assert len(installs) == 5
    for command in installs:
        assert "--no-deps" in command
        assert "--no-index" in command or "--no-build-isolation --wheel-dir" in command or "--require-hashes" in command
        # What has no wheel would be built with whatever setuptools is newest.
        built = f"requirements-{name}.txt" in command
        assert not built or "--no-build-isolation" in command, command
        # A cache mount is no layer.
        assert "--no-cache-dir" in command or "type=cache,target=/root/.cache/pip" in "".join(stages), command


@pytest.mark.parametrize("name", ["serve", "train"])
def test_the_last_stage_installs_nothing_and_runs_as_nobody_in_particular(name: str) -> None:
    stage = final_stage(name)
    words = [word for word, _ in stage]
    assert stage[0] == ("FROM", "python:3.11-slim")
    assert [rest for word, rest in stage if word == "USER"] == ["10001"]
    assert words.index("USER") < words.index("CMD")
    for word, rest in stage:
        assert word != "RUN" or not re.search(r"pip|apt|gcc|curl|wget", rest), rest
        assert word != "COPY" or "--from=" in rest or rest == "serving /app/serving", rest
    text = " ".join(rest for _, rest in stage)
    for label in ("title", "description", "version", "revision", "source", "licenses"):
        assert f"org.opencontainers.image.{label}=" in text
    assert ("HEALTHCHECK" in words) == (name == "serve")
    assert ("SONORANT_RUNS=/runs" in text) == (name == "train")


def test_both_images_share_their_recipe() -> None:
    """Two files so that each reads from top to bottom; what they do alike must stay alike."""
    stages = [
        [(w, r.replace(f"requirements-{name}", "requirements-X")) for w, r in instructions(name) if w != "FROM"][:9]
        for name in ("serve", "train")
    ]
    assert stages[0] == stages[1]


def test_what_stays_outside_the_build() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv", "artifacts", "runs", "build"} <= set(ignored)
