"""Who is let in: keys, quotas, other sites' pages; and what the log says of it."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, WebSocket
from fastapi.testclient import TestClient
from starlette.testclient import WebSocketDenialResponse
from starlette.websockets import WebSocketDisconnect

from serving.__main__ import main
from serving.app import create_app
from serving.edge.keys import Account, Bucket, Key, Keys, read
from serving.edge.traffic import HEADERS
from serving.errors import ApiError
from serving.logs import Line, without_queries
from serving.schemas import ErrorEnvelope
from serving.settings import Settings
from tests.serving.conftest import FakeSpeech, ready_client
from tests.serving.test_refusals import WAV, audio, check

ALICE, BOB, CAROL = ("snr_" + letter * 43 for letter in "abc")
ORIGIN = "https://lab.example"


def line_of(name: str, token: str, **more: Any) -> str:
    from hashlib import sha256

    return json.dumps({"name": name, "sha256": sha256(token.encode()).hexdigest(), **more}) + "\n"


class Clock:
    """Time that passes when told to."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.jsonl"
    path.write_text(
        "# who may come in\n\n"
        + line_of("alice", ALICE)
        + line_of("bob", BOB, models=["other"], requests_per_minute=3)
        + line_of("carol", CAROL, audio_seconds_per_hour=10)
    )
    return path


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def guarded(keys_file: Path, clock: Clock) -> FastAPI:
    """An app of two models with keys, CORS, and a WebSocket that charges and echoes."""
    settings = Settings(max_file_seconds=5, max_queue_seconds=20, keys_file=keys_file, cors_origins=[ORIGIN])
    app = create_app(settings, {"tiny": FakeSpeech(), "other": FakeSpeech()})
    keys = app.state.keys
    keys.clock = clock
    keys.accounts = [Account(account.key, clock) for account in keys.accounts]

    @app.websocket("/v1/test")
    async def socket(websocket: WebSocket) -> None:
        visit = websocket.state.visit
        visit.allow(websocket.query_params.get("model", "tiny"))
        assert "snr_" not in str((websocket.headers.raw, websocket.scope["subprotocols"]))
        await websocket.accept()
        while True:
            visit.charge(float(await websocket.receive_text()))
            await websocket.send_text(str(visit.audio_seconds))

    return app


@pytest.fixture
def guest(guarded: FastAPI) -> Iterator[TestClient]:
    with ready_client(guarded) as client:
        yield client


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


# -------------------------------------------------------------------------------------------------------- who comes in


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        ({}, ["found none"]),
        ({"Authorization": "Basic YTpi"}, ["found none"]),
        ({"Authorization": "Bearer"}, ["found an unknown one"]),
        ({"Authorization": "Bearer "}, ["found an unknown one"]),
        ({"X-API-Key": ""}, ["found an unknown one"]),
        ({"X-API-Key": ALICE[:-1]}, ["found an unknown one"]),
        ({"X-API-Key": ALICE + "\u00e9"}, ["found an unknown one"]),
        ({"X-API-Key": "x" * 20_000}, ["found an unknown one"]),
        ({"X-API-Key": BOB, "Authorization": f"Bearer {ALICE}"}, ["found several"]),
        ([("X-API-Key", ALICE), ("X-API-Key", "x")], ["found several"]),
    ],
)
def test_nobody_comes_in_without_a_key(guest, headers, words):
    headers = [(n, v.encode("latin-1")) for n, v in (headers.items() if isinstance(headers, dict) else headers)]
    answer = guest.post("/v1/units", content=audio(), headers=[*headers, ("Content-Type", b"audio/wav")])
    message = check(answer, 401, "unauthorized", "API key", *words)
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert "snr_" not in message


@pytest.mark.parametrize(
    "headers",
    [
        bearer(ALICE),
        {"X-API-Key": ALICE},
        {"authorization": f"bEARER   {ALICE} "},
        {"X-API-Key": ALICE, **bearer(ALICE)},
        {"X-API-Key": ALICE, "Authorization": "Basic YTpi"},
    ],
)
def test_a_key_opens(guest, headers):
    assert guest.post("/v1/units", content=audio(), headers={**WAV, **headers}).status_code == 200


