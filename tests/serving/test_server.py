"""The server as it is run: processes, a port, a model on disk, signals."""

from __future__ import annotations

import asyncio
import io
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import httpx
import numpy as np
import pytest

from serving.__main__ import main
from sonorant.inference import load, read_wave
from tests.serving.conftest import ROOT, RunServer, publish

WAV = {"Content-Type": "audio/wav"}


def test_serve_a_real_model_until_told_to_stop(model, wave, encode, tmp_path, run_server: RunServer):
    server = run_server(model)
    with httpx.Client(base_url=server.url, timeout=30) as client:
        files = [("file", (f"{n}.wav", encode(wave[:n]))) for n in (24_000, 8_000, 400)]
        waves = []
        for _, (name, data) in files:
            (tmp_path / name).write_bytes(data)
            waves.append(read_wave(tmp_path / name, max_seconds=9))
        embeddings = client.post("/v1/embeddings?layer=1", files=files).json()["results"]
        units = client.post("/v1/units", files=files).json()["results"]
        speech = load(model)
        for result, expected in zip(embeddings, speech.embed(waves, layer=1), strict=True):
            # The same kernels on other batches: float32 sums in another order.
            np.testing.assert_allclose(result["embedding"], expected, atol=1e-5)
        assert [result["units"] for result in units] == [tokens.tolist() for tokens in speech.units(waves)]
        alone = client.post("/v1/units", content=files[1][1][1], headers=WAV).json()
        assert alone["results"][0]["units"] == units[1]["units"]
        assert client.get("/v1/models").json()["models"][0]["layer"] == 2
    lines = server.stop()
    assert "/v1/embeddings" in lines
    assert "Traceback" not in lines


def test_a_long_recording_equals_its_windows_heard_offline(model, encode, run_server: RunServer):
    """75 s go through in windows, on whatever worker is free; frames, units and a stretch of them."""
    rng = np.random.default_rng(1)
    long = (rng.normal(0, 0.1, 75 * 16_000) * (1 + np.sin(np.arange(75 * 16_000) / 9_000))).astype(np.float32)
    body = encode(long, subtype="FLOAT")
    server = run_server(model)
    speech = load(model)
    with httpx.Client(base_url=server.url, timeout=60) as client:
        units = client.post("/v1/units", content=body, headers=WAV).json()["results"][0]["units"]
        # Windows of one recording may share a batch: the last digit differs, and with it a unit between two centroids.
        agreement = np.mean(np.array(units) == speech.units_long(long))
        assert agreement > 0.999
        answer = client.post("/v1/embeddings", content=body, headers={**WAV, "Accept": "application/x-npy"})
        (Path(server.folder) / "a.npy").write_bytes(answer.content)
        frames = np.load(Path(server.folder) / "a.npy")
        np.testing.assert_allclose(frames, speech.embed_long(long), atol=1e-5)
        part = client.post("/v1/units?start=40.5&end=41", content=body, headers=WAV).json()["results"][0]
        first = part["start_ms"] // 20
        assert part["num_frames"] == 25
        assert part["units"] == units[first : first + 25]
        assert 40.5 <= first * 0.02 + 0.0125 < 40.52


def test_results_are_those_of_evaluate_whatever_the_batch(model, encode, run_server: RunServer):
    """`evaluate` takes an utterance's frames from `Speech.states`; the server's batches are as they happen to be."""
    rng = np.random.default_rng(3)
    waves = [rng.normal(0, 0.1, size).astype(np.float32) for size in rng.integers(400, 64_000, 40)]
    bodies = [encode(wave, subtype="FLOAT") for wave in waves]
    speech = load(model)
    expected = [speech.states([wave], [2])[0][0] for wave in waves]
    server = run_server(model)

    async def run() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=40)
        async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits) as client:
            headers = {**WAV, "Accept": "application/x-npy"}
            return await asyncio.gather(*(client.post("/v1/embeddings", content=b, headers=headers) for b in bodies))

    answers = asyncio.run(run())
    for answer, frames in zip(answers, expected, strict=True):
        found = np.load(io.BytesIO(answer.content), allow_pickle=False)
        # float32 sums in another order, of values of size one.
        np.testing.assert_allclose(found, frames, atol=1e-5)
    # What both workers did is counted in one place, a moment after the last answer.
    while 'route="/v1/embeddings",status="200"} 40.0' not in (metrics := httpx.get(f"{server.url}/metrics").text):
        time.sleep(0.01)  # pytest's timeout ends it
    assert "sonorant_batch_size_count 40.0" not in metrics  # some travelled together
    assert "sonorant_queue_seconds_count 40.0" in metrics


