"""The embedding server: speech in, frame embeddings or unit tokens out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any

import numpy as np
from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Depends, FastAPI, Query, Request
from fastapi.responses import Response
from numpy.typing import NDArray
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic_core import to_json

from serving import schemas
from serving.batcher import Frames, Task
from serving.errors import ApiError, use_envelope
from serving.gate import Gate
from serving.intake import REQUEST_BODY, Clip, read_clips
from serving.metrics import Metrics
from serving.service import Service
from serving.settings import Settings
from sonorant.inference import FRAME_MS, Speech, load

NOT_READY: dict[int | str, dict[str, Any]] = {
    503: {"model": schemas.ErrorEnvelope, "description": "Not warmed up yet, or about to stop"}
}
ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": schemas.ErrorEnvelope, "description": "No readable audio in the body"},
    413: {"model": schemas.ErrorEnvelope, "description": "Too many bytes or too many seconds"},
    415: {"model": schemas.ErrorEnvelope, "description": "A media type that is not accepted"},
    422: {"model": schemas.ErrorEnvelope, "description": "An option or a field that is not accepted"},
    429: {
        "model": schemas.ErrorEnvelope,
        "description": "As much audio waits as the queue takes",
        "headers": {"Retry-After": {"description": "seconds to wait", "schema": {"type": "integer"}}},
    },
    503: {"model": schemas.ErrorEnvelope, "description": "About to stop"},
}
routes = APIRouter()


def the_service(request: Request) -> Service:
    """The service of the app that answers."""
    service: Service = request.app.state.service
    return service


UsesService = Annotated[Service, Depends(the_service)]


@routes.post(
    "/v1/embeddings",
    response_model=schemas.Embeddings,
    responses=ERRORS,
    openapi_extra={"requestBody": REQUEST_BODY},
    tags=["speech"],
)
async def embeddings(
    request: Request, service: UsesService, options: Annotated[schemas.EmbeddingOptions, Query()]
) -> Response:
    """One vector for every frame of the audio, or their mean."""
    layer = service.speech.layer if options.layer is None else options.layer
    if layer > service.speech.num_layers:
        raise ApiError(422, "invalid_option", f"query layer: found {layer}, wanted 0 to {service.speech.num_layers}")
    clips = await read_clips(request, service.settings, request.app.state.decoders)
    frames = await service.process(Task("embed", layer), clips, "/v1/embeddings")

    def answer() -> bytes:
        pooled = [f.mean(axis=0) for f in frames] if options.pooling == "mean" else frames
        return to_json(
            {
                "model": service.name,
                "layer": layer,
                "pooling": options.pooling,
                "dim": service.speech.dim,
                "frame_ms": FRAME_MS,
                "results": [
                    result | {"embedding": p.tolist()}
                    for result, p in zip(describe(clips, frames), pooled, strict=True)
                ],
            }
        )

    return Response(await to_thread.run_sync(answer), media_type="application/json")


@routes.post(
    "/v1/units",
    response_model=schemas.Units,
    responses=ERRORS,
    openapi_extra={"requestBody": REQUEST_BODY},
    tags=["speech"],
)
async def units(request: Request, service: UsesService, options: Annotated[schemas.UnitOptions, Query()]) -> Response:
    """One unit token for every frame of the audio, or each run of equal units once."""
    clips = await read_clips(request, service.settings, request.app.state.decoders)
    frames = await service.process(Task("units"), clips, "/v1/units")
    body = {
        "model": service.name,
        "num_units": service.speech.num_units,
        "frame_ms": FRAME_MS,
        "results": [
            result | spell(tokens, options.deduplicate)
            for result, tokens in zip(describe(clips, frames), frames, strict=True)
        ],
    }
    return Response(to_json(body), media_type="application/json")


def describe(clips: Sequence[Clip], frames: Sequence[Frames]) -> list[dict[str, Any]]:
    """What every result says of its file."""
    return [
        {"name": clip.name, "seconds": clip.seconds, "num_frames": len(f)}
        for clip, f in zip(clips, frames, strict=True)
    ]


def spell(units: NDArray[np.int64], deduplicated: bool) -> dict[str, Any]:
    """A file's unit tokens (T,) as the answer has them."""
    if not deduplicated:
        return {"units": units.tolist(), "durations_ms": None}
    kept, durations_ms = deduplicate(units)
    return {"units": kept.tolist(), "durations_ms": durations_ms.tolist()}


def deduplicate(units: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The unit of each run of equal ones, and how many milliseconds it lasts: (T,) to (R,), (R,)."""
    starts = np.flatnonzero(np.diff(units, prepend=-1))
    return units[starts], np.diff(starts, append=len(units)) * FRAME_MS


@routes.get("/v1/models", response_model=schemas.Models, tags=["speech"])
async def models(service: UsesService) -> Response:
    """What is loaded, and where it comes from."""
    speech = service.speech
    model = {
        "id": service.name,
        "layer": speech.layer,
        "num_layers": speech.num_layers,
        "dim": speech.dim,
        "num_units": speech.num_units,
        "frame_ms": FRAME_MS,
        "about": speech.about,
    }
    return Response(to_json({"models": [model]}), media_type="application/json")


@routes.get("/health/live", tags=["operation"])
async def live() -> schemas.Health:
    """The process answers."""
    return schemas.Health(status="live")


@routes.get("/health/ready", responses=NOT_READY, tags=["operation"])
async def ready(service: UsesService) -> schemas.Health:
    """The model has run once and takes requests."""
    service.check_ready()
    return schemas.Health(status="ready")


@routes.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    tags=["operation"],
)
async def metrics(service: UsesService) -> Response:
    """Counters and histograms for Prometheus."""
    return Response(service.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)


def create_app(speech: Speech | None = None, settings: Settings | None = None) -> FastAPI:
    """The server around `speech`, or the model that the settings name: ValueError where there is none."""
    settings = settings or Settings()
    metrics = Metrics()
    service = Service(speech or load(settings.model), settings, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.decoders = CapacityLimiter(settings.num_decoders)
        service.batcher.start()
        warming = asyncio.create_task(service.warm_up())
        yield
        await service.batcher.close(settings.drain_seconds)
        await warming

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
    app.state.service = service
    use_envelope(app)
    app.add_middleware(Gate, settings=settings, metrics=metrics)
    app.include_router(routes)
    return app
