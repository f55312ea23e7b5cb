"""The routes, by what they answer."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from serving.app import create_app
from serving.schemas import Embeddings, Models, Units
from serving.settings import Settings
from sonorant.inference import read_wave


def post(client: TestClient, path: str, body: bytes, media: str = "audio/wav") -> dict[str, Any]:
    answer = client.post(path, content=body, headers={"Content-Type": media})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_embeddings_are_the_models(client, speech, wave, encode):
    body = encode(wave)
    answer = post(client, "/v1/embeddings", body)
    Embeddings.model_validate(answer, strict=True)
    [frames] = speech.embed([read_wave(io.BytesIO(body))])
    [result] = answer["results"]
    # Exact: a float32 goes through JSON as a float64 and comes back whole.
    assert np.array_equal(np.array(result["embedding"], np.float32), frames)
    assert (answer["model"], answer["layer"], answer["dim"], answer["frame_ms"]) == ("tiny", 2, 4, 20)
    assert (result["seconds"], result["num_frames"], result["name"]) == (1.5, len(frames), None)


def test_layer_and_pooling(client, speech, wave, encode):
    body = encode(wave)
    [frames] = speech.embed([read_wave(io.BytesIO(body))], layer=0)
    answer = post(client, "/v1/embeddings?layer=0&pooling=mean", body)
    Embeddings.model_validate(answer, strict=True)
    assert answer["layer"] == 0
    assert answer["pooling"] == "mean"
    assert np.array_equal(np.array(answer["results"][0]["embedding"], np.float32), frames.mean(axis=0))
    assert answer["results"][0]["num_frames"] == len(frames)


def test_units_raw_and_deduplicated(client, speech, wave, encode):
    body = encode(wave)
    [units] = speech.units([read_wave(io.BytesIO(body))])
    raw, short = post(client, "/v1/units", body), post(client, "/v1/units?deduplicate=true", body)
    for answer in (raw, short):
        Units.model_validate(answer, strict=True)
    assert raw["results"][0]["units"] == units.tolist()
    assert raw["results"][0]["durations_ms"] is None
    [result] = short["results"]
    assert len(result["units"]) < len(units)
    assert all(a != b for a, b in zip(result["units"], result["units"][1:], strict=False))
    assert np.repeat(result["units"], np.array(result["durations_ms"]) // 20).tolist() == units.tolist()


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/units"])
def test_every_way_to_send_audio_gives_the_same(client, wave, encode, path):
    body = encode(wave)
    raw = post(client, path, body, "audio/wav")
    assert post(client, path, body, "application/octet-stream") == raw
    assert post(client, path, body, "Audio/X-Wav; rate=16000") == raw
    encoded = client.post(path, json={"audio": base64.b64encode(body).decode()})
    assert encoded.json() == raw
    form = client.post(path, files={"anything": ("a.wav", body)}).json()
    assert form["results"][0].pop("name") == "a.wav"
    raw["results"][0].pop("name")
    assert form == raw


def test_many_files_keep_their_order(client, speech, wave, encode):
    lengths = [24_000, 400, 9_999, 16_000]
    files = [("file", (f"{n}.flac", encode(wave[:n], format="FLAC"))) for n in lengths]
    answer = client.post("/v1/units", files=files).json()
    Units.model_validate(answer, strict=True)
    assert [result["name"] for result in answer["results"]] == [f"{n}.flac" for n in lengths]
    assert [result["num_frames"] for result in answer["results"]] == [74, 1, 30, 49]
    for result, (_, (_, data)) in zip(answer["results"], files, strict=True):
        assert result["units"] == speech.units([read_wave(io.BytesIO(data))])[0].tolist()


def test_any_rate_and_channel_count(client, speech, wave, encode):
    body = encode(np.stack([wave, -0.5 * wave], axis=1), 44_100, "FLAC", "PCM_24")
    [units] = speech.units([read_wave(io.BytesIO(body))])
    assert post(client, "/v1/units", body, "audio/flac")["results"][0]["units"] == units.tolist()


def test_models_tell_what_is_loaded(client, speech):
    answer = client.get("/v1/models").json()
    Models.model_validate(answer, strict=True)
    [model] = answer["models"]
    assert model["provenance"] == speech.about["provenance"]
    assert [model[key] for key in ("id", "layer", "num_layers", "dim", "num_units")] == ["tiny", 2, 3, 4, 10]


def test_ready_only_after_the_warm_up(app, speech):
    speech.may_run.clear()
    with TestClient(app) as client:
        assert client.get("/health/live").json() == {"status": "live"}
        early = client.get("/health/ready")
        assert early.status_code == 503
        assert early.json()["error"]["code"] == "not_ready"
        assert early.headers["Retry-After"] == "1"
        speech.may_run.set()
        while client.get("/health/ready").status_code != 200:  # pytest's timeout ends it
            pass
        assert speech.batches


def test_never_ready_where_the_model_fails(app, speech, monkeypatch):
    monkeypatch.setattr(speech, "_frames", lambda _: np.full((9, 4), np.nan, np.float32))
    with TestClient(app) as client:
        while not app.state.service.failure:  # pytest's timeout ends it
            assert client.get("/health/ready").status_code == 503
    assert "not finite" in app.state.service.failure


def test_a_fault_of_ours_is_called_one(client, speech, monkeypatch, wave, encode):
    monkeypatch.setattr(speech, "_frames", None)
    answer = client.post("/v1/units", content=encode(wave), headers={"Content-Type": "audio/wav"})
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal"
    monkeypatch.undo()
    post(client, "/v1/units", encode(wave))


def samples(client: TestClient) -> dict[str, float]:
    lines = [line for line in client.get("/metrics").text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_metrics_count_what_happened(client, wave, encode):
    post(client, "/v1/units", encode(wave))
    client.post("/v1/units", content=b"no audio", headers={"Content-Type": "audio/wav"})
    client.get("/nowhere/42")
    found = samples(client)
    assert found['sonorant_requests_total{route="/v1/units",status="200"}'] == 1
    assert found['sonorant_requests_total{route="/v1/units",status="400"}'] == 1
    assert found['sonorant_requests_total{route="unmatched",status="404"}'] == 1
    assert found['sonorant_request_seconds_count{route="/v1/units"}'] == 2
    assert found['sonorant_audio_seconds_total{route="/v1/units"}'] == 1.5
    assert found["sonorant_batch_size_count"] == 1
    assert found["sonorant_queue_depth"] == found["sonorant_queue_audio_seconds"] == 0


def test_two_apps_count_apart(client, speech, wave, encode):
    post(client, "/v1/units", encode(wave))
    with TestClient(create_app(Settings(), {"tiny": speech})) as other:
        assert 'sonorant_requests_total{route="/v1/units",status="200"}' not in samples(other)


def test_request_ids(client):
    assert client.get("/health/live", headers={"X-Request-ID": "job-7.a"}).headers["X-Request-ID"] == "job-7.a"
    made = [
        client.get("/health/live", headers={"X-Request-ID": bad}).headers["X-Request-ID"]
        for bad in ("", "a b", "x" * 65)
    ]
    assert len(set(made)) == 3
    assert all(len(i) == 32 for i in made)
