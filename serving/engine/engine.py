"""One loading of the models, and what becomes of a recording in it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from anyio import to_thread

from serving.engine.batcher import Batcher, ClosedError, Item, LateError, Pass, Replica, Search, Ticket, WaveError
from serving.engine.cards import Card, cards_of
from serving.engine.process import Process, places
from serving.engine.wire import Array, Letter, LostError
from serving.engine.worker import introduce, perform, warm_up
from serving.errors import ApiError, draining, late
from serving.metrics import Metrics
from serving.routes.intake import Clip, relabel
from serving.settings import Settings
from sonorant.inference import FRAME_MS, LONG, Cut, Speech, Window, frames_within, num_frames

log = logging.getLogger("serving")


class Thread:
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
class Wanted:
    """What a request wants of its audio. layer: an index, or a weight for each; span: seconds of the recording;
    search: of the images it speaks of."""

    card: Card
    layer: int | tuple[float, ...]
    spell: bool = False
    span: tuple[float, float] | None = None
    search: Search | None = None


class Engine:
    """One loading of the models: their cards, their replicas and their queue. A reload makes another."""

    def __init__(self, settings: Settings, metrics: Metrics, processes: Sequence[Process] = ()) -> None:
        self.settings, self.metrics = settings, metrics
        self._processes = [*processes]
        self.cards: dict[str, Card] = {}
        self.replicas: list[Process | Thread] = []
        self._num_holders, self._free = 0, asyncio.Event()
        self._free.set()
        self.batcher = Batcher(
            max_seconds=settings.max_queue_seconds,
            max_batch_seconds=settings.max_batch_seconds,
            observe=metrics.observe_batch,
        )

    async def start(self, models: Mapping[str, Speech] | None = None) -> None:
        """Load and warm up, in worker processes, or `models` in a thread; ValueError where it fails."""
        if models is not None:
            thread = Thread(models)
            introductions = [await thread.start()]
            self.replicas = [thread]
        else:
            processes = self._processes or [
                Process(place) for place in places(self.settings.num_workers, self.settings.device)
            ]
            self.replicas = [*processes]
            found = await asyncio.gather(*map(self._load, processes), return_exceptions=True)
            for outcome in found:
                if isinstance(outcome, BaseException):
                    await self.stop()
                    raise outcome
            introductions = [outcome for outcome in found if not isinstance(outcome, BaseException)]
        if any(other.fields["models"] != introductions[0].fields["models"] for other in introductions):
            await self.stop()
            raise ValueError("model: found it changing while it was loaded, wanted it whole: reload it again")
        self.cards = cards_of(introductions[0])
        self.batcher.pace = float(np.mean([introduction.fields["pace"] for introduction in introductions]))
        cores = {replica.place.core for replica in self.replicas if isinstance(replica, Process)}
        self.batcher.num_cores = max(1, len(cores))
        self.batcher.start(self.replicas, self._replace)

    async def _load(self, process: Process) -> Letter:
        return await process.start(self.settings.model, self.settings.precision)

    async def _replace(self, lost: Replica) -> Replica:
        """Another process in the place of one that was lost; tried until it succeeds."""
        assert isinstance(lost, Process), "a thread is not lost"
        self.metrics.workers_lost.inc()
        wait = 0.1
        while True:
            log.error("worker %d: lost; another is started in its place", lost.pid)
            process = Process(lost.place)
            try:
                introduction = await self._load(process)
                if {name: card.digest for name, card in cards_of(introduction).items()} == self._digests():
                    break
                await process.stop()
                log.error("worker %d: found another model than the server has, wanted the same: reload it", process.pid)
            except ValueError as error:
                log.error("worker %d: not ready: %s", process.pid, error)
            wait = min(30, 2 * wait)
            await asyncio.sleep(wait)
        self.replicas[self.replicas.index(lost)] = process
        return process

    def _digests(self) -> dict[str, str]:
        return {name: card.digest for name, card in self.cards.items()}

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Keep it from ending while something may still be asked of it."""
        self._num_holders += 1
        self._free.clear()
        try:
            yield
        finally:
            self._num_holders -= 1
            if not self._num_holders:
                self._free.set()

    async def retire(self, timeout: float) -> None:
        """End once nobody holds it any more, and in any case after so long."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._free.wait(), timeout)
        await self.close(self.settings.drain_seconds)

    async def close(self, timeout: float) -> None:
        """Finish what was admitted, at most for so long, and end."""
        await self.batcher.close(timeout)
        await self.stop()

    async def stop(self) -> None:
        """End the replicas at once."""
        await asyncio.gather(*(replica.stop() for replica in self.replicas))

    # ------------------------------------------------------------------------------------------------- work

    def submit(
        self, wanted: Wanted, clips: Sequence[Clip], deadline: float, held: bool = False
    ) -> tuple[Ticket, list[Work]]:
        """Admit all of the clips or none. `held`: what they belong to holds the queue, see `Batcher.hold`."""
        works = [Work.plan(wanted, clip) for clip in clips]
        items = [item for work in works for item in work.items]
        seconds = sum(clip.seconds for clip in clips)
        return self.batcher.admit(items, seconds=seconds, deadline=deadline, held=held), works


@dataclass(frozen=True)
class Work:
    """A clip on its way: the waves it was cut into, and what is to become of their frames.

    To search it is one wave without windows, however long.
    """

    wanted: Wanted
    clip: Clip
    items: list[Item]
    windows: list[Window]
    rows: slice
    """Of the recording's frames, those that are wanted."""

    @classmethod
    def plan(cls, wanted: Wanted, clip: Clip, cut: Cut = LONG) -> Work:
        """How the clip goes through the model: whole, or where it is long in overlapping windows."""
        card = wanted.card
        if wanted.search is not None:
            key, count = Pass(card.name, wanted.layer, led=True), num_frames(len(clip.wave))
            item = Item(key, clip.wave, card.operations(count, wanted.layer), search=wanted.search)
            return cls(wanted, clip, [item], [], slice(0, count))
        windows = cut.windows(len(clip.wave))
        total = windows[-1].frames.stop
        rows = slice(0, total) if wanted.span is None else frames_within(*wanted.span, total)
        key = Pass(card.name, wanted.layer)
        if rows.start >= rows.stop:
            return cls(wanted, clip, [], [], rows)
        if len(windows) == 1:
            spell = wanted.spell and rows == slice(0, total)
            items = [Item(key, clip.wave, card.operations(total, wanted.layer), spell)]
            return cls(wanted, clip, items, windows, rows)
        if not (wanted.spell and card.centred):
            windows = [w for w in windows if w.frames.start < rows.stop and w.frames.stop > rows.start]
        items = []
        for window in windows:
            wave = clip.wave[window.samples]
            heard = window.kept.stop + cut.after
            items.append(Item(key, wave, card.operations(heard, wanted.layer), moments=clip.moments))
        return cls(wanted, clip, items, windows, rows)

    def about(self) -> dict[str, Any]:
        """What is said of the clip's result."""
        return {
            "name": self.clip.name,
            "seconds": self.clip.seconds,
            "start_ms": FRAME_MS * self.rows.start,
            "num_frames": self.rows.stop - self.rows.start,
        }

    async def result(self) -> Array:
        """The clip's frames (T, D), units (T,) or images (JSON's bytes); ApiError where it makes none in time."""
        if not self.items:
            raise ApiError(
                422, "no_frames", f"{self.clip.label}: found no frame from start to end, wanted at least one"
            )
        remaining = self.items[0].ticket.deadline - time.monotonic()
        try:
            async with asyncio.timeout(remaining):
                parts = [await item.result for item in self.items]
        except WaveError as error:
            if error.kind == "bad_audio":
                raise ApiError(400, "bad_audio", relabel(error, self.clip.label)) from None
            log.error("model: %s", error)
            raise ApiError(500, "internal", "model: found a fault of its own, wanted none: report it") from None
        except (LateError, TimeoutError):
            waited = time.monotonic() - self.items[0].ticket.arrived
            raise late(f"{self.clip.label}: found no result after {waited:.1f} s, wanted one by then") from None
        except LostError as error:
            raise ApiError(
                503, "worker_lost", f"{error}: send it again or leave it out", {"Retry-After": "5"}
            ) from None
        except ClosedError:
            raise draining() from None
        if self.wanted.search is not None or (len(parts) == 1 and self.rows == slice(0, len(parts[0]))):
            return parts[0]
        return await to_thread.run_sync(self._join, parts)

    def _join(self, parts: Sequence[Array]) -> Array:
        first = self.windows[0].frames.start
        frames = np.concatenate([part[window.kept] for part, window in zip(parts, self.windows, strict=True)])
        rows = slice(self.rows.start - first, self.rows.stop - first)
        codebook = self.wanted.card.codebook
        if not self.wanted.spell or codebook is None:
            return frames[rows]
        return codebook.assign(frames[rows], frames.mean(0, dtype=np.float64))
