"""The routes that whoever operates the server asks: is it alive, is it ready, what does it count."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST

from serving import schemas
from serving.routes.requests import UsesService

NOT_READY: dict[int | str, dict[str, Any]] = {
    503: {"model": schemas.ErrorEnvelope, "description": "Not warmed up yet, or about to stop"}
}
routes = APIRouter(tags=["operation"])


@routes.get("/health/live")
async def live() -> schemas.Health:
    """The process answers."""
    return schemas.Health(status="live")


@routes.get("/health/ready", responses=NOT_READY)
async def ready(service: UsesService) -> schemas.Health:
    """The models have run once and take requests."""
    _ = service.engine
    return schemas.Health(status="ready")


@routes.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def metrics(service: UsesService) -> Response:
    """Counters and histograms for Prometheus."""
    return Response(service.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)
