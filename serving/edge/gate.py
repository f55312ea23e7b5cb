"""What every request passes first and every answer last, whatever answers it."""

from __future__ import annotations

import logging
import re
import time
import uuid
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketDisconnect

from serving.edge.traffic import DENIAL, Incoming, Load, Outgoing
from serving.edge.visit import Visit
from serving.errors import ApiError, envelope
from serving.metrics import Metrics
from serving.settings import Settings

log = logging.getLogger("serving")
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
CLIENT_GONE = 499  # nginx's status for a client that left; nobody receives it
UNDONE = (429, 500, 503)
"""The statuses of requests whose audio is not charged."""
PROBES = ("/health/", "/v2/health/", "/metrics")  # asked too often to be worth a line


class Gate:
    """The outermost ASGI middleware: an id, bodies and answers bounded, headers, metrics, a log line, no bare 500."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self.app, self.settings, self.metrics = app, settings, metrics
        self.load = Load()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection's event of the ASGI protocol."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        given, started = Headers(scope=scope).get("x-request-id", ""), time.monotonic()
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        visit = Visit(request_id, started, started + self.settings.request_seconds)
        scope.setdefault("state", {}).update(request_id=request_id, visit=visit)
        incoming = Incoming(scope, receive, self.settings, self.load)
        outgoing = Outgoing(scope, send, self.settings.send_seconds)
        try:
            await self.app(scope, incoming, outgoing)
        except (ClientDisconnect, WebSocketDisconnect):
            pass
        except Exception as error:
            await answer_fault(scope, incoming, outgoing, error)
        finally:
            visit.exit.close()
            self.load.num_bytes -= incoming.num_bytes
            if visit.status < 500 and not outgoing.whole and scope["type"] == "http":
                visit.status = CLIENT_GONE
            if visit.account is not None and visit.status in UNDONE:
                visit.account.refund(visit.audio_seconds)
            tell(
                self.metrics,
                scope.get("method", "WS"),
                getattr(scope.get("route"), "path", "unmatched"),
                visit.status or CLIENT_GONE,
                time.monotonic() - started,
                request_id=request_id,
                key=visit.account.key.name if visit.account else None,
                audio_seconds=round(visit.audio_seconds, 3),
            )


def tell(metrics: Metrics, method: str, route: str, status: int, seconds: float, **fields: Any) -> None:
    """Count an answer, and write its line."""
    metrics.observe_request(route, status, seconds)
    level = logging.DEBUG if route.startswith(PROBES) else logging.INFO if status < 500 else logging.WARNING
    told = {**fields, "method": method, "route": route, "status": status, "ms": round(1000 * seconds, 1)}
    log.log(level, "%s %s %d", method, route, status, extra={"fields": told})


async def answer_fault(scope: Scope, receive: Receive, send: Send, error: Exception) -> None:
    """Answer with the envelope of `error`, or of a 500 for what is no ApiError; cut off an answer that has begun."""
    visit: Visit = scope["state"]["visit"]
    if not isinstance(error, ApiError):
        fields: dict[str, Any] = {"request_id": visit.request_id}
        log.error("server: an error that no input should cause", exc_info=error, extra={"fields": fields})
        message = f"server: found a fault of its own, wanted none: report it with request id {visit.request_id}"
        error = ApiError(500, "internal", message)
    if not visit.status and (scope["type"] == "http" or DENIAL in scope.get("extensions", {})):
        await envelope(scope, error)(scope, receive, send)
    elif scope["type"] == "websocket":
        code = 1011 if error.status >= 500 else 1008
        await send({"type": "websocket.close", "code": code, "reason": error.code})
    else:
        visit.status = 500
