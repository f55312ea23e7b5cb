"""The models at work: which engine takes requests, reloading, draining."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from anyio import to_thread

from serving.engine.engine import Engine
from serving.engine.process import Process
from serving.errors import draining, not_ready
from serving.metrics import Metrics
from serving.routes.intake import Decoder
from serving.settings import Settings
from serving.tracing import Tracing
from sonorant.inference import Speech

log = logging.getLogger("serving")


class Service:
    """The engine of the day, its successor while one is made, and whether requests are taken."""

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        models: Mapping[str, Speech] | None = None,
        processes: Sequence[Process] = (),
    ) -> None:
        self.settings, self.metrics = settings, metrics
        self._models, self._processes = models, processes
        self.decoder = Decoder(settings)
        self.tracing = Tracing() if settings.tracing else None
        self.failure = ""
        """Why the models could not be loaded at the start."""
        self._engine: Engine | None = None
        self._retiring: set[asyncio.Task[None]] = set()
        self._reloading = asyncio.Lock()
        self.draining = False
        metrics.queue_depth.set_function(lambda: len(self._engine.batcher.waiting) if self._engine else 0)
        metrics.queue_seconds.set_function(lambda: self._engine.batcher.seconds if self._engine else 0)

    async def start(self) -> None:
        """Load the models. From then on the service is ready, or `failure` says why it never will be."""
        engine = Engine(self.settings, self.metrics, self._processes)
        try:
            await engine.start(self._models)
        except ValueError as error:
            self.failure = str(error)
            log.error("%s", error)
        else:
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

        The old ones stay for the requests and streams that found them. Where the new ones cannot be loaded they go on.
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
                task = asyncio.create_task(old.retire(self.settings.max_stream_seconds))
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
            await asyncio.gather(*(engine.close(self.settings.drain_seconds) for engine in engines))
            for task in self._retiring:
                task.cancel()
            await asyncio.gather(*self._retiring, return_exceptions=True)
        if self.tracing is not None:
            await to_thread.run_sync(self.tracing.close)


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
