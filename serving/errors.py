"""One error envelope for every answer that is not 200, whoever found the fault."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Scope

from serving.schemas import ErrorEnvelope, Fault, Refusal

CODES = {404: "not_found", 405: "method_not_allowed"}


class ApiError(Exception):
    """An answer that is an error: HTTP status, a code for programs, a message of one line for people."""

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, dict(headers or {})


def overloaded(message: str, retry_seconds: int) -> ApiError:
    """429: what is in hand must be finished first."""
    return ApiError(429, "overloaded", message, {"Retry-After": str(retry_seconds)})


def draining() -> ApiError:
    """503: the server is about to stop."""
    message = "server: found it stopping, wanted it running: send the request again later or elsewhere"
    return ApiError(503, "draining", message, {"Retry-After": "5"})


def not_ready() -> ApiError:
    """503: the model has not run yet."""
    message = "model: found it not warmed up, wanted one pass: wait and send the request again"
    return ApiError(503, "not_ready", message, {"Retry-After": "1"})


def late(message: str) -> ApiError:
    """408: the deadline came first."""
    return ApiError(408, "late", f"{message}: send less audio at once, or allow more time in X-Request-Timeout")


def envelope(scope: Scope, error: ApiError) -> Response:
    """`error` as the answer to the request of `scope`, in the form that its clients read."""
    fault = fault_of(scope, error)
    if scope["path"].startswith("/v2"):
        body = Refusal(error=fault.message, code=fault.code, request_id=fault.request_id).model_dump_json()
    else:
        body = ErrorEnvelope(error=fault).model_dump_json()
    return Response(body, error.status, error.headers, media_type="application/json")


def fault_of(scope: Scope, error: ApiError) -> Fault:
    """What went wrong with the request of `scope`."""
    return Fault(code=error.code, message=one_line(error.message), request_id=scope["state"]["request_id"])


def one_line(text: str) -> str:
    """`text` without line breaks, control characters and lone surrogates."""
    printable = "".join(c if c.isprintable() else " " for c in text)
    return " ".join(printable.encode("utf-8", "replace").decode().split())


def shorten(value: object, length: int = 60) -> str:
    """A found value as an error message quotes it."""
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}…"


def describe(fault: Mapping[str, Any]) -> str:
    """One fault that pydantic found, as: the field, what it found, what it wanted."""
    field = " ".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        return f"{field}: found an unknown option, wanted one that /openapi.json lists: remove or respell it"
    if fault["type"] == "missing":
        return f"{field}: found nothing, wanted a value: add it"
    if fault["type"] == "value_error":  # ours: says all of it
        return f"{field}: {fault['ctx']['error']}".removeprefix(": ")
    wanted = fault["msg"].replace("Input should be ", "")
    return f"{field}: found {shorten(fault['input'])}, wanted {wanted}"


def describe_all(faults: Sequence[Mapping[str, Any]]) -> str:
    """All faults on one line; of many, the first three."""
    rest = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
    return "; ".join(describe(fault) for fault in faults[:3]) + rest


def use_envelope(app: FastAPI) -> None:
    """Answer every error of `app`, its framework's own included, with the envelope."""

    @app.exception_handler(ApiError)
    async def _(request: Request, error: ApiError) -> Response:
        if request.scope["type"] == "websocket":
            raise error  # the guard knows whether it has been accepted
        return envelope(request.scope, error)

    @app.exception_handler(RequestValidationError)
    async def _(request: Request, error: RequestValidationError) -> Response:
        return envelope(request.scope, ApiError(422, "invalid_option", describe_all(error.errors())))

    @app.exception_handler(HTTPException)
    async def _(request: Request, error: HTTPException) -> Response:
        found = f"{request.method} {request.url.path}"[:100]
        if error.status_code == 405:
            allowed = (error.headers or {}).get("Allow")
            message = f"{found}: found a method that this path does not have, wanted {allowed}"
        elif error.status_code == 404 and error.detail == "Not Found":
            message = f"{found}: found no such path, wanted one that /openapi.json lists"
        else:
            message = f"{found}: {error.detail}"
        code = CODES.get(error.status_code, "bad_request")
        return envelope(request.scope, ApiError(error.status_code, code, message, error.headers))
