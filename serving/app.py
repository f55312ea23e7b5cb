"""The embedding server: speech in, frame embeddings or unit tokens out."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI

from serving.edge.gate import Gate
from serving.edge.guard import Cors, Guard
from serving.edge.keys import Keys
from serving.engine.process import Process
from serving.engine.service import Service
from serving.errors import use_envelope
from serving.metrics import Metrics
from serving.routes import kserve, operation, pages, speech, stream
from serving.settings import Settings
from serving.tracing import Traced
from sonorant.inference import Speech

log = logging.getLogger("serving")


def create_app(
    settings: Settings | None = None,
    models: Mapping[str, Speech] | None = None,
    processes: Sequence[Process] = (),
) -> FastAPI:
    """The server of the models that the settings name, in worker processes; or of `models`, in a thread of this one.

    `processes` are worker processes that have been started already. Raises ValueError where the keys' file is broken
    or traces are asked for that cannot be made.
    """
    settings = settings or Settings()
    metrics = Metrics()
    service = Service(settings, metrics, models, processes)
    keys = Keys(settings.keys_file)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(service.start())]
        if settings.watch_seconds:
            tasks.append(asyncio.create_task(service.watch(settings.watch_seconds)))
            tasks.append(asyncio.create_task(keys.watch(settings.watch_seconds)))
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await service.close()

    app = FastAPI(
        title="Sonorant",
        version="1",
        description="Speech to frame embeddings and unit tokens.",
        lifespan=lifespan,
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        generate_unique_id_function=lambda route: route.name,
    )
    app.state.service, app.state.keys = service, keys
    use_envelope(app)
    if service.tracing is not None:
        app.add_middleware(Traced, tracing=service.tracing)
    app.add_middleware(Guard, settings=settings, keys=keys)  # the last one added is the first one passed
    if settings.cors_origins:
        app.add_middleware(Cors, origins=settings.cors_origins)
    app.add_middleware(Gate, settings=settings, metrics=metrics)
    for routes in (speech.routes, stream.routes, kserve.routes, operation.routes, pages.make_routes()):
        app.include_router(routes)
    return app
