"""What is handed over, and to whom."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sonorant.artifacts import RECORD, read_record
from sonorant.config import LaunchConfig


@dataclass(frozen=True)
class Work:
    """A step's configuration and artifacts, from which its command is made."""

    step: str
    key: str
    """Names this configuration of these inputs: the same work has the same key."""
    record: Mapping[str, Any]
    """What its outputs will say of their step, configuration and inputs."""
    params: Mapping[str, Any]
    """What `--config` is to hold."""
    inputs: Mapping[str, Path]
    outputs: Mapping[str, Path]
    runs: Path
    """Where checkpoints go."""

    def is_done(self) -> bool:
        """Whether every output is in place and made by this work, not by another before it."""
        return all(
            (path / RECORD).is_file() and self.record.items() <= read_record(path, name).items()
            for name, path in self.outputs.items()
        )

    def command(self, config: Path) -> list[str]:
        """The step's words, as they follow `python -m torch.distributed.run`."""
        paths = {**self.inputs, **self.outputs}
        flags = [word for name, path in paths.items() for word in (f"--{name}", str(path))]
        return ["-m", "sonorant", self.step, "--config", str(config), *flags]

    def write_params(self, path: Path) -> Path:
        """Write the file that `--config` names, which YAML reads too."""
        path.write_text(json.dumps(self.params, indent=1) + "\n")
        return path


def is_elsewhere(launch: LaunchConfig | None) -> bool:
    """Whether other processes are to do the work: never in one that torchrun has started, which is one of them."""
    return launch is not None and launch.launcher != "process" and "RANK" not in os.environ


def do_elsewhere(launch: LaunchConfig, work: Work) -> None:
    """Have the work done; its outputs are in place when this returns.

    Raises ValueError with the last lines of who failed, SystemExit or KeyboardInterrupt when told to stop.
    """
    if launch.launcher == "torchrun":
        from sonorant.launch.torchrun import run_here

        run_here(launch, work)
    else:
        from sonorant.launch.trainjob import run_job

        run_job(launch, work)
