"""Speech in, ranked images out: what `Speech.search` finds, its refusals, small pictures, a new model's images."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from serving.app import create_app
from serving.settings import Settings
from sonorant.client import Client, FoundImage, ServiceError
from sonorant.inference import load, read_wave
from tests.serving.conftest import COLOURS, Encode, FakeSpeech, Wave, jpeg, publish, ready_client, serving

ROUTE = "/v1/images/search"


@pytest.fixture
def body(encode: Encode, wave: Wave) -> bytes:
    return encode(wave)


def test_images_come_ranked(client: TestClient, speech: FakeSpeech, body: bytes) -> None:
    answer = client.post(ROUTE, content=body, headers={"Content-Type": "audio/wav"})
    assert answer.status_code == 200
    found = answer.json()
    [result] = found.pop("results")
    assert found == {"model": "tiny", "digest": "0" * 8, "num_images": 5}
    assert result["name"] is None
    assert result["seconds"] == 1.5
    [query] = speech.query([read_wave(io.BytesIO(body))])
    scores = speech.gallery.vectors(range(5)) @ query
    order = np.argsort(-scores)
    assert [image["id"] for image in result["images"]] == [f"{COLOURS[row]}.png" for row in order]
    # Four products in float32.
    np.testing.assert_allclose([image["score"] for image in result["images"]], scores[order], rtol=1e-5)
    assert [image["rank"] for image in result["images"]] == [1, 2, 3, 4, 5]
    assert all(image["thumbnail"] is None for image in result["images"])
    assert result["images"][0]["texts"] == [f"a {COLOURS[order[0]]} thing"]


def test_as_many_as_asked_for(client: TestClient, body: bytes) -> None:
    for top, count in ((1, 1), (3, 3), (100, 5)):
        [result] = client.post(ROUTE, params={"top": top}, files={"file": ("a.wav", body)}).json()["results"]
        assert len(result["images"]) == count
        assert result["name"] == "a.wav"


def test_small_pictures_come_where_they_are_asked_for_and_there(client: TestClient, body: bytes) -> None:
    answer = client.post(ROUTE, params={"thumbnails": True}, files={"file": ("a.wav", body)})
    for image in answer.json()["results"][0]["images"]:
        colour = image["id"].removesuffix(".png")
        if colour == COLOURS[-1]:
            assert image["thumbnail"] is None
            continue
        kind, _, content = image["thumbnail"].partition(",")
        assert kind == "data:image/jpeg;base64"
        assert base64.b64decode(content) == jpeg(colour)
        assert Image.open(io.BytesIO(base64.b64decode(content))).size == (48, 32)


def test_line_by_line_a_bad_file_spoils_no_other(client: TestClient, body: bytes) -> None:
    files = [("file", ("a.wav", body)), ("file", ("b.wav", b"noise")), ("file", ("c.wav", body))]
    answer = client.post(ROUTE, files=files, headers={"Accept": "application/x-ndjson"})
    first, second, third = map(json.loads, answer.text.splitlines())
    assert first["images"] == third["images"]
    assert (first["index"], first["num_images"]) == (0, 5)
    assert second["error"]["code"] == "bad_audio"


@pytest.mark.parametrize("media", ["application/x-npy", "application/safetensors", "text/html"])
def test_images_are_no_array(client: TestClient, body: bytes, media: str) -> None:
    answer = client.post(ROUTE, content=body, headers={"Content-Type": "audio/wav", "Accept": media})
    assert answer.status_code == 406
    assert "wanted one of application/json, application/x-ndjson" in answer.json()["error"]["message"]


@pytest.mark.parametrize("query", [{"top": 0}, {"top": 101}, {"top": "many"}, {"start": 0}, {"thumbnails": "two"}])
def test_options_out_of_range_are_refused(client: TestClient, body: bytes, query: dict[str, object]) -> None:
    answer = client.post(ROUTE, params=query, content=body, headers={"Content-Type": "audio/wav"})
    assert answer.status_code == 422
    assert answer.json()["error"]["code"] == "invalid_option"
    assert f"query {next(iter(query))}" in answer.json()["error"]["message"]


def test_a_long_recording_is_not_cut_behind_the_clients_back(encode: Encode, wave: Wave, body: bytes) -> None:
    with ready_client(create_app(Settings(max_search_seconds=2), {"tiny": FakeSpeech()})) as client:
        long = client.post(ROUTE, content=encode(np.tile(wave, 2)), headers={"Content-Type": "audio/wav"})
        assert long.status_code == 413
        assert long.json()["error"]["code"] == "too_long"
        assert long.json()["error"]["message"] == "audio: found more than 2 s, wanted at most 2 s: cut it"
        assert client.post(ROUTE, content=body, headers={"Content-Type": "audio/wav"}).status_code == 200


def test_beyond_the_length_of_a_window_it_is_still_one_utterance(
    speech: FakeSpeech, encode: Encode, wave: Wave
) -> None:
    """35 s, which /v1/embeddings would hear in two windows."""
    long = np.tile(wave, 24)
    with ready_client(create_app(Settings(max_search_seconds=60), {"tiny": speech})) as client:
        answer = client.post(ROUTE, content=encode(long), headers={"Content-Type": "audio/wav"})
    [found] = speech.gallery.find(speech.query([read_wave(io.BytesIO(encode(long)))]), 10)
    assert [image["score"] for image in answer.json()["results"][0]["images"]] == [image.score for image in found]


@pytest.mark.parametrize("lacks", ["grounding", "images"])
def test_a_model_that_finds_nothing_says_so(lacks: str, body: bytes) -> None:
    speech = FakeSpeech()
    speech.gallery = None
    if lacks == "grounding":
        speech.grounder = None
    with ready_client(create_app(Settings(), {"tiny": speech})) as client:
        answer = client.post(ROUTE, content=body, headers={"Content-Type": "audio/wav"})
        [about] = client.get("/v1/models").json()["models"]
    assert answer.status_code == 422
    assert answer.json()["error"]["code"] == "not_grounded"
    assert (about["grounded"], about["num_images"]) == (lacks == "images", 0)


def test_a_query_that_is_not_finite_is_the_audios_fault(client: TestClient, speech: FakeSpeech, body: bytes) -> None:
    speech.query = lambda waves: np.full((len(waves), 4), np.nan, np.float32)
    answer = client.post(ROUTE, content=body, headers={"Content-Type": "audio/wav"})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "bad_audio"


def test_the_client_finds_the_same(client: TestClient, body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    route = {"params": {"top": 4, "thumbnails": True}, "content": body, "headers": {"Content-Type": "audio/wav"}}
    expected = client.post(ROUTE, **route).json()["results"][0]["images"]
    with serving(create_app(Settings(), {"tiny": FakeSpeech()})) as address, Client(f"http://{address}") as ours:
        found = ours.search(body, top=4, thumbnails=True, model="tiny")
        assert [(image.id, image.rank, image.score) for image in found] == [
            (image["id"], image["rank"], image["score"]) for image in expected
        ]
        assert [image.texts for image in found] == [tuple(image["texts"]) for image in expected]
        small = {image.id.removesuffix(".png"): image.thumbnail for image in found}
        assert all(small[colour] == (None if colour == COLOURS[-1] else jpeg(colour)) for colour in small)
        [best] = ours.search(body, top=1)
        assert best == FoundImage(found[0].id, 1, found[0].score, found[0].texts, None)
        with pytest.raises(ServiceError, match="query top: found '101'") as told:
            ours.search(body, top=101)
        assert told.value.code == "invalid_option"
        strange = [b"{}", b"[]", b'{"results": []}', b'{"results": [{"images": [{"id": 1}]}]}', b"\xff"]
        strange.append(
            json.dumps({"results": [{"images": [{**expected[0], "thumbnail": "data:image/png,%%"}]}]}).encode()
        )
        for content in strange:
            monkeypatch.setattr(ours, "_request", lambda *_, content=content: content)
            with pytest.raises(ServiceError, match="found an answer of something else, wanted images with scores"):
                ours.search(body)


# ------------------------------------------------------------------------------------------------- a real model


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish(tmp_path_factory.mktemp("grounded") / "model", num_images=30)


@pytest.fixture
def served(real: Path, tmp_path: Path) -> Iterator[tuple[TestClient, Path]]:
    """The model in worker processes, from a folder that may change."""
    folder = tmp_path / "model"
    shutil.copytree(real, folder)
    with ready_client(create_app(Settings(model={"tiny": folder}, num_workers=1, watch_seconds=0.1))) as client:
        yield client, folder


def test_what_is_served_is_what_speech_finds(served: tuple[TestClient, Path], encode: Encode, wave: Wave) -> None:
    """In a process of its own, several files at once; then the images of the model that takes its place."""
    client, folder = served
    bodies = [encode(wave[: 8_000 * (1 + place)]) for place in range(3)]

    def ask() -> list[list[tuple[str, float]]]:
        answer = client.post(ROUTE, params={"top": 7}, files=[("file", ("a.wav", body)) for body in bodies])
        assert answer.status_code == 200, answer.text
        return [[(image["id"], image["score"]) for image in file["images"]] for file in answer.json()["results"]]

    def expected() -> list[list[tuple[str, float]]]:
        found = load(folder).search([read_wave(io.BytesIO(body)) for body in bodies], top=7)
        return [[(image.picture.id, image.score) for image in images] for images in found]

    assert client.get("/v1/models").json()["models"][0]["num_images"] == 30
    first = ask()
    compare(first, expected())
    other = publish(folder.with_name("other"), seed=1, num_images=12)
    for path in other.iterdir():
        path.replace(folder / path.name)
    while client.get("/v1/models").json()["models"][0]["num_images"] != 12:  # pytest's timeout ends it
        pass
    compare(ask(), expected())
    assert first != ask()


def compare(found: list[list[tuple[str, float]]], expected: list[list[tuple[str, float]]]) -> None:
    assert [[name for name, _ in file] for file in found] == [[name for name, _ in file] for file in expected]
    for ours, theirs in zip(found, expected, strict=True):
        # Another batch may sum in another order; scores are of size one.
        np.testing.assert_allclose([score for _, score in ours], [score for _, score in theirs], atol=1e-4)
