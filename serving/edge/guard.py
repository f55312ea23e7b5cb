"""Who may come in: API keys, other sites' pages, and the time a request gives itself."""

from __future__ import annotations

from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketDisconnect

from serving.edge.gate import answer_fault
from serving.edge.keys import KEY_PROTOCOL, Keys, tokens_of
from serving.edge.visit import Visit
from serving.errors import ApiError, shorten
from serving.settings import Settings

OPEN_PATHS = ("/", "/metrics", "/openapi.json")
OPEN_FOLDERS = ("/health/", "/v2/health/", "/page/")
PROTOCOL = "sonorant"
"""The subprotocol to choose where a WebSocket's client offers it beside its key."""
SECRETS = (b"authorization", b"x-api-key", b"sec-websocket-protocol", b"cookie", b"proxy-authorization")


class Guard:
    """The innermost ASGI middleware: lets in whom it may, and answers every error of the app with the envelope."""

    def __init__(self, app: ASGIApp, settings: Settings, keys: Keys) -> None:
        self.app, self.settings, self.keys = app, settings, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection's event of the ASGI protocol."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        offered = scope.get("subprotocols", [])

        async def send_chosen(message: Message) -> None:
            if message["type"] == "websocket.accept" and not message.get("subprotocol"):
                message = {**message, "subprotocol": choose_protocol(offered)}
            await send(message)

        try:
            self._let_in(scope)
            await self.app(scope, receive, send_chosen if offered else send)
        except (ClientDisconnect, WebSocketDisconnect):
            raise
        except Exception as error:
            await answer_fault(scope, receive, send, error)

    def _let_in(self, scope: Scope) -> None:
        headers, visit = Headers(scope=scope), scope["state"]["visit"]
        assert isinstance(visit, Visit)
        offered = scope.get("subprotocols", [])
        tokens = tokens_of(headers, offered)
        # What is behind the guard sees no secret, and no header that comes after the body.
        scope["headers"] = [(name, value) for name, value in scope["headers"] if name.lower() not in SECRETS]
        if offered:
            scope["subprotocols"] = [name for name in offered if not name.startswith(KEY_PROTOCOL)]
        if scope["type"] == "websocket":
            check_origin(headers, self.settings.cors_origins)
        path = scope["path"]
        if path not in OPEN_PATHS and not path.startswith(OPEN_FOLDERS):
            visit.account = self.keys.identify(tokens)
            if visit.account is not None:
                visit.account.enter()
        visit.deadline = min(visit.deadline, visit.started + self._allowed(headers))

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


def choose_protocol(offered: Collection[str]) -> str | None:
    """What to answer to the subprotocols a client offers: browsers want one of them, be it the one with the key."""
    if PROTOCOL in offered:
        return PROTOCOL
    return next((name for name in offered if name.startswith(KEY_PROTOCOL)), None)


def check_origin(headers: Headers, allowed: Collection[str]) -> None:
    """ApiError 403 where another site's page opens a WebSocket: browsers leave it to the server to refuse that."""
    origin = headers.get("origin")
    if origin is None or origin in allowed:
        return
    try:
        host = urlsplit(origin).netloc
    except ValueError:
        host = ""
    if host.lower() != headers.get("host", "").lower():
        raise ApiError(
            403, "forbidden", f"Origin: found {shorten(origin)}, wanted this server's own or one of its cors_origins"
        )


class Cors(CORSMiddleware):
    """Lets pages of other origins read the answers; a preflight request needs no key, and is refused by envelope."""

    def __init__(self, app: ASGIApp, origins: Collection[str]) -> None:
        super().__init__(
            app,
            allow_origins=tuple(origins),
            allow_methods=("GET", "HEAD", "POST"),
            allow_headers=("Authorization", "X-API-Key", "X-Request-ID", "X-Request-Timeout"),
            expose_headers=("X-Request-ID", "Retry-After"),
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        """The answer to a browser that asks what it may send."""
        answer = super().preflight_response(request_headers)
        if answer.status_code != 200:
            origin = shorten(request_headers["origin"])
            raise ApiError(
                403,
                "forbidden",
                f"Origin: found {origin} and what it asks for, wanted one of this server's cors_origins, "
                f"{' or '.join(self.allow_methods)}, and no other headers than {', '.join(self.allow_headers)}",
            )
        return answer