def test_a_killed_worker_fails_no_request(model, wave, encode, run_server: RunServer):
    server = run_server(model)
    body = encode(wave)

    async def run() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:

            async def ask() -> int:
                return (await client.post("/v1/units", content=body, headers=WAV)).status_code

            for _ in range(3):
                tasks = [asyncio.create_task(ask()) for _ in range(40)]
                await asyncio.sleep(0.05)
                os.kill(server.workers()[0], signal.SIGKILL)
                assert await asyncio.gather(*tasks) == [200] * 40
            metrics = (await client.get("/metrics")).text
            assert "sonorant_workers_lost_total 3.0" in metrics

    asyncio.run(run())
    assert "another is started" in server.stop()


def test_reload_under_load_fails_no_request(model, wave, encode, tmp_path, run_server: RunServer):
    """The folder is replaced by another model's, and by a broken one, while requests come without a pause."""
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    other = publish(tmp_path / "other", seed=1)
    speeches = [load(model), load(other)]
    body = encode(wave)
    expected = [speech.units([read_wave_of(body)])[0].tolist() for speech in speeches]
    assert expected[0] != expected[1]
    server = run_server(folder)
    found: list[list[int]] = []

    async def run() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            over = asyncio.Event()

            async def keep_asking() -> None:
                while not over.is_set():
                    answer = await client.post("/v1/units", content=body, headers=WAV)
                    assert answer.status_code == 200, answer.text
                    found.append(answer.json()["results"][0]["units"])

            askers = [asyncio.create_task(keep_asking()) for _ in range(6)]
            for what, outcome in ((other, "done"), (None, "failed"), (model, "done")):
                if what is None:
                    (folder / "model.safetensors").write_bytes(b"broken")
                else:
                    replace_folder(folder, what)
                before = await reloads(client, outcome)
                server.signal(signal.SIGHUP)
                while await reloads(client, outcome) == before:  # pytest's timeout ends it
                    await asyncio.sleep(0.05)
                if what is other:
                    while not found or found[-1] != expected[1]:
                        await asyncio.sleep(0.01)
            while found[-1] != expected[0]:
                await asyncio.sleep(0.01)
            over.set()
            await asyncio.gather(*askers)

    asyncio.run(run())
    assert {tuple(units) for units in found} == {tuple(units) for units in expected}
    assert "the models loaded before stay" in server.stop()


def test_a_watched_folder_is_loaded_anew(model, wave, encode, tmp_path, run_server: RunServer):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    server = run_server(folder, SONORANT_SERVE_WATCH_SECONDS="0.1")
    with httpx.Client(base_url=server.url, timeout=30) as client:
        replace_folder(folder, publish(tmp_path / "other", seed=1))
        while 'outcome="done"} 1.0' not in client.get("/metrics").text:  # pytest's timeout ends it
            time.sleep(0.05)
        [units] = load(folder).units([read_wave_of(encode(wave))])
        assert (
            client.post("/v1/units", content=encode(wave), headers=WAV).json()["results"][0]["units"] == units.tolist()
        )


def test_sigterm_under_load_answers_all_that_was_admitted(model, wave, encode, run_server: RunServer):
    server = run_server(model)
    body = encode(wave)

    async def run() -> list[int]:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:

            async def ask() -> int:
                return (await client.post("/v1/units", content=body, headers=WAV)).status_code

            tasks = [asyncio.create_task(ask()) for _ in range(60)]
            while (await client.get("/metrics")).text.count("sonorant_queue_depth 0.0"):
                await asyncio.sleep(0.001)
            server.signal(signal.SIGTERM)
            return await asyncio.gather(*tasks)

    # What had been admitted is answered; what came too late is told so.
    statuses = asyncio.run(run())
    assert set(statuses) <= {200, 503}
    assert statuses.count(200) > 0
    server.stop()


