"""The ways to ask, and the ways an answer is written."""

from __future__ import annotations

import io
import json

import httpx
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from serving.app import create_app
from serving.routes.answers import json_array, merged, npy
from serving.schemas import Embeddings, ErrorEnvelope
from serving.settings import Settings
from sonorant.inference import read_wave
from tests.serving.conftest import serving

WAV = {"Content-Type": "audio/wav"}
SAFETENSORS, NDJSON, NPY = "application/safetensors", "application/x-ndjson", "application/x-npy"


@pytest.fixture
def frames(speech, wave, encode):
    """The published layer's frames of the file that is sent, (T, D)."""
    return speech.embed([read_wave(io.BytesIO(encode(wave)))])[0]


def embedding(client, body: bytes, query: str = "") -> np.ndarray:
    answer = client.post(f"/v1/embeddings?{query}", content=body, headers=WAV)
    assert answer.status_code == 200, answer.text
    Embeddings.model_validate_json(answer.content, strict=True)
    return np.array(answer.json()["results"][0]["embedding"], np.float32)


@pytest.mark.parametrize(("layer", "size"), [("published", 3), ("last", 4), ("0", 1), ("2", 3)])
def test_layers_by_name_and_index(client, wave, encode, frames, layer, size):
    # The fake one's layer l is its layer 0 times 1 + l.
    np.testing.assert_allclose(embedding(client, encode(wave), f"layer={layer}"), frames / 3 * size, rtol=1e-6)


def test_weighted_layers(client, wave, encode, frames):
    body = encode(wave)
    # Sums of float32: the last digit.
    np.testing.assert_allclose(embedding(client, body, "layer=weighted"), frames / 3 * 2.5, rtol=1e-6)
    query = "layer=weighted&layer_weights=0.5,0,-1,2e-1"
    np.testing.assert_allclose(embedding(client, body, query), frames / 3 * (0.5 - 3 + 0.8), rtol=1e-6)
    answer = client.post(f"/v1/embeddings?{query}", content=body, headers=WAV).json()
    assert answer["layer"] == [0.5, 0, -1, 0.2]


def test_normalised(client, wave, encode, frames):
    body = encode(wave)
    found = embedding(client, body, "normalise=l2")
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(found * np.linalg.norm(frames, axis=1, keepdims=True), frames, rtol=1e-5, atol=1e-7)
    found = embedding(client, body, "normalise=l2&pooling=mean")
    np.testing.assert_allclose(found, frames.mean(0) / np.linalg.norm(frames.mean(0)), rtol=1e-5)
    found = embedding(client, body, "normalise=utterance")
    expected = (frames - frames.mean(0)) / np.sqrt(frames.var(0) + 1e-5)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


def test_silence_has_no_direction_and_makes_no_nan(client, encode):
    found = embedding(client, encode(np.zeros(8_000, np.float32)), "normalise=l2")
    assert np.array_equal(found, np.zeros_like(found))


def test_a_stretch_of_the_file(client, wave, encode, frames):
    """Frames whose centre lies in [0.5 s, 0.6 s): centres are at 12.5 ms and every 20 ms from there."""
    answer = client.post("/v1/embeddings?start=0.5&end=0.6", content=encode(wave), headers=WAV).json()["results"][0]
    assert (answer["start_ms"], answer["num_frames"]) == (500, 5)
    assert np.array_equal(np.array(answer["embedding"], np.float32), frames[25:30])
    units = client.post("/v1/units?start=0.5&end=0.6", content=encode(wave), headers=WAV).json()["results"][0]
    whole = client.post("/v1/units", content=encode(wave), headers=WAV).json()["results"][0]
    assert units["units"] == whole["units"][25:30]


def test_npy(client, wave, encode, frames):
    answer = client.post("/v1/embeddings", content=encode(wave), headers={**WAV, "Accept": NPY})
    assert answer.headers["Content-Type"] == NPY
    assert np.array_equal(np.load(io.BytesIO(answer.content), allow_pickle=False), frames)
    answer = client.post("/v1/units", content=encode(wave), headers={**WAV, "Accept": NPY})
    assert np.load(io.BytesIO(answer.content), allow_pickle=False).dtype == np.int64
    files = [("f", ("a.wav", encode(wave)))] * 2
    answer = client.post("/v1/units", files=files, headers={"Accept": NPY})
    assert answer.status_code == 406
    assert "2 files, wanted one" in ErrorEnvelope.model_validate_json(answer.content).error.message