def test_what_is_open_needs_no_key_and_nothing_else_is_open(guest):
    for path in ("/health/live", "/health/ready", "/metrics", "/openapi.json"):
        assert guest.get(path).status_code == 200
    for path in ("/v2/health/ready", "/page/nothing", "/"):
        assert guest.get(path).status_code != 401
    # A path that only looks like an open one leads nowhere.
    for path in ("/health", "/healthy", "/metrics/", "/openapi.json/", "/%2e/health/live", "/v1/models", "/x"):
        check(guest.get(path), 401, "unauthorized")
    for path in ("/health/%2e%2e/v1/models", "/page/..%2fv1%2fmodels", "/health//v1/models"):
        check(guest.get(path), 404, "not_found")


def test_the_digest_is_compared_with_every_key(guarded, monkeypatch):
    from serving.edge import keys

    compared: list[str] = []
    compare = keys.hmac.compare_digest
    monkeypatch.setattr(keys.hmac, "compare_digest", lambda a, b: compared.append(a) or compare(a, b))
    for token in (ALICE, CAROL):
        assert guarded.state.keys.identify({token}).key.name in ("alice", "carol")
    with pytest.raises(ApiError):
        guarded.state.keys.identify({"x"})
    assert len(compared) == 9


def test_a_key_is_for_its_models(guest):
    headers = {**WAV, **bearer(BOB)}
    check(guest.post("/v1/units", content=audio(), headers=headers), 403, "forbidden", "'tiny'", "other", "key bob")
    answer = guest.post("/v1/embeddings?model=tiny", content=audio(), headers=headers)
    check(answer, 403, "forbidden")
    [model] = guest.get("/v1/models", headers=headers).json()["models"]
    assert model["id"] == "other"


# -------------------------------------------------------------------------------------------------------------- quotas


def test_requests_are_counted(guest, clock):
    def status() -> httpx.Response:
        return guest.get("/v1/models", headers=bearer(BOB))

    assert [status().status_code for _ in range(4)] == [200, 200, 200, 429]
    check(status(), 429, "rate_limited", "key bob's 3 a minute", "retry in 20 s")
    wait = int(status().headers["Retry-After"])
    clock.now += wait - 0.1
    assert status().status_code == 429
    clock.now += 0.1
    assert status().status_code == 200
    assert status().status_code == 429
    assert guest.get("/v1/models", headers=bearer(ALICE)).status_code == 200
    assert guest.get("/health/live", headers=bearer(BOB)).status_code == 200


def test_audio_is_counted(guest, clock):
    def post(*seconds: int) -> httpx.Response:
        files = [("f", ("a.wav", audio(16_000 * each))) for each in seconds]
        return guest.post("/v1/units", files=files, headers=bearer(CAROL))

    assert post(5).status_code == 200
    message = check(post(4, 4, 4), 413, "too_long", "found 12.0 s", "at most key carol's 10 s an hour", "in parts")
    assert "retry" not in message
    assert post(4).status_code == 200  # the refused one cost nothing
    answer = post(3)
    check(answer, 429, "quota_exceeded", "found 3.0 s", "key carol's 10 s an hour")
    assert answer.headers["Retry-After"] == "720"  # 2 of 10 s are missing: a fifth of the hour
    clock.now += 719
    assert post(3).status_code == 429
    clock.now += 1
    assert post(3).status_code == 200
    clock.now += 1e6
    assert post(5, 5).status_code == 200
    assert post(1).status_code == 429


def test_what_was_not_done_is_not_charged(guest, guarded):
    guarded.state.service.engine.batcher.max_seconds = 3
    for _ in range(5):
        answer = guest.post("/v1/units", content=audio(16_000 * 4), headers={**WAV, **bearer(CAROL)})
        check(answer, 429, "overloaded")
    guarded.state.service.engine.batcher.max_seconds = 20
    assert guest.post("/v1/units", files=[("f", audio(80_000))] * 2, headers=bearer(CAROL)).status_code == 200


@pytest.mark.parametrize("size", [1, 3, 7, 1e9])
def test_whoever_waits_as_long_as_told_gets_it(clock, size):
    bucket = Bucket(size, 60, clock)
    for amount in (size, size / 3, size, size / 7, 1e-3):
        while wait := bucket.take(amount):
            assert 0 < wait <= 60 * (1 + 1e-9)
            clock.now += wait
    assert bucket.level >= -1e-6 * size


# ---------------------------------------------------------------------------------------------------------- WebSockets


