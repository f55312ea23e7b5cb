"""What every request passes on its way in and every answer on its way out."""

from __future__ import annotations

import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.errors import ApiError, envelope, overloaded
from serving.metrics import Metrics
from serving.settings import Settings

log = logging.getLogger("serving")
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
CLIENT_GONE = 499  # nginx's status for a client that left; nobody receives it


class Gate:
    """ASGI middleware: a request id, bodies bounded while they are read, metrics, a log line, no bare 500."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self.app, self.settings, self.metrics = app, settings, metrics
        self.buffered = 0  # bytes of all requests in hand

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection's event of the ASGI protocol."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, headers = time.perf_counter(), Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        status, received = 0, 0

        async def receive_bounded() -> Message:
            nonlocal received
            claimed = headers.get("content-length", "")
            self._check_size(int(claimed) if claimed.isdecimal() else 0)
            message = await receive()
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
                MutableHeaders(scope=message)["X-Request-ID"] = request_id
            await send(message)

        try:
            await self.app(scope, receive_bounded, send_tagged)
        except ClientDisconnect:
            status = CLIENT_GONE
        except Exception:
            log.exception("%s: an error that no input should cause", request_id)
            if not status:
                message = f"server: found a fault of its own, wanted none: report it with request id {request_id}"
                await envelope(scope, ApiError(500, "internal", message))(scope, receive, send_tagged)
        finally:
            self.buffered -= received
            seconds = time.perf_counter() - started
            route = getattr(scope.get("route"), "path", "unmatched")
            self.metrics.observe_request(route, status or CLIENT_GONE, seconds)
            log.info("%s %s %s %d %.1f ms", request_id, scope["method"], route, status, 1000 * seconds)

    def _check_size(self, size: int) -> None:
        if size > self.settings.max_body_bytes:
            raise ApiError(
                413,
                "too_large",
                f"body: found more than {self.settings.max_body_bytes} bytes, "
                f"wanted at most {self.settings.max_body_bytes}: cut the audio or send it as FLAC",
            )
