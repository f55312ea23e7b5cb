"""uvicorn's protocols, and what they leave out: bounds on a request's head, on a reader that stands still and on what
goes on after a refusal; the envelope for what the app never sees; and bodies of clients that would like HTTP/2.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.datastructures import Headers
from websockets.http11 import Request, Response

from serving.edge.gate import tell
from serving.edge.traffic import HEADERS
from serving.metrics import Metrics
from serving.schemas import ErrorEnvelope, Fault
from serving.settings import Settings

log = logging.getLogger("serving")
LINGER_SECONDS = 2.0
"""How long what is left of a refused body is thrown away, so that its sender gets to read the refusal."""


class HeadError(Exception):
    """A request's head is not one that is answered."""


class Protocol(asyncio.Protocol):
    """Ends the connection of a client that takes nothing of its answer for too long, which `close` would wait for."""

    transport: asyncio.Transport
    limits: Settings
    metrics: Metrics
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

    def refusal(self, method: str, status: int, code: str, message: str) -> tuple[dict[str, str], bytes]:
        """The headers and the body of an answer that no app gives; it is logged and counted."""
        request_id = uuid.uuid4().hex
        body = ErrorEnvelope(error=Fault(code=code, message=message, request_id=request_id)).model_dump_json().encode()
        tell(self.metrics, method, "unmatched", status, 0.0, request_id=request_id)
        return {
            **HEADERS,
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            "Connection": "close",
            "X-Request-ID": request_id,
        }, body


class WebSocketProtocol(Protocol, WebSocketsSansIOProtocol):
    """A WebSocket: a handshake that is not understood gets the envelope."""

    def __init__(self, *given: Any, limits: Settings, metrics: Metrics, **named: Any) -> None:
        super().__init__(*given, **named)
        self.limits, self.metrics = limits, metrics
        accept = self.conn.accept

        def accept_or_refuse(request: Request) -> Response:
            answer = accept(request)
            return answer if answer.status_code == 101 else self._refuse(answer)

        self.conn.accept = accept_or_refuse  # type: ignore[method-assign]

    def data_received(self, data: bytes) -> None:
        """Some bytes have come."""
        super().data_received(data)
        if self.conn.handshake_exc is not None and not self.handshake_initiated:
            answer = self._refuse(Response(400, "Bad Request", Headers()))
            self.transport.write(answer.serialize())
            self.transport.close()

    def shutdown(self) -> None:
        """The server stops: a conversation is brought to its end by the app, which has been told."""
        if self.close_sent or not self.handshake_complete:
            super().shutdown()

    def _refuse(self, answer: Response) -> Response:
        """`answer`, which has no envelope, with one."""
        code = "method_not_allowed" if answer.status_code == 405 else "bad_request"
        message = "request: found no valid WebSocket handshake, wanted version 13 and short headers: mind RFC 6455"
        headers, body = self.refusal("WS", answer.status_code, code, message)
        kept = {name: answer.headers[name] for name in ("Allow", "Upgrade") if name in answer.headers}
        return Response(answer.status_code, answer.reason_phrase, Headers({**headers, **kept}), body)


class HttpProtocol(Protocol, HttpToolsProtocol):
    """A connection of HTTP/1.1: heads are bounded in bytes and time, and what cannot be parsed gets the envelope."""

    def __init__(self, *given: Any, limits: Settings, metrics: Metrics, **named: Any) -> None:
        super().__init__(*given, **named)
        self.limits, self.metrics = limits, metrics
        self._in_head = False
        self._head_bytes = 0
        self._without_upgrade = False
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
        self._unset_keepalive_if_required()
        if self._in_head:  # those in which a head begins are counted when it is whole
            self._head_bytes += len(data)
        try:
            if self._head_bytes > self.limits.max_head_bytes:
                raise HeadError
            self.parser.feed_data(data)
        except (httptools.HttpParserError, HeadError):
            self.send_400_response("")
        except httptools.HttpParserUpgrade as upgrade:
            if self._should_upgrade():
                self.handle_websocket_upgrade()
            else:
                self._stay(data[upgrade.args[0] :])

    def _stay(self, rest: bytes) -> None:
        """Go on in HTTP/1.1, which the client's wish for HTTP/2 does not forbid: the parser would skip the body."""
        head = [self.scope["method"].encode(), b" ", self.url, b" HTTP/", self.parser.get_http_version().encode()]
        for name, value in self.headers:
            if name != b"upgrade":
                head += [b"\r\n", name, b": ", value]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does, which ignores that data
        self.data_received(b"".join([*head, b"\r\n\r\n", rest]))

    # ------------------------------------------------------------------------------------------ the parser's callbacks

    def on_message_begin(self) -> None:
        """A head begins."""
        super().on_message_begin()
        self._in_head, self._head_bytes, self._without_upgrade = True, 0, False
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
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        self._head_bytes = size if size > self.limits.max_head_bytes else 0
        if self._head_bytes or self.parser.get_method() == b"CONNECT":
            raise HeadError
        if self.parser.should_upgrade() and not self._should_upgrade():
            self.scope["method"] = self.parser.get_method().decode()
            self._without_upgrade = True
            return
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The body is whole."""
        if self._without_upgrade:
            return
        if self._linger is not None:
            self._linger.cancel()
            self._linger = None
        super().on_message_complete()

    # ------------------------------------------------------------------------------------------------------- answers

    def on_response_complete(self) -> None:
        """An answer has been sent; where the body of its request goes on, it may do so for a moment."""
        unread = self.cycle.response_complete and self.cycle.more_body
        super().on_response_complete()
        if unread and not self.transport.is_closing():
            self._linger = self.loop.call_later(LINGER_SECONDS, self.transport.close)

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002
        """Answer a request that the app never sees: 431 for a head that is too long, else 400."""
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
        if self.transport.is_closing():
            return
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            self.transport.abort()  # in the midst of an answer there is no saying it
            return
        headers, body = self.refusal("HTTP", status, code, message)
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self.transport.write(STATUS_LINE[status] + lines.encode() + b"\r\n" + body)
        self.transport.close()
