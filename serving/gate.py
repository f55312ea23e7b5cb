"""What every request passes on its way in and every answer on its way out."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from contextlib import ExitStack
from dataclasses import dataclass, field

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.errors import ApiError, envelope, late, overloaded, shorten
from serving.metrics import Metrics
from serving.settings import Settings

log = logging.getLogger("serving")
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
CLIENT_GONE = 499  # nginx's status for a client that left; nobody receives it
PROBES = ("/health/", "/v2/health/", "/metrics")  # asked too often to be worth a line
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
"""Of every answer that does not say otherwise."""


@dataclass(eq=False)
class Visit:
    """A request while it is in hand. exit: what is given back once its answer has been sent."""

    request_id: str
    started: float
    deadline: float
    exit: ExitStack = field(default_factory=ExitStack)

    def charge(self, seconds: float) -> None:
        """Count so much audio against the key's quota."""


class Gate:
    """ASGI middleware: an id, a deadline, bodies and answers bounded, metrics, a log line, no bare 500."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self.app, self.settings, self.metrics = app, settings, metrics
        self.buffered = 0  # bytes of all requests in hand

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection's event of the ASGI protocol."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given, started = headers.get("x-request-id", ""), time.monotonic()
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        visit = Visit(request_id, started, started + self.settings.request_seconds)
        scope.setdefault("state", {}).update(request_id=request_id, visit=visit)
        status, received = 0, 0
        complete = scope["type"] == "websocket"

        async def receive_bounded() -> Message:
            nonlocal received, complete
            claimed = headers.get("content-length", "")
            self._check_size(int(claimed) if claimed.isdecimal() else 0)
            if complete:
                return await receive()
            try:
                async with asyncio.timeout(started + self.settings.body_seconds - time.monotonic()):
                    message = await receive()
            except TimeoutError:
                raise late(
                    f"body: found it not whole after {self.settings.body_seconds:g} s, wanted all of it"
                ) from None
            complete = not message.get("more_body", False)
            size = len(message.get("body", b""))
            received += size
            self.buffered += size
            self._check_size(received)
            if self.buffered > self.settings.max_buffered_bytes:
                raise overloaded(
                    f"server: found {self.buffered} bytes of requests in hand, wanted at most "
                    f"{self.settings.max_buffered_bytes}: retry in 1 s",
                    1,
                )
            return message

        async def send_tagged(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                answered = MutableHeaders(scope=message)
                answered["X-Request-ID"] = request_id
                for name, value in HEADERS.items():
                    answered.setdefault(name, value)
            elif message["type"] in ("websocket.accept", "websocket.close"):
                status = 101 if message["type"] == "websocket.accept" else status or 403
            try:
                async with asyncio.timeout(self.settings.send_seconds):
                    await send(message)
            except TimeoutError:
                raise ClientDisconnect from None

        try:
            visit.deadline = min(visit.deadline, started + self._allowed(headers))
            await self.app(scope, receive_bounded, send_tagged)
        except ClientDisconnect:
            status = CLIENT_GONE
        except ApiError as error:
            await envelope(scope, error)(scope, receive, send_tagged)
        except Exception:
            log.exception("%s: an error that no input should cause", request_id)
            if not status and scope["type"] == "http":
                message = f"server: found a fault of its own, wanted none: report it with request id {request_id}"
                await envelope(scope, ApiError(500, "internal", message))(scope, receive, send_tagged)
        finally:
            visit.exit.close()
            self.buffered -= received
            seconds = time.monotonic() - started
            route = getattr(scope.get("route"), "path", "unmatched")
            self.metrics.observe_request(route, status or CLIENT_GONE, seconds)
            method = scope.get("method", "WS")
            level = logging.DEBUG if route.startswith(PROBES) else logging.INFO
            log.log(level, "%s %s %s %d %.1f ms", request_id, method, route, status or CLIENT_GONE, 1000 * seconds)

    def _allowed(self, headers: Headers) -> float:
        given = headers.get("x-request-timeout")
        if given is None:
            return self.settings.request_seconds
        try:
            seconds = float(given)
        except ValueError:
            seconds = -1
        if not 0 < seconds < float("inf"):
            raise ApiError(
                422, "invalid_option", f"header X-Request-Timeout: found {shorten(given)}, wanted seconds above 0"
            )
        return seconds

    def _check_size(self, size: int) -> None:
        if size > self.settings.max_body_bytes:
            raise ApiError(
                413,
                "too_large",
                f"body: found more than {self.settings.max_body_bytes} bytes, "
                f"wanted at most {self.settings.max_body_bytes}: cut the audio or send it as FLAC",
            )
