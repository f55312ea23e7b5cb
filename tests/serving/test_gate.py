"""The server's edge, spoken to byte by byte: what is slow, endless, malformed or forged."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from serving.schemas import ErrorEnvelope
from tests.serving.test_keys import ALICE, BOB, line_of
from tests.serving.test_refusals import WAV, audio

ROOT = Path(__file__).resolve().parents[2]
KEY = f"X-API-Key: {ALICE}\r\n".encode()
SECRET = "geheim"
SERVER = """
import asyncio, sys
from pathlib import Path
from fastapi import WebSocket
from fastapi.responses import StreamingResponse
from serving.__main__ import serve
from serving.app import create_app
from serving.settings import Settings
from tests.serving.conftest import FakeSpeech

settings = Settings(
    port=int(sys.argv[1]), keys_file=Path(sys.argv[2]), max_body_bytes=100_000, max_head_bytes=10_000,
    head_seconds=1, body_seconds=1.5, send_seconds=1, max_file_seconds=5, max_queue_seconds=20, drain_seconds=1,
)
app = create_app(settings, {"tiny": FakeSpeech()})

@app.get("/v1/flood")
async def flood():
    async def pieces():
        for _ in range(1_000):
            yield bytes(2**18)
    return StreamingResponse(pieces())

@app.get("/v1/broken")
async def broken():
    async def pieces():
        yield b"begun"
        raise KeyError("geheim")
    return StreamingResponse(pieces())

@app.websocket("/v1/test")
async def test(websocket: WebSocket):
    await websocket.accept()
    while (word := await websocket.receive_text()) != "flood":
        await websocket.send_text(word)
    while True:
        await websocket.send_bytes(bytes(2**18))

serve(app, settings)
"""


@dataclass
class Server:
    """A server in a process of its own."""

    port: int
    log: Path
    process: subprocess.Popen[bytes]
    keys: Path

    def open(self, receive_bytes: int | None = None) -> socket.socket:
        client = socket.socket()
        if receive_bytes:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        client.settimeout(20)
        client.connect(("127.0.0.1", self.port))
        return client

    def ask(self, *pieces: bytes, pause: float = 0) -> bytes:
        """All that the server says to these bytes until it ends the connection."""
        with self.open() as client:
            for piece in pieces:
                try:
                    client.sendall(piece)
                except OSError:
                    break
                time.sleep(pause)
            return read_all(client)

    def lines(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def wait_for(self, **wanted: object) -> dict[str, object]:
        """The log's line with these fields."""
        while True:  # pytest's timeout ends it
            for line in self.lines():
                if wanted.items() <= line.items():
                    return line
            time.sleep(0.02)


def read_all(client: socket.socket) -> bytes:
    said = b""
    try:
        while piece := client.recv(1 << 16):
            said += piece
    except ConnectionResetError:
        pass
    return said


def head(path: str = "/v1/units", *lines: str, method: str = "POST", close: bool = True) -> bytes:
    more = [f"X-API-Key: {ALICE}", *(["Connection: close"] if close else []), *lines]
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: h", *more, "", ""]).encode("latin-1")


def refused(said: bytes, status: int, code: str) -> str:
    """The one answer in what was said is the envelope; its message."""
    top, _, body = said.partition(b"\r\n\r\n")
    assert top.startswith(b"HTTP/1.1 %d " % status), said[:300]
    assert b"x-content-type-options: nosniff" in top.lower()
    error = ErrorEnvelope.model_validate_json(body).error
    assert error.code == code
    assert f"x-request-id: {error.request_id}" in top.decode().lower()
    return error.message


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    keys = folder / "keys.jsonl"
    keys.write_text(line_of("alice", ALICE))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(port), str(keys)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}"},
            stderr=log,
            stdout=log,
        )
    server = Server(port, folder / "log", process, keys)
    try:
        while True:  # pytest's timeout ends it
            assert process.poll() is None, server.log.read_text()
            try:
                if server.ask(head("/health/ready", method="GET")).startswith(b"HTTP/1.1 200"):
                    break
            except ConnectionRefusedError:
                time.sleep(0.1)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(20)
        finally:
            process.kill()
            process.wait()
    told = server.log.read_text()
    for word in (ALICE, BOB, SECRET, "Traceback", "RIFF"):
        assert word not in told
    for line in told.splitlines():  # uvicorn's too
        assert {"time", "level", "message"} <= json.loads(line).keys()


