"""The routes /v2: the Open Inference Protocol (KServe's V2) over HTTP, with its binary tensor data extension.

Inputs are `audio`, FP32 (rows, samples) or (samples,) at 16 kHz, of which `num_samples`, INT64 (rows,), are heard in
each row; or `file`, BYTES (files,), encoded audio. Outputs are `embeddings`, FP32 (rows, frames, dim), zero where a
row has fewer frames, or (rows, dim) with a pooling; `units`, INT64 (rows, frames), -1 there; and `num_frames`, INT64
(rows,). One pass of the model makes them all. Request parameters are `layer`, `layer_weights`, `pooling` and
`normalise` as in /v1, and `timeout` in microseconds.

The protocol's clients read an error as a string, so these routes answer {"error": one line, "code", "request_id"}
where /v1 answers {"error": {"code", "message", "request_id"}}.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Annotated, Any

from anyio import CapacityLimiter
from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from pydantic import Field

from serving import schemas
from serving.engine.cards import Card
from serving.engine.service import Service
from serving.errors import ApiError, shorten
from serving.routes.inference import ACCEPTED, VERSION, infer
from serving.routes.requests import UsesService, find_card
from serving.routes.tensors import InferenceRequest


class TensorMetadata(schemas.Message):
    """A tensor that a model takes or makes; -1 in its shape is any size."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(schemas.Message):
    """A model, as the protocol describes it."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ServerMetadata(schemas.Message):
    """The server, as the protocol describes it."""

    name: str
    version: str
    extensions: list[str]


class TensorOutput(schemas.Message):
    """A tensor of an answer: its data here, or behind the JSON."""

    name: str
    datatype: str
    shape: list[int]
    parameters: Annotated[dict[str, int] | None, Field(description="binary_data_size")] = None
    data: Annotated[list[float] | None, Field(description="row-major, flat")] = None


class InferenceAnswer(schemas.Message):
    """The JSON of an answer."""

    model_name: str
    model_version: str
    id: str | None = None
    outputs: list[TensorOutput]


REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": schemas.Refusal, "description": "A request that does not fit together, or no readable audio"},
    401: {"model": schemas.Refusal, "description": "No API key, where one is needed, or an unknown one"},
    403: {"model": schemas.Refusal, "description": "An API key that may not use this model"},
    404: {"model": schemas.Refusal, "description": "A model or a version that is not loaded"},
    408: {"model": schemas.Refusal, "description": "The body or the result did not come in time"},
    413: {"model": schemas.Refusal, "description": "Too many bytes or too many seconds"},
    415: {"model": schemas.Refusal, "description": "A Content-Encoding that is not accepted"},
    422: {"model": schemas.Refusal, "description": "An option that is not accepted"},
    429: {"model": schemas.Refusal, "description": "More than the queue or the key's quota takes"},
    503: {"model": schemas.Refusal, "description": "Not ready yet, or about to stop"},
}
ASKED = {status: REFUSALS[status] for status in (401, 403, 404, 422, 429, 503)}
routes = APIRouter(tags=["inference protocol"])


async def the_card(model: str, request: Request, service: UsesService) -> Card:
    """The model in the path; ApiError 404 where it, or the version, is not loaded, 403 where the key is for others."""
    card = find_card(request.state.visit, service, model)
    found = request.path_params.get("version", VERSION)
    if found != VERSION:
        raise ApiError(404, "no_such_version", f"version of {card.name}: found {shorten(found)}, wanted {VERSION}")
    return card


UsesCard = Annotated[Card, Depends(the_card)]


# ------------------------------------------------------------------------------------------------------ statistics


@dataclass
class Count:
    """Requests that ended one way, and the nanoseconds they took together."""

    count: int = 0
    ns: int = 0

    def add(self, started: float) -> None:
        """Count one that was begun then."""
        self.count += 1
        self.ns += round(1e9 * (time.monotonic() - started))


class Ledger:
    """The inferences of one model by these routes."""

    def __init__(self) -> None:
        self.success, self.fail, self.num_rows, self.last_ms = Count(), Count(), 0, 0

    def describe(self, name: str) -> dict[str, Any]:
        """It, as Triton's clients read it."""
        return {
            "name": name,
            "version": VERSION,
            "last_inference": self.last_ms,
            "inference_count": self.num_rows,
            "execution_count": self.success.count,
            "inference_stats": {"success": vars(self.success), "fail": vars(self.fail)},
        }


@dataclass(frozen=True)
class Desk:
    """What these routes of one app share: the inferences of every model, and how many bodies are parsed at once."""

    ledgers: dict[str, Ledger]
    limiter: CapacityLimiter


def the_desk(request: Request, service: UsesService) -> Desk:
    """The desk of the app that answers."""
    state = request.app.state
    if not hasattr(state, "desk"):
        state.desk = Desk({}, CapacityLimiter(service.settings.num_decoders))
    desk: Desk = state.desk
    return desk


def usable(request: Request, service: Service) -> list[str]:
    """The models that the request's key is for."""
    return [name for name in service.engine.cards if request.state.visit.may_use(name)]


@routes.get("/v2/models/stats", responses={k: ASKED[k] for k in (401, 429, 503)})
async def all_statistics(request: Request, service: UsesService) -> dict[str, Any]:
    """What these routes have inferred since the server began."""
    ledgers = the_desk(request, service).ledgers
    return {"model_stats": [ledgers.get(name, Ledger()).describe(name) for name in usable(request, service)]}


