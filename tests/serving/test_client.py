"""The client against the real server, and against servers that fail in every way: nothing is lost, doubled or mixed."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors import safe_open

from serving.app import create_app
from serving.settings import Settings
from sonorant.client import Client, ServiceError
from sonorant.client import run as run_module
from sonorant.client.command import embed
from sonorant.client.inputs import find_files
from sonorant.client.run import Asked, embed_files
from sonorant.client.service import seconds_of
from sonorant.client.store import name_of
from sonorant.inference import load, read_wave
from tests.serving.conftest import FakeSpeech, RunServer, serving

WAV = {"Content-Type": "audio/wav"}
EMBED = [sys.executable, "-m", "sonorant", "embed"]
KEY = "a-key-nobody-may-see"
FRAMES = Asked("embeddings", {})


@contextmanager
def url_of(speech: FakeSpeech) -> Iterator[str]:
    """The real app in a real server of a thread; its URL."""
    app = create_app(Settings(max_file_seconds=5, max_queue_seconds=60), {"tiny": speech})
    with serving(app) as address:
        yield f"http://{address}"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with url_of(FakeSpeech()) as url:
        yield url


Fault = int | str | dict[str, Any]


class Relay:
    """A server that passes requests on to another, but first does what it is told.

    faults: what becomes of the next requests for speech: a status, "drop" or "cut", or headers and body of an answer.
    """

    def __init__(self, url: str) -> None:
        self.target, self.faults, self.delay = url, list[Fault](), 0.0
        self.seen: list[tuple[str, str]] = []
        self.keys: set[str | None] = set()
        self.digest: str | None = None
        self._turn = threading.Lock()
        relay = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                relay.answer(self, b"")

            def do_POST(self) -> None:
                relay.answer(self, self.rfile.read(int(self.headers["Content-Length"])))

            def log_message(self, *_: object) -> None:
                """Nothing."""

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def posts(self) -> int:
        return sum(method == "POST" for method, _ in self.seen)

    def answer(self, handler: http.server.BaseHTTPRequestHandler, body: bytes) -> None:
        self.seen.append((handler.command, handler.path))
        self.keys.add(handler.headers["Authorization"])
        fault: Fault = 0
        if handler.command == "POST":
            time.sleep(self.delay)
            with self._turn:
                fault = self.faults.pop(0) if self.faults else 0
        if fault == "drop":
            handler.close_connection = True
            return
        headers = {"Accept": handler.headers["Accept"], **({"Content-Type": "audio/wav"} if body else {})}
        found = httpx.request(handler.command, self.target + handler.path, content=body, headers=headers)
        status, said, content = found.status_code, {"X-Request-ID": found.headers["X-Request-ID"]}, found.content
        if self.digest is not None and handler.path == "/v1/models":
            content = content.replace(b"0" * 8, self.digest.encode())
        if isinstance(fault, dict):
            status, said, content = fault["status"], fault.get("headers", {}), fault.get("body", content)
        elif isinstance(fault, int) and fault:
            error = {"code": "told_so", "message": f"the relay answers {fault}", "request_id": "r"}
            status, content = fault, json.dumps({"error": error}).encode()
            said = {"Retry-After": "0"}
        handler.send_response(status)
        for name, value in {**said, "Content-Length": str(len(content))}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(content[: len(content) // 2] if fault == "cut" else content)
        handler.close_connection = fault == "cut"


@pytest.fixture
def relay(url: str) -> Iterator[Relay]:
    relay = Relay(url)
    yield relay
    relay.server.shutdown()
    relay.server.server_close()


@pytest.fixture
def audio(tmp_path: Path, wave, encode) -> Path:
    """Twelve files in folders, two of them of one name."""
    folder = tmp_path / "audio"
    for index in range(12):
        path = folder / "ab"[index % 2] / f"{index // 2:02d}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(wave[: 3_000 + 1_500 * index] * (1 - 0.05 * index)))
    return folder


def command(*words: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """`sonorant embed …`; whatever happens it shows no traceback and no key."""
    environment = {**os.environ, "NO_COLOR": "1", **variables}
    answer = subprocess.run(
        [*EMBED, *map(str, words)], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert "Traceback" not in answer.stderr
    assert KEY not in answer.stderr + answer.stdout
    return answer


def complaint(*words: object, **variables: str) -> str:
    """The one line that a failing command says."""
    answer = command(*words, **variables)
    assert answer.returncode == 1, answer
    assert answer.stdout == ""
    [line] = [line for line in answer.stderr.splitlines() if "are done already" not in line]
    return line


def contents(output: Path) -> Any:
    """The bytes of all that is there in the end."""
    files = [output] if output.is_file() else sorted(output.iterdir())
    return {file.name: file.read_bytes() for file in files}


def expected(url: str, path: Path, query: str = "", kind: str = "embeddings") -> dict[str, Any]:
    answer = httpx.post(f"{url}/v1/{kind}{query}", content=path.read_bytes(), headers=WAV).json()
    return answer["results"][0]


# ------------------------------------------------------------------------------------------------ in Python


def test_the_client_gives_what_the_routes_give(url, audio):
    path = audio / "b" / "05.wav"
    with Client(url) as client:
        for options, query in [
            ({}, ""),
            ({"layer": 0}, "?layer=0"),
            ({"layer": [0.5, 0, 0, 0.25]}, "?layer=weighted&layer_weights=0.5,0,0,0.25"),
            ({"layer": "last", "pooling": "mean", "normalise": "l2"}, "?layer=last&pooling=mean&normalise=l2"),
            ({"start": 0.1, "end": 0.3}, "?start=0.1&end=0.3"),
        ]:
            frames = client.embed(path, **options)
            assert frames.dtype == np.float32
            assert frames.flags.writeable
            # Exact: a float32 goes through JSON as a float64 and comes back whole.
            assert np.array_equal(frames, np.array(expected(url, path, query)["embedding"], np.float32)), query
            assert np.array_equal(frames, client.embed(path.read_bytes(), **options))
        units, durations_ms = client.units(str(path))
        assert (units.tolist(), durations_ms) == (expected(url, path, kind="units")["units"], None)
        units, durations_ms = client.units(path, deduplicate=True)
        short = expected(url, path, "?deduplicate=true", "units")
        assert (units.tolist(), durations_ms.tolist()) == (short["units"], short["durations_ms"])
        assert client.models() == httpx.get(f"{url}/v1/models").json()["models"]


def test_an_error_says_what_the_server_said(url):
    with Client(url) as client:
        with pytest.raises(ServiceError, match="found no readable audio") as caught:
            client.embed(b"no audio")
        assert (caught.value.status, caught.value.code) == (400, "bad_audio")
        assert len(caught.value.request_id) == 32
        with pytest.raises(ServiceError, match="query layer: found '9'"):
            client.embed(b"no audio", layer=9)
        with pytest.raises(FileNotFoundError):
            client.embed("nowhere.wav")


@pytest.fixture
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts follow each other at once."""
    monkeypatch.setattr("sonorant.client.service.FIRST_WAIT", 1e-3)


