"""Ranks on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from sonorant.config import LaunchConfig
from sonorant.launch.processes import adopted_orphans, children_of, descendants_of, kill_all
from sonorant.launch.ranks import REPORT
from sonorant.launch.stopping import stop_requests
from sonorant.launch.work import Work

GRACE = 60.0
"""How long ranks may take to write a checkpoint once their time is up."""


def run_here(launch: LaunchConfig, work: Work) -> None:
    """Do the work under torchrun. No rank outlives this call."""
    count = num_ranks(launch)
    with TemporaryDirectory(prefix="launch-") as folder:
        config, report = work.write_params(Path(folder) / "params.json"), Path(folder) / "report"
        words = ["--standalone", "--nproc-per-node", str(count), *work.command(config)]
        code = run_command([sys.executable, "-m", "sonorant.launch.ranks", *words], report, launch.hours, work.step)
        said = report.read_text() if report.is_file() else f"torchrun exited with {code}"
    if code:
        raise ValueError(
            f"{work.step}: {said}; wanted all {count} ranks to finish: do what it says, "
            f"and run the same command again; it goes on from the last checkpoint in {work.runs}"
        )
    if not work.is_done():
        # Somebody told a rank to stop, and it the others.
        raise SystemExit(0)


def run_command(command: list[str], report: Path, hours: float, step: str) -> int:
    """Run it to its end and return its exit status; everything it started is gone then.

    Told to stop, it is told so too, and given the time it needs; told twice, it is killed. Raises ValueError where it
    takes too long.
    """
    before = children_of(os.getpid())
    deadline = time.monotonic() + hours * 3600
    with stop_requests() as stop, adopted_orphans():
        # Its metrics are in the artifact's record. A session of its own: Ctrl-C reaches it through us alone.
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, env=os.environ | {REPORT: str(report)}, start_new_session=True
        )
        is_late = False
        try:
            while process.poll() is None and not stop.wait(0.2):
                is_late = time.monotonic() > deadline
                if is_late:
                    break
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            end = time.monotonic() + GRACE
            while process.poll() is None and len(stop.signals) < 2 and not (is_late and time.monotonic() > end):
                time.sleep(0.1)
        finally:
            kill_all(descendants_of(os.getpid(), but=before))
            process.wait()
        if stop:
            stop.leave()
    if is_late:
        raise ValueError(
            f"{step}: found no end after launch.hours {hours:g}, wanted one by then: raise launch.hours, "
            "and run the same command again; it goes on from the last checkpoint"
        )
    return process.returncode


def num_ranks(launch: LaunchConfig) -> int:
    """How many processes there are to be on this machine; ValueError where there are fewer GPUs, but some."""
    import torch

    visible = torch.cuda.device_count()
    if launch.num_processes == "auto":
        return max(visible, 1)
    if 0 < visible < launch.num_processes:
        raise ValueError(
            f"launch.num_processes: found {launch.num_processes}, wanted at most {visible}, one a GPU: lower it"
        )
    return launch.num_processes
