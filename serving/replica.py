"""The copies of the models that do the work: worker processes, or one thread where a model is given as an object."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.batcher import LostError
from serving.wire import Array, Letter, receive_soon, send_soon
from serving.worker import introduce, pack_moments, perform, warm_up
from sonorant.inference import FRAME_MS, STREAM, Codebook, EncoderConfig, Speech, measure, num_operations

Wave = NDArray[np.float32]
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Place:
    """Where a replica runs: a device, and on a CPU the core that is its own."""

    device: str
    core: int | None


def places(num_workers: int | None, device: str) -> list[Place]:
    """One replica a usable core, or one a GPU, unless their number is given; more than cores share them."""
    if device != "cpu":
        return [Place(f"{device}:{i}" if num_workers else device, None) for i in range(num_workers or 1)]
    cores = sorted(os.sched_getaffinity(0))
    count = num_workers or len(cores)
    return [Place("cpu", cores[i % len(cores)] if count > 1 else None) for i in range(count)]


class WorkerProcess:
    """A process that runs `serving.worker`."""

    def __init__(self, process: subprocess.Popen[bytes], connection: socket.socket, place: Place) -> None:
        self.process, self.connection, self.place = process, connection, place

    @classmethod
    async def start(cls, models: Mapping[str, Path], precision: str, place: Place) -> tuple[WorkerProcess, Letter]:
        """A process that has loaded the models and run them once, and its introduction; ValueError where it cannot."""
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "serving.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                # One thread a process: small operations collapse where threads outnumber cores.
                env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
            )
        ours.setblocking(False)
        worker = cls(process, ours, place)
        order = {
            "models": {name: str(folder.absolute()) for name, folder in models.items()},
            "precision": precision,
            "device": place.device,
            "core": place.core,
        }
        try:
            introduction = await worker.run(Letter(order))
        except LostError:
            raise ValueError(
                "worker: found its process gone before it was ready, wanted a model: see its log"
            ) from None
        except BaseException:
            await worker.stop()
            raise
        if (error := introduction.fields.get("error")) is not None:
            await worker.stop()
            raise ValueError(error)
        return worker, introduction

    async def run(self, order: Letter) -> Letter:
        """The answer to a batch; LostError where the process is gone."""
        try:
            await send_soon(self.connection, order)
            return await receive_soon(self.connection)
        except (EOFError, OSError) as error:
            await self.stop()
            raise LostError(f"worker {self.process.pid}: found it gone ({error or 'closed'})") from None

    async def stop(self) -> None:
        """End the process: at once, whatever it does."""
        self.connection.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        await asyncio.to_thread(self.process.wait)


class WorkerThread:
    """Models of this process, run in a thread."""

    def __init__(self, models: Mapping[str, Speech]) -> None:
        self.models = models
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")

    async def start(self) -> Letter:
        """Run every model once; the introduction."""
        loop = asyncio.get_running_loop()
        paces = [await loop.run_in_executor(self._thread, warm_up, speech) for speech in self.models.values()]
        return introduce(self.models, paces)

    async def run(self, order: Letter) -> Letter:
        """The answer to a batch."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, perform, self.models, order)

    async def stop(self) -> None:
        """Let go of the thread."""
        self._thread.shutdown(wait=False)


@dataclass(frozen=True)
class Card:
    """What the server knows of a model that is loaded in its workers.

    layer: the published one; encoder: its configuration, where the model has one; about: what was published with it.
    """

    name: str
    digest: str
    precision: str
    device: str
    layer: int
    num_layers: int
    dim: int
    num_units: int
    poolings: tuple[str, ...]
    encoder: EncoderConfig | None
    about: Mapping[str, Any]
    codebook: Codebook | None

    @property
    def centred(self) -> bool:
        """Whether units are made of frames less the recording's mean."""
        return self.codebook is not None and self.codebook.centred

    def operations(self, num_frames: int, layer: int | tuple[float, ...]) -> float:
        """What it costs to take so many frames to a layer, or to the last with a weight."""
        if self.encoder is None:
            return 1e6 * num_frames
        last = layer if isinstance(layer, int) else max((i for i, weight in enumerate(layer) if weight), default=0)
        return num_operations(self.encoder, num_frames, last)

    def moments(self, wave: Wave) -> Array | None:
        """What the model must know of a recording to hear its windows as it hears all of it, packed."""
        return None if self.encoder is None else pack_moments(measure(wave, self.encoder))

    def describe(self) -> dict[str, Any]:
        """It, as /v1/models tells it."""
        step, after, before = (FRAME_MS * count / 1000 for count in (STREAM.step, STREAM.after, STREAM.before))
        return {
            "id": self.name,
            "digest": self.digest,
            "precision": self.precision,
            "device": self.device,
            "layer": self.layer,
            "num_layers": self.num_layers,
            "dim": self.dim,
            "num_units": self.num_units,
            "centred": self.centred,
            "poolings": self.poolings,
            "frame_ms": FRAME_MS,
            "stream": {"step": step, "look_ahead": after, "history": before},
            "encoder": {} if self.encoder is None else self.encoder.model_dump(mode="json"),
            "provenance": self.about.get("provenance", {}),
        }


def cards_of(introduction: Letter) -> dict[str, Card]:
    """The models that a replica has loaded, by name."""
    arrays = iter(introduction.arrays)
    cards = {}
    for fields in introduction.fields["models"]:
        centred = fields.pop("centred")
        codebook = None if centred is None else Codebook(*(next(arrays) for _ in range(3)), centred=centred)
        encoder = None if fields["encoder"] is None else EncoderConfig.model_validate(fields["encoder"])
        named = {**fields, "poolings": tuple(fields["poolings"]), "encoder": encoder}
        cards[fields["name"]] = Card(**named, codebook=codebook)
    return cards
