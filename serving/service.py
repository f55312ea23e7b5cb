"""The models at work: what is loaded, what becomes of a request's audio, reloading and draining."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from anyio import to_thread

from serving.batcher import (
    Batch,
    Batcher,
    ClosedError,
    FullError,
    Item,
    LateError,
    LostError,
    Pass,
    Replica,
    Ticket,
    WaveError,
)
from serving.errors import ApiError, draining, late, not_ready, overloaded
from serving.intake import Clip, Decoder, relabel
from serving.metrics import Metrics
from serving.replica import Card, Place, WorkerProcess, WorkerThread, cards_of, places
from serving.settings import Settings
from serving.wire import Array, Letter
from sonorant.inference import FRAME_MS, LONG, Cut, Speech, Window, frames_within

log = logging.getLogger("serving")


@dataclass(frozen=True)
class Wanted:
    """What a request wants of its audio. layer: an index, or a weight for each; span: seconds of the recording."""

    card: Card
    layer: int | tuple[float, ...]
    spell: bool = False
    span: tuple[float, float] | None = None


class Engine:
    """One loading of the models: their cards, their replicas and their queue. A reload makes another."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings, self.metrics = settings, metrics
        self.cards: dict[str, Card] = {}
        self.replicas: list[WorkerProcess | WorkerThread] = []
        self.batcher = Batcher(
            max_seconds=settings.max_queue_seconds,
            max_batch_seconds=settings.max_batch_seconds,
            observe=self._observe,
        )

    async def start(self, models: Mapping[str, Speech] | None = None) -> None:
        """Load and warm up, in worker processes, or `models` in a thread; ValueError where it fails."""
        if models is not None:
            thread = WorkerThread(models)
            introductions = [await thread.start()]
            self.replicas = [thread]
        else:
            wanted = places(self.settings.num_workers, self.settings.device)
            started = await asyncio.gather(*map(self._hire, wanted), return_exceptions=True)
            self.replicas = [outcome[0] for outcome in started if not isinstance(outcome, BaseException)]
            failures = [outcome for outcome in started if isinstance(outcome, BaseException)]
            if failures:
                await self.stop()
                raise failures[0]
            introductions = [outcome[1] for outcome in started if not isinstance(outcome, BaseException)]
        if any(other.fields["models"] != introductions[0].fields["models"] for other in introductions):
            await self.stop()
            raise ValueError("model: found it changing while it was loaded, wanted it whole: reload it again")
        self.cards = cards_of(introductions[0])
        self.batcher.pace = float(np.mean([introduction.fields["pace"] for introduction in introductions]))
        self.batcher.start(self.replicas, self._replace)

    async def _hire(self, place: Place) -> tuple[WorkerProcess, Letter]:
        return await WorkerProcess.start(self.settings.model, self.settings.precision, place)

    async def _replace(self, lost: Replica) -> Replica:
        """Another process in the place of one that was lost; tried until it succeeds."""
        assert isinstance(lost, WorkerProcess)
        log.error("worker %d: lost with status %s", lost.process.pid, lost.process.returncode)
        self.metrics.workers_lost.inc()
        wait = 0.1
        while True:
            try:
                worker, introduction = await self._hire(lost.place)
                if cards_of(introduction).keys() == self.cards.keys():
                    break
            except ValueError as error:
                log.error("worker: not started again: %s", error)
            wait = min(30, 2 * wait)
            await asyncio.sleep(wait)
        self.replicas[self.replicas.index(lost)] = worker
        return worker

    def _observe(self, batch: Batch) -> None:
        self.metrics.observe_batch(batch)

    async def retire(self, timeout: float | None) -> None:
        """Finish what was admitted, at most for so long, and end."""
        await self.batcher.close(timeout)
        await self.stop()

    async def stop(self) -> None:
        """End the replicas at once."""
        await asyncio.gather(*(replica.stop() for replica in self.replicas))

    # ------------------------------------------------------------------------------------------------- work

    def submit(self, wanted: Wanted, clips: Sequence[Clip], deadline: float) -> tuple[Ticket, list[Work]]:
        """Admit all of the clips or none."""
        works = [Work.plan(wanted, clip) for clip in clips]
        items = [item for work in works for item in work.items]
        seconds = sum(clip.seconds for clip in clips)
        return self.batcher.admit(items, seconds=seconds, deadline=deadline), works


