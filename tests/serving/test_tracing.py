"""Traces, as a collector receives them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from serving.app import create_app
from serving.settings import Settings
from tests.serving.conftest import FakeSpeech, ready_client

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Span]]:
    """The spans that come in at a collector of OTLP over HTTP."""
    spans: list[Span] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                for scope in resource.scope_spans:
                    spans.extend(scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
    yield spans
    server.shutdown()
    thread.join()


def test_a_request_its_wait_and_its_model_calls(received, wave, encode):
    app = create_app(Settings(tracing=True), {"tiny": FakeSpeech()})
    with ready_client(app) as client:
        files = [("f", (f"{i}.wav", encode(wave))) for i in range(2)]
        headers = {"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"}
        answer = client.post("/v1/units", files=files, headers=headers)
        assert answer.status_code == 200
        assert client.post("/v1/units", content=b"no audio", headers={"Content-Type": "audio/wav"}).status_code == 400
    mine = [span for span in received if span.trace_id.hex() == TRACE]
    [request] = [span for span in mine if span.name == "POST /v1/units"]
    assert request.parent_span_id.hex() == "00f067aa0ba902b7"
    attributes = {a.key: a.value for a in request.attributes}
    assert attributes["http.response.status_code"].int_value == 200
    assert attributes["request_id"].string_value == answer.headers["X-Request-ID"]
    queues = [span for span in mine if span.name == "queue"]
    models = [span for span in mine if span.name == "model"]
    assert len(queues) == len(models) == 2
    for queue, model in zip(queues, models, strict=True):
        assert queue.parent_span_id == model.parent_span_id == request.span_id
        # Both clocks are read once for all: the whole lies inside the request but for their grain.
        assert request.start_time_unix_nano - 1e6 <= queue.start_time_unix_nano <= queue.end_time_unix_nano
        assert queue.end_time_unix_nano == model.start_time_unix_nano <= model.end_time_unix_nano
    assert any(a.value.int_value == 400 for span in received for a in span.attributes)
    told = str([[str(a) for a in span.attributes] for span in received])
    assert "wav" not in told  # neither file names nor anything else a client sent
