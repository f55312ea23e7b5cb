"""What every request passes on its way in and every answer on its way out, whatever answers it."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketDisconnect

from serving.errors import ApiError, envelope, late, overloaded, shorten
from serving.keys import Account
from serving.metrics import Metrics
from serving.settings import Settings

log = logging.getLogger("serving")
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
CLIENT_GONE = 499  # nginx's status for a client that left; nobody receives it
UNDONE = (429, 500, 503)
"""The statuses of requests whose audio is not charged."""
PROBES = ("/health/", "/v2/health/", "/metrics")  # asked too often to be worth a line
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Permissions-Policy": "microphone=(self), camera=(), geolocation=()",
    "Cache-Control": "no-store",
}
"""Of every answer that does not say otherwise."""
DENIAL = "websocket.http.response"
"""The ASGI extension to answer a WebSocket's handshake like any other request."""


@dataclass(eq=False)
class Visit:
    """A request while it is in hand.

    account: of its key, where keys are needed. exit: what is given back once its answer has been sent.
    status: of the answer that has begun, else 0; 101 for a WebSocket that was accepted.
    """

    request_id: str
    started: float
    deadline: float
    account: Account | None = None
    exit: ExitStack = field(default_factory=ExitStack)
    audio_seconds: float = 0.0
    status: int = 0

    def may_use(self, model: str) -> bool:
        """Whether the key is one for that model."""
        return self.account is None or self.account.may_use(model)

    def allow(self, model: str) -> None:
        """Go on with that model; ApiError 403 where the key is for others."""
        if self.account is not None and not self.account.may_use(model):
            key = self.account.key
            raise ApiError(
                403,
                "forbidden",
                f"model: found {shorten(model)}, wanted {' or '.join(key.models or ())}, which key {key.name} is for: "
                "name one, or use another key",
            )

    def charge(self, seconds: float) -> None:
        """Count so much audio against the key's quota; ApiError 429, or 413 where it is more than the whole quota."""
        if self.account is not None:
            self.account.charge(seconds)
        self.audio_seconds += seconds


class Gate:
    """The outermost ASGI middleware: an id, bodies and answers bounded, headers, metrics, a log line, no bare 500."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self.app, self.settings, self.metrics = app, settings, metrics
        self.buffered = 0  # bytes of all requests in hand

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection's event of the ASGI protocol."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        given, started = Headers(scope=scope).get("x-request-id", ""), time.monotonic()
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        visit = Visit(request_id, started, started + self.settings.request_seconds)
        scope.setdefault("state", {}).update(request_id=request_id, visit=visit)
        incoming = Incoming(self, scope, receive)
        outgoing = Outgoing(scope, send, self.settings.send_seconds)
        try:
            await self.app(scope, incoming, outgoing)
        except (ClientDisconnect, WebSocketDisconnect):
            pass
        except Exception as error:
            await answer_fault(scope, incoming, outgoing, error)
        finally:
            visit.exit.close()
            self.buffered -= incoming.num_bytes
            if visit.status < 500 and not outgoing.whole and scope["type"] == "http":
                visit.status = CLIENT_GONE
            if visit.account is not None and visit.status in UNDONE:
                visit.account.refund(visit.audio_seconds)
            self._tell(scope, visit)

    def _tell(self, scope: Scope, visit: Visit) -> None:
        seconds = time.monotonic() - visit.started
        route, status = getattr(scope.get("route"), "path", "unmatched"), visit.status or CLIENT_GONE
        self.metrics.observe_request(route, status, seconds)
        method = scope.get("method", "WS")
        level = logging.DEBUG if route.startswith(PROBES) else logging.INFO if status < 500 else logging.WARNING
        fields = {
            "request_id": visit.request_id,
            "key": visit.account.key.name if visit.account else None,
            "method": method,
            "route": route,
            "status": status,
            "ms": round(1000 * seconds, 1),
            "audio_seconds": round(visit.audio_seconds, 3),
        }
        log.log(level, "%s %s %d", method, route, status, extra={"fields": fields})


class Incoming:
    """What a request's client sends, as it may: not too much, not too slowly."""

    def __init__(self, gate: Gate, scope: Scope, receive: Receive) -> None:
        self.gate, self.settings, self.receive = gate, gate.settings, receive
        self.visit: Visit = scope["state"]["visit"]
        claimed = Headers(scope=scope).get("content-length", "").lstrip("0")
        # More digits than any server would let through would be too many for int().
        self.claimed = int(claimed[:20]) if claimed.isascii() and claimed.isdecimal() else 0
        self.num_bytes = 0
        self.whole = scope["type"] == "websocket"

    async def __call__(self) -> Message:
        """The next message. ApiError where it may not be; once an answer has begun, that ends the request instead."""
        if self.whole:
            return await self.receive()
        try:
            return await self._receive()
        except ApiError:
            if self.visit.status:
                return {"type": "http.disconnect"}
            raise

    async def _receive(self) -> Message:
        self._check_size(self.claimed)
        limit = self.settings.body_seconds
        try:
            async with asyncio.timeout(self.visit.started + limit - time.monotonic()):
                message = await self.receive()
        except TimeoutError:
            raise late(f"body: found it not whole after {limit:g} s, wanted all of it") from None
        self.whole = not message.get("more_body", False)
        size = len(message.get("body", b""))
        self.num_bytes += size
        self.gate.buffered += size
        self._check_size(self.num_bytes)
        if self.gate.buffered > self.settings.max_buffered_bytes:
            raise overloaded(
                f"server: found {self.gate.buffered} bytes of requests in hand, wanted at most "
                f"{self.settings.max_buffered_bytes}: retry in 1 s",
                1,
            )
        return message

    def _check_size(self, size: int) -> None:
        if size > self.settings.max_body_bytes:
            raise ApiError(
                413,
                "too_large",
                f"body: found more than {self.settings.max_body_bytes} bytes, "
                f"wanted at most {self.settings.max_body_bytes}: cut the audio or send it as FLAC",
            )