def test_a_websocket_passes_the_same_gate(guest):
    for more in (bearer(ALICE), {"X-API-Key": ALICE}):
        with guest.websocket_connect("/v1/test", headers=more) as socket:
            socket.send_text("2.5")
            assert socket.receive_text() == "2.5"
            assert socket.accepted_subprotocol is None
    for protocols, chosen in (
        ([f"sonorant.key.{ALICE}"], f"sonorant.key.{ALICE}"),
        (["sonorant", f"sonorant.key.{ALICE}"], "sonorant"),
    ):
        with guest.websocket_connect("/v1/test", subprotocols=protocols) as socket:
            assert socket.accepted_subprotocol == chosen


@pytest.mark.parametrize(
    ("path", "headers", "protocols", "status", "code"),
    [
        ("/v1/test", {}, [], 401, "unauthorized"),
        ("/v1/test", {}, ["sonorant.key.x"], 401, "unauthorized"),
        ("/v1/test", bearer(BOB), [f"sonorant.key.{ALICE}"], 401, "unauthorized"),
        ("/v1/test", bearer(BOB), [], 403, "forbidden"),
        ("/v1/test", {**bearer(ALICE), "Origin": "https://evil.example"}, [], 403, "forbidden"),
        ("/v1/test", {**bearer(ALICE), "Origin": "null"}, [], 403, "forbidden"),
        ("/v1/test", {**bearer(ALICE), "Origin": "http://[evil"}, [], 403, "forbidden"),
        ("/v1/nothing", bearer(ALICE), [], 404, "not_found"),
    ],
)
def test_a_websocket_is_refused_before_it_is_accepted(guest, path, headers, protocols, status, code):
    with (
        pytest.raises(WebSocketDenialResponse) as refusal,
        guest.websocket_connect(path, headers=headers, subprotocols=protocols),
    ):
        pass
    check(refusal.value, status, code)


def test_a_websocket_from_a_page_that_may(guest):
    for origin in (ORIGIN, "http://testserver", "https://testserver"):
        with guest.websocket_connect("/v1/test", headers={**bearer(ALICE), "Origin": origin}):
            pass


def test_a_websocket_that_spends_its_quota_is_closed(guest):
    with guest.websocket_connect("/v1/test", headers=bearer(CAROL)) as socket:
        socket.send_text("9")
        assert socket.receive_text() == "9.0"
        socket.send_text("2")
        with pytest.raises(WebSocketDisconnect) as end:
            socket.receive_text()
        assert (end.value.code, end.value.reason) == (1008, "quota_exceeded")


# ---------------------------------------------------------------------------------------------------------------- CORS


def test_pages_of_listed_origins_may_read_every_answer(guest):
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    answer = guest.options("/v1/units", headers={"Origin": ORIGIN, **asked})
    assert (answer.status_code, answer.headers["Access-Control-Allow-Origin"]) == (200, ORIGIN)
    assert answer.headers["X-Request-ID"]
    for headers, status in (({}, 401), (bearer(ALICE), 415)):
        answer = guest.post("/v1/units", headers={"Origin": ORIGIN, **headers})
        assert (answer.status_code, answer.headers["Access-Control-Allow-Origin"]) == (status, ORIGIN)
        assert "Retry-After" in answer.headers["Access-Control-Expose-Headers"]
        assert "Access-Control-Allow-Credentials" not in answer.headers
    other = guest.options("/v1/units", headers={"Origin": "https://evil.example", **asked})
    check(other, 403, "forbidden", "https://evil.example")
    assert "Access-Control-Allow-Origin" not in other.headers
    answer = guest.get("/v1/models", headers={"Origin": "https://evil.example", **bearer(ALICE)})
    assert "Access-Control-Allow-Origin" not in answer.headers
    many = {**asked, "Access-Control-Request-Headers": "cookie"}
    check(guest.options("/v1/units", headers={"Origin": ORIGIN, **many}), 403, "forbidden")


def test_without_a_setting_there_is_no_cors(client):
    asked = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
    for answer in (client.options("/v1/units", headers=asked), client.get("/v1/models", headers=asked)):
        assert not any(name.startswith("access-control") for name in answer.headers)


