"""The Open Inference Protocol, by Triton's own client and by hand."""

from __future__ import annotations

import base64
import gzip
import json
import zlib
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.utils import InferenceServerException

from serving.app import create_app
from serving.schemas import Refusal
from serving.settings import Settings
from tests.serving.conftest import FakeSpeech, serving

INFER = "/v2/models/tiny/infer"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of a server of the small model, in a thread."""
    app = create_app(Settings(max_file_seconds=5), {"tiny": FakeSpeech()})
    with serving(app) as address:
        yield address


@pytest.fixture
def client_of(address: str) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(address) as client:
        yield client


def tensor(name: str, datatype: str, values: np.ndarray[Any, Any], binary: bool = True) -> triton.InferInput:
    made = triton.InferInput(name, list(values.shape), datatype)
    made.set_data_from_numpy(values, binary_data=binary)
    return made


def as_v1(address: str, path: str, body: bytes) -> Any:
    answer = httpx.post(f"http://{address}/v1/{path}", content=body, headers={"Content-Type": "audio/wav"})
    return answer.json()["results"][0]


# ------------------------------------------------------------------------------------------------- Triton's client


def test_metadata(client_of):
    assert client_of.is_server_live()
    assert client_of.is_server_ready()
    assert client_of.is_model_ready("tiny")
    assert client_of.is_model_ready("tiny", "1")
    assert not client_of.is_model_ready("tiny", "2")
    assert not client_of.is_model_ready("huge")
    assert "binary_tensor_data" in client_of.get_server_metadata()["extensions"]
    found = client_of.get_model_metadata("tiny")
    assert found == client_of.get_model_metadata("tiny", "1")
    assert [(t["name"], t["datatype"], t["shape"]) for t in found["outputs"]] == [
        ("embeddings", "FP32", [-1, -1, 4]),
        ("units", "INT64", [-1, -1]),
        ("num_frames", "INT64", [-1]),
    ]
    assert {t["name"] for t in found["inputs"]} == {"audio", "num_samples", "file"}
    assert client_of.get_model_config("tiny")["input"][0]["data_type"] == "TYPE_FP32"
    assert client_of.get_model_repository_index() == [{"name": "tiny", "version": "1", "state": "READY", "reason": ""}]


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("datatype", ["FP32", "FP64"])
def test_inference_is_that_of_v1(client_of, address, wave, encode, binary, datatype):
    """Exactly: the samples are the same, the pass is the same, and JSON keeps every digit."""
    rows = np.zeros((2, len(wave)), np.float32)
    rows[0], rows[1, :9_999] = wave, wave[:9_999]
    rows[1, 9_999:] = 7  # is not heard
    inputs = [
        tensor("audio", datatype, rows.astype({"FP32": np.float32, "FP64": np.float64}[datatype]), binary),
        tensor("num_samples", "INT64", np.array([len(wave), 9_999]), binary),
    ]
    outputs = [triton.InferRequestedOutput(name, binary) for name in ("units", "num_frames", "embeddings")]
    found = client_of.infer("tiny", inputs, outputs=outputs, request_id="job 7")
    assert found.get_response()["id"] == "job 7"
    assert [output["name"] for output in found.get_response()["outputs"]] == ["units", "num_frames", "embeddings"]
    embeddings, units, counts = map(found.as_numpy, ("embeddings", "units", "num_frames"))
    assert embeddings.dtype == np.float32
    assert units.shape == embeddings.shape[:2] == (2, 74)
    assert counts.tolist() == [74, 30]
    for index, count in enumerate(counts):
        body = encode(rows[index, : (24_000, 9_999)[index]], subtype="FLOAT")
        expected = as_v1(address, "embeddings", body)["embedding"]
        assert np.array_equal(embeddings[index, :count], np.array(expected, np.float32))
        assert units[index, :count].tolist() == as_v1(address, "units", body)["units"]
        assert not embeddings[index, count:].any()
        assert (units[index, count:] == -1).all()


@pytest.mark.parametrize("algorithm", [None, "gzip", "deflate"])
def test_files_by_default_outputs_and_compressed(client_of, address, wave, encode, algorithm):
    bodies = [encode(wave, 44_100), encode(wave[:8_000], format="FLAC")]
    files = tensor("file", "BYTES", np.array(bodies, dtype=object))
    found = client_of.infer("tiny", [files], model_version="1", request_compression_algorithm=algorithm)
    assert found.as_numpy("num_frames").tolist() == [26, 24]
    for index, body in enumerate(bodies):
        units = as_v1(address, "units", body)["units"]
        assert found.as_numpy("units")[index, : len(units)].tolist() == units
    text = tensor("file", "BYTES", np.array([base64.b64encode(body) for body in bodies], dtype=object), binary=False)
    same = client_of.infer("tiny", [text])
    assert np.array_equal(same.as_numpy("embeddings"), found.as_numpy("embeddings"))


def test_options_are_those_of_v1(client_of, address, wave, encode):
    body = encode(wave, subtype="FLOAT")
    audio = tensor("audio", "FP32", wave)  # one row without its dimension
    found = client_of.infer("tiny", [audio], parameters={"layer": 0, "pooling": "mean", "normalise": "l2"})
    expected = as_v1(address, "embeddings?layer=0&pooling=mean&normalise=l2", body)["embedding"]
    assert np.array_equal(found.as_numpy("embeddings"), np.array([expected], np.float32))
    assert found.as_numpy("units") is None  # are the published layer's
    found = client_of.infer("tiny", [audio], parameters={"layer": "weighted", "layer_weights": "0,0.5,0,2"})
    expected = as_v1(address, "embeddings?layer=weighted&layer_weights=0,0.5,0,2", body)["embedding"]
    assert np.array_equal(found.as_numpy("embeddings")[0], np.array(expected, np.float32))
    assert client_of.infer("tiny", [audio], outputs=[triton.InferRequestedOutput("units")]).as_numpy("units").shape == (
        1,
        74,
    )


def test_errors_reach_tritons_user(client_of, wave):
    with pytest.raises(InferenceServerException, match=r"^\[404\] model: found 'huge', wanted one of tiny$"):
        client_of.get_model_metadata("huge")
    with pytest.raises(InferenceServerException, match=r"^\[404\] version of tiny: found '9', wanted 1$"):
        client_of.infer("tiny", [tensor("audio", "FP32", wave)], model_version="9")
    with pytest.raises(InferenceServerException, match=r"^\[400\] audio row 0: found NaN or infinite"):
        client_of.infer("tiny", [tensor("audio", "FP32", wave * np.nan)])
    with pytest.raises(InferenceServerException, match=r"^\[413\] audio row 0: found 6\.0 s, wanted at most 5 s"):
        client_of.infer("tiny", [tensor("audio", "FP32", np.tile(wave, 4))])
    for call in (client_of.get_trace_settings, client_of.get_system_shared_memory_status, client_of.get_log_settings):
        with pytest.raises(InferenceServerException, match=r"^\[404\] GET /v2/.*: found no such path"):
            call()


def test_statistics(client_of, wave):
    def read() -> Any:
        [found] = client_of.get_inference_statistics("tiny")["model_stats"]
        assert client_of.get_inference_statistics()["model_stats"] == [found]
        return found

    before = read()
    client_of.infer("tiny", [tensor("audio", "FP32", np.stack([wave, wave]))])
    with pytest.raises(InferenceServerException):
        client_of.infer("tiny", [tensor("audio", "FP32", wave[:10])])
    after = read()
    assert after["inference_count"] - before["inference_count"] == 2
    for outcome in ("success", "fail"):
        assert after["inference_stats"][outcome]["count"] - before["inference_stats"][outcome]["count"] == 1
    assert after["last_inference"] > before["last_inference"]


# --------------------------------------------------------------------------------------------------------- by hand


def audio(**changes: Any) -> dict[str, Any]:
    return {"name": "audio", "shape": [1, 400], "datatype": "FP32", "data": [0.1] * 400, **changes}


def check(answer: httpx.Response, status: int, *words: str) -> None:
    assert answer.status_code == status, answer.text
    found = Refusal.model_validate_json(answer.content)
    assert found.request_id == answer.headers["X-Request-ID"]
    assert "\n" not in found.error
    assert all(word in found.error for word in words), found.error


def test_nested_data_is_flat_data(client):
    flat = client.post(INFER, json={"inputs": [audio()]}).json()
    assert client.post(INFER, json={"inputs": [audio(data=[[0.1] * 400])]}).json() == flat
    assert flat["outputs"][0]["shape"] == [1, 1, 4]


COUNT = {"name": "num_samples", "shape": [1], "datatype": "INT64", "data": [400]}
BINARY = {"name": "audio", "shape": [1, 400], "datatype": "FP32"}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, ["body inputs: found nothing"]),
        ([], ["body"]),
        ({"inputs": []}, ["body inputs", "at least 1"]),
        ({"inputs": [COUNT]}, ["found neither audio nor file"]),
        ({"inputs": [audio(), audio()]}, ["found 'audio' twice"]),
        ({"inputs": [audio(name="sound")]}, ["found 'sound', wanted one of audio, num_samples, file"]),
        ({"inputs": [audio(datatype="INT16")]}, ["found datatype 'INT16', wanted FP32"]),
        ({"inputs": [audio(shape=[])]}, ["inputs 0 shape"]),
        ({"inputs": [audio(shape=[-1, 400])]}, ["shape [-1, 400], wanted every size at least 1"]),
        ({"inputs": [audio(shape=[0, 400], data=[])]}, ["at least 1"]),
        ({"inputs": [audio(shape=[1, 10**30])]}, ["found 400 elements, wanted 1000"]),
        ({"inputs": [audio(shape=[1.0, 400])]}, ["shape 0: found 1.0"]),
        ({"inputs": [audio(shape=[True, 400])]}, ["shape 0: found True"]),
        ({"inputs": [audio(shape=[1, 2, 200])]}, ["audio: found shape (1, 2, 200)"]),
        ({"inputs": [audio(data=[0.1] * 399)]}, ["found 399 elements, wanted 400"]),
        ({"inputs": [audio(data=[[0.1] * 399, [0.1]])]}, ["found 2 lists, wanted 1"]),
        ({"inputs": [audio(data=[[[0.1]] * 400])]}, ["found list in its data"]),
        ({"inputs": [audio(shape=[1, 1, 400], data=[[[0.1] * 400, 7]])]}, ["found 2 lists"]),
        ({"inputs": [audio(data="no")]}, ["found 'no' as its data, wanted a list"]),
        ({"inputs": [audio(data=["0.1"] * 400)]}, ["found str in its data"]),
        ({"inputs": [audio(data=[True] * 400)]}, ["found bool in its data"]),
        ({"inputs": [audio(data=[None] * 400)]}, ["found NoneType in its data"]),
        ({"inputs": [audio(data=[10**400] * 400)]}, ["beyond 64 bits"]),
        ({"inputs": [audio(data=[1e39] * 400)]}, ["found NaN or infinite samples"]),
        ({"inputs": [audio(data=None)]}, ["found no data"]),
        ({"inputs": [audio(shape=[399], data=[0.1] * 399)]}, ["audio row 0: found shape (399,)"]),
        ({"inputs": [audio(shape=[65, 400], data=[0.1] * 26_000)]}, ["found 65 rows, wanted at most 64"]),
        ({"inputs": [audio(), {**COUNT, "data": [401]}]}, ["found 401 for row 0, wanted 0 to its 400"]),
        ({"inputs": [audio(), {**COUNT, "data": [-1]}]}, ["found -1 for row 0"]),
        ({"inputs": [audio(), {**COUNT, "data": [400.0]}]}, ["found float in its data"]),
        ({"inputs": [audio(), {**COUNT, "data": [2**64]}]}, ["beyond 64 bits"]),
        ({"inputs": [audio(), {**COUNT, "shape": [2], "data": [1, 1]}]}, ["num_samples: found shape (2,)"]),
        ({"inputs": [{"name": "file", "shape": [1], "datatype": "BYTES", "data": ["%"]}]}, ["found no base64"]),
        ({"inputs": [{"name": "file", "shape": [1], "datatype": "BYTES", "data": [1]}]}, ["found int in its data"]),
        (
            {"inputs": [{"name": "file", "shape": [1], "datatype": "BYTES", "data": [""]}]},
            ["file 0: found no readable"],
        ),
        ({"inputs": [audio(), {"name": "file", "shape": [1], "datatype": "BYTES", "data": [""]}]}, ["audio and file"]),
        ({"inputs": [audio(parameters={"shared_memory_region": "a"})]}, ["found shared_memory_region"]),
        ({"inputs": [audio(parameters={"binary_data_size": 1600})]}, ["found data and binary_data_size"]),
        ({"inputs": [{**BINARY, "parameters": {"binary_data_size": -1}}]}, ["found binary_data_size -1"]),
        ({"inputs": [{**BINARY, "parameters": {"binary_data_size": 1600}}]}, ["found 0 bytes left for it"]),
        ({"inputs": [audio()], "outputs": [{"name": "text"}]}, ["outputs: found 'text', wanted one of embeddings"]),
        ({"inputs": [audio()], "outputs": [{"name": "units"}, {"name": "units"}]}, ["found units twice"]),
        (
            {"inputs": [audio()], "outputs": [{"name": "units", "parameters": {"classification": 3}}]},
            ["classification"],
        ),
        ({"inputs": [audio()], "outputs": [{"name": "units", "parameters": {"binary_data": 1}}]}, ["binary_data 1"]),
        ({"inputs": [audio()], "outputs": [{"name": "units"}], "parameters": {"layer": 0}}, ["units: found layer 0"]),
        ({"inputs": [audio()], "parameters": {"layer": 9}}, ["parameter layer: found '9'"]),
        ({"inputs": [audio()], "parameters": {"layer": True}}, ["parameter layer: found True"]),
        ({"inputs": [audio()], "parameters": {"layer_weights": "1"}}, ["parameter layer_weights"]),
        ({"inputs": [audio()], "parameters": {"pooling": "max"}}, ["parameter pooling: found 'max'"]),
        ({"inputs": [audio()], "parameters": {"pooling": "attentive"}}, ["parameter pooling: found attentive"]),
        ({"inputs": [audio()], "parameters": {"binary_data_output": 1}}, ["binary_data_output: found 1"]),
        ({"inputs": [audio()], "parameters": {"sequence_id": 1}}, ["parameter 'sequence_id': found it"]),
        ({"inputs": [audio()], "parameters": {"timeout": -1}}, ["timeout: found -1, wanted microseconds"]),
        ({"inputs": [audio()], "output": []}, ["body output: found an unknown option"]),
        ({"inputs": [audio()], "id": 7}, ["body id: found 7"]),
    ],
)
def test_malformed_requests_are_400_in_one_line(patient_client, body, words):
    check(patient_client.post(INFER, json=body), 400, *words)


def binary_body(head: dict[str, Any] | bytes, *tensors: bytes) -> tuple[bytes, dict[str, str]]:
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    return text + b"".join(tensors), {"Inference-Header-Content-Length": str(len(text))}


def declared(size: int, name: str = "audio", shape: tuple[int, ...] = (1, 400), datatype: str = "FP32") -> Any:
    return {"name": name, "shape": shape, "datatype": datatype, "parameters": {"binary_data_size": size}}


@pytest.mark.parametrize(
    ("inputs", "data", "words"),
    [
        ([declared(1600)], bytes(1599), ["found 1599 bytes left for it, wanted binary_data_size, 1600"]),
        ([declared(1600)], bytes(1601), ["found 1 bytes behind the inputs"]),
        ([declared(1604)], bytes(1604), ["found 1604 bytes, wanted 1600 for shape [1, 400] of FP32"]),
        ([declared(8, shape=(2**62, 2**62))], bytes(8), ["found 8 bytes, wanted"]),
        ([declared(3, "file", (1,), "BYTES")], bytes(3), ["found 3 bytes for the length of an element"]),
        ([declared(5, "file", (1,), "BYTES")], b"\xff\xff\xff\xff.", ["found 1 bytes left for an element"]),
        ([declared(8, "file", (1,), "BYTES")], bytes(8), ["found 4 bytes behind its 1 elements"]),
        ([declared(4, "file", (2,), "BYTES")], bytes(4), ["found 1 elements, wanted 2"]),
        ([declared(8, "file", (1, 2), "BYTES")], bytes(8), ["file: found shape (1, 2)"]),
        ([declared(1600)], np.full(400, np.inf, "<f4").tobytes(), ["found NaN or infinite"]),
    ],
)
def test_malformed_binary_requests_are_400_in_one_line(patient_client, inputs, data, words):
    body, headers = binary_body({"inputs": inputs}, data)
    check(patient_client.post(INFER, content=body, headers=headers), 400, *words)


@pytest.mark.parametrize("length", ["0", "-1", "x", "1e3", "9999", "²", "9" * 5000, ""])
def test_a_wrong_header_length_is_400(patient_client, length):
    body, _ = binary_body({"inputs": [declared(1600)]}, bytes(1600))
    headers = {"Inference-Header-Content-Length": length.encode()}
    check(patient_client.post(INFER, content=body, headers=headers), 400, "Inference-Header-Content-Length: found")


def test_compressed_bodies_are_bounded(speech):
    app = create_app(Settings(max_body_bytes=100_000), {"tiny": speech})
    with TestClient(app, raise_server_exceptions=False) as client:
        while client.get("/v2/health/ready").status_code != 200:  # pytest's timeout ends it
            pass

        def post(body: bytes, encoding: str) -> httpx.Response:
            return client.post(INFER, content=body, headers={"Content-Encoding": encoding})

        plain = json.dumps({"inputs": [audio()]}).encode()
        assert post(gzip.compress(plain), "gzip").status_code == 200
        check(post(gzip.compress(bytes(10**7)), "gzip"), 413, "found more than 100000 bytes unpacked")
        check(post(zlib.compress(bytes(10**7)), "deflate"), 413, "unpacked")
        check(post(gzip.compress(plain)[:-9], "gzip"), 400, "cut off")
        check(post(gzip.compress(plain) + b"more", "gzip"), 400, "followed by 4 bytes")
        check(post(plain, "gzip"), 400, "found no gzip")
        check(post(plain, "br"), 415, "Content-Encoding: found 'br'")


def test_padding_is_bounded(speech):
    """63 short rows beside one of 5 s would be filled up to 320 s, of which 100 s are taken."""
    app = create_app(Settings(max_file_seconds=5, max_queue_seconds=100), {"tiny": speech})
    shape = (64, 80_000)
    with TestClient(app) as client:
        while client.get("/v2/health/ready").status_code != 200:  # pytest's timeout ends it
            pass
        counts = np.array([80_000] + [400] * 63, "<i8").tobytes()
        inputs = [declared(80_000 * 64 * 2, shape=shape, datatype="FP16"), declared(512, "num_samples", (64,), "INT64")]
        body, headers = binary_body({"inputs": inputs}, bytes(80_000 * 64 * 2), counts)
        check(client.post(INFER, content=body, headers=headers), 413, "rows: found 64 filled up to 5.0 s")
        body, headers = binary_body({"inputs": inputs, "parameters": {"pooling": "mean", "layer": 0}}, body[-10240512:])
        assert client.post(INFER, content=body, headers=headers).status_code == 200


def test_a_timeout_is_the_requests_deadline(app, speech):
    with TestClient(app) as client:
        while client.get("/v2/health/ready").status_code != 200:  # pytest's timeout ends it
            pass
        speech.may_run.clear()
        check(
            client.post(INFER, json={"inputs": [audio()], "parameters": {"timeout": 300_000}}),
            408,
            "audio row 0: found",
        )
        speech.may_run.set()


def test_not_ready_is_503(app, speech):
    speech.may_run.clear()
    with TestClient(app) as client:
        assert client.get("/v2/health/live").json() == {"live": True}
        for path in ("/v2/health/ready", "/v2/models/tiny/ready", "/v2/models/tiny"):
            check(client.get(path), 503, "found it not warmed up")
        speech.may_run.set()


GOOD, GOOD_HEADERS = binary_body(
    {"inputs": [declared(1600), {**declared(8, "num_samples", (1,), "INT64")}], "outputs": [{"name": "units"}]},
    bytes(1600),
    (400).to_bytes(8, "little"),
)


@settings(max_examples=300, deadline=None)
@given(
    damage=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=4),
    cut=st.integers(0, 2_000),
    length=st.integers(-2, 2) | st.integers(-400, 2_000),
)
def test_damaged_requests_make_no_500(patient_client: TestClient, damage: Any, cut: int, length: int) -> None:
    body = bytearray(GOOD)
    for place, value in damage:
        body[place % len(body)] = value
    claimed = int(GOOD_HEADERS["Inference-Header-Content-Length"]) + length
    headers = {"Inference-Header-Content-Length": str(claimed)}
    answer = patient_client.post(INFER, content=bytes(body[: len(body) - cut]), headers=headers)
    assert answer.status_code in (200, 400, 413), answer.text
    if answer.status_code != 200:
        Refusal.model_validate_json(answer.content)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["name", "data", "a"]), inner),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(
    tensor=st.fixed_dictionaries(
        {
            "name": st.sampled_from(["audio", "file", "num_samples"]) | ANYTHING,
            "shape": st.lists(st.integers(-1, 3) | st.integers(), max_size=3) | ANYTHING,
            "datatype": st.sampled_from(["FP32", "FP16", "BYTES", "INT64"]) | ANYTHING,
            "data": ANYTHING,
        },
        optional={"parameters": ANYTHING},
    ),
    others=st.dictionaries(st.sampled_from(["id", "parameters", "outputs"]), ANYTHING),
)
def test_odd_requests_make_no_500(patient_client: TestClient, tensor: Any, others: Any) -> None:
    body = json.dumps({"inputs": [tensor, audio()], **others}).encode()
    answer = patient_client.post(INFER, content=body)
    assert answer.status_code in (200, 400), answer.text
