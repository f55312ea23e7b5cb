"""The very graph that Kubeflow runs, run on this machine on a tiny corpus."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sonorant.artifacts import digest_folder, read_record
from sonorant.steps import STEPS
from tests.workflow import workflow

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    "prepare.sources=[{kind: synthetic, num_utterances: 36, num_speakers: 9, voice: tones,"
    " dev_share: 0.25, test_share: 0.35}]",
    "cluster.num_units=8",
    "cluster.num_restarts=1",
    "pretrain.num_updates=2",
    "pretrain.encoder={stem_channels: 16, dim: 32, num_layers: 3, num_heads: 2, ffn_dim: 64}",
    "pretrain.batching={batch_seconds: 4.0, crop_seconds: 2.0}",
    "publish.num_units=8",
    "publish.num_restarts=1",
    "evaluate.num_examples=1",
]


@pytest.mark.slow
@pytest.mark.parametrize("num_rounds", [1, 2])
def test_every_step_runs_and_its_lineage_is_recorded(tmp_path: Path, num_rounds: int) -> None:
    command = [sys.executable, "-m", "pipelines", "run", "--local", "--root", str(tmp_path / "root")]
    command += [word for override in [*TINY, f"rounds={num_rounds}"] for word in ("--set", override)]
    environment = {**os.environ, "SONORANT_RUNS": str(tmp_path / "runs")}
    answer = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout[-3000:] + answer.stderr[-3000:]

    (folder,) = (path for path in (tmp_path / "root").iterdir() if path.name.startswith("sonorant-train"))
    digests: dict[tuple[str, tuple[str, int]], str] = {}
    for task in workflow(num_rounds):
        step, place = STEPS[task.step], folder / (task.step if task.round == 1 else f"{task.step}-{task.round}")
        logged = json.loads((place / "executor_output.json").read_text())["artifacts"]
        assert logged["metrics"]["artifacts"][0]["metadata"]
        for artifact in step.outputs:
            record = read_record(place / artifact, artifact)
            digest = digests[artifact, (task.step, task.round)] = digest_folder(place / artifact)
            metadata = logged[artifact]["artifacts"][0]["metadata"]
            assert metadata["digest"] == record["digest"] == digest
            assert metadata["inputs"] == {name: digests[name, writer] for name, writer in task.reads.items()}
            assert metadata["step"] == task.step
    # Every step finished, so nothing is kept for a retry.
    assert list((tmp_path / "runs").glob("*")) == []


@pytest.mark.slow
def test_a_failing_step_is_tried_again_and_then_named_on_one_line(tmp_path: Path) -> None:
    source = f"prepare.sources=[{{kind: folder, name: absent, path: {tmp_path / 'absent'}}}]"
    command = [sys.executable, "-m", "pipelines", "run", "--local", "--root", str(tmp_path / "root")]
    environment = {**os.environ, "SONORANT_RUNS": str(tmp_path / "runs")}
    answer = subprocess.run(
        [*command, "--set", source], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 1
    assert answer.stderr.splitlines()[-1].startswith("run: Pipeline 'sonorant-train' finished")
    assert "'prepare'" in answer.stderr.splitlines()[-1]
    # The first try and pipelines/train.py's two retries, each ending in the step's own line.
    assert answer.stdout.count(f"ValueError: source absent: found nothing at {tmp_path / 'absent'}") == 3