def test_safetensors(client, speech, wave, encode, frames):
    files = [("f", ("a.wav", encode(wave))), ("f", ("b.wav", encode(wave[:8_000])))]
    answer = client.post("/v1/embeddings", files=files, headers={"Accept": SAFETENSORS})
    assert answer.headers["Content-Type"] == SAFETENSORS
    found = safetensors.numpy.load(answer.content)
    assert found.keys() == {"embedding.0", "embedding.1"}
    assert np.array_equal(found["embedding.0"], frames)
    assert np.array_equal(found["embedding.1"], speech.embed([read_wave(io.BytesIO(files[1][1][1]))])[0])
    length = int.from_bytes(answer.content[:8], "little")
    about = json.loads(answer.content[8 : 8 + length])["__metadata__"]
    assert [file["name"] for file in json.loads(about["files"])] == ["a.wav", "b.wav"]
    assert json.loads(about["head"])["model"] == "tiny"
    answer = client.post("/v1/units?deduplicate=true", files=files, headers={"Accept": SAFETENSORS})
    found = safetensors.numpy.load(answer.content)
    assert found.keys() == {"units.0", "durations_ms.0", "units.1", "durations_ms.1"}
    assert found["durations_ms.0"].sum() == 20 * len(frames)


def test_one_bad_file_does_not_fail_the_others(client, wave, encode):
    bad, short = b"no audio", encode(wave[:300])
    files = [("f", (f"{i}.wav", data)) for i, data in enumerate([encode(wave), bad, short, encode(wave[:8_000])])]
    answer = client.post("/v1/units", files=files, headers={"Accept": NDJSON})
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == NDJSON
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert [line["index"] for line in lines] == [0, 1, 2, 3]
    assert [line["name"] for line in lines] == ["0.wav", "1.wav", "2.wav", "3.wav"]
    assert [line.get("num_frames") for line in lines] == [74, None, None, 24]
    assert [line["error"]["code"] for line in lines if "error" in line] == ["bad_audio", "bad_audio"]
    assert lines[1]["error"]["message"].startswith("file 1 '1.wav': found no readable audio")
    assert lines[1]["error"]["request_id"] == answer.headers["X-Request-ID"]
    alone = client.post("/v1/units", content=encode(wave), headers=WAV).json()["results"][0]
    assert lines[0]["units"] == alone["units"]
    assert client.post("/v1/units", files=files).status_code == 400  # as one answer it is all or nothing


def test_lines_come_as_they_are_done(speech, wave, encode):
    """The first file's line is there while the model stands still before the second file."""
    files = [("f", ("short.wav", encode(wave[:8_000]))), ("f", ("long.wav", encode(wave)))]
    embed = speech.embed

    def embed_then_stand_still(*arguments):
        found = embed(*arguments)
        speech.may_run.clear()
        return found

    app = create_app(Settings(max_batch_seconds=1), {"tiny": speech})
    with serving(app) as address:
        speech.embed = embed_then_stand_still
        with httpx.stream(
            "POST", f"http://{address}/v1/units", files=files, headers={"Accept": NDJSON}, timeout=30
        ) as answer:
            lines = answer.iter_lines()
            assert json.loads(next(lines))["name"] == "short.wav"
            assert not speech.may_run.is_set()
            speech.may_run.set()
            assert json.loads(next(lines))["name"] == "long.wav"


@pytest.mark.parametrize(
    ("accept", "media"),
    [
        ("", "application/json"),
        ("*/*", "application/json"),
        ("text/html, */*;q=0.1", "application/json"),
        ("application/x-npy;q=0.5, application/safetensors", SAFETENSORS),
        ("Application/X-NPY", NPY),
        ("application/safetensors;q=0, application/json;q=0.2", "application/json"),
        ("application/json;q=x, application/x-npy", NPY),
    ],
)
def test_accept(client, wave, encode, accept, media):
    answer = client.post("/v1/units", content=encode(wave), headers={**WAV, "Accept": accept})
    assert answer.status_code == 200, answer.text
    assert answer.headers["Content-Type"] == media


def test_what_cannot_be_answered_with_is_refused_before_the_work(client, speech, wave, encode):
    before = len(speech.batches)
    answer = client.post("/v1/units", content=encode(wave), headers={**WAV, "Accept": "text/html"})
    assert answer.status_code == 406
    message = ErrorEnvelope.model_validate_json(answer.content).error.message
    assert "found 'text/html', wanted one of application/json" in message
    assert len(speech.batches) == before


@settings(deadline=None, max_examples=50)
@given(
    arrays.arrays(np.float32, arrays.array_shapes(max_dims=2, max_side=700), elements=st.floats(-1e6, 1e6, width=32))
)
def test_json_in_pieces_is_json(array):
    text = b"".join(merged(json_array(array)))
    assert np.array_equal(np.array(json.loads(text), np.float32).reshape(array.shape), array)
    assert np.array_equal(np.load(io.BytesIO(b"".join(npy(array)))), array)


def test_long_answers_are_never_one_piece():
    pieces = list(merged(json_array(np.random.default_rng(0).normal(size=(9_000, 64)).astype(np.float32))))
    assert max(map(len, pieces)) < 1_000_000
    assert sum(map(len, pieces)) > 5_000_000


def test_empty_arrays_are_written_too():
    assert json.loads(b"".join(json_array(np.zeros(0, np.int64)))) == []
    assert np.load(io.BytesIO(b"".join(npy(np.zeros((0, 4), np.float32))))).shape == (0, 4)
