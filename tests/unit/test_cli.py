"""The command line, as a process: whatever a user gets wrong is one line on stderr and a non-zero exit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_udpates": 3}, "pretrain.num_udpates: found an unknown key"),
        ({"optim": {"learning_rate": "fast"}}, "pretrain.optim.learning_rate: found 'fast', wanted a valid number"),
        ({"optim": {"learning_rate": -1}}, "pretrain.optim.learning_rate: found -1, wanted greater than 0"),
        ({"num_updates": 100.5}, "pretrain.num_updates: found 100.5, wanted a valid integer"),
        ({"encoder": {"num_heads": 5}}, "dim 32 is not divisible by num_heads 5: change one of them"),
        ({"teacher": {"num_layers": 3}}, "teacher.num_layers 3 exceeds encoder.num_layers 2: lower it"),
        ({"phases": [{"share": 0.5, "weights": {"units": 1}}]}, "phases' shares sum to 0.5, wanted 1"),
        ({"phases": [{"weights": {"units": 0}}]}, "are all zero"),
        ({"phases": [{"weights": {"untis": 1}}]}, "wanted 'units' or 'teacher'"),
        ({"optim": {"learning_rate": float("nan")}}, "learning_rate: found nan, wanted a finite number"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_wrong_values(change: dict[str, object], message: str, folder: Path) -> None:
    (folder / "params.yaml").write_text(yaml.safe_dump({"pretrain": pretrain_values(**change)}))
    assert message in complaint(folder, "pretrain", "--config", "params.yaml", *PATHS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cluster: {}", "found only the sections ['cluster'], wanted pretrain: add it"),
        ("pretrain: {}\npretrian: {}", "found unknown sections ['pretrian']"),
        ("pretrain: {num_updates: [1", "found no valid YAML"),
        ("- pretrain", "found list, wanted a mapping"),
        ("", "found NoneType, wanted a mapping"),
        ("pretrain: 3", "pretrain: found 3, wanted a valid dictionary"),
        ("pretrain:", "pretrain.phases: found nothing, wanted a value: add it"),
    ],
)
def test_wrong_files(text: str, message: str, folder: Path) -> None:
    (folder / "params.yaml").write_text(text)
    assert message in complaint(folder, "pretrain", "--config", "params.yaml", *PATHS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config", "nowhere.yaml"], "--config nowhere.yaml: found no such file"),
        (["--config", "params.yaml"], "corpus corpus: found nothing there, wanted an artifact"),
        (["--config", "params.yaml", "--set", "pretrain.num_updates=0"], "pretrain.num_updates: found 0"),
        (["--config", "params.yaml", "--set", "num_updates=3"], "found no section.key=value"),
        (["--config", "params.yaml", "--set", "pretrain.optim=[1"], "--set pretrain.optim=[1: found no valid YAML"),
        (["--config", "params.yaml", "--set", "pretrian.seed=1"], "found unknown sections ['pretrian']"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_wrong_options(words: list[str], message: str, folder: Path) -> None:
    assert message in complaint(folder, "pretrain", *words, *PATHS)


def test_every_fault_is_named_at_once(folder: Path) -> None:
    text = complaint(
        folder, "pretrain", "--config", "params.yaml", "--set", "pretrain.seeed=1", "--set", "pretrain.num_updates=x", *PATHS
    )
    assert "pretrain.seeed" in text
    assert "pretrain.num_updates" in text


def test_later_files_and_options_override(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    recipe = tmp_path_factory.mktemp("recipes") / "recipe.yaml"
    recipe.write_text("pretrain: {num_updates: -1, seed: -0.5}")
    words = ["--config", "params.yaml", "--config", str(recipe), "--set", "pretrain.seed=0"]
    text = complaint(folder, "pretrain", *words, *PATHS)
    assert "num_updates: found -1" in text
    assert "seed" not in text


@pytest.mark.parametrize("words", [[], ["pretrain"], ["pretrain", "--config", "params.yaml"], ["dance"], ["pretrain", "--loud"]])
def test_misuse_shows_usage_and_no_traceback(words: list[str], folder: Path) -> None:
    answer = run(folder, *words)
    assert answer.returncode == 2
    assert "Usage:" in answer.stdout + answer.stderr
    assert "Traceback" not in answer.stderr


def test_help_is_made_from_the_signatures(folder: Path) -> None:
    assert all(name in run(folder, "--help").stdout for name in ("prepare", "cluster", "pretrain", "publish", "evaluate"))
    text = run(folder, "pretrain", "--help").stdout
    assert all(f"--{name}" in text for name in ("config", "set", "corpus", "units", "encoder"))
    assert "Train the shared encoder" in text


def test_a_missing_library_is_named(folder: Path) -> None:
    # What the base install, which is for inference alone, says of the command line.
    program = "import sys; sys.modules['typer'] = None; from sonorant.cli import main; main()"
    answer = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False)
    assert answer.returncode == 1
    assert answer.stderr == "sonorant: found no module typer, wanted the training extra: pip install 'sonorant[train]'\n"
