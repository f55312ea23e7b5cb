"""The WebSocket /v1/stream: what is heard piece by piece is what is heard as a whole."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import WebSocketDenialResponse
from starlette.websockets import WebSocketDisconnect
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from serving.app import create_app
from serving.engine.batcher import Ticket
from serving.schemas import Fault
from serving.settings import Settings
from sonorant.inference import STREAM, Codebook, Cut, Speech, load
from tests.serving.conftest import FakeSpeech, ready_client, serving
from tests.tiny import make_encoder, noise

URL = "/v1/stream"
SECONDS = Settings(max_stream_seconds=20, stream_idle_seconds=60, max_streams=2)


@pytest.fixture(scope="module")
def real() -> Speech:
    """A tiny model that computes, whose units of noise vary; its codebook centres."""
    encoder = make_encoder()
    plain = Speech(encoder, 2)
    [frames] = plain.embed([noise(64_000, 9)])
    picked = frames[:: len(frames) // 11][:11]
    return Speech(encoder, 2, Codebook(picked, np.zeros(32, np.float32), np.ones(32, np.float32), centred=True))


@pytest.fixture(scope="module")
def real_client(real: Speech) -> Iterator[TestClient]:
    with ready_client(create_app(SECONDS, {"tiny": real})) as client:
        yield client


@pytest.fixture
def client(speech: FakeSpeech) -> Iterator[TestClient]:
    with ready_client(create_app(SECONDS, {"tiny": speech})) as client:
        yield client


def pieces_of(data: bytes, sizes: list[int]) -> Iterator[bytes]:
    """The bytes in pieces of these sizes, over and over."""
    start = turn = 0
    while start < len(data):
        yield data[start : start + sizes[turn % len(sizes)]]
        start, turn = start + sizes[turn % len(sizes)], turn + 1


def heard(client: TestClient, data: bytes, sizes: list[int], **begin: Any) -> tuple[list[int], dict[str, Any]]:
    """The units of a whole stream, which come in order, and what was said when it was done."""
    with client.websocket_connect(URL) as socket:
        socket.send_json(begin)
        ready = socket.receive_json()
        assert ready["type"] == "ready", ready
        for piece in pieces_of(data, sizes):
            socket.send_bytes(piece)
        socket.send_json({"type": "end"})
        units: list[int] = []
        while (message := socket.receive_json())["type"] == "units":
            assert message["start_ms"] == 20 * len(units)
            assert message["final"] is True
            units += message["units"]
        assert message["type"] == "done", message
        assert message["num_frames"] == len(units)
        with pytest.raises(WebSocketDisconnect) as closed:
            socket.receive_json()
        assert closed.value.code == 1000
        return units, message


@settings(max_examples=12, deadline=None)
@given(
    num_samples=st.integers(0, 40_000),
    sizes=st.lists(st.integers(1, 50_000), min_size=1, max_size=5),
    begin=st.sampled_from(
        [
            {},
            {"step_ms": 100, "look_ahead_ms": 0, "history_ms": 600},
            {"step_ms": 20, "look_ahead_ms": 40, "history_ms": 0},
        ]
    ),
    whole=st.booleans(),
)
def test_a_stream_is_what_it_is_offline(real_client, real, num_samples, sizes, begin, whole):
    """To the unit: every window goes through the model alone, there and here."""
    wave = (0.3 * noise(num_samples)).astype(np.float32)
    cut = STREAM
    if begin:
        cut = Cut(begin["step_ms"] // 20, begin["history_ms"] // 20, begin["look_ahead_ms"] // 20)
    if whole:
        data, form = (wave * 32_767).astype("<i2"), "s16le"
        wave = data.astype(np.float32) / np.float32(32_768)
    else:
        data, form = wave.astype("<f4"), "f32le"
    sizes = [max(size, num_samples // 100) for size in sizes]
    found, done = heard(real_client, data.tobytes(), sizes, format=form, **begin)
    assert found == real.stream_units(wave, cut).tolist()
    assert done["seconds"] == num_samples / 16_000


def test_units_vary_and_come_before_the_end(real_client, real):
    wave = noise(32_000)
    with real_client.websocket_connect(URL) as socket:
        socket.send_json({"format": "f32le"})
        ready = socket.receive_json()
        assert {name: ready[name] for name in ("latency_ms", "step_ms", "num_units", "model", "rate")} == {
            "latency_ms": 800,
            "step_ms": 320,
            "num_units": 11,
            "model": "tiny",
            "rate": 16_000,
        }
        socket.send_bytes(wave.astype("<f4").tobytes())
        first = socket.receive_json()
        assert first["units"] == real.stream_units(wave)[:16].tolist()
    assert len(set(real.stream_units(wave).tolist())) > 3


def test_a_byte_at_a_time(client):
    data = (noise(3_000) * 3_000).astype("<i2")
    found, _ = heard(client, data.tobytes(), [1], step_ms=20, look_ahead_ms=0, history_ms=0)
    whole, _ = heard(client, data.tobytes(), [10_000], step_ms=20, look_ahead_ms=0, history_ms=0)
    assert found == whole
    assert len(found) == 9


@pytest.mark.parametrize("num_samples", [0, 1, 399])
def test_too_short_for_a_frame(client, num_samples):
    assert heard(client, bytes(2 * num_samples), [100])[0] == []


def sent(client: TestClient, *messages: Any) -> tuple[Fault, int]:
    """The error that ends a stream in which these are sent, and what it is closed with."""
    with client.websocket_connect(URL, headers={"X-Request-ID": "job-7"}) as socket:
        for message in messages:
            if isinstance(message, bytes):
                socket.send_bytes(message)
            else:
                socket.send_text(message if isinstance(message, str) else json.dumps(message))
        while (found := socket.receive_json())["type"] in ("ready", "units"):
            pass
        assert found["type"] == "error", found
        fault = Fault.model_validate(found["error"])
        assert fault.request_id == "job-7"
        assert "\n" not in fault.message
        with pytest.raises(WebSocketDisconnect) as closed:
            socket.receive_json()
        return fault, closed.value.code


@pytest.mark.parametrize(
    ("messages", "code", "closed", "words"),
    [
        ([b"\0\0"], "bad_message", 1003, "begin: found 2 bytes, wanted a JSON object"),
        (["no"], "bad_message", 1003, "begin: found no JSON"),
        (["[]"], "bad_message", 1003, "begin: found []"),
        (["[" * 3000], "bad_message", 1003, "begin: found no JSON"),
        ([" " * 5000], "too_large", 1009, "begin: found more than 4096"),
        ([{"rate": 8_000}], "invalid_option", 1008, "begin rate: found 8000, wanted 16000"),
        ([{"format": "mulaw"}], "invalid_option", 1008, "begin format: found 'mulaw'"),
        ([{"steps": 1}], "invalid_option", 1008, "begin steps: found an unknown option"),
        ([{"step_ms": 30}], "invalid_option", 1008, "begin step_ms: found 30, wanted a multiple of 20"),
        ([{"step_ms": 320.0}], "invalid_option", 1008, "begin step_ms: found 320.0"),
        ([{"step_ms": 0}], "invalid_option", 1008, "begin step_ms: found 0"),
        ([{"history_ms": -20}], "invalid_option", 1008, "begin history_ms: found -20"),
        ([{"step_ms": 100}], "invalid_option", 1008, "windows of 4580 ms every 100 ms, wanted at most 3200 ms"),
        ([{"step_ms": 10_000, "history_ms": 20_000}], "invalid_option", 1008, "wanted at most 25000 ms"),
        ([{"model": "huge"}], "no_such_model", 1008, "found 'huge', wanted one of tiny"),
        ([{}, "{}"], "bad_message", 1003, 'found {}, wanted samples or {"type": "end"}'),
        ([{}, {"type": "stop"}], "bad_message", 1003, "found {'type': 'stop'}"),
        ([{}, bytes((1 << 18) + 1)], "too_large", 1009, "message: found 262145 bytes"),
        ([{}, b"\0\0\0", {"type": "end"}], "bad_audio", 1007, "found 1 bytes of the last one, wanted 2"),
        ([{"format": "f32le"}, np.float32([np.nan] * 9).tobytes()], "bad_audio", 1007, "found NaN or infinite"),
        ([{}, *[bytes(200_000)] * 4], "too_long", 1008, "found more than 20 s"),
    ],
)
def test_what_is_refused(client, messages, code, closed, words):
    fault, found = sent(client, *messages)
    assert (fault.code, found) == (code, closed)
    assert words in fault.message


def test_a_model_without_a_codebook_makes_no_units(speech):
    speech.codebook, speech.num_units = None, 0
    with ready_client(create_app(SECONDS, {"tiny": speech})) as client:
        assert "found no codebook" in sent(client, {})[0].message


def test_streams_are_bounded(client):
    with client.websocket_connect(URL) as first, client.websocket_connect(URL):
        with pytest.raises(WebSocketDenialResponse) as refused, client.websocket_connect(URL):
            pass
        assert refused.value.status_code == 429
        assert refused.value.headers["Retry-After"] == "5"
        assert "found 2 streams, wanted at most 2" in refused.value.json()["error"]["message"]
        first.close()
        while True:  # pytest's timeout ends it
            try:
                with client.websocket_connect(URL) as third:
                    third.send_json({})
                    assert third.receive_json()["type"] == "ready"
                    break
            except WebSocketDenialResponse:
                pass


def test_an_idle_stream_is_closed(speech):
    with ready_client(create_app(Settings(stream_idle_seconds=0.3), {"tiny": speech})) as client:
        fault, code = sent(client, {})
        assert (fault.code, code) == ("idle", 1008)
        assert "found nothing sent for 0.3 s" in fault.message


def occupy(client: TestClient, seconds: float) -> Callable[[], None]:
    """Take up so much of the queue; what gives it back."""
    batcher = client.app.state.service.engine.batcher
    portal = client.portal

    def take() -> Ticket:
        return batcher.admit([], seconds=seconds, deadline=time.monotonic() + 60)

    ticket = portal.call(take)
    return lambda: portal.call(ticket.release, ticket)


def test_a_window_waits_for_room_in_the_queue(speech):
    """The queue takes 5 s; another request holds them for a while."""
    app = create_app(Settings(max_file_seconds=5, max_queue_seconds=5), {"tiny": speech})
    data = bytes(2 * 16_000)
    with ready_client(app) as client, client.websocket_connect(URL) as socket:
        socket.send_json({})
        assert socket.receive_json()["type"] == "ready"
        speech.may_run.clear()
        release = occupy(client, 4.9)
        socket.send_bytes(data)
        time.sleep(0.3)
        assert not app.state.service.engine.batcher.waiting
        release()
        speech.may_run.set()
        assert socket.receive_json()["type"] == "units"


def test_a_window_that_finds_no_room_in_time_ends_the_stream(speech):
    app = create_app(Settings(max_file_seconds=5, max_queue_seconds=5, request_seconds=0.3), {"tiny": speech})
    with ready_client(app) as client:
        occupy(client, 4.9)
        fault, code = sent(client, {}, bytes(2 * 16_000))
        assert (fault.code, code) == ("overloaded", 1013)
        assert "found 4.9 s of audio in hand" in fault.message


def test_a_window_that_is_not_done_in_time_ends_the_stream(speech):
    with ready_client(create_app(Settings(request_seconds=0.3), {"tiny": speech})) as client:
        speech.may_run.clear()
        fault, code = sent(client, {}, bytes(2 * 16_000))
        speech.may_run.set()
        assert (fault.code, code) == ("late", 1013)
        assert fault.message.startswith("window from 0 ms: found no result after")


def test_a_fault_of_the_model_ends_the_stream(client, speech, monkeypatch):
    monkeypatch.setattr(speech, "_frames", None)
    fault, code = sent(client, {}, bytes(2 * 16_000))
    assert (fault.code, code) == ("internal", 1011)


def test_audio_is_counted_once(client):
    """Windows overlap; what is charged is what was heard, to the last sample."""
    before = audio_seconds(client)
    heard(client, bytes(2 * 40_123), [7_001])
    assert audio_seconds(client) - before == pytest.approx(40_123 / 16_000, abs=1e-9)  # sums of floats


def audio_seconds(client: TestClient) -> float:
    name = 'sonorant_audio_seconds_total{route="/v1/stream"} '
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.removeprefix(name)) for line in lines if line.startswith(name))


# ---------------------------------------------------------------------------------------------------- a real server


@pytest.fixture
def server(speech: FakeSpeech) -> Iterator[str]:
    """The address of a server of the small model, in a thread."""
    app = create_app(Settings(max_streams=3), {"tiny": speech})
    with serving(app) as address:
        yield f"ws://{address}{URL}"


def test_a_client_that_sends_too_fast_is_slowed_down(server, speech):
    """While the model stands still, a sender that never pauses gets rid of little more than what buffers take."""
    sent_bytes = 0
    with connect(server, compression=None, close_timeout=0.5) as socket:
        socket.send("{}")
        assert json.loads(socket.recv())["type"] == "ready"
        speech.may_run.clear()

        def send_all() -> None:
            nonlocal sent_bytes
            try:
                for _ in range(600):  # 60 MB
                    socket.send(bytes(100_000))
                    sent_bytes += 100_000
            except ConnectionClosed:
                pass

        sender = threading.Thread(target=send_all)
        sender.start()
        last = -1
        while sent_bytes != last:
            last = sent_bytes
            time.sleep(0.5)
        assert sent_bytes < 30_000_000
        speech.may_run.set()
        socket.close()
        sender.join()


def test_a_client_that_leaves_frees_its_place(server):
    for _ in range(10):
        socket: ClientConnection = connect(server)
        socket.send("{}")
        assert json.loads(socket.recv())["type"] == "ready"
        socket.socket.close()
        time.sleep(0.05)


def test_many_streams_at_once_keep_apart(server):
    """Three streams of different loudness, whose units tell them apart."""

    def run(loudness: int) -> list[int]:
        with connect(server) as socket:
            socket.send("{}")
            socket.recv()
            for _ in range(20):
                socket.send(np.full(3_200, loudness * 3_277, "<i2").tobytes())
            socket.send('{"type": "end"}')
            units: list[int] = []
            for text in socket:
                units += json.loads(text).get("units", [])
            return units

    async def run_all() -> list[list[int]]:
        return await asyncio.gather(*(asyncio.to_thread(run, loudness) for loudness in (1, 2, 3)))

    for units, loudness in zip(asyncio.run(run_all()), (1, 2, 3), strict=True):
        assert units == [3 * loudness] * 199  # the published layer is three times the samples


# ------------------------------------------------------------------------------------------- reloading and stopping


def rest_of(socket: Any) -> tuple[list[int], dict[str, Any]]:
    """The units that still come, and what is said last."""
    units: list[int] = []
    while (message := socket.receive_json())["type"] == "units":
        units += message["units"]
    return units, message


def test_a_stream_keeps_its_model_over_a_reload(speech):
    """Half of it is heard before, half after; the units are those of one recording."""
    app = create_app(SECONDS, {"tiny": speech})
    data = (3_000 * noise(40_000)).astype("<i2").tobytes()
    with ready_client(app) as client:
        expected, _ = heard(client, data, [5_000])
        with client.websocket_connect(URL) as socket:
            socket.send_json({})
            assert socket.receive_json()["type"] == "ready"
            socket.send_bytes(data[:40_000])
            first = socket.receive_json()
            old = app.state.service.engine
            assert client.portal is not None
            assert client.portal.call(app.state.service.reload)
            assert app.state.service.engine is not old
            socket.send_bytes(data[40_000:])
            socket.send_json({"type": "end"})
            units, done = rest_of(socket)
            assert first["units"] + units == expected
            assert done["type"] == "done"
        while not all(server.done() for server in old.batcher._servers):  # pytest's timeout ends it
            time.sleep(0.01)


def test_what_was_heard_is_answered_when_the_server_stops(speech):
    app = create_app(SECONDS, {"tiny": speech})
    data = (3_000 * noise(20_000)).astype("<i2").tobytes()
    with ready_client(app) as client:
        expected, _ = heard(client, data, [5_000])
        with client.websocket_connect(URL) as socket:
            socket.send_json({})
            assert socket.receive_json()["type"] == "ready"
            socket.send_bytes(data + b"\0")  # and half a sample, which is lost
            first = socket.receive_json()
            app.state.service.drain()
            units, done = rest_of(socket)
            assert first["units"] + units == expected
            assert (done["type"], done["num_frames"]) == ("done", len(expected))
            with pytest.raises(WebSocketDisconnect) as closed:
                socket.receive_json()
            assert closed.value.code == 1012
        with pytest.raises(WebSocketDenialResponse) as refused, client.websocket_connect(URL):
            pass
        assert refused.value.status_code == 503


def test_a_drain_that_takes_too_long_ends_the_stream(speech):
    app = create_app(Settings(drain_seconds=0.3), {"tiny": speech})
    with ready_client(app) as client, client.websocket_connect(URL) as socket:
        socket.send_json({})
        assert socket.receive_json()["type"] == "ready"
        speech.may_run.clear()
        socket.send_bytes(bytes(2 * 16_000))
        time.sleep(0.1)
        assert client.portal is not None
        closing = client.portal.start_task_soon(app.state.service.close)
        message = socket.receive_json()
        speech.may_run.set()
        closing.result()
        assert message["error"]["code"] == "draining"
        with pytest.raises(WebSocketDisconnect) as closed:
            socket.receive_json()
        assert closed.value.code == 1012


def test_a_process_that_is_told_to_stop_answers_what_it_heard(model, run_server):
    server = run_server(model)
    speech = load(model)
    data = (3_000 * noise(20_000)).astype("<i2")
    with connect(str(server.url).replace("http", "ws") + URL) as socket:
        socket.send("{}")
        assert json.loads(socket.recv())["type"] == "ready"
        socket.send(data.tobytes())
        units = json.loads(socket.recv())["units"]
        server.process.send_signal(signal.SIGTERM)
        with suppress(ConnectionClosed):
            while True:
                units += json.loads(socket.recv()).get("units", [])
        assert socket.protocol.close_code == 1012
        assert units == speech.stream_units(data.astype(np.float32) / np.float32(32_768)).tolist()
    assert server.process.wait(timeout=30) in (0, -signal.SIGTERM)