# ---------------------------------------------------------------------------------------------------------- slowness


def test_a_slow_body(server):
    message = refused(
        server.ask(head("/v1/units", "Content-Type: audio/wav", "Content-Length: 9") + b"abc"), 408, "late"
    )
    assert "body: found it not whole after 1.5 s" in message


def test_a_body_that_trickles_for_ever(server):
    with server.open() as client:
        client.sendall(head("/v1/units", "Content-Type: audio/wav", "Content-Length: 90000", close=False))
        started = time.monotonic()
        try:
            while time.monotonic() - started < 15:
                client.sendall(b"x")
                time.sleep(0.05)
        except OSError:
            pass
        # 1.5 s for the body, 2 s to go on after the refusal, and what a busy machine takes.
        assert time.monotonic() - started < 10


def test_a_slow_head(server):
    assert "head not whole after 1 s" in refused(server.ask(b"POST /v1/units HTT"), 408, "late")
    refused(server.ask(b"GET / HTTP/1.1\r\nHost: h\r\n", b"X-A: b\r\n", b"X-B: c\r\n", pause=0.6), 408, "late")
    assert server.ask() == b""
    with server.open() as client:  # on a connection that was good before
        client.sendall(head("/v1/models", method="GET", close=False))
        client.sendall(b"GET /v1/mod")
        said = read_all(client)
        assert said.startswith(b"HTTP/1.1 200")
        refused(said[said.index(b"HTTP/1.1 408") :], 408, "late")


def test_a_reader_that_stands_still_is_dropped(server):
    with server.open(receive_bytes=4096) as client:
        client.sendall(head("/v1/flood", "X-Request-ID: still", method="GET"))
        assert server.wait_for(request_id="still")["status"] == 499
        time.sleep(1.5)  # the connection is cut a second later
        assert len(read_all(client)) < 2**26  # of 2**28


def test_a_client_that_leaves_is_noted(server):
    with server.open() as client:
        client.sendall(head("/v1/flood", "X-Request-ID: left-1", method="GET"))
        client.recv(1000)
    with server.open() as client:
        lines = ("Content-Type: audio/wav", "Content-Length: 1000", "X-Request-ID: left-2")
        client.sendall(head("/v1/units", *lines) + b"RIFF")
    for name in ("left-1", "left-2"):
        assert server.wait_for(request_id=name)["status"] == 499


def test_a_fault_in_the_midst_of_an_answer_cuts_it(server):
    said = server.ask(head("/v1/broken", "X-Request-ID: midst", method="GET"))
    assert said.endswith(b"5\r\nbegun\r\n")  # no last chunk: the client sees that it is not whole
    assert server.wait_for(request_id="midst", route="/v1/broken")["status"] == 500


# -------------------------------------------------------------------------------------------------------------- sizes


def test_bodies_are_measured_as_they_come(server):
    said = server.ask(head("/v1/units", "Content-Type: audio/wav", "Content-Length: 100001"))
    assert "more than 100000 bytes" in refused(said, 413, "too_large")
    chunked = head("/v1/units", "Content-Type: audio/wav", "Transfer-Encoding: chunked", close=False)
    chunk = b"2710\r\n" + bytes(10_000) + b"\r\n"
    with server.open() as client:
        client.sendall(chunked + chunk * 11)
        assert client.recv(12) == b"HTTP/1.1 413"
        client.sendall(b"0\r\n\r\n" + head("/v1/models", method="GET"))  # the connection is still good
        assert b"HTTP/1.1 200" in read_all(client)
    said = server.ask(chunked.replace(b"Host", b"Connection: close\r\nHost") + b"9\r\nsome wav.\r\n0\r\n\r\n")
    refused(said, 400, "bad_audio")
    # Megabytes after the refusal are thrown away for a moment; then the connection ends.
    started = time.monotonic()
    server.ask(chunked, *[chunk] * 400, pause=0.01)
    assert time.monotonic() - started < 15


def test_lengths_that_lie(server):
    wav = audio(1_000)
    lines = ("Content-Type: audio/wav", f"Content-Length: {len(wav) - 100}")
    said = server.ask(head("/v1/units", *lines, close=False) + wav)
    assert said.startswith(b"HTTP/1.1 400")  # cut off
    assert b"HTTP/1.1 200" not in said  # and its end is no request
    for length in ("-1", "1e3", "0x10", "9" * 30, "1, 2", "+5", "５".encode().decode("latin-1")):
        said = server.ask(head("/v1/units", "Content-Type: audio/wav", f"Content-Length: {length}"))
        refused(said, 400, "bad_request")


