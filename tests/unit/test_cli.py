"""The command line, as a process: whatever a user gets wrong is one line on stderr and a non-zero exit."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from sonorant.config import PretrainConfig
from sonorant.params import parse_section
from sonorant.steps import STEPS
from tests.tiny import pretrain_values

PATHS = ["--corpus", "corpus", "--units", "units", "--encoder", "encoder"]


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`python -m sonorant …` in `folder`."""
    command = [sys.executable, "-m", "sonorant", *words]
    environment = {k: v for k, v in os.environ.items() if k != "SONORANT_TRACEBACK"}
    environment |= {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=120
    )


def complaint(folder: Path, *words: str) -> str:
    """The one line that a failing command says."""
    answer = run(folder, *words)
    assert answer.returncode == 1, answer
    assert answer.stdout == ""
    assert len(answer.stderr.splitlines()) == 1, answer.stderr
    assert "Traceback" not in answer.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["params.yaml"], "nothing was made"
    return answer.stderr


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({"pretrain": pretrain_values()}))
    return tmp_path


IMPOSSIBLE: list[tuple[dict[str, Any], str]] = [
    ({"num_udpates": 3}, "pretrain.num_udpates: found an unknown key"),
    ({"optim": {"learning_rate": "fast"}}, "pretrain.optim.learning_rate: found 'fast', wanted a valid number"),
    ({"optim": {"learning_rate": -1}}, "pretrain.optim.learning_rate: found -1, wanted greater than 0"),
    ({"optim": {"learning_rate": float("nan")}}, "learning_rate: found nan, wanted a finite number"),
    ({"num_updates": 100.5}, "pretrain.num_updates: found 100.5, wanted a valid integer"),
    ({"encoder": {"num_heads": 5}}, "dim 32 is not divisible by num_heads 5: change one of them"),
    ({"teacher": {"num_layers": 3}}, "teacher.num_layers 3 exceeds encoder.num_layers 2: lower it"),
    ({"phases": [{"share": 0.5, "weights": {"units": 1}}]}, "phases' shares sum to 0.5, wanted 1"),
    ({"phases": [{"weights": {"units": 0}}]}, "are all zero"),
    ({"phases": [{"weights": {"units": {"start": 1}}}]}, "weights.units.line.end: found nothing, wanted a value"),
    ({"phases": [{"weights": {"units": -1}}]}, "weights.units.number: found -1, wanted greater than or equal to 0"),
    ({"phases": [{"weights": {"untis": 1}}]}, "wanted 'units', 'teacher', "),
]


@pytest.mark.parametrize(("change", "message"), IMPOSSIBLE, ids=[message for _, message in IMPOSSIBLE])
def test_impossible_values_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        parse_section("pretrain", PretrainConfig, pretrain_values(**change))
    assert "\n" not in str(caught.value)
    assert "at least 1 item" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cluster: {}", "pretrain: params.yaml: found only the sections ['cluster'], wanted pretrain: add it"),
        ("pretrain: {}\npretrian: {}", "pretrain: params.yaml: found unknown sections ['pretrian']"),
        ("pretrain: {num_updates: [1", "pretrain: --config params.yaml: found no valid YAML"),
        ("- pretrain", "pretrain: --config params.yaml: found list, wanted a mapping"),
        ("pretrain: 3", "pretrain: found 3, wanted a valid dictionary"),
        ("pretrain:", "pretrain.phases: found nothing, wanted a value: add it"),
    ],
    ids=["missing section", "unknown section", "broken YAML", "no mapping", "no section", "empty section"],
)
def test_wrong_files(text: str, message: str, folder: Path) -> None:
    (folder / "params.yaml").write_text(text)
    assert message in complaint(folder, "pretrain", "--config", "params.yaml", *PATHS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "corpus corpus: found nothing there, wanted an artifact: run the step that writes it first"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml: found no such file"),
        (["--set", "num_updates=3"], "--set num_updates=3: found no section.key=value"),
        (["--set", "pretrain.optim=[1"], "--set pretrain.optim=[1: found no valid YAML"),
    ],
    ids=["missing artifact", "missing file", "no key", "broken YAML"],
)
def test_wrong_options(words: list[str], message: str, folder: Path) -> None:
    assert message in complaint(folder, "pretrain", "--config", "params.yaml", *words, *PATHS)


def test_every_wrong_value_is_named_at_once(folder: Path) -> None:
    changes = ["pretrain.seeed=1", "pretrain.num_updates=x", "pretrain.optim.eps=0"]
    words = [word for change in changes for word in ("--set", change)]
    text = complaint(folder, "pretrain", "--config", "params.yaml", *words, *PATHS)
    assert "pretrain.seeed: found an unknown key" in text
    assert "pretrain.num_updates: found 'x', wanted a valid integer" in text
    assert "pretrain.optim.eps: found 0, wanted greater than 0" in text


def test_later_files_and_options_override(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    recipe = tmp_path_factory.mktemp("recipes") / "recipe.yaml"
    recipe.write_text("pretrain: {num_updates: -1, seed: -0.5}")
    words = ["--config", "params.yaml", "--config", str(recipe), "--set", "pretrain.seed=0"]
    text = complaint(folder, "pretrain", *words, *PATHS)
    assert "num_updates: found -1" in text
    assert "seed" not in text


@pytest.mark.parametrize("words", [[], ["pretrain", "--config", "params.yaml"], ["dance"]])
def test_misuse_shows_usage_and_no_traceback(words: list[str], folder: Path) -> None:
    answer = run(folder, *words)
    assert answer.returncode == 2
    assert "Usage:" in answer.stdout + answer.stderr
    assert "Traceback" not in answer.stderr
    if not words:
        assert all(name in answer.stdout + answer.stderr for name in STEPS)


def test_help_is_made_from_the_signature(folder: Path) -> None:
    text = run(folder, "pretrain", "--help").stdout
    assert all(f"--{name}" in text for name in ("config", "set", "corpus", "units", "encoder"))
    assert STEPS["pretrain"].summary in text


def test_a_missing_library_is_named(folder: Path) -> None:
    # What the base install, which is for inference alone, says of the command line.
    program = "import sys; sys.modules['typer'] = None; from sonorant.cli import main; main()"
    command = [sys.executable, "-c", program]
    answer = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert answer.returncode == 1
    wanted = "wanted the training extra: pip install 'sonorant[train]'"
    assert answer.stderr == f"sonorant: found no module typer, {wanted}\n"
