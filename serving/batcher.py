"""From many requests to few model calls: a bounded queue and one worker thread.

The engine packs waves of any length without padding, so a result does not depend on the batch it was made in
and a batch is capped by its audio alone.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sonorant.inference import SAMPLE_RATE

Wave = NDArray[np.float32]
Frames = NDArray[Any]


@dataclass(frozen=True)
class Task:
    """What the model is to do; only waves of one task share a batch."""

    kind: Literal["embed", "units"]
    layer: int | None = None


class FullError(Exception):
    """The queue holds all the audio it may; there may be room after `retry_seconds`."""

    def __init__(self, waiting: float, offered: float, limit: float, retry_seconds: int) -> None:
        super().__init__(
            f"queue: found {waiting:.1f} s of audio waiting and {offered:.1f} s offered, "
            f"wanted at most {limit:g} s together: retry in {retry_seconds} s"
        )
        self.retry_seconds = retry_seconds


class ClosedError(Exception):
    """The queue takes no more work, or was closed before this was done."""


@dataclass(frozen=True, eq=False)
class Item:
    """One wave on its way through the model."""

    task: Task
    wave: Wave
    result: asyncio.Future[Frames]


class Batcher:
    """Runs `run(task, waves)` in one thread on batches of what was admitted.

    The oldest item is always served next; others of its task join it, shortest first, up to
    `max_batch_seconds`. An item longer than that goes alone. Where a batch fails, each of its items is tried
    alone.
    """

    def __init__(
        self,
        run: Callable[[Task, list[Wave]], Sequence[Frames]],
        *,
        max_batch_seconds: float,
        max_queue_seconds: float,
        observe: Callable[[int, float], None],
    ) -> None:
        self.run, self.observe = run, observe
        self.max_batch_seconds, self.max_queue_seconds = max_batch_seconds, max_queue_seconds
        self.waiting: list[Item] = []
        self.draining = False
        self._num_samples = 0  # admitted and not yet answered
        self._pace = 1.0  # audio seconds done per second, smoothed
        self._wake = asyncio.Event()

    @property
    def seconds(self) -> float:
        """Audio admitted and not yet answered."""
        return self._num_samples / SAMPLE_RATE

    def start(self) -> None:
        """Begin to work, in the running event loop."""
        self.draining = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._worker = asyncio.create_task(self._work())

    def admit(self, task: Task, waves: Sequence[Wave]) -> list[asyncio.Future[Frames]]:
        """Take all of `waves` or none; a future for each. Cancel one to have it left undone.

        Raises FullError, or ClosedError while draining.
        """
        if self.draining:
            raise ClosedError("queue: found it closed, wanted it open")
        offered = count_samples(waves)
        if self._num_samples + offered > self.max_queue_seconds * SAMPLE_RATE:
            retry_seconds = min(60, max(1, math.ceil(self.seconds / self._pace)))
            raise FullError(self.seconds, offered / SAMPLE_RATE, self.max_queue_seconds, retry_seconds)
        loop = asyncio.get_running_loop()
        items = [Item(task, wave, loop.create_future()) for wave in waves]
        self.waiting.extend(items)
        self._num_samples += offered
        self._wake.set()
        for item in items:  # an error of a result nobody waits for any more is no news
            item.result.add_done_callback(lambda result: result.cancelled() or result.exception())
        return [item.result for item in items]

    def drain(self) -> None:
        """Admit nothing more; what was admitted will be done."""
        self.draining = True
        self._wake.set()

    async def close(self, timeout: float) -> None:
        """Drain for at most `timeout` seconds, then fail what is left with ClosedError."""
        self.drain()
        _, late = await asyncio.wait([self._worker], timeout=timeout)
        if late:
            self._worker.cancel()
            await asyncio.wait([self._worker])
        self._finish(self._take(self.waiting))
        self._thread.shutdown(wait=False)

    async def _work(self) -> None:
        while self.waiting or not self.draining:
            self._finish(self._take([item for item in self.waiting if item.result.done()]))
            if self.waiting:
                batch = self._take(self._choose())
                try:
                    await self._serve(batch)
                finally:
                    self._finish(batch)
            else:
                self._wake.clear()
                await self._wake.wait()

    def _choose(self) -> list[Item]:
        first, *rest = self.waiting
        batch, room = [first], self.max_batch_seconds * SAMPLE_RATE - len(first.wave)
        for item in sorted((i for i in rest if i.task == first.task), key=lambda item: len(item.wave)):
            room -= len(item.wave)
            if room < 0:
                break
            batch.append(item)
        return batch

    def _take(self, items: Sequence[Item]) -> list[Item]:
        taken = set(items)
        self.waiting = [item for item in self.waiting if item not in taken]
        return list(items)

    def _finish(self, items: Sequence[Item]) -> None:
        self._num_samples -= count_samples([item.wave for item in items])
        for item in items:
            if not item.result.done():
                item.result.set_exception(ClosedError("queue: found it closed before this was done"))

    async def _serve(self, batch: Sequence[Item]) -> None:
        waves = [item.wave for item in batch]
        seconds, started = count_samples(waves) / SAMPLE_RATE, time.perf_counter()
        self.observe(len(batch), seconds)
        loop = asyncio.get_running_loop()
        outcomes = await loop.run_in_executor(self._thread, self._outcomes, batch[0].task, waves)
        self._pace += 0.2 * (seconds / max(time.perf_counter() - started, 1e-6) - self._pace)
        for item, outcome in zip(batch, outcomes, strict=True):
            if item.result.done():
                continue
            if isinstance(outcome, Exception):
                item.result.set_exception(outcome)
            else:
                item.result.set_result(outcome)

    def _outcomes(self, task: Task, waves: list[Wave]) -> list[Frames | Exception]:
        try:
            results = self.run(task, waves)
            assert len(results) == len(waves), f"{task}: {len(results)} results for {len(waves)} waves"
            return list(results)
        except Exception as error:
            if len(waves) == 1:
                return [error]
        return [outcome for wave in waves for outcome in self._outcomes(task, [wave])]


def count_samples(waves: Sequence[Wave]) -> int:
    """Samples of all waves together."""
    return sum(len(wave) for wave in waves)