def test_heads_that_are_too_long(server):
    for said in (
        server.ask(head("/v1/units?" + "a" * 20_000)),
        server.ask(head("/v1/units", "X-Long: " + "a" * 20_000)),
        server.ask(head("/v1/units", *(f"X-{i}: a" for i in range(3_000)))),
        server.ask(b"GET /", *[b"a" * 1_000] * 400),
        server.ask(b"GET / HTTP/1.1\r\nX: ", *[b"a" * 1_000] * 400),
        server.ask(b"GET / HTTP/1.1\r\n", *[b"X-A: b\r\n" * 100] * 400),
    ):
        if said:  # the kernel may cut the answer to a client that goes on sending
            assert "10000 bytes" in refused(said, 431, "too_large")
    assert server.ask(head("/v1/models?" + "a" * 5_000, method="GET")).startswith(b"HTTP/1.1 200")


# ----------------------------------------------------------------------------------------------------------- forgery


@pytest.mark.parametrize(
    "lines",
    [
        ["Content-Length: 5", "Transfer-Encoding: chunked"],
        ["Transfer-Encoding: chunked", "Content-Length: 5"],
        ["Content-Length: 5", "Content-Length: 6"],
        ["Content-Length: 5", "Content-Length: 5"],
        ["Transfer-Encoding: xchunked"],
        ["Transfer-Encoding: chunked, identity"],
        ["Transfer-Encoding: chunked", "Transfer-Encoding: identity"],
        ["Transfer-Encoding : chunked"],
        ["Transfer-Encoding\t: chunked"],
        ["X: a\n b", "Content-Length: 5\rX: b"],
        ["X-Request-ID: a\rSet-Cookie: b"],
        ["X-Request-ID: a\0b"],
        ["no colon"],
        [": nameless"],
        ["X\xe9: a", "X Y: b"],
    ],
)
def test_no_two_servers_can_read_a_head_differently(server, lines):
    smuggled = b"0\r\n\r\n" + head("/v1/models", method="GET")
    said = server.ask(head("/v1/units", *lines, close=False) + smuggled)
    refused(said, 400, "bad_request")
    assert re.findall(rb"HTTP/1.1 (\d+)", said) == [b"400"]


@pytest.mark.parametrize(
    "chunks", [b"5\r\nabcdeX\r\n", b"-5\r\nabcde\r\n", b"0x5\r\nabcde\r\n", b"fffffffffffffffff\r\n", b"5;\nabcde\r\n"]
)
def test_broken_chunks(server, chunks):
    lines = ("Content-Type: audio/wav", "Transfer-Encoding: chunked")
    refused(server.ask(head("/v1/units", *lines, close=False) + chunks + b"0\r\n\r\n"), 400, "bad_request")


@pytest.mark.parametrize("pause", [0, 0.1])
def test_a_client_that_would_like_http_2_is_heard_in_http_1(server, pause):
    """Java's asks with every first request. What follows the head is its body, and no request of its own."""
    lines = ["Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAEAAEAAAAIAAAAB"]
    wav = audio(2_000)
    post = head("/v1/units", *lines, "Content-Type: audio/wav", f"Content-Length: {len(wav)}", close=False)
    chunked = head("/v1/units", *lines, "Content-Type: audio/wav", "Transfer-Encoding: chunked", close=False)
    chunks = b"%x\r\n%b\r\n0\r\n\r\n" % (len(wav), wav)
    get = head("/v1/models", *lines, method="GET", close=False)
    forged = head("/v1/units", *lines, "Content-Type: audio/wav", f"Content-Length: {len(get)}", close=False)
    last = head("/v1/models", method="GET")
    said = server.ask(post, wav, chunked, chunks, get, forged, get, last, pause=pause)
    assert re.findall(rb"HTTP/1.1 (\d+)", said) == [b"200", b"200", b"200", b"400", b"200"]
    assert re.findall(rb"HTTP/1.1 (\d+)", server.ask(post + wav + chunked + chunks + last)) == [b"200"] * 3


def test_a_trailer_is_no_header(server):
    first = b"POST /v1/units HTTP/1.1\r\nHost: h\r\nContent-Type: audio/wav\r\nTransfer-Encoding: chunked\r\n\r\n"
    said = server.ask(first + b"1\r\nR\r\n0\r\n" + KEY + b"\r\n" + head("/v1/models", method="GET"))
    assert re.findall(rb"HTTP/1.1 (\d+)", said) == [b"401", b"200"]


