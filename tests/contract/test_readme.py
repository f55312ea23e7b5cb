"""What README tells a newcomer to type exists: targets, steps and their flags, files, routes."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import typer.main

from sonorant.cli import make_app
from sonorant.params import check_params, parse_round, parse_section, read_params
from sonorant.steps import SHARED, STEPS
from sonorant.studies.plan import plan_study, read_study
from tests.written import check_make, check_pipelines, check_store, shell_lines

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
LINES = shell_lines(README)
SONORANT_LINES = [line for line in LINES if re.search(r"(^|-m )sonorant ", line)]
EMBED_LINES = [line for line in SONORANT_LINES if "sonorant embed " in line]
STORE_LINES = [line for line in SONORANT_LINES if "sonorant store " in line]
COMPARE_LINES = [line for line in SONORANT_LINES if "sonorant compare " in line]
STUDY_LINES = [line for line in SONORANT_LINES if "sonorant study " in line]
STEP_LINES = [line for line in SONORANT_LINES if line not in EMBED_LINES + STORE_LINES + COMPARE_LINES + STUDY_LINES]
CURL_LINES = [line for line in LINES if line.startswith("curl")]


def test_there_are_commands_to_hold_it_to() -> None:
    assert len(STEP_LINES) >= len(STEPS)
    assert CURL_LINES


@pytest.mark.parametrize("line", STEP_LINES)
def test_a_step_takes_these_flags(line: str) -> None:
    words = shlex.split(line.split("sonorant ", 1)[1], comments=True)
    step = (SHARED | STEPS)[words[0]]
    flags = list(zip(words[1::2], words[2::2], strict=True))
    paths = {flag.removeprefix("--") for flag, _ in flags if flag not in ("--config", "--set", "--round")}
    assert {*step.inputs, *step.outputs} - step.optional <= paths <= {*step.inputs, *step.outputs}
    configs = [ROOT / value for flag, value in flags if flag == "--config"]
    params = read_params(configs, [value for flag, value in flags if flag == "--set"])
    if step.name in SHARED:
        parse_section(step.section, step.config, params[step.section])
        return
    check_params(params)
    parse_round(step.name, params, int(dict(flags).get("--round", "1")))


@pytest.mark.parametrize("line", EMBED_LINES + COMPARE_LINES)
def test_a_command_that_is_no_step_takes_these_flags(line: str) -> None:
    name, *words = shlex.split(line.split("sonorant ", 1)[1], comments=True)
    commands = typer.main.get_command(make_app()).commands  # type: ignore[attr-defined]
    given = commands[name].make_context(name, words).params  # click complains of others
    assert given["files" if name == "embed" else "reports"]


@pytest.mark.parametrize("line", STUDY_LINES)
def test_a_study_takes_these_words(line: str) -> None:
    words = shlex.split(line.split("sonorant study ", 1)[1], comments=True)
    command = typer.main.get_command(make_app()).commands["study"]  # type: ignore[attr-defined]
    given = command.make_context("study", words).params
    params = read_params([ROOT / path for path in given["config"]])
    for name in given["names"]:
        path = ROOT / "recipes" / "studies" / f"{name}.yaml"
        assert plan_study(read_study(path), path.parent, params)


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("python -m pipelines")])
def test_pipelines_takes_these_words(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", "https://kubeflow.example.org")
    check_pipelines(line)


@pytest.mark.parametrize("line", STORE_LINES)
def test_store_takes_these_words(line: str) -> None:
    check_store(line)


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.*?)```", README, re.DOTALL))
def test_these_settings_go_on_top_of_the_demo(block: str, tmp_path: Path) -> None:
    (tmp_path / "shown.yaml").write_text(block)
    params = read_params([ROOT / "params.yaml", tmp_path / "shown.yaml"])
    check_params(params)
    parse_round("pretrain", params, 1)


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("make ")])
def test_make_has_this_target(line: str) -> None:
    check_make(line)


@pytest.mark.parametrize("line", CURL_LINES)
def test_the_server_has_this_route(line: str) -> None:
    routes = json.loads((ROOT / "tests" / "serving" / "openapi.json").read_text())["paths"]
    match = re.search(r"127\.0\.0\.1:8000(/[^\s?']*)", line)
    assert match
    assert match[1] in routes


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:recipes|src|serving|tests)/[\w./-]+)`", README))))
def test_this_file_is_there(path: str) -> None:
    assert (ROOT / path).exists()