@pytest.mark.usefixtures("no_waits")
def test_what_passes_is_tried_again_and_only_so_often(relay, audio):
    path = audio / "a" / "00.wav"
    with Client(relay.url, retries=4) as client:
        whole = client.embed(path)
        relay.faults = [429, "drop", 503, "cut"]
        assert np.array_equal(client.embed(path), whole)
        assert relay.posts == 6
        relay.faults = [503] * 9
        with pytest.raises(ServiceError, match="the relay answers 503") as caught:
            client.embed(path)
        assert (caught.value.status, relay.posts, relay.faults) == (503, 11, [503] * 4)
        relay.faults = [400]
        with pytest.raises(ServiceError, match="the relay answers 400"):
            client.embed(path)
        assert relay.posts == 12


def test_it_waits_as_long_as_the_server_asks(relay, audio):
    relay.faults = [{"status": 429, "headers": {"Retry-After": "1"}, "body": b"{}"}]
    began = time.monotonic()
    with Client(relay.url) as client:
        client.embed(audio / "a" / "00.wav")
        assert time.monotonic() - began >= 1
        relay.faults = [{"status": 429, "headers": {"Retry-After": "86400"}, "body": b"{}"}]
        with pytest.raises(ServiceError) as caught:  # at once: pytest's timeout is shorter than a day
            client.embed(audio / "a" / "00.wav")
    assert caught.value.retry_after == 86_400


