"""OpenTelemetry traces, where they are asked for: of a request, of each wave's time in the queue and in the model.

Where they are sent is told by OpenTelemetry's own variables (OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_SERVICE_NAME, …).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.engine.batcher import Ticket

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import SpanProcessor


class Tracing:
    """What makes the spans. ValueError where OpenTelemetry is not installed."""

    def __init__(self, processor: SpanProcessor | None = None) -> None:
        try:
            from opentelemetry import context, propagate, trace
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise ValueError(
                f"tracing: found no module {error.name}, wanted OpenTelemetry: pip install 'sonorant[tracing]', "
                "or leave SONORANT_SERVE_TRACING unset"
            ) from None
        self.trace, self.extract, self.here = trace, propagate.extract, context.get_current
        self.provider = TracerProvider()
        self.provider.add_span_processor(processor or BatchSpanProcessor(OTLPSpanExporter()))
        self.tracer = self.provider.get_tracer("sonorant.serving")

    def record(self, ticket: Ticket, parent: Context) -> None:
        """What became of a request's waves, beneath its span."""
        offset = time.time_ns() - time.monotonic_ns()

        def at(seconds: float) -> int:
            return int(1e9 * seconds) + offset

        for item in ticket.items:
            if item.started is None:
                continue
            attributes = {"model": item.key.model, "samples": len(item.wave)}
            queue = self.tracer.start_span("queue", parent, start_time=at(ticket.arrived), attributes=attributes)
            queue.end(at(item.started))
            if item.finished is not None:
                model = self.tracer.start_span("model", parent, start_time=at(item.started), attributes=attributes)
                model.end(at(item.finished))

    def close(self) -> None:
        """Send what is left."""
        self.provider.shutdown()


class Traced:
    """ASGI middleware: a span for every request, the caller's one above it."""

    def __init__(self, app: ASGIApp, tracing: Tracing) -> None:
        self.app, self.tracing = app, tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection's event of the ASGI protocol."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        trace = self.tracing.trace
        parent = self.tracing.extract(Headers(scope=scope))
        method = scope.get("method", "WS")
        attributes: dict[str, Any] = {"http.request.method": method, "request_id": scope["state"]["request_id"]}
        with self.tracing.tracer.start_as_current_span(
            method, parent, kind=trace.SpanKind.SERVER, attributes=attributes
        ) as span:

            async def send_noted(message: Message) -> None:
                if message["type"] == "http.response.start":
                    span.set_attribute("http.response.status_code", message["status"])
                    if message["status"] >= 500:
                        span.set_status(trace.StatusCode.ERROR)
                await send(message)

            try:
                await self.app(scope, receive, send_noted)
            finally:
                route = getattr(scope.get("route"), "path", "unmatched")
                span.update_name(f"{method} {route}")
                span.set_attribute("http.route", route)