# ------------------------------------------------------------------------------------------------------------ the file


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["found no key", "python -m serving key"]),
        ("# none\n\n", ["found no key"]),
        ("snr_secret\n", ["line 1", "found no JSON object"]),
        ("[]\n", ["line 1", "found no JSON object"]),
        ('{"name": "a"}\n', ["found no digest in sha256"]),
        ('{"name": "a", "sha256": "snr_secret"}\n', ["line 1", "found no digest in sha256", "64 hexadecimal"]),
        ('{"name": "a", "token": "snr_secret"}\n', ["line 1"]),
        (line_of("a", "x", secretly="snr_secret"), ["line 1", "unknown field 'secretly'", "requests_per_minute"]),
        (line_of("a b", "x"), ["line 1: name: found 'a b'"]),
        (line_of("a", "x", models=[]), ["models"]),
        (line_of("a", "x", models=["a/b"]), ["models"]),
        (line_of("a", "x", requests_per_minute=0.5), ["requests_per_minute: found 0.5"]),
        (line_of("a", "x", audio_seconds_per_hour=0), ["audio_seconds_per_hour: found 0"]),
        (line_of("a", "x") + line_of("b", "y") + line_of("a", "z"), ["line 3", "another key named a"]),
        (line_of("a", "x") + line_of("b", "x"), ["line 2", "another key with the token of a"]),
        ("\udcff", ["no UTF-8"]),
    ],
)
def test_a_broken_file_is_one_line_without_secrets(tmp_path, text, words):
    path = tmp_path / "keys"
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError) as error:
        read(path)
    message = str(error.value)
    assert message.startswith(f"keys file {path}")
    assert len(message.splitlines()) == 1
    assert "snr_" not in message
    assert all(word in message for word in words), message


def test_a_wrong_start_is_one_line(tmp_path):
    with pytest.raises(SystemExit) as stop:
        main(["--model", str(tmp_path), "--keys-file", str(tmp_path / "none")])
    assert str(stop.value.code).startswith("keys file")
    with pytest.raises(ValueError, match="keys file"):
        create_app(Settings(keys_file=tmp_path / "none"), {"tiny": FakeSpeech()})


def test_a_made_key_opens(tmp_path, capsys):
    main(["key", "dora", "--models", "a,b", "--requests-per-minute", "5", "--audio-seconds-per-hour", "60"])
    said = capsys.readouterr()
    path = tmp_path / "keys"
    path.write_text(said.out)
    token = said.err.split()[-1]
    assert token not in said.out
    account = Keys(path).identify({token})
    assert account is not None
    assert account.key.model_dump(exclude={"sha256"}) == {
        "name": "dora",
        "models": ("a", "b"),
        "requests_per_minute": 5,
        "audio_seconds_per_hour": 60,
    }
    main(["key", "dora"])
    assert capsys.readouterr().err.split()[-1] != token
    with pytest.raises(SystemExit, match="key: name: found 'a b'"):
        main(["key", "a b"])


def test_a_reload_keeps_what_is_spent_and_survives_a_broken_file(keys_file, clock, caplog):
    keys = Keys(keys_file, clock)
    bob = keys.identify({BOB})
    assert bob is not None
    for _ in range(3):
        bob.enter()
    good = keys_file.read_text()
    keys_file.write_text("broken")
    assert not keys.reload()
    assert "the old keys stay: keys file" in caplog.text
    assert keys.identify({BOB}) is bob
    keys_file.write_text(good.replace('"alice"', '"anna"') + line_of("dora", "x"))
    assert keys.reload()
    assert [account.key.name for account in keys.accounts] == ["anna", "bob", "carol", "dora"]
    with pytest.raises(ApiError):
        keys.identify({BOB}).enter()
    keys_file.write_text(good.replace('"requests_per_minute": 3', '"requests_per_minute": 4'))
    assert keys.reload()
    keys.identify({BOB}).enter()
    keys_file.write_text(line_of("dora", "x"))
    assert keys.reload()
    with pytest.raises(ApiError, match="unknown"):
        keys.identify({BOB})


def test_a_changed_file_is_seen(keys_file):
    async def run() -> None:
        keys = Keys(keys_file)
        watch = asyncio.create_task(keys.watch(0.01))
        await asyncio.sleep(0.03)
        keys_file.write_text(line_of("dora", "x"))
        while len(keys.accounts) != 1:  # pytest's timeout ends it
            await asyncio.sleep(0.01)
        keys_file.unlink()
        await asyncio.sleep(0.05)
        assert len(keys.accounts) == 1
        watch.cancel()

    asyncio.run(run())


# ------------------------------------------------------------------------------------------------------------- the log


