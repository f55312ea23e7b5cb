"""Every step killed with SIGKILL at several instants: the same command completes, with the undisturbed artifact."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from sonorant.artifacts import digest_folder, read_record
from sonorant.params import read_params
from sonorant.steps import STEPS

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
INSTANTS = (0.35, 0.6, 0.85)
"""Of an undisturbed run's time; the first is mostly spent on imports."""
PARAMS = {
    "prepare": {
        "sources": [{"kind": "synthetic", "num_utterances": 96, "num_speakers": 9}],
    },
    "cluster": {"num_units": 20, "normalise": "utterance_mean", "context_frames": 1},
    "pretrain": {
        **read_params([RECIPES / "mt4ssl.yaml", RECIPES / "sizes" / "tiny.yaml"])["pretrain"],
        "num_updates": 60,
        "checkpoint_every": 10,
    },
    "ground": {
        "num_updates": 40,
        "phases": [
            {"share": 0.5, "weights": {"units": 1.0, "grounding": 1.0}},
            {"share": 0.5, "weights": {"grounding": 1.0}, "reset_optimizer": True},
        ],
        "grounding": {"queue_size": 16},
        "batching": {"batch_seconds": 16.0, "crop_seconds": 4.0},
        "log_every": 7,
        "checkpoint_every": 8,
    },
    "align": {
        "num_updates": 30,
        "phases": [{"weights": {"alignment": 1.0}}],
        "num_trained_layers": 1,
        "batching": {"batch_seconds": 8.0, "crop_seconds": 4.0},
        "log_every": 7,
        "checkpoint_every": 8,
    },
    "publish": {"num_units": 20},
    "evaluate": {},
}


def start(step: str, folder: Path) -> subprocess.Popen[bytes]:
    names = [*STEPS[step].inputs, *STEPS[step].outputs]
    given = [name for name in names if name not in STEPS[step].optional or (folder / name).exists()]
    paths = [word for name in given for word in (f"--{name}", str(folder / name))]
    command = [sys.executable, "-m", "sonorant", step, "--config", str(folder / "params.yaml"), *paths]
    environment = {**os.environ, "SONORANT_RUNS": str(folder / "runs"), "OMP_NUM_THREADS": "1"}
    log = (folder / "log").open("ab")
    return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def finish(step: str, folder: Path) -> dict[str, str]:
    """Digests of the step's artifacts."""
    assert start(step, folder).wait(timeout=200) == 0, (folder / "log").read_text()
    return {name: read_record(folder / name, name)["digest"] for name in STEPS[step].outputs}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_step_completes_with_the_same_artifact(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
        (folder / "params.yaml").write_text(yaml.safe_dump(PARAMS))
    for step in STEPS:
        began = time.monotonic()
        wanted = finish(step, whole)
        seconds = time.monotonic() - began
        for instant in INSTANTS:
            process = start(step, killed)
            time.sleep(instant * seconds)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            # A run that was quicker than its elder has left an artifact; then it is a whole one.
            for name in STEPS[step].outputs:
                if (killed / name).exists():
                    assert digest_folder(killed / name) == wanted[name], f"{step} left a part of {name}"
        assert finish(step, killed) == wanted, step
        for name in STEPS[step].outputs:
            shutil.rmtree(killed / name)
            shutil.copytree(whole / name, killed / name)