class Outgoing:
    """The answer: its headers completed, its progress noted, given up where the client does not take it."""

    def __init__(self, scope: Scope, send: Send, seconds: float) -> None:
        self.scope, self.send, self.seconds = scope, send, seconds
        self.visit: Visit = scope["state"]["visit"]
        self.whole = False

    async def __call__(self, message: Message) -> None:
        """Send it; ClientDisconnect where the client does not take it."""
        kind = message["type"]
        if kind == "websocket.close" and not self.visit.status:
            if DENIAL in self.scope.get("extensions", {}):
                await envelope(self.scope, unwanted(self.scope))(self.scope, _nothing, self)
                return
            self.visit.status = 403
        elif kind.endswith("http.response.start"):
            self.visit.status = message["status"]
            self._complete(message, HEADERS)
        elif kind == "websocket.accept":
            self.visit.status = 101
            self._complete(message, {})
        self.whole = kind.endswith("http.response.body") and not message.get("more_body", False)
        try:
            async with asyncio.timeout(self.seconds):
                await self.send(message)
                if message.get("more_body"):
                    await asyncio.sleep(0)  # others' turn; and whoever listens learns that the client has left
        except OSError:  # TimeoutError is one, and so is what a server raises for a client that left
            self.whole = False
            raise ClientDisconnect from None

    def _complete(self, message: Message, defaults: Mapping[str, str]) -> None:
        message.setdefault("headers", [])
        headers = MutableHeaders(scope=message)
        headers["X-Request-ID"] = self.visit.request_id
        for name, value in defaults.items():
            headers.setdefault(name, value)


async def _nothing() -> Message:
    return {"type": "http.disconnect"}


def unwanted(scope: Scope) -> ApiError:
    """The answer to a WebSocket that the app closes before it was accepted."""
    path = shorten(scope["path"])
    if scope.get("endpoint") is None:
        return ApiError(404, "not_found", f"WebSocket {path}: found no such path, wanted one that /openapi.json lists")
    return ApiError(403, "forbidden", f"WebSocket {path}: found it refused, wanted it as /openapi.json has it")


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
