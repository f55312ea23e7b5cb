"""A request's messages in and its answer's messages out: bounded in size and time, and completed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from serving.edge.visit import Visit
from serving.errors import ApiError, envelope, late, overloaded, shorten
from serving.settings import Settings

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


@dataclass
class Load:
    """The bytes of all requests in hand."""

    num_bytes: int = 0


class Incoming:
    """What a request's client sends, as it may: not too much, not too slowly."""

    def __init__(self, scope: Scope, receive: Receive, settings: Settings, load: Load) -> None:
        self.receive, self.settings, self.load = receive, settings, load
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
        self.load.num_bytes += size
        self._check_size(self.num_bytes)
        if self.load.num_bytes > self.settings.max_buffered_bytes:
            raise overloaded(
                f"server: found {self.load.num_bytes} bytes of requests in hand, wanted at most "
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
