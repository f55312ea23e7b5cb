"""uvicorn's protocols with the bounds it leaves out: a request's head, a reader that stands still, a refused body."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from serving.gate import HEADERS
from serving.schemas import ErrorEnvelope, Fault
from serving.settings import Settings

LINGER_SECONDS = 2.0
"""How long what is left of a refused body is thrown away, so that its sender gets to read the refusal."""


class HeadError(Exception):
    """A request's head is longer than it may be."""


class PatientProtocol(asyncio.Protocol):
    """Ends the connection of a client that takes nothing of its answer for too long, which `close` would wait for."""

    transport: asyncio.Transport
    limits: Settings
    _standstill: asyncio.TimerHandle | None = None

    def pause_writing(self) -> None:
        """More is waiting than the transport wants to hold."""
        super().pause_writing()
        # A second more than the gate has, which notes who left.
        self._standstill = asyncio.get_running_loop().call_later(self.limits.send_seconds + 1, self.transport.abort)

    def resume_writing(self) -> None:
        """The client goes on reading."""
        super().resume_writing()
        if self._standstill is not None:
            self._standstill.cancel()


class WebSocketProtocol(PatientProtocol, WebSocketsSansIOProtocol):
    """A WebSocket."""

    def __init__(self, *given: Any, limits: Settings, **named: Any) -> None:
        super().__init__(*given, **named)
        self.limits = limits


class HttpProtocol(PatientProtocol, HttpToolsProtocol):
    """A connection of HTTP/1.1: heads are bounded in bytes and time, and what cannot be parsed gets the envelope."""

    def __init__(self, *given: Any, limits: Settings, **named: Any) -> None:
        super().__init__(*given, **named)
        self.limits = limits
        self._in_head = False
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._linger: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has come, and must say what it wants."""
        super().connection_made(transport)
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone."""
        super().connection_lost(exc)
        for timer in (self._head_timer, self._linger, self._standstill):
            if timer is not None:
                timer.cancel()

    def data_received(self, data: bytes) -> None:
        """Some bytes have come."""
        if self._in_head:  # those in which a head begins are counted when it is whole
            self._head_bytes += len(data)
            if self._head_bytes > self.limits.max_head_bytes:
                self.logger.warning("Request refused: its head is too long.")
                self.send_400_response("")
                return
        super().data_received(data)

    # ------------------------------------------------------------------------------------------ the parser's callbacks

    def on_message_begin(self) -> None:
        """A head begins."""
        super().on_message_begin()
        self._in_head, self._head_bytes = True, 0
        if self._head_timer is None:
            self._wait_for_head()

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header. Those that come after a body are not heeded."""
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is whole."""
        self._in_head = False
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        self._head_bytes = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if self._head_bytes > self.limits.max_head_bytes:
            raise HeadError
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The body is whole."""
        if self._linger is not None:
            self._linger.cancel()
            self._linger = None
        super().on_message_complete()

    # ------------------------------------------------------------------------------------------------------- answers

    def on_response_complete(self) -> None:
        """An answer has been sent; where the request's body goes on, it may do so for a moment."""
        unread = self.cycle is not None and self.cycle.more_body
        super().on_response_complete()
        if unread and not self.transport.is_closing():
            self._linger = self.loop.call_later(LINGER_SECONDS, self.transport.close)

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002
        """Answer a request that the app never sees: 431 for a head that is too long, else 400."""
        if self.transport.is_closing():
            return
        if self._head_bytes > self.limits.max_head_bytes:
            limit = self.limits.max_head_bytes
            self._refuse(431, "too_large", f"request: found a head of more than {limit} bytes, wanted at most that")
        else:
            self._refuse(400, "bad_request", "request: found no valid HTTP/1.1, wanted it: mind lengths and headers")

    def _wait_for_head(self) -> None:
        self._head_timer = self.loop.call_later(self.limits.head_seconds, self._give_up)

    def _give_up(self) -> None:
        if self._in_head:
            self._refuse(408, "late", f"request: found its head not whole after {self.limits.head_seconds:g} s")
        else:
            self.transport.close()

    def _refuse(self, status: int, code: str, message: str) -> None:
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            self.transport.abort()  # in the midst of an answer there is no saying it
            return
        request_id = uuid.uuid4().hex
        body = ErrorEnvelope(error=Fault(code=code, message=message, request_id=request_id)).model_dump_json().encode()
        headers = {
            **HEADERS,
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            "Connection": "close",
            "X-Request-ID": request_id,
        }
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self.transport.write(STATUS_LINE[status] + lines.encode() + b"\r\n" + body)
        self.transport.close()
