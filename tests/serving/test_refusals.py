"""What is refused, and that every refusal has one shape: no input makes a 500."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import struct

import httpx
import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.app import create_app
from serving.schemas import ErrorEnvelope
from serving.settings import Settings

WAV = {"Content-Type": "audio/wav"}
JSON = {"Content-Type": "application/json"}
FORM = {"Content-Type": "application/x-www-form-urlencoded"}
DISPOSITION = b"Content-Disposition: form-data; "


def audio(
    num_samples: int = 16_000, rate: int = 16_000, channels: int = 1, form: str = "WAV", value: float = 0.1
) -> bytes:
    file = io.BytesIO()
    subtype = "FLOAT" if form == "WAV" else None
    soundfile.write(file, np.full((num_samples, channels), value, np.float32), rate, format=form, subtype=subtype)
    return file.getvalue()


def check(answer: httpx.Response, status: int, code: str, *words: str) -> str:
    """The answer is the envelope, on one line, with these words; its message."""
    assert answer.status_code == status, answer.text
    assert answer.headers["Content-Type"] == "application/json"
    error = ErrorEnvelope.model_validate_json(answer.content).error
    assert error.code == code
    assert error.request_id == answer.headers["X-Request-ID"]
    assert "\n" not in error.message
    assert all(word in error.message for word in words), error.message
    return error.message


async def ready(client: httpx.AsyncClient) -> None:
    while (await client.get("/health/ready")).status_code != 200:  # pytest's timeout ends it
        await asyncio.sleep(0.01)


def form(*parts: bytes, boundary: str = "b") -> tuple[dict[str, str], bytes]:
    body = b"".join(b"--b\r\n" + part + b"\r\n" for part in parts) + b"--b--\r\n"
    return {"Content-Type": f"multipart/form-data; boundary={boundary}"}, body


@pytest.mark.parametrize(
    ("headers", "body", "status", "code", "words"),
    [
        (WAV, b"", 400, "bad_audio", ["audio: found no readable audio", "wanted WAV"]),
        (WAV, b"no audio at all", 400, "bad_audio", ["audio: found no readable audio"]),
        (WAV, audio(0), 400, "bad_audio", ["found 0 samples"]),
        (WAV, audio(399), 400, "bad_audio", ["audio: found", "399", "400"]),
        (WAV, audio(channels=192), 400, "bad_audio", ["found 192 channels", "32"]),
        (WAV, audio(rate=1_000_000), 400, "bad_audio", ["1000000 Hz", "384000 Hz"]),
        (WAV, audio(rate=1), 400, "bad_audio", ["found a rate of 1 Hz"]),
        (WAV, audio(value=np.nan), 400, "bad_audio", ["found NaN or infinite"]),
        (WAV, audio(value=-np.inf), 400, "bad_audio", ["found NaN or infinite"]),
        (WAV, audio(channels=2, value=3e38), 400, "bad_audio", ["found"]),
        (WAV, audio()[:20_000], 400, "bad_audio", ["cut off"]),
        (WAV, audio(form="FLAC")[:-9], 400, "bad_audio", ["audio: found"]),
        (WAV, audio(5 * 16_000 + 1), 413, "too_long", ["more than 5 s", "at most 5 s"]),
        (WAV, audio(3600 * 8_000, 8_000, form="FLAC"), 413, "too_long", ["more than 5 s"]),
        (JSON, b"", 400, "bad_json", ["found no JSON"]),
        (JSON, b'{"audio": ', 400, "bad_json", ["found no JSON"]),
        (JSON, b"[" * 100_000, 400, "bad_json", ["found no JSON"]),
        (JSON, b"[]", 422, "invalid_body", ["body: found []"]),
        (JSON, b"{}", 422, "invalid_body", ["body audio: found nothing"]),
        (JSON, b'{"audio": 1}', 422, "invalid_body", ["body audio: found 1", "string"]),
        (JSON, b'{"audio": "", "url": "http://a"}', 422, "invalid_body", ["body url", "unknown"]),
        (JSON, b'{"audio": "?!"}', 400, "bad_base64", ["found no base64"]),
        (JSON, '{"audio": "é"}'.encode(), 400, "bad_base64", ["found no base64"]),
        (JSON, b'{"audio": "\\ud800"}', 400, "bad_json", ["found no JSON"]),
        (JSON, b'{"audio": ""}', 400, "bad_audio", ["audio: found no readable audio"]),
        ({}, b"RIFF", 415, "unsupported_media_type", ["found ''", "wanted audio/*"]),
        ({"Content-Type": "text/html"}, b"RIFF", 415, "unsupported_media_type", ["found 'text/html'"]),
        (FORM, b"R", 415, "unsupported_media_type", ["audio/*"]),
        ({**WAV, "Content-Encoding": "gzip"}, audio(), 415, "unsupported_media_type", ["found 'gzip'"]),
        ({"Content-Type": "multipart/form-data"}, b"", 400, "bad_multipart", ["boundary"]),
        (*form(boundary="c"), 400, "bad_multipart", ["form: found it broken"]),
        (*form(b"no headers"), 400, "bad_multipart", ["form: found it broken"]),
        (*form(boundary="b; charset=idna"), 422, "invalid_body", ["form: found no file"]),
        (*form(DISPOSITION + b'name="layer"\r\n\r\n3'), 422, "invalid_body", ["'layer'", "text"]),
        (
            *form(DISPOSITION + b'name="f"; filename="a\xff.wav"\r\n\r\n' + audio(0)),
            400,
            "bad_audio",
            ["file 0 'aÿ.wav': found 0 samples"],
        ),
        (*form(*[DISPOSITION + b'name="f"; filename=""\r\n\r\n'] * 65), 400, "bad_multipart", ["64"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/units"])
def test_bodies(client, path, headers, body, status, code, words):
    check(client.post(path, content=body, headers=headers), status, code, *words)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/v1/embeddings?layer=4", ["query layer: found '4'", "wanted 0 to 3"]),
        ("/v1/embeddings?layer=-1", ["query layer: found '-1'", "wanted 0 to 3, published, last or weighted"]),
        ("/v1/embeddings?layer=%D9%A3", ["query layer: found '٣'"]),
        ("/v1/embeddings?layer=weighted&layer_weights=1,2", ["query layer_weights: found '1,2'", "wanted 4"]),
        ("/v1/embeddings?layer=weighted&layer_weights=1,2,nan,4", ["query layer_weights", "wanted 4 finite"]),
        ("/v1/embeddings?layer_weights=1,2,3,4", ["query layer_weights", "layer=weighted"]),
        ("/v1/embeddings?pooling=attentive", ["query pooling: found attentive", "none or mean"]),
        ("/v1/embeddings?pooling=mean&normalise=utterance", ["query normalise"]),
        ("/v1/units?start=nan", ["query start"]),
        ("/v1/units?start=2&end=1", ["query end: found 1", "start, which is 2"]),
        (f"/v1/embeddings?layer={'9' * 5000}", ["query layer: found"]),
        ("/v1/embeddings?pooling=max", ["query pooling: found 'max'", "'mean'"]),
        ("/v1/embeddings?pool=mean", ["query pool", "unknown option"]),
        ("/v1/units?layer=1", ["query layer", "unknown option"]),
        ("/v1/units?deduplicate=perhaps", ["query deduplicate: found 'perhaps'"]),
        ("/v1/units?deduplicate=%00%ff%0a", ["query deduplicate"]),
    ],
)
def test_options(client, path, words):
    check(client.post(path, content=audio(), headers=WAV), 422, "invalid_option", *words)


def test_a_stretch_beyond_the_end(client):
    answer = client.post("/v1/units?start=1.5", content=audio(), headers=WAV)
    check(answer, 422, "no_frames", "audio: found no frame from start to end")


def test_paths_and_methods(client):
    check(client.get("/nowhere"), 404, "not_found", "GET /nowhere:", "/openapi.json")
    check(client.post("/v1/units/"), 404, "not_found")
    check(client.get("/docs%0a%ff"), 404, "not_found")
    answer = client.get("/v1/units")
    check(answer, 405, "method_not_allowed", "GET /v1/units", "wanted POST")
    assert answer.headers["Allow"] == "POST"
    check(client.delete("/metrics"), 405, "method_not_allowed")


def test_a_request_of_too_much_audio_is_told_so(client):
    files = [("f", (f"{i}.flac", audio(5 * 16_000, form="FLAC"))) for i in range(5)]
    message = check(client.post("/v1/units", files=files), 413, "too_long", "'4.flac'")
    assert "at most 0 s" in message
    assert client.post("/v1/units", files=files[:4]).status_code == 200  # all the queue takes, and no more


def test_the_name_of_a_bad_file_is_told(client):
    files = [("f", ("good.wav", audio())), ("f", ("short.wav", audio(9)))]
    check(client.post("/v1/units", files=files), 400, "bad_audio", "file 1 'short.wav': found shape (9,)")


def test_headers_that_claim_ten_hours_are_not_believed(client):
    flac = bytearray(audio(form="FLAC"))
    num_samples = 10 * 3600 * 16_000
    rate_and_size = int.from_bytes(flac[18:26], "big") & ~(2**36 - 1) | num_samples
    flac[18:26] = rate_and_size.to_bytes(8, "big")
    answer = client.post("/v1/units", content=bytes(flac), headers=WAV)
    check(answer, 400, "bad_audio", "found 16000 samples of 576000000")

    wav = bytearray(audio())
    at = wav.index(b"data") + 4
    wav[at : at + 4] = struct.pack("<I", 0xFFFF_FFFF)  # as a recorder that streams writes it
    answer = client.post("/v1/units", content=bytes(wav), headers=WAV)
    assert answer.json()["results"][0]["seconds"] == 1


def test_a_body_is_refused_before_it_is_read(speech):
    app = create_app(Settings(max_body_bytes=10_000), {"tiny": speech})
    sent = 0

    async def chunks():
        nonlocal sent
        while sent < 1_000_000:
            sent += 1_000
            yield bytes(1_000)

    async def run() -> None:
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client,
        ):
            await ready(client)
            for media in ("audio/wav", "application/json", "multipart/form-data; boundary=b"):
                nonlocal sent
                sent = 0
                answer = await client.post("/v1/units", content=chunks(), headers={"Content-Type": media})
                if "multipart" not in media:  # zeros are no form: that is found first
                    check(answer, 413, "too_large", "more than 10000 bytes")
                assert sent <= 12_000
            sent = 0
            claimed = {"Content-Length": "1000000", **WAV}
            check(await client.post("/v1/units", content=chunks(), headers=claimed), 413, "too_large")
            assert sent == 0

    asyncio.run(run())


def test_bodies_in_hand_are_bounded_together(speech):
    """Of two requests that are each small enough, the one that goes over the common bound must wait."""
    app = create_app(Settings(max_body_bytes=10_000, max_buffered_bytes=12_000), {"tiny": speech})
    body = audio(2_000)[:8_000]

    async def run() -> None:
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client,
        ):
            await ready(client)
            half, rest = asyncio.Event(), asyncio.Event()

            async def slowly():
                yield body[:7_000]
                half.set()
                await rest.wait()
                yield body[7_000:]

            slow = asyncio.create_task(client.post("/v1/units", content=slowly(), headers=WAV))
            await half.wait()
            answer = await client.post("/v1/units", content=body, headers=WAV)
            check(answer, 429, "overloaded", "wanted at most 12000")
            assert answer.headers["Retry-After"] == "1"
            rest.set()
            assert (await slow).status_code in (200, 400)
            assert (await client.post("/v1/units", content=audio(1_000), headers=WAV)).status_code == 200

    asyncio.run(run())


def test_audio_that_is_decoded_and_not_yet_answered_is_bounded(speech, monkeypatch):
    """Small files can be long audio: what all requests together have made of theirs has an end too."""
    monkeypatch.setattr("serving.routes.intake.HELD_QUEUES", 0.1)
    app = create_app(Settings(max_file_seconds=5, max_queue_seconds=20), {"tiny": speech})

    async def run() -> None:
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client,
        ):
            await ready(client)
            speech.may_run.clear()
            body = audio(5 * 16_000, form="FLAC")
            first = asyncio.create_task(client.post("/v1/units", content=body, headers=WAV))
            while app.state.service.engine.batcher.seconds < 5:
                await asyncio.sleep(0.01)
            message = check(
                await client.post("/v1/units", content=body, headers=WAV), 429, "overloaded", "5 s of audio"
            )
            assert "decoded and in hand" in message
            speech.may_run.set()
            assert (await first).status_code == 200
            assert (await client.post("/v1/units", content=body, headers=WAV)).status_code == 200

    asyncio.run(run())


def test_a_full_queue_answers_429_and_a_closing_one_503(app, speech):
    """16 of 20 s wait: 5 s more are too much, 4 s are taken; what was taken is answered while draining."""

    async def run() -> None:
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client,
        ):

            def post(seconds: int) -> asyncio.Task[httpx.Response]:
                return asyncio.create_task(client.post("/v1/units", content=audio(16_000 * seconds), headers=WAV))

            await ready(client)
            speech.may_run.clear()
            waiting = [post(4) for _ in range(4)]
            service = app.state.service
            batcher = service.engine.batcher
            while batcher.seconds < 16:
                await asyncio.sleep(0.01)
            refused = await post(5)
            check(refused, 429, "overloaded", "16.0 s of audio in hand and 5.0 s offered", "at most 20 s")
            assert 1 <= int(refused.headers["Retry-After"]) <= 60
            waiting.append(post(4))
            while batcher.seconds < 20:
                await asyncio.sleep(0.01)
            service.drain()
            late = await post(1)
            check(late, 503, "draining")
            assert "Retry-After" in late.headers
            check(await client.get("/health/ready"), 503, "draining")
            speech.may_run.set()
            assert [answer.status_code for answer in await asyncio.gather(*waiting)] == [200] * 5

    asyncio.run(run())


BODIES = {
    form: audio(2_000, form=form)
    for form in ("WAV", "FLAC", "OGG", "AIFF", "W64", "CAF", "AU", "MP3")
    if form in soundfile.available_formats()
}


@settings(max_examples=200, deadline=None)
@given(
    form=st.sampled_from(sorted(BODIES)),
    cut=st.integers(0, 4_000),
    damage=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6),
)
def test_damaged_audio_makes_no_500(patient_client, form, cut, damage):
    body = bytearray(BODIES[form])
    for place, value in damage:
        body[place % len(body)] = value
    answer = patient_client.post("/v1/embeddings", content=bytes(body[: len(body) - cut]), headers=WAV)
    assert answer.status_code in (200, 400, 413), answer.text
    if answer.status_code != 200:
        ErrorEnvelope.model_validate_json(answer.content)


@settings(max_examples=60, deadline=None)
@given(body=st.binary(max_size=200), boundary=st.sampled_from(["b", '"', "b; charset=punycode", "\x7f"]))
def test_damaged_forms_make_no_500(patient_client, body, boundary):
    headers, whole = form(DISPOSITION + b'name="f"; filename="a"\r\n\r\n' + body, boundary=boundary)
    for sent in (whole, body, whole[:-5] + body):
        answer = patient_client.post("/v1/units", content=sent, headers=headers)
        assert answer.status_code in (400, 422), answer.text


@settings(max_examples=60, deadline=None)
@given(
    value=st.recursive(
        st.none() | st.text() | st.floats(),
        lambda inner: st.dictionaries(st.sampled_from(["audio", "a"]), inner),
    )
)
def test_odd_json_makes_no_500(patient_client, value):
    answer = patient_client.post("/v1/units", content=json.dumps(value).encode(), headers=JSON)
    assert answer.status_code in (400, 422), answer.text


def test_base64_with_line_breaks_is_refused_by_name(client):
    body = base64.encodebytes(audio()).decode()
    check(client.post("/v1/units", json={"audio": body}), 400, "bad_base64", "found no base64")