@dataclass(frozen=True)
class Work:
    """A clip on its way: the waves it was cut into, and what is to become of their frames."""

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
        items, moments = [], card.moments(clip.wave)
        for window in windows:
            wave = clip.wave[window.samples]
            heard = window.kept.stop + cut.after
            items.append(Item(key, wave, card.operations(heard, wanted.layer), moments=moments))
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
        """The clip's frames (T, D), or units (T,); ApiError where it makes none in time."""
        if not self.items:
            raise ApiError(
                422, "invalid_option", f"{self.clip.label}: found no frame from start to end, wanted at least one"
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
        if len(parts) == 1 and self.rows == slice(0, len(parts[0])):
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


class Service:
    """The engine of the day, its successor while one is made, and whether requests are taken."""

    def __init__(self, settings: Settings, metrics: Metrics, models: Mapping[str, Speech] | None = None) -> None:
        self.settings, self.metrics = settings, metrics
        self._models = models
        self.decoder = Decoder(settings)
        self.failure = ""
        """Why the models could not be loaded at the start."""
        self._engine: Engine | None = None
        self._retiring: set[asyncio.Task[None]] = set()
        self._reloading = asyncio.Lock()
        self.draining = False
        metrics.queue_depth.set_function(lambda: len(self._engine.batcher.waiting) if self._engine else 0)
        metrics.queue_seconds.set_function(lambda: self._engine.batcher.seconds if self._engine else 0)

    async def start(self) -> None:
        """Load the models; ValueError where that fails. From then on the service is ready."""
        engine = Engine(self.settings, self.metrics)
        await engine.start(self._models)
        self._take(engine)

    def _take(self, engine: Engine) -> None:
        self._engine = engine
        if self.draining:
            engine.batcher.drain()
        self.metrics.show_models(engine.cards.values())

    @property
    def engine(self) -> Engine:
        """What serves now; ApiError 503 until it has been warmed up, and from the moment the service drains."""
        if self.draining:
            raise draining()
        if self._engine is None:
            raise not_ready()
        return self._engine

    async def reload(self) -> bool:
        """Load the models' folders anew, then let the new ones take all further requests.

        The old ones finish what they were admitted with. Where the new ones cannot be loaded the old ones stay.
        """
        async with self._reloading:
            old, new = self._engine, Engine(self.settings, self.metrics)
            try:
                await new.start(self._models)
            except ValueError as error:
                self.metrics.reloads.labels("failed").inc()
                log.error("reload: %s; the models loaded before stay", error)
                return False
            self._take(new)
            if old is not None:
                task = asyncio.create_task(old.retire(self.settings.request_seconds))
                self._retiring.add(task)
                task.add_done_callback(self._retiring.discard)
            self.metrics.reloads.labels("done").inc()
            log.info("reload: %s", ", ".join(f"{card.name} {card.digest[:12]}" for card in new.cards.values()))
            return True

    async def watch(self, seconds: float) -> None:
        """Reload whenever the models' folders have changed, looking that often."""
        known = signatures(self.settings.model)
        while True:
            await asyncio.sleep(seconds)
            found = await to_thread.run_sync(signatures, self.settings.model)
            if found != known and await self.reload():
                known = found

    def drain(self) -> None:
        """Admit nothing more; what was admitted will be answered."""
        self.draining = True
        if self._engine:
            self._engine.batcher.drain()

    async def close(self) -> None:
        """Drain for as long as the settings say, then end."""
        self.drain()
        async with self._reloading:
            engines = [self._engine] if self._engine else []
            await asyncio.gather(*(engine.retire(self.settings.drain_seconds) for engine in engines))
            for task in self._retiring:
                task.cancel()
            await asyncio.gather(*self._retiring, return_exceptions=True)

    def submit(self, wanted: Wanted, clips: Sequence[Clip], deadline: float) -> tuple[Ticket, list[Work]]:
        """Admit all of the clips or none: ApiError 429, or 503 while draining."""
        try:
            return self.engine.submit(wanted, clips, deadline)
        except FullError as error:
            raise overloaded(str(error), error.retry_seconds) from None
        except ClosedError:
            raise draining() from None


def signatures(models: Mapping[str, Path]) -> list[Any]:
    """What tells a published folder from the one that lay there before."""
    found = []
    for folder in models.values():
        for name in ("config.json", "artifact.json", "model.safetensors"):
            try:
                status = (folder / name).stat()
                found.append((status.st_ino, status.st_mtime_ns, status.st_size))
            except OSError:
                found.append(None)
    return found