def test_request_ids_cannot_be_forged(server):
    for given in ("a b", "a%0d%0aSet-Cookie: b", "<script>", "x" * 65, "\xe9"):
        said = server.ask(head("/v1/models", f"X-Request-ID: {given}", method="GET"))
        assert re.search(rb"x-request-id: [0-9a-f]{32}\r\n", said)
        assert given.encode("latin-1") not in said
    said = server.ask(head("/v1/models", "X-Request-ID: one", "X-Request-ID: two", method="GET"))
    assert said.count(b"x-request-id: ") == 1


def test_requests_in_one_go_are_answered_in_order(server):
    wav = audio(2_000)
    post = head("/v1/units", "Content-Type: audio/wav", f"Content-Length: {len(wav)}", close=False) + wav
    said = server.ask(post * 3 + head("/nothing", method="GET", close=False) + head("/v1/models", method="GET"))
    assert re.findall(rb"HTTP/1.1 (\d+)", said) == [b"200"] * 3 + [b"404", b"200"]


@pytest.mark.parametrize(
    ("lines", "first"),
    [
        (["Content-Length: 100001", KEY.decode().strip()], b"HTTP/1.1 413"),
        (["Content-Length: 4"], b"HTTP/1.1 401"),
        (["Content-Length: 4", KEY.decode().strip()], b"HTTP/1.1 100"),
    ],
)
def test_a_client_that_asks_before_it_sends(server, lines, first):
    with server.open() as client:
        top = ["POST /v1/units HTTP/1.1", "Host: h", "Content-Type: audio/wav", "Expect: 100-continue", *lines, "", ""]
        client.sendall("\r\n".join(top).encode())
        assert client.recv(1 << 16).startswith(first)
        if first.endswith(b"100"):
            client.sendall(b"RIFF")
            assert client.recv(1 << 16).startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "PUT", "PATCH", "TRACE", "CONNECT", "PROPFIND", "NONE", "get"])
def test_odd_methods(server, method):
    for path in ("/v1/units", "/v1/models", "/health/live", "*", "http://evil.example/v1/units", "h:80"):
        said = server.ask(head(path, method=method))
        status = int(said[9:12])
        assert status in (200, 400, 404, 405), (path, said)
        if method == "HEAD" and status != 400:
            assert said.endswith(b"\r\n\r\n")
        elif status != 200:
            refused(said, status, {404: "not_found", 405: "method_not_allowed"}.get(status, "bad_request"))


@pytest.mark.parametrize(
    "path",
    [
        "/v1/units?a=%",
        "/v1/units?%ff=%00",
        "/v1/%ff%fe",
        "/v1/%00",
        "/%ed%a0%80",
        "/v1/units#f",
        "//v1/units",
        "/\xe9",
        "?",
    ],
)
def test_odd_addresses(server, path):
    said = server.ask(head(path, "Content-Type: audio/wav", "Content-Length: 0"))
    assert int(said[9:12]) in (400, 404, 405, 422), said
    ErrorEnvelope.model_validate_json(said.partition(b"\r\n\r\n")[2])


def test_http_1_0_and_other_versions(server):
    assert server.ask(b"GET /v1/models HTTP/1.0\r\n" + KEY + b"\r\n").startswith(b"HTTP/1.1 200")
    for version in (b"HTTP/0.9", b"HTTP/3.0", b"ICE/1.0", b""):
        said = server.ask(b"GET /v1/models " + version + b"\r\n" + KEY + b"\r\n")
        assert said == b"" or int(said[9:12]) in (200, 400)  # the parser takes 0.9 for 1.0
    refused(server.ask(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), 400, "bad_request")
    refused(server.ask(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64)), 400, "bad_request")  # TLS


# ---------------------------------------------------------------------------------------------------------- WebSockets


