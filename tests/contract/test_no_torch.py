"""The signatures, the components and the compiler load no heavy library."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "torchaudio", "faiss", "lhotse", "numba", "scipy", "matplotlib", "transformers")
REPORT = f"""
import json, sys, time
print(json.dumps({{"heavy": [m for m in {HEAVY} if m in sys.modules], "seconds": time.process_time()}}))
"""


def run(source: str) -> dict[str, object]:
    """What a fresh interpreter has loaded and how long it computed, after running `source`."""
    command = [sys.executable, "-c", source + REPORT]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    return json.loads(answer.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "module", ["sonorant.config", "sonorant.steps", "sonorant.steps.component", "sonorant.cli", "components"]
)
def test_importing_loads_nothing_heavy(module: str) -> None:
    assert run(f"import {module}")["heavy"] == []


def test_compiling_loads_nothing_heavy_and_takes_under_three_seconds(tmp_path: Path) -> None:
    source = f"""
from pipelines.__main__ import app
app(["compile", "--output", {str(tmp_path / "train.yaml")!r}], standalone_mode=False)
"""
    report = run(source)
    assert (tmp_path / "train.yaml").stat().st_size > 0
    assert report["heavy"] == []
    # Processor time, for the cores may be shared; the wall clock shows the same on an idle machine.
    assert report["seconds"] < 3
