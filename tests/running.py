"""The steps that train as processes: started, watched, interrupted."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from sonorant.steps import pretrain
from sonorant.steps.step import Step
from sonorant.training.journal import read_journal


def journal_of(encoder: Path) -> list[dict[str, float]]:
    """What was logged on the way to an encoder."""
    return read_journal(encoder / "journal.jsonl")


def command(
    folder: Path, values: dict[str, Any], inputs: dict[str, Path], ranks: int = 1, step: Step = pretrain
) -> list[str]:
    """The step as a command line that writes folder/encoder, or whatever its output is called."""
    (folder / "params.yaml").write_text(yaml.safe_dump({step.name: values}))
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    start = [sys.executable, "-m", *(torchrun if ranks > 1 else []), "sonorant", step.name]
    paths = [*inputs.items(), *((name, folder / name) for name in step.outputs)]
    return [*start, "--config", str(folder / "params.yaml"), *(w for n, p in paths for w in (f"--{n}", str(p)))]


@contextmanager
def begun(words: list[str], runs: Path, update: int) -> Iterator[subprocess.Popen[str]]:
    """A process that has written the checkpoint of that update."""
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 200
        while not list(runs.glob(f"*/checkpoint-{update:08d}")):
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            assert time.monotonic() < deadline
            time.sleep(0.002)
        yield process
    finally:
        process.kill()
        process.communicate()