@pytest.mark.parametrize(
    ("path", "headers", "protocols", "status", "code"),
    [
        ("/v1/test", {}, None, 401, "unauthorized"),
        ("/v1/test", {"X-API-Key": BOB}, None, 401, "unauthorized"),
        ("/v1/test", {}, [f"sonorant.key.{BOB}"], 401, "unauthorized"),
        ("/v1/test", {"X-API-Key": ALICE, "Origin": "https://evil.example"}, None, 403, "forbidden"),
        (f"/v1/none?{SECRET}", {"X-API-Key": ALICE}, None, 404, "not_found"),
        (f"/health/{SECRET}", {}, None, 404, "not_found"),
    ],
)
def test_a_websocket_is_refused_in_http(server, path, headers, protocols, status, code):
    with (
        pytest.raises(InvalidStatus) as refusal,
        connect(f"ws://127.0.0.1:{server.port}{path}", additional_headers=headers, subprotocols=protocols),
    ):
        pass
    answer = refusal.value.response
    assert answer.status_code == status
    error = ErrorEnvelope.model_validate_json(answer.body).error
    assert (error.code, error.request_id) == (code, answer.headers["X-Request-ID"])
    assert answer.headers.get("WWW-Authenticate") == ("Bearer" if status == 401 else None)
    assert server.wait_for(request_id=error.request_id)["status"] == status


@pytest.mark.parametrize(
    ("method", "lines", "status"),
    [
        ("GET", ["Sec-WebSocket-Version: 12"], 400),
        ("GET", ["X-Long: " + "a" * 9_000], 400),
        ("GET", ["X: a"] * 300, 400),
        ("GET", ["Sec-WebSocket-Key: short"], 400),
        ("GET", ["Sec-WebSocket-Protocol: ,;"], 400),
        ("GET", ["Content-Length: 5"], 400),
        ("POST", [], 405),
    ],
)
def test_a_broken_handshake_is_refused(server, method, lines, status):
    more = ["Upgrade: websocket", "Connection: Upgrade"]
    for name, value in (("Version", "13"), ("Key", base64.b64encode(bytes(16)).decode())):
        if not any(name in line for line in lines):
            more.append(f"Sec-WebSocket-{name}: {value}")
    said = server.ask(head("/v1/test", *more, *lines, method=method, close=False))
    refused(said, status, {405: "method_not_allowed"}.get(status, "bad_request"))


def test_a_refusal_by_the_protocol_is_in_the_log(server):
    said = server.ask(b"nonsense\r\n\r\n")
    name = ErrorEnvelope.model_validate_json(said.partition(b"\r\n\r\n")[2]).error.request_id
    line = server.wait_for(request_id=name)
    assert (line["status"], line["route"]) == (400, "unmatched")


def test_a_websocket_with_a_key(server):
    url = f"ws://127.0.0.1:{server.port}/v1/test?{SECRET}"
    token = f"sonorant.key.{ALICE}"
    for headers, protocols, chosen in (
        ({"Authorization": f"Bearer {ALICE}"}, None, None),
        ({}, [token], token),
        ({}, [token, "sonorant"], "sonorant"),
    ):
        with connect(url, additional_headers=headers, subprotocols=protocols) as client:
            assert client.subprotocol == chosen
            client.send("hello")
            assert client.recv() == "hello"
            name = client.response.headers["X-Request-ID"]
        line = server.wait_for(request_id=name)
        assert (line["status"], line["key"], line["method"], line["route"]) == (101, "alice", "WS", "/v1/test")


def test_a_websocket_whose_reader_stands_still_is_dropped(server):
    with server.open(receive_bytes=4096) as client:
        lines = ["Upgrade: websocket", "Sec-WebSocket-Version: 13", "X-Request-ID: ws-still"]
        nonce = base64.b64encode(bytes(16)).decode()
        top = head("/v1/test", *lines, f"Sec-WebSocket-Key: {nonce}", "Connection: Upgrade", method="GET", close=False)
        client.sendall(top)
        assert client.recv(1000).startswith(b"HTTP/1.1 101")
        client.sendall(b"\x81\x85" + bytes(4) + b"flood")
        server.wait_for(request_id="ws-still")
        time.sleep(1.5)
        assert len(read_all(client)) < 2**26


def test_a_websocket_that_sends_nonsense_is_closed(server):
    with connect(f"ws://127.0.0.1:{server.port}/v1/test", additional_headers={"X-API-Key": ALICE}) as client:
        client.send(SECRET.encode())  # bytes, where the route wants text: a fault of its own
        with pytest.raises(ConnectionClosed) as end:
            client.recv()
        assert end.value.rcvd.code == 1011
        assert SECRET not in end.value.rcvd.reason


# --------------------------------------------------------------------------------------------------------------- keys