def test_nothing_is_left_running(model, run_server: RunServer):
    """The workers end with the server, however it ends."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        server = run_server(model)
        workers = server.workers()
        assert workers
        server.signal(number)
        server.process.wait(timeout=30)
        deadline = time.monotonic() + 10
        while any(alive(pid) for pid in workers):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_two_models_in_one_server(model, wave, encode, tmp_path, run_server: RunServer):
    other = publish(tmp_path / "other", seed=1)
    server = run_server(f"first={model},second={other}")
    body = encode(wave)
    with httpx.Client(base_url=server.url, timeout=30) as client:
        assert [m["id"] for m in client.get("/v1/models").json()["models"]] == ["first", "second"]
        for name, folder in (("first", model), ("second", other)):
            answer = client.post(f"/v1/units?model={name}", content=body, headers=WAV).json()
            assert answer["model"] == name
            assert answer["results"][0]["units"] == load(folder).units([read_wave_of(body)])[0].tolist()
        missing = client.post("/v1/units?model=third", content=body, headers=WAV)
        assert missing.status_code == 404
        assert "'third', wanted one of first, second" in missing.json()["error"]["message"]


WRITES = """
import os, sys
sys.stderr.write("WATCHED\\n")
def refuse(event, arguments):
    if event == "open":
        path, mode, flags = arguments
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes and str(path) not in ("/dev/null", "/dev/tty") and not str(path).endswith(".pyc"):
            sys.stderr.write(f"WRITES {path}\\n")
    elif event in ("os.mkdir", "os.rename", "os.remove", "tempfile.mkstemp", "tempfile.mkdtemp"):
        sys.stderr.write(f"WRITES {event} {arguments}\\n")
sys.addaudithook(refuse)
"""


def test_nothing_is_written_to_disk(model, wave, encode, tmp_path, run_server: RunServer):
    """Neither by the server nor by its workers: they run on a read-only file system."""
    (tmp_path / "sitecustomize.py").write_text(WRITES)
    paths = os.pathsep.join([str(tmp_path), str(ROOT / "src")])
    server = run_server(model, PYTHONPATH=paths, PYTHONDONTWRITEBYTECODE="1")
    with httpx.Client(base_url=server.url, timeout=60) as client:
        files = [("file", (f"{i}.wav", encode(np.tile(wave, 20)))) for i in range(4)]
        for accept in ("application/json", "application/x-ndjson", "application/safetensors"):
            assert client.post("/v1/embeddings", files=files, headers={"Accept": accept}).status_code == 200
        workers = server.workers()
        os.kill(workers[0], signal.SIGKILL)
        assert client.post("/v1/units", files=files).status_code == 200
    server.signal(signal.SIGHUP)
    time.sleep(0.2)
    told = server.stop()
    assert told.count("WATCHED") >= 2 + len(workers)  # the server, its workers, and one in the lost one's place
    assert "WRITES" not in told


@pytest.mark.parametrize(
    ("arguments", "variables", "words"),
    [
        (["--model", "nowhere"], {}, ["nowhere", "sonorant publish"]),
        (["--model", "a=x,a=y"], {}, ["settings: model", "two models named a"]),
        (["--port", "99999"], {}, ["settings: port: found 99999", "65535"]),
        ([], {"SONORANT_SERVE_MAX_FILE_SECONDS": "soon"}, ["max_file_seconds: found 'soon'"]),
        ([], {"SONORANT_SERVE_MAX_QUEUE_SECONDS": "5"}, ["max_file_seconds 600 above max_queue_seconds 5"]),
    ],
)
def test_a_wrong_start_is_one_line(arguments, variables, words, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    message = stop.value.code  # a string: written to stderr, exit status 1
    assert len(message.splitlines()) == 1, message
    assert all(word in message for word in words), message


def test_a_folder_that_holds_no_model_is_one_line(tmp_path, run_server: RunServer):
    server = run_server(tmp_path, wait=False)
    assert server.process.wait(timeout=60) == 1
    assert server.log().splitlines()[-1].startswith(f"model {tmp_path}: found no readable config.json")
    assert "Traceback" not in server.log()


def read_wave_of(body: bytes) -> np.ndarray:
    return read_wave(io.BytesIO(body))


def replace_folder(folder: Path, other: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(other, folder)


async def reloads(client: httpx.AsyncClient, outcome: str) -> str:
    lines = (await client.get("/metrics")).text.splitlines()
    return next((line for line in lines if line.startswith(f'sonorant_reloads_total{{outcome="{outcome}"}}')), "")


def alive(pid: int) -> bool:
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")
