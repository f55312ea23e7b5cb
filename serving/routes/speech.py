"""The routes /v1: speech in, frame embeddings, unit tokens or images out."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from anyio import to_thread
from fastapi import APIRouter, Query, Request
from fastapi.responses import Response
from numpy.typing import NDArray
from pydantic_core import to_json

from serving import schemas
from serving.engine.batcher import Search
from serving.engine.cards import Card
from serving.engine.engine import Wanted, Work
from serving.engine.service import Service
from serving.engine.wire import Array
from serving.errors import ApiError, fault_of, shorten
from serving.routes.answers import JSON, MEDIA, NDJSON, NPY, SAFETENSORS, Part, answer, answer_by_line, choose_media
from serving.routes.intake import REQUEST_BODY, Clip, Upload, read_uploads
from serving.routes.requests import UsesService, admit, check_time, find_card
from sonorant.inference import FRAME_MS

Envelope = schemas.ErrorEnvelope
LISTS = (JSON, NDJSON)
"""The ways to write what is no array."""
RETRY = {"Retry-After": {"description": "seconds to wait", "schema": {"type": "integer"}}}
ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": Envelope, "description": "No readable audio in the body"},
    401: {"model": Envelope, "description": "No API key, where one is needed, or an unknown one"},
    403: {"model": Envelope, "description": "An API key that may not use this model"},
    404: {"model": Envelope, "description": "A model that is not loaded"},
    406: {"model": Envelope, "description": "A media type that cannot be answered with"},
    408: {"model": Envelope, "description": "The body or the result did not come in time"},
    413: {"model": Envelope, "description": "Too many bytes or too many seconds"},
    415: {"model": Envelope, "description": "A media type that is not accepted"},
    422: {"model": Envelope, "description": "An option or a field that is not accepted"},
    429: {"model": Envelope, "description": "More than the queue or the key's quota takes", "headers": RETRY},
    503: {"model": Envelope, "description": "Not ready yet, or about to stop", "headers": RETRY},
}


def responses(model: type[schemas.Message], media: Sequence[str] = MEDIA) -> dict[int | str, dict[str, Any]]:
    """What a route for speech may answer, for the document."""
    binary = {"schema": {"type": "string", "format": "binary"}}
    lines = {"schema": {"type": "string", "description": "one JSON object a line and file: its result or its error"}}
    content = {NDJSON: lines, NPY: binary, SAFETENSORS: binary}
    return {200: {"model": model, "content": {kind: content[kind] for kind in media if kind != JSON}}, **ERRORS}


routes = APIRouter(tags=["speech"])


@routes.post(
    "/v1/embeddings",
    response_model=schemas.Embeddings,
    responses=responses(schemas.Embeddings),
    openapi_extra={"requestBody": REQUEST_BODY},
)
async def embeddings(
    request: Request, service: UsesService, options: Annotated[schemas.EmbeddingOptions, Query()]
) -> Response:
    """One vector for every frame of the audio, or one for all of it."""
    card = find_card(request.state.visit, service, options.model)
    if options.pooling not in card.poolings:
        wanted = " or ".join(card.poolings)
        raise ApiError(422, "invalid_option", f"query pooling: found {options.pooling}, wanted {wanted}: model's own")
    if options.normalise == "utterance" and options.pooling != "none":
        raise ApiError(
            422, "invalid_option", "query normalise: found utterance with a pooling, wanted none or l2: the mean is 0"
        )
    layer = layer_of(card, options)
    head = {
        "model": card.name,
        "digest": card.digest,
        "layer": layer if isinstance(layer, int) else list(layer),
        "pooling": options.pooling,
        "normalise": options.normalise,
        "dim": card.dim,
        "frame_ms": FRAME_MS,
    }

    def finish(work: Work, frames: Array) -> Part:
        return Part(work.about(), {"embedding": shape(frames, options.pooling, options.normalise)})

    return await respond(request, service, Wanted(card, layer, span=span_of(options)), head, finish)


@routes.post(
    "/v1/units",
    response_model=schemas.Units,
    responses=responses(schemas.Units),
    openapi_extra={"requestBody": REQUEST_BODY},
)
async def units(request: Request, service: UsesService, options: Annotated[schemas.UnitOptions, Query()]) -> Response:
    """One unit token for every frame of the audio, or each run of equal units once."""
    card = find_card(request.state.visit, service, options.model)
    if not card.num_units:
        raise ApiError(422, "invalid_option", f"model {card.name}: found no codebook, wanted one to make units")

    def finish(work: Work, found: Array) -> Part:
        if not options.deduplicate:
            return Part(work.about(), {"units": found, "durations_ms": None})
        kept, durations_ms = deduplicate(found)
        return Part(work.about(), {"units": kept, "durations_ms": durations_ms})

    head = {"model": card.name, "digest": card.digest, "num_units": card.num_units, "frame_ms": FRAME_MS}
    wanted = Wanted(card, card.layer, spell=True, span=span_of(options))
    return await respond(request, service, wanted, head, finish)


@routes.post(
    "/v1/images/search",
    response_model=schemas.Searches,
    responses=responses(schemas.Searches, LISTS),
    openapi_extra={"requestBody": REQUEST_BODY},
)
async def search_images(
    request: Request, service: UsesService, options: Annotated[schemas.SearchOptions, Query()]
) -> Response:
    """The images that the audio speaks of, best first: each file is heard as one utterance."""
    card = find_card(request.state.visit, service, options.model)
    if not card.num_images or card.grounded_layer is None:
        found = "it not grounded" if card.grounded_layer is None else "it grounded but without images"
        raise ApiError(
            422,
            "not_grounded",
            f"model {card.name}: found {found}, wanted images to search: see num_images, /v1/models",
        )

    def finish(work: Work, found: Array) -> Part:
        about = {"name": work.clip.name, "seconds": work.clip.seconds}
        return Part({**about, "images": json.loads(found.tobytes())}, {})

    head = {"model": card.name, "digest": card.digest, "num_images": card.num_images}
    wanted = Wanted(card, card.grounded_layer, search=Search(options.top, options.thumbnails))
    return await respond(request, service, wanted, head, finish, LISTS, service.settings.max_search_seconds)


@routes.get("/v1/models", response_model=schemas.Models, responses={k: ERRORS[k] for k in (401, 429, 503)})
async def models(request: Request, service: UsesService) -> Response:
    """What is loaded, and where it comes from."""
    cards = service.engine.cards.values()
    described = [card.describe() for card in cards if request.state.visit.may_use(card.name)]
    return Response(to_json({"models": described}), media_type="application/json")


# ------------------------------------------------------------------------------------------------------- options


def layer_of(card: Card, options: schemas.EmbeddingOptions) -> int | tuple[float, ...]:
    """The layer's index, or every layer's weight."""
    if options.layer != "weighted" and options.layer_weights is not None:
        raise ApiError(422, "invalid_option", "query layer_weights: found them without layer=weighted, wanted both")
    if options.layer == "weighted":
        return weights_of(card, options.layer_weights)
    names = {"published": card.layer, "last": card.num_layers, **{str(i): i for i in range(card.num_layers + 1)}}
    if options.layer not in names:
        wanted = f"wanted 0 to {card.num_layers}, published, last or weighted"
        raise ApiError(422, "invalid_option", f"query layer: found {shorten(options.layer)}, {wanted}")
    return names[options.layer]


def weights_of(card: Card, given: str | None) -> tuple[float, ...]:
    """A weight for every layer, 0 included."""
    count = card.num_layers + 1
    if given is None:
        return (1 / count,) * count
    wanted = f"wanted {count} finite numbers with commas between, one a layer from 0 to {card.num_layers}"
    try:
        weights = tuple(float(part) for part in given.split(","))
    except ValueError:
        raise ApiError(422, "invalid_option", f"query layer_weights: found {shorten(given)}, {wanted}") from None
    if len(weights) != count or not all(math.isfinite(w) and abs(w) <= 1e6 for w in weights):
        raise ApiError(422, "invalid_option", f"query layer_weights: found {shorten(given)}, {wanted}")
    return weights


def span_of(options: schemas.Options) -> tuple[float, float] | None:
    """The stretch of every file that is wanted."""
    if options.start is None and options.end is None:
        return None
    start, end = options.start or 0.0, math.inf if options.end is None else options.end
    if end <= start:
        raise ApiError(422, "invalid_option", f"query end: found {end:g}, wanted more than start, which is {start:g}")
    return start, end


# ------------------------------------------------------------------------------------------------------- answers

Finish = Callable[[Work, Array], Part]


async def respond(
    request: Request,
    service: Service,
    wanted: Wanted,
    head: Mapping[str, Any],
    finish: Finish,
    offered: Sequence[str] = MEDIA,
    max_seconds: float = math.inf,
) -> Response:
    """What the model makes of every file of the request, none longer than `max_seconds`, brought to its final form by
    `finish` and written in one of the ways that are `offered`."""
    media = choose_media(request, offered)
    check_time(request.state.visit)
    uploads = await read_uploads(request, service.settings)
    clips = await service.decoder.decode(uploads, request.state.visit.exit, max_seconds)
    if media != NDJSON:
        for clip in clips:
            if isinstance(clip, ApiError):
                raise clip
    good = [clip for clip in clips if isinstance(clip, Clip)]
    works = await admit(request, service, wanted, good)

    async def part(work: Work) -> Part:
        found = await work.result()
        return await to_thread.run_sync(finish, work, found) if len(found) > 4096 else finish(work, found)

    if media == NDJSON:
        return answer_by_line(head, by_line(request, uploads, clips, works, part))
    return answer(media, head, [await part(work) for work in works])


async def by_line(
    request: Request,
    uploads: Sequence[Upload],
    clips: Sequence[Clip | ApiError],
    works: Sequence[Work],
    part: Callable[[Work], Any],
) -> AsyncIterator[Part]:
    """The files in order, each a result or what was wrong with it."""
    waiting = iter(works)
    for index, (upload, clip) in enumerate(zip(uploads, clips, strict=True)):
        try:
            if isinstance(clip, ApiError):
                raise clip
            found: Part = await part(next(waiting))
            yield Part({"index": index, **found.about}, found.arrays)
        except ApiError as error:
            yield Part({"index": index, "name": upload.name, "error": fault_of(request.scope, error).model_dump()}, {})


def shape(frames: NDArray[np.float32], pooling: str, normalise: str) -> NDArray[np.float32]:
    """Frames (T, D) normalised and pooled: (T, D) or (D,)."""
    if normalise == "utterance":
        centred = frames - frames.mean(0, dtype=np.float64)
        frames = (centred / np.sqrt(np.square(centred).mean(0) + 1e-5)).astype(np.float32)
    vectors: NDArray[np.float32] = frames.mean(0) if pooling == "mean" else frames
    if normalise == "l2":
        lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
        vectors = vectors / np.maximum(lengths, np.finfo(np.float32).tiny)
    return vectors


def deduplicate(units: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The unit of each run of equal ones, and how many milliseconds it lasts: (T,) to (R,), (R,)."""
    starts = np.flatnonzero(np.diff(units, prepend=-1))
    return units[starts], np.diff(starts, append=len(units)) * FRAME_MS
