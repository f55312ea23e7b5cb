"""Worker processes. Importing this loads no torch, so that they can begin to load theirs before the server does."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from serving.engine.wire import Letter, LostError, receive_soon, send_soon

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Place:
    """Where a replica runs: a device, and on a CPU the core that is its own."""

    device: str
    core: int | None


def places(num_workers: int | None, device: str) -> list[Place]:
    """One replica a usable core, or one a GPU, unless their number is given; more than there are share them."""
    if device != "cpu":
        return [Place(device, None)] * (num_workers or 1)
    cores = sorted(os.sched_getaffinity(0))
    count = num_workers or len(cores)
    return [Place("cpu", cores[i % len(cores)] if count > 1 else None) for i in range(count)]


class Process:
    """A process that runs `serving.engine.worker`, at the other end of a socket."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.connection, theirs = socket.socketpair()
        self.connection.setblocking(False)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "serving.engine.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                # One thread a process: small operations collapse where threads outnumber cores.
                env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
            )
        self.pid = self._process.pid

    async def start(self, models: Mapping[str, Path], precision: str) -> Letter:
        """Load the models and run them once: the process' introduction. ValueError where it cannot."""
        order = {
            "models": {name: str(folder.absolute()) for name, folder in models.items()},
            "precision": precision,
            "device": self.place.device,
            "core": self.place.core,
        }
        try:
            introduction = await self.run(Letter(order))
        except LostError as error:
            raise ValueError(f"{error}, wanted a model loaded: see its log") from None
        except BaseException:
            await self.stop()
            raise
        if (error := introduction.fields.get("error")) is not None:
            await self.stop()
            raise ValueError(error)
        return introduction

    async def run(self, order: Letter) -> Letter:
        """The answer to a batch; LostError where the process is gone."""
        try:
            await send_soon(self.connection, order)
            return await receive_soon(self.connection)
        except (EOFError, OSError):
            await self.stop()
            raise LostError(f"worker {self.pid}: found it ended with status {self._process.returncode}") from None

    async def stop(self) -> None:
        """End the process at once, whatever it does."""
        self.connection.close()
        if self._process.poll() is None:
            self._process.kill()
        await asyncio.to_thread(self._process.wait)
