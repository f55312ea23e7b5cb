"""The server as it is run: a process, a port, a model on disk, a signal."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch

from serving.__main__ import main
from sonorant.config import EncoderConfig
from sonorant.inference import load, read_wave
from sonorant.models.codebook import Codebook
from sonorant.models.encoder import Encoder
from sonorant.models.huggingface import save_encoder

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model of 3 layers × 32, published by hand."""
    folder = tmp_path_factory.mktemp("artifacts") / "model"
    folder.mkdir()
    torch.manual_seed(0)
    config = EncoderConfig(
        stem_channels=16, dim=32, num_layers=3, num_heads=2, ffn_dim=64, position_groups=4, position_kernel=3
    )
    save_encoder(Encoder(config), folder, layer=2)
    centroids = np.random.default_rng(0).normal(size=(7, 32)).astype(np.float32)
    Codebook(centroids, np.zeros(32, np.float32), np.ones(32, np.float32)).save(folder / "codebook.safetensors")
    return folder


def test_serve_a_real_model_until_told_to_stop(model, wave, encode, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (tmp_path / "log").open("w+")
    server = subprocess.Popen(
        [sys.executable, "-m", "serving", "--model", str(model), "--port", str(port)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        stderr=log,
        stdout=log,
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            while True:  # pytest's timeout ends it
                assert server.poll() is None, (tmp_path / "log").read_text()
                try:
                    if client.get("/health/ready").status_code == 200:
                        break
                except httpx.ConnectError:
                    time.sleep(0.1)
            files = [("file", (f"{n}.wav", encode(wave[:n]))) for n in (24_000, 8_000, 400)]
            waves = []
            for _, (name, data) in files:
                (tmp_path / name).write_bytes(data)
                waves.append(read_wave(tmp_path / name, max_seconds=9))
            embeddings = client.post("/v1/embeddings?layer=1", files=files).json()["results"]
            units = client.post("/v1/units", files=files).json()["results"]
            speech = load(model)
            for result, expected in zip(embeddings, speech.embed(waves, layer=1), strict=True):
                # Both pack the same three waves and run the same kernels, up to the number of threads.
                np.testing.assert_allclose(result["embedding"], expected, atol=1e-5)
            assert [result["units"] for result in units] == [tokens.tolist() for tokens in speech.units(waves)]
            alone = client.post("/v1/units", content=files[1][1][1], headers={"Content-Type": "audio/wav"}).json()
            assert alone["results"][0]["units"] == units[1]["units"]
            assert client.get("/v1/models").json()["models"][0]["about"]["layer"] == 2
        server.send_signal(signal.SIGTERM)
        # uvicorn shuts down in order, then ends by the signal it was sent.
        assert server.wait(timeout=30) in (0, -signal.SIGTERM)
    finally:
        server.kill()
        server.wait()
        log.close()
    lines = (tmp_path / "log").read_text()
    assert "POST /v1/embeddings 200" in lines
    assert "Traceback" not in lines


@pytest.mark.parametrize(
    ("arguments", "variables", "words"),
    [
        (["--model", "nowhere"], {}, ["nowhere", "sonorant publish"]),
        (["--port", "99999"], {}, ["settings: port: found 99999", "65535"]),
        ([], {"SONORANT_SERVE_MAX_FILE_SECONDS": "soon"}, ["max_file_seconds: found 'soon'"]),
        ([], {"SONORANT_SERVE_MAX_QUEUE_SECONDS": "5"}, ["max_file_seconds 60 above max_queue_seconds 5"]),
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