def test_keys_are_reloaded_on_a_signal(server):
    asked = head("/v1/models", method="GET").replace(ALICE.encode(), BOB.encode())
    good = server.keys.read_text()
    refused(server.ask(asked), 401, "unauthorized")
    server.keys.write_text("broken " + BOB)
    server.process.send_signal(signal.SIGHUP)
    while not any("the old keys stay" in str(line["message"]) for line in server.lines()):  # pytest's timeout ends it
        time.sleep(0.02)
    assert server.ask(head("/v1/models", method="GET")).startswith(b"HTTP/1.1 200")
    server.keys.write_text(good + line_of("bob", BOB))
    server.process.send_signal(signal.SIGHUP)
    server.wait_for(message="reload: 2 keys")
    assert server.ask(asked).startswith(b"HTTP/1.1 200")
    server.keys.write_text(good)
    server.process.send_signal(signal.SIGHUP)
    server.wait_for(message="reload: 1 keys")
    refused(server.ask(asked), 401, "unauthorized")


# -------------------------------------------------------------------------------------------- odd input behind the gate


@pytest.mark.parametrize(
    "accept",
    ["", ",", ";", ";q=", "*/*;q=nan", "*/*;q=-1", "a/b;q=1;q=2,*/*", "application/json;q=1e999", "\xff", "*" * 9_000],
)
def test_odd_accept_headers(client, accept):
    answer = client.post("/v1/units", content=audio(), headers={**WAV, "Accept": accept.encode("latin-1")})
    assert answer.status_code in (200, 406), answer.text


@pytest.mark.parametrize(
    "disposition",
    [
        b'name="f"; filename="a\0b.wav"',
        b'name="f"; filename="\xed\xa0\x80.wav"',
        b'name="f"; filename="\xff\xfe"',
        b"name=\"f\"; filename*=utf-8''%00%ff%ed%a0%80.wav",
        b'name="f"; filename="' + b"a" * 5_000 + b'"',
        b'name="f"; filename="../../etc/passwd"',
        b'name="\0"; filename="\r"',
        b'name="f"; name="g"; filename="a"; filename="b"',
        b'filename="a"',
        b'name="f"; filename="\\"a\\""',
    ],
)
@pytest.mark.parametrize("accept", ["application/json", "application/x-ndjson", "application/safetensors"])
def test_odd_file_names(client, disposition, accept):
    for content in (audio(), b"no audio"):
        part = b"Content-Disposition: form-data; " + disposition + b"\r\n\r\n" + content
        answer = client.post(
            "/v1/units",
            content=b"--b\r\n" + part + b"\r\n--b--\r\n",
            headers={"Content-Type": "multipart/form-data; boundary=b", "Accept": accept},
        )
        assert answer.status_code in (200, 400, 422), answer.text
        assert len(answer.text.encode("utf-8", "strict")) > 0


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": b"audio/wav\xff"},
        {"Content-Type": b"multipart/form-data; boundary=\xff"},
        {"Content-Type": b"multipart/form-data; boundary=" + b"b" * 1_000},
        {"Content-Type": b"multipart/form-data; charset=\xff; boundary=b"},
        {"Content-Type": b"multipart/form-data; charset=none; boundary=b"},
        {"Content-Type": b"audio/wav", "Content-Encoding": b"\xff"},
        {"Content-Type": b"audio/wav", "X-Request-Timeout": b"\xb2"},
        {"Content-Type": b"audio/wav", "X-Request-Timeout": b"9" * 5_000},
        {"Content-Type": b"audio/wav", "Content-Length": b"9" * 5_000},
        {"Content-Type": b"audio/wav", "Content-Length": b"\xb2"},
        {"Content-Type": b"audio/wav", "Range": b"bytes=0-", "If-None-Match": b"*", "Origin": b"\xff"},
        {"Content-Type": b"application/json; charset=utf-16"},
    ],
)
def test_odd_headers(client, headers):
    answer = client.post("/v1/units", content=b"--b\r\n\r\n", headers=headers)
    assert 400 <= answer.status_code < 500, answer.text
    ErrorEnvelope.model_validate_json(answer.content)


def test_duplicate_options_and_headers(client):
    answer = client.post("/v1/units?deduplicate=1&deduplicate=0", content=audio(), headers=WAV)
    assert answer.status_code in (200, 422)
    twice = [("Content-Type", "audio/wav"), ("Content-Type", "application/json"), ("Accept", "a/b"), ("Accept", "*/*")]
    assert client.post("/v1/units", content=audio(), headers=twice).status_code in (200, 406, 415)