@routes.get("/v2/models/{model}/versions/{version}/stats", include_in_schema=False)
@routes.get("/v2/models/{model}/stats", responses=ASKED)
async def model_statistics(request: Request, service: UsesService, card: UsesCard) -> dict[str, Any]:
    """What these routes have inferred with one model since the server began."""
    return {"model_stats": [the_desk(request, service).ledgers.get(card.name, Ledger()).describe(card.name)]}


# -------------------------------------------------------------------------------------------------------- metadata


@routes.get("/v2", response_model=ServerMetadata, responses={k: REFUSALS[k] for k in (401, 429)})
async def server_metadata() -> ServerMetadata:
    """What serves, and what it can do beyond the protocol's core."""
    extensions = ["binary_tensor_data", "model_configuration", "parameters", "statistics"]
    return ServerMetadata(name="sonorant", version=version("sonorant"), extensions=extensions)


@routes.get("/v2/health/live")
async def server_live() -> dict[str, bool]:
    """The process answers."""
    return {"live": True}


@routes.get("/v2/health/ready", responses={503: REFUSALS[503]})
async def server_ready(service: UsesService) -> dict[str, bool]:
    """The models have run once and take requests."""
    _ = service.engine
    return {"ready": True}


@routes.get("/v2/models/{model}/versions/{version}", include_in_schema=False)
@routes.get("/v2/models/{model}", response_model=ModelMetadata, responses=ASKED)
async def model_metadata(card: UsesCard) -> ModelMetadata:
    """The tensors that a model takes and makes."""
    inputs, outputs = inputs_of(), outputs_of(card)
    return ModelMetadata(name=card.name, versions=[VERSION], platform="sonorant", inputs=inputs, outputs=outputs)


@routes.get("/v2/models/{model}/versions/{version}/ready", include_in_schema=False)
@routes.get("/v2/models/{model}/ready", responses=ASKED)
async def model_ready(card: UsesCard) -> dict[str, str | bool]:
    """The model takes requests."""
    return {"name": card.name, "ready": True}


@routes.get("/v2/models/{model}/versions/{version}/config", include_in_schema=False)
@routes.get("/v2/models/{model}/config", responses=ASKED)
async def model_config(card: UsesCard) -> dict[str, Any]:
    """The model as Triton's clients know a configuration."""

    def described(tensors: Sequence[TensorMetadata], **others: bool) -> list[dict[str, Any]]:
        kinds = {"BYTES": "STRING"}
        return [
            {"name": t.name, "data_type": f"TYPE_{kinds.get(t.datatype, t.datatype)}", "dims": t.shape, **others}
            for t in tensors
        ]

    return {
        "name": card.name,
        "platform": "sonorant",
        "backend": "sonorant",
        "max_batch_size": 0,  # rows are a dimension like the others
        "input": described(inputs_of(), optional=True),
        "output": described(outputs_of(card)),
    }


def inputs_of() -> list[TensorMetadata]:
    """What every model takes."""
    shapes = {"audio": [-1, -1], "num_samples": [-1], "file": [-1]}
    return [TensorMetadata(name=name, datatype=ACCEPTED[name][0], shape=shape) for name, shape in shapes.items()]


def outputs_of(card: Card) -> list[TensorMetadata]:
    """What this one makes."""
    found = [TensorMetadata(name="embeddings", datatype="FP32", shape=[-1, -1, card.dim])]
    if card.num_units:
        found.append(TensorMetadata(name="units", datatype="INT64", shape=[-1, -1]))
    return [*found, TensorMetadata(name="num_frames", datatype="INT64", shape=[-1])]


@routes.post("/v2/repository/index", responses={k: ASKED[k] for k in (401, 429, 503)})
async def repository_index(request: Request, service: UsesService) -> list[dict[str, str]]:
    """The models that are loaded."""
    names = usable(request, service)
    return [{"name": name, "version": VERSION, "state": "READY", "reason": ""} for name in names]


# ------------------------------------------------------------------------------------------------------- inference

SIZE = {"description": "bytes of JSON; tensors' bytes follow", "schema": {"type": "integer"}}
BINARY = {"schema": {"type": "string", "format": "binary", "description": "JSON, and the tensors' bytes behind it"}}
ANSWER: dict[str, Any] = {
    "model": InferenceAnswer,
    "content": {"application/octet-stream": BINARY},
    "headers": {"Inference-Header-Content-Length": SIZE},
}
BODY = {
    "required": True,
    "content": {
        "application/json": {
            "schema": InferenceRequest.model_json_schema(ref_template="#/components/schemas/{model}"),
            "example": {
                "inputs": [{"name": "file", "datatype": "BYTES", "shape": [1], "data": [schemas.EXAMPLE_AUDIO]}],
                "outputs": [{"name": "units"}],
            },
        },
        "application/octet-stream": BINARY,
    },
}


@routes.post("/v2/models/{model}/versions/{version}/infer", include_in_schema=False)
@routes.post(
    "/v2/models/{model}/infer",
    response_model=InferenceAnswer,
    responses={200: ANSWER, **REFUSALS},
    openapi_extra={"requestBody": BODY},
)
async def inference(request: Request, service: UsesService, card: UsesCard) -> Response:
    """Embeddings and units of rows of samples, or of audio files."""
    desk, started = the_desk(request, service), time.monotonic()
    ledger = desk.ledgers.setdefault(card.name, Ledger())
    try:
        answer, num_rows = await infer(request, service, card, desk.limiter)
    except ApiError:
        ledger.fail.add(started)
        raise
    ledger.success.add(started)
    ledger.num_rows += num_rows
    ledger.last_ms = round(1000 * time.time())
    return answer