def test_retry_after_may_be_a_date():
    assert seconds_of("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert seconds_of("2.5") == 2.5
    assert seconds_of("soon") is seconds_of("inf") is seconds_of(None) is None


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"status": 302, "headers": {"Location": "http://127.0.0.1:1/v1/embeddings"}}, ["HTTP 302", "127.0.0.1:1"]),
        ({"status": 200, "body": b"<html>"}, ["something else", "safetensors"]),
        ({"status": 200, "body": b"\xff" * 100}, ["something else"]),
        ({"status": 200, "body": (2).to_bytes(8, "little") + b"{}"}, ["something else"]),
        ({"status": 200, "headers": {"Content-Encoding": "gzip"}}, ["not compressed"]),
        ({"status": 200, "body": bytes(100_001)}, ["found more", "at most 100000 bytes"]),
        ({"status": 404, "body": b"<html>\x1b[2J" * 99_999}, ["HTTP 404", "correct the URL"]),
    ],
)
def test_answers_that_are_none(fault, words, relay, audio):
    relay.faults = [fault]
    with Client(relay.url, max_answer_bytes=100_000) as client, pytest.raises(ServiceError) as caught:
        client.embed(audio / "a" / "00.wav")
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message
    assert relay.posts == 1


def test_a_slow_answer_is_given_up(relay, audio):
    relay.delay = 1
    with Client(relay.url, timeout=0.2, retries=0) as client, pytest.raises(ServiceError, match=r"within 0.2 s"):
        client.embed(audio / "a" / "00.wav")


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://a", "http://", "http://a/?b", "http://[", "http://u:p@a"])
def test_what_is_no_url(url):
    with pytest.raises(ValueError, match="--url: found"):
        Client(url)


def test_the_key_is_sent_and_not_shown(relay, monkeypatch):
    monkeypatch.setenv("SONORANT_API_KEY", KEY)
    with Client(relay.url) as client:
        client.models()
        assert KEY not in repr(client) + repr(vars(client))
    assert relay.keys == {f"Bearer {KEY}"}
    with pytest.raises(ValueError, match="API key: found blanks") as caught:
        Client(relay.url, f"{KEY}\n{KEY}")
    assert KEY not in str(caught.value)


# ------------------------------------------------------------------------------------------ the command line