@pytest.fixture(params=["json", "text"])
def lines(request: pytest.FixtureRequest) -> Iterator[tuple[str, io.StringIO]]:
    """The log as it would be on stderr, down to the least important line of ours."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(Line(request.param))
    handler.addFilter(without_queries)
    logging.getLogger().addHandler(handler)
    logging.getLogger("serving").setLevel(logging.DEBUG)
    yield request.param, stream
    logging.getLogger().removeHandler(handler)
    logging.getLogger("serving").setLevel(logging.NOTSET)


def test_the_log_tells_of_requests_and_no_secrets(lines, guarded, monkeypatch):
    form, stream = lines
    secret = "geheim"
    with ready_client(guarded) as client:
        for token in (ALICE, BOB, CAROL, secret):
            for headers in (bearer(token), {"X-API-Key": token}, {"Cookie": token}):
                for path in (f"/v1/units?model={secret}", f"/v1/{secret}", "/v1/models", f"/metrics?{secret}"):
                    client.post(path, files=[("f", (f"{secret}.wav", audio()))], headers=headers)
                    client.get(path, headers=headers)
                client.post("/v1/units", content=secret, headers={**WAV, **headers})
                client.post("/v1/units", json={"audio": secret, secret: secret}, headers=headers)
                client.post("/v1/embeddings", files=[("f", (f"{secret}\r\n.wav", audio()))], headers=headers)
                client.post("/v1/embeddings", files={secret: secret.encode()}, headers=headers)
            for protocol in (f"sonorant.key.{token}", secret):
                try:
                    with client.websocket_connect(f"/v1/test?{secret}", subprotocols=[protocol]) as socket:
                        socket.send_text(secret)  # no number: a fault of the test's own route
                        socket.receive_text()
                except (WebSocketDenialResponse, WebSocketDisconnect):
                    pass
        logging.getLogger("uvicorn.error").info('%s - "WebSocket %s" [accepted]', "a", f"/v1/stream?{secret}")

        def fail(*_: object) -> None:
            raise KeyError(secret) from ValueError(secret)

        monkeypatch.setattr("serving.routes.speech.choose_media", fail)
        answer = client.post("/v1/units", content=audio(), headers={**WAV, **bearer(ALICE), "X-Request-ID": "job-1"})
        check(answer, 500, "internal", "job-1")
    text = stream.getvalue()
    for word in (secret, ALICE, BOB, CAROL, "snr_", "RIFF"):
        assert word not in text
    if form == "text":
        assert " info POST /v1/embeddings 200 request_id=" in text
        return
    told = [json.loads(line) for line in text.splitlines()]
    assert all({"time", "level", "message"} <= line.keys() for line in told)
    answers = [line for line in told if "status" in line]
    assert {line["key"] for line in answers} == {None, "alice", "bob", "carol"}
    last = answers[-1]
    assert (last["request_id"], last["key"], last["method"], last["route"]) == ("job-1", "alice", "POST", "/v1/units")
    assert (last["status"], last["level"], last["message"]) == (500, "warning", "POST /v1/units 500")
    good = next(line for line in answers if line["route"] == "/v1/embeddings" and line["status"] == 200)
    assert good["audio_seconds"] == 1
    assert good["ms"] > 0
    [fault] = [line for line in told if line.get("request_id") == "job-1" and "exception" in line]
    assert "KeyError at " in fault["exception"]
    assert "caused by ValueError" in fault["exception"]
    assert "tests/serving/test_keys.py" in fault["exception"]


def test_a_line_stays_one_line():
    record = logging.LogRecord("x", logging.INFO, "", 0, "a\nb %s", ("\r\n\udc80",), None)
    for form in ("json", "text"):
        assert len(Line(form).format(record).encode().splitlines()) == 1


# ------------------------------------------------------------------------------------------------------- every answer


def test_every_answer_has_its_headers(guest):
    for answer in (
        guest.get("/health/live"),
        guest.get("/v1/models"),
        guest.get("/v1/models", headers=bearer(ALICE)),
        guest.get("/nothing", headers=bearer(ALICE)),
        guest.options("/v1/units", headers={"Origin": "x", "Access-Control-Request-Method": "POST"}),
        guest.head("/v1/models", headers=bearer(ALICE)),
        guest.post("/v1/units", content=audio(), headers={**WAV, **bearer(ALICE)}),
    ):
        for name, value in HEADERS.items():
            assert answer.headers[name] == value
        assert answer.headers["X-Request-ID"]
        assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'")


def test_a_refusal_before_the_app_is_an_envelope(guest):
    answer = guest.get("/v1/models", headers={"X-Request-Timeout": "soon", **bearer(ALICE)})
    check(answer, 422, "invalid_option", "X-Request-Timeout: found 'soon'")
    ErrorEnvelope.model_validate_json(answer.content)
    assert Key.model_fields.keys() == {"name", "sha256", "models", "requests_per_minute", "audio_seconds_per_hour"}
