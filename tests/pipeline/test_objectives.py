"""benchmarks/objectives.py from one end to the other on the built-in corpus, with a model that learns nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
TASKS = {"teacher": {"num_layers": 1}, "contrast": {"dim": 8, "num_negatives": 5}, "quantiser": {"num_codes": 8}}
CONFIG = {
    "prepare": {
        "sources": [
            {"kind": "synthetic", "num_utterances": 12, "num_speakers": 3, "voice": "tones", "dev_share": 0.3,
             "test_share": 0.3}
        ],
        "num_workers": 1,
    },
    "cluster": {"num_units": 8},
    "pretrain": {
        "num_updates": 2,
        "phases": [{"weights": {"units": 1.0}}],
        "encoder": {"stem_channels": 8, "dim": 16, "num_layers": 1, "num_heads": 2, "ffn_dim": 32, "position_depth": 1},
        "batching": {"batch_seconds": 2.0, "crop_seconds": 1.0},
        **TASKS,
    },
    "publish": {"num_units": 8},
    "evaluate": {"abx_max_items": 2},
}  # fmt: skip


def run(folder: Path, *arguments: str) -> list[str]:
    """Its lines."""
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    command = [sys.executable, "benchmarks/objectives.py", "--config", str(folder / "config.yaml")]
    command += ["--folder", str(folder / "runs"), "--seeds", "0", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_every_run_is_made_once_and_compared(tmp_path: Path) -> None:
    methods = ["--methods", "hubert", "data2vec", "mt4ssl", "--conditions", "updates"]
    lines = run(tmp_path, *methods)
    assert not [line for line in lines if "failed" in line]
    found = json.loads(lines[-1])
    assert found["benchmark"] == "objectives"
    assert {"mt4ssl_vs_hubert_pnmi", "mt4ssl_vs_data2vec_abx_across"} <= set(found["ratios"])
    table = [line.split(" | ")[0].removeprefix("| ") for line in lines if line.startswith("| ")]
    assert {"hubert", "data2vec", "mt4ssl", "mfcc", "mfcc_centred", "untrained"} <= set(table)
    again = run(tmp_path, *methods)
    assert "6 runs, 6 of them done before" in again
    assert again[-1] == lines[-1]