@pytest.mark.parametrize("flags", [(), ("--pooling", "mean", "--layer", "1"), ("--layer", "weighted")], ids=str)
def test_a_table_of_embeddings(flags, url, audio, tmp_path):
    output = tmp_path / "out.parquet"
    assert command(audio, "--url", url, "--output", output, *flags).returncode == 0
    table = pq.read_table(output)
    files = find_files([str(audio)])
    assert table["path"].to_pylist() == files
    query = "?" + "&".join(f"{k[2:]}={v}" for k, v in zip(flags[::2], flags[1::2], strict=True))
    for row, file in zip(table.to_pylist(), files, strict=True):
        result = expected(url, Path(file), query)
        assert np.array_equal(np.float32(row["embedding"]), np.float32(result["embedding"]))
        assert [row[n] for n in ("seconds", "num_frames", "start_ms")] == [
            result[n] for n in ("seconds", "num_frames", "start_ms")
        ]
        assert (row["model"], row["digest"]) == ("tiny", "0" * 8)
        assert row["layer"] == {"": 2, "1": 1, "weighted": None}[flags[-1] if flags else ""]
        assert row.get("layer_weights") == ([0.25] * 4 if "weighted" in flags else None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["audio", "out.parquet"]


@pytest.mark.parametrize("flags", [("--units",), ("--units", "--deduplicate", "--start", "0.1")], ids=str)
def test_units_as_table_and_as_folder(flags, url, audio, tmp_path):
    query = "?deduplicate=true&start=0.1" if len(flags) > 1 else ""
    for output in (tmp_path / "out.parquet", tmp_path / "out"):
        assert command(audio, "--url", url, "--output", output, *flags).returncode == 0
    rows = {row["path"]: row for row in pq.read_table(tmp_path / "out.parquet").to_pylist()}
    index = [json.loads(line) for line in (tmp_path / "out" / "index.jsonl").read_text().splitlines()]
    assert [entry["path"] for entry in index] == list(rows) == find_files([str(audio)])
    for entry in index:
        result = expected(url, Path(entry["path"]), query, "units")
        row = rows[entry["path"]]
        assert (row["units"], row["durations_ms"]) == (result["units"], result["durations_ms"])
        assert row["layer"] == 2
        with safe_open(tmp_path / "out" / entry["file"], "numpy") as file:
            assert file.get_tensor("units").tolist() == result["units"]
            assert ("durations_ms" in file.keys()) == (len(flags) > 1)  # noqa: SIM118 (no mapping)
            said = json.loads(file.metadata()["sonorant"])
        assert said["path"] == entry["path"]
        assert said["num_frames"] == result["num_frames"]
        assert said["start_ms"] == result["start_ms"]


def test_a_real_model_in_processes(model, audio, tmp_path, run_server: RunServer):
    output = tmp_path / "out.parquet"
    server = run_server(model)
    assert command(audio, "--url", server.url, "--output", output, "--layer", "1").returncode == 0
    speech = load(model)
    for row in pq.read_table(output).to_pylist():
        [frames] = speech.embed([read_wave(Path(row["path"]))], layer=1)
        # The same kernels on other batches: float32 sums in another order.
        np.testing.assert_allclose(np.float32(row["embedding"]), frames, atol=1e-5)


@pytest.mark.parametrize("name", ["out.parquet", "out"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_run_goes_on(name, number, relay, audio, tmp_path):
    words = [str(audio), "--url", relay.url, "--jobs", "2", "--output"]
    assert command(*words, tmp_path / "whole" / name).returncode == 0
    output, relay.delay = tmp_path / name, 0.2
    process = subprocess.Popen([*EMBED, *words, str(output)], stderr=subprocess.PIPE, text=True)
    work = tmp_path / "out.parquet.parts" if name == "out.parquet" else output
    while len(list(work.glob("*.safetensors"))) < 4:  # pytest's timeout ends it
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(number)
    _, said = process.communicate(timeout=20)
    done = len(list(work.glob("[!.]*.safetensors")))
    assert 4 <= done < 12
    if number == signal.SIGINT:
        assert process.returncode == 130
        lines = said.splitlines()
        assert lines == [f"embed: interrupted; finished work is kept in {work}; run the same command again to go on"]
    relay.delay, middle = 0, relay.posts
    again = command(*words, output)
    assert again.returncode == 0
    assert f"{done} of 12 files are done already" in again.stderr
    # What was done is not sent again; one more is the sound that tries the options.
    assert relay.posts - middle == 12 - done + 1
    assert contents(output) == contents(tmp_path / "whole" / name)


def test_a_run_killed_while_it_merges_goes_on(url, audio, tmp_path, monkeypatch):
    files, output = find_files([str(audio)]), tmp_path / "out.parquet"
    with Client(url) as client:
        embed_files(client, FRAMES, files, tmp_path / "whole.parquet", 2)
        with monkeypatch.context() as patch:
            patch.setattr("sonorant.client.store.GROUP_ROWS", 5)
            patch.setattr("sonorant.client.store.read_part", stumble_at(7))
            with pytest.raises(InterruptedError):
                embed_files(client, FRAMES, files, output, 2)
        assert not output.exists()
        embed_files(client, FRAMES, files, output, 2)
    assert contents(output)["out.parquet"] == (tmp_path / "whole.parquet").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["audio", "out.parquet", "whole.parquet"]


def stumble_at(count: int) -> Callable[[Path], Any]:
    from sonorant.client.store import read_part

    calls = iter(range(count))

    def read(path: Path) -> Any:
        if next(calls, None) is None:
            raise InterruptedError
        return read_part(path)

    return read


def test_row_groups_hold_the_same_rows(url, audio, tmp_path, monkeypatch):
    files = find_files([str(audio)])
    with Client(url) as client:
        embed_files(client, FRAMES, files, tmp_path / "one.parquet", 2)
        monkeypatch.setattr("sonorant.client.store.GROUP_ROWS", 5)
        embed_files(client, FRAMES, files, tmp_path / "three.parquet", 2)
    one, three = pq.read_table(tmp_path / "one.parquet"), pq.read_table(tmp_path / "three.parquet")
    assert pq.ParquetFile(tmp_path / "three.parquet").num_row_groups == 3
    assert one.equals(three)


@pytest.mark.parametrize("kind", ["embeddings", "units"])
def test_new_and_changed_files_join_a_finished_table(kind, relay, audio, tmp_path, wave, encode):
    files, output, asked = find_files([str(audio)]), tmp_path / "out.parquet", Asked(kind, {})
    with Client(relay.url) as client:
        embed_files(client, asked, files[3:9], output, 2)
        first = relay.posts
        embed_files(client, asked, files[3:9], output, 2)
        assert relay.posts - first == 1, "only the sound that tries the options"
        Path(files[5]).write_bytes(encode(wave[:9_999]))
        embed_files(client, asked, files, output, 2)
        assert relay.posts - first == 1 + 1 + 7
        embed_files(client, asked, files, tmp_path / "whole.parquet", 2)
        assert output.read_bytes() == (tmp_path / "whole.parquet").read_bytes()
        with pytest.raises(ValueError, match=r"out.parquet: found rows of 2 other files, .*00.wav the first"):
            embed_files(client, asked, files[2:], output, 2)
    assert output.read_bytes() == (tmp_path / "whole.parquet").read_bytes()


@pytest.mark.usefixtures("no_waits")
@pytest.mark.parametrize("name", ["out.parquet", "out"])
def test_faults_that_pass_leave_no_trace(name, relay, audio, tmp_path):
    embed([str(audio)], tmp_path / "whole" / name, relay.url)
    relay.faults = [429, "drop", 0, 503, "drop", "cut", 408, 429, "cut", 502]
    embed([str(audio)], tmp_path / name, relay.url)
    assert relay.faults == []
    assert contents(tmp_path / name) == contents(tmp_path / "whole" / name)


@pytest.mark.parametrize("name", ["out.parquet", "out"])
def test_broken_files_are_listed_and_hold_nobody_up(name, url, audio, tmp_path, wave, encode):
    output = tmp_path / name
    listed = tmp_path / "out.parquet.failed.jsonl" if name == "out.parquet" else output / "failed.jsonl"
    good = find_files([str(audio)])
    (audio / "a" / "00b.wav").write_bytes(b"no audio")
    (audio / "b" / "empty.flac").touch()
    (audio / "b" / "long.flac").write_bytes(encode(np.tile(wave, 4), format="FLAC"))
    answer = command(audio, "--url", url, "--output", output)
    assert answer.returncode == 1
    lines = [json.loads(line) for line in listed.read_text().splitlines()]
    assert [Path(line["path"]).name for line in lines] == ["00b.wav", "empty.flac", "long.flac"]
    assert [line["status"] for line in lines] == [400, 400, 413]
    assert all(line["message"] in answer.stderr and line["request_id"] for line in lines)
    assert "3 files have no answer" in answer.stderr
    (audio / "a" / "00b.wav").write_bytes(encode(wave))
    assert command(audio, "--url", url, "--output", output).returncode == 1
    assert len(listed.read_text().splitlines()) == 2
    for broken in ("empty", "long"):
        (audio / "b" / f"{broken}.flac").unlink()
    assert command(audio, "--url", url, "--output", output).returncode == 0
    assert not listed.exists()
    if name == "out.parquet":
        assert pq.read_table(output)["path"].to_pylist() == sorted([*good, str(audio / "a" / "00b.wav")])


def test_a_file_that_only_its_own_request_fails_is_listed(relay, audio, tmp_path):
    relay.faults = [0, 500]
    answer = command(audio, "--url", relay.url, "--output", tmp_path / "out", "--jobs", "1")
    assert answer.returncode == 1
    [line] = (tmp_path / "out" / "failed.jsonl").read_text().splitlines()
    assert json.loads(line)["status"] == 500
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 11


def test_a_server_that_goes_away_ends_the_run(relay, audio, tmp_path):
    def leave() -> None:
        while relay.posts < 5:
            time.sleep(0.005)
        relay.faults = ["drop"] * 999
        relay.server.shutdown()
        relay.server.server_close()

    relay.delay = 0.05
    thread = threading.Thread(target=leave)
    thread.start()
    line = complaint(audio, "--url", relay.url, "--output", tmp_path / "out", "--jobs", "2", "--retries", "1")
    thread.join()
    assert "found no answer" in line
    assert line.endswith("what is finished is kept: run the same command again to go on")


@pytest.mark.parametrize("name", ["out.parquet", "out"])
def test_other_options_and_other_models_are_not_mixed(name, relay, audio, tmp_path):
    def again(**options: Any) -> None:
        embed([str(audio)], tmp_path / name, relay.url, **options)

    again()
    before = contents(tmp_path / name)
    for options, found in [
        ({"layer": "1"}, "layer 2, wanted layer 1"),
        ({"pooling": "mean"}, "pooling none, wanted pooling mean"),
        ({"units": True}, "kind embeddings, wanted kind units"),
        ({"start": 0.1}, "start None, wanted start 0.1"),
    ]:
        with pytest.raises(ValueError, match=f"{name}: found answers of {found}"):
            again(**options)
    again(layer="2")  # the published layer by another name
    relay.digest = "1" * 8
    assert "found answers of digest 00000000, wanted digest 11111111" in complaint(
        audio, "--url", relay.url, "--output", tmp_path / name
    )
    assert contents(tmp_path / name) == before


def test_answers_of_a_model_that_changed_meanwhile_are_forgotten(relay, audio, tmp_path, monkeypatch):
    files = find_files([str(audio)])
    monkeypatch.setattr(run_module, "SECONDS_BETWEEN_CHECKS", 0)
    relay.delay = 0.05
    with Client(relay.url) as client:
        ask, count = client.ask, iter(range(6))

        def ask_until_it_changes(*arguments: Any) -> Any:
            if next(count, None) is None:
                relay.digest = "1" * 8
            return ask(*arguments)

        monkeypatch.setattr(client, "ask", ask_until_it_changes)
        with pytest.raises(ValueError, match="found digest 11111111, wanted 00000000 as when the run began"):
            embed_files(client, FRAMES, files, tmp_path / "out", 1)
    kept = {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    assert kept <= {name_of(file) for file in files[:5]}
    assert kept


def test_two_runs_do_not_share_an_output(relay, audio, tmp_path):
    words = [str(audio), "--url", relay.url, "--output", str(tmp_path / "out")]
    relay.delay = 2
    process = subprocess.Popen([*EMBED, *words], stderr=subprocess.DEVNULL)
    while not (tmp_path / "out" / "embed.json").exists():
        time.sleep(0.01)
    assert "found another run at work on it" in complaint(*words)
    process.kill()
    process.wait()
    relay.delay = 0
    assert command(*words).returncode == 0


def test_a_full_disk_is_one_line(url, audio, tmp_path):
    words = f"{sys.executable} -m sonorant embed {audio} --url {url} --output {tmp_path / 'out'}"
    # No file may grow beyond 1024 bytes.
    answer = subprocess.run(["bash", "-c", f"ulimit -f 1; exec {words}"], capture_output=True, text=True, timeout=60)
    assert answer.returncode == 1
    [line] = answer.stderr.splitlines()
    assert line.startswith("embed: File too large")
    assert "run the same command again; finished work is kept in" in line
    assert command(audio, "--url", url, "--output", tmp_path / "out").returncode == 0
    assert command(audio, "--url", url, "--output", tmp_path / "whole").returncode == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


WRONG: list[tuple[list[str], str]] = [
    (["nowhere.wav"], "embed: nowhere.wav: found nothing there, wanted audio files or folders"),
    (["@nowhere.txt"], "embed: @nowhere.txt: found no such file, wanted a list"),
    (["AUDIO", "--url", "http://127.0.0.1:1"], "embed: http://127.0.0.1:1: found no answer ("),
    (["AUDIO", "--url", "nowhere"], "embed: --url: found 'nowhere', wanted one such as http://127.0.0.1:8000"),
    (["AUDIO", "--url", "URL/elsewhere"], "embed: POST /elsewhere/v1/embeddings: found no such path"),
    (["AUDIO", "--layer", "9"], "embed: query layer: found '9', wanted 0 to 3"),
    (["AUDIO", "--pooling", "sum"], "embed: query pooling: found 'sum'"),
    (["AUDIO", "--model", "huge"], "embed: model: found 'huge', wanted one of tiny"),
    (["AUDIO", "--start", "2", "--end", "1"], "embed: --end: found 1, wanted more than --start, which is 2"),
    (["AUDIO", "--units", "--layer", "1"], "embed: --layer: found 1 beside --units"),
    (["AUDIO", "--deduplicate"], "embed: --deduplicate: found it without --units"),
    (["AUDIO", "--jobs", "0"], "embed: --jobs: found 0, wanted 1 to 256"),
    (["AUDIO", "--timeout", "nan"], "embed: --timeout: found nan"),
    (["AUDIO", "--output", "out.csv"], "embed: --output: found out.csv, wanted a name that ends in .parquet"),
    (["AUDIO", "--output", "AUDIO"], "found other files in it, wanted an empty folder"),
    (["AUDIO", "--key-file", "nowhere"], "embed: --key-file nowhere: found it unreadable (No such file"),
]


@pytest.mark.parametrize(("words", "message"), WRONG, ids=[" ".join(words) for words, _ in WRONG])
def test_misuse_is_one_line(words, message, url, audio, tmp_path):
    places = {"AUDIO": str(audio), "URL/elsewhere": f"{url}/elsewhere"}
    words = [places.get(word, word) for word in words]
    for flag, value in (("--url", url), ("--output", str(tmp_path / "out"))):
        words += [] if flag in words else [flag, value]
    assert message in complaint(*words)
    assert not (tmp_path / "out").exists()


def test_a_table_of_others_is_not_touched(url, audio, tmp_path):
    output = tmp_path / "out.parquet"
    output.write_bytes(b"PAR1 nothing")
    assert "found no Parquet" in complaint(audio, "--url", url, "--output", output)
    assert output.read_bytes() == b"PAR1 nothing"
    pq.write_table(pq.read_table(make_table(tmp_path)), output)
    assert "found no table of `sonorant embed`" in complaint(audio, "--url", url, "--output", output)


def make_table(folder: Path) -> Path:
    import pyarrow as pa

    pq.write_table(pa.table({"path": ["a"]}), folder / "other.parquet")
    return folder / "other.parquet"


def test_the_key_comes_from_a_file_or_the_environment(relay, audio, tmp_path):
    (tmp_path / "key").write_text(f"{KEY}\n")
    words = [audio / "a" / "00.wav", "--url", relay.url, "--output"]
    assert command(*words, tmp_path / "1", "--key-file", tmp_path / "key").returncode == 0
    assert relay.keys == {f"Bearer {KEY}"}
    assert command(*words, tmp_path / "2", SONORANT_API_KEY=KEY).returncode == 0
    assert relay.keys == {f"Bearer {KEY}"}
    relay.faults = [401] * 9
    assert "embed: the relay answers 401" in complaint(*words, tmp_path / "3", SONORANT_API_KEY=KEY)
    assert len(relay.faults) == 8
    (tmp_path / "key").unlink()
    assert all(KEY.encode() not in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())


def test_folders_lists_and_odd_names(url, audio, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(audio / "a" / "00.wav", os.fsencode(tmp_path) + b"/b\xff\n.wav")
    shutil.copy(audio / "a" / "00.wav", tmp_path / "näh me.wav")
    (tmp_path / "list.txt").write_text("näh me.wav\n\naudio/b\nnäh me.wav\n")
    (audio / "b" / "notes.txt").touch()
    (audio / "b" / ".hidden.wav").touch()
    odd = os.fsdecode(b"b\xff\n.wav")
    files = find_files([odd, "@list.txt", "audio/b/00.wav"])
    assert files == [odd, "näh me.wav", *(f"audio/b/{i:02d}.wav" for i in range(6))]
    assert len({name_of(file) for file in find_files(["audio"])}) == 12
    for output in (Path("out"), Path("out.parquet")):
        with Client(url) as client:
            assert embed_files(client, FRAMES, files, output, 2) == []
            assert embed_files(client, FRAMES, files, output, 2) == []
    paths = pq.read_table("out.parquet")["path"].to_pylist()
    assert paths == ["b\\xff\n.wav", *files[1:]]
