"""Commands that pages for people show, and how they are held to what there is."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import typer.main

import pipelines.__main__
from pipelines.study import graph_for_study
from sonorant.cli import make_app
from sonorant.params import check_params, read_params

ROOT = Path(__file__).resolve().parents[1]


def shell_lines(page: str) -> list[str]:
    """The commands of all sh blocks of a page, each on one line."""
    blocks = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def check_pipelines(line: str) -> None:
    """Parse `python -m pipelines …` as it would be, the parameters it names included."""
    words = shlex.split(line.split("python -m pipelines", 1)[1], comments=True)
    context = make_contexts(typer.main.get_command(pipelines.__main__.app), "pipelines", words)
    if "config" in context.params:
        files = [ROOT / path for path in context.params["config"]]
        params = read_params(files, context.params["overrides"])
        if study := context.params.get("study"):
            assert graph_for_study(ROOT / study, params)
        else:
            check_params(params)


def check_store(line: str) -> None:
    """Parse `sonorant store …` as it would be."""
    words = shlex.split(line.split("sonorant ", 1)[1], comments=True)
    make_contexts(typer.main.get_command(make_app()), "sonorant", words)


def make_contexts(command: Any, name: str, words: list[str]) -> Any:
    """The context of the innermost command that the words lead to; click complains of words that lead nowhere."""
    parent = None
    while hasattr(command, "commands"):
        assert words, f"{name}: wanted one of {sorted(command.commands)}"
        assert words[0] in command.commands, f"{name}: found {words[0]}, wanted one of {sorted(command.commands)}"
        parent = command.make_context(name, [], parent=parent, resilient_parsing=True)
        name, command, words = words[0], command.commands[words[0]], words[1:]
    return command.make_context(name, words, parent=parent)


def check_make(line: str) -> None:
    """The target exists."""
    target = line.split()[1]
    assert re.search(rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
