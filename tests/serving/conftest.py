"""A small model that computes real numbers from the wave, and the app around it."""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile
import torch
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient
from numpy.typing import NDArray
from PIL import Image

from serving.app import create_app
from serving.settings import Settings
from sonorant.config import EncoderConfig, GroundingConfig
from sonorant.data.frames import HOP_SAMPLES, WINDOW_SAMPLES
from sonorant.inference import Codebook, Gallery, Picture
from sonorant.models.encoder import Encoder
from sonorant.models.grounding import Grounder, save_grounder
from sonorant.models.huggingface import save_encoder

Wave = NDArray[np.float32]
ROOT = Path(__file__).resolve().parents[2]


COLOURS = ("red", "green", "blue", "white", "black")


def jpeg(colour: str) -> bytes:
    """A picture of one colour."""
    file = io.BytesIO()
    Image.new("RGB", (48, 32), colour).save(file, "JPEG")
    return file.getvalue()


def make_gallery(dim: int, seed: int = 0) -> Gallery:
    """Images of one colour each, all but the last with a picture, with vectors of length one."""
    vectors = np.random.default_rng(seed).normal(size=(len(COLOURS), dim)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    pictures = [Picture(f"{colour}.png", "test", (f"a {colour} thing",)) for colour in COLOURS]
    with tempfile.TemporaryDirectory() as folder:
        small = [jpeg(colour) if colour != COLOURS[-1] else None for colour in COLOURS]
        Gallery(vectors, pictures).save(Path(folder), small)
        gallery = Gallery.load(Path(folder))
    assert gallery is not None
    return gallery


class FakeSpeech:
    """Statistics of each frame's window as its embedding, its loudness as its unit; their means find an image."""

    layer, num_layers, dim, num_units = 2, 3, 4, 10
    precision, device, digest, config = "float32", "cpu", "0" * 8, None
    poolings = ("none", "mean")

    def __init__(self) -> None:
        self.about = {"provenance": {"corpus": "none"}}
        # Units are the loudness of the published layer, in ten steps.
        centroids = np.zeros((self.num_units, self.dim), np.float32)
        centroids[:, 1] = np.arange(self.num_units) / 10
        self.codebook = Codebook(centroids, np.zeros(4, np.float32), np.float32([0, 1, 0, 0]))
        self.grounder, self.gallery = SimpleNamespace(layer=1), make_gallery(self.dim)
        self.batches: list[int] = []
        self.may_run = threading.Event()
        self.may_run.set()

    def embed(self, waves: Sequence[Wave], layer: Any = None, _: object = None) -> list[NDArray[np.float32]]:
        self.may_run.wait()
        self.batches.append(len(waves))
        layer = self.layer if layer is None else layer
        size = 1 + layer if isinstance(layer, int) else sum(w * (1 + i) for i, w in enumerate(layer))
        return [self._frames(wave) * np.float32(size) for wave in waves]

    def units(self, waves: Sequence[Wave]) -> list[NDArray[np.int64]]:
        return [self.codebook.assign(frames) for frames in self.embed(waves)]

    def query(self, waves: Sequence[Wave]) -> NDArray[np.float32]:
        return np.stack([frames.mean(0) for frames in self.embed(waves, self.grounder.layer)])

    def device_bytes(self) -> int:
        return 0

    def _frames(self, wave: Wave) -> NDArray[np.float32]:
        if len(wave) < WINDOW_SAMPLES:
            raise ValueError(f"wave: found {len(wave)} samples, wanted at least {WINDOW_SAMPLES}: send longer audio")
        windows = np.lib.stride_tricks.sliding_window_view(wave, WINDOW_SAMPLES)[::HOP_SAMPLES]
        rms = np.sqrt(np.square(windows, dtype=np.float64).mean(1))
        statistics = [windows.mean(1), rms, windows.max(1), (np.diff(np.sign(windows)) != 0).mean(1)]
        return np.stack(statistics, axis=1).astype(np.float32)


@contextmanager
def ready_client(app: FastAPI) -> Iterator[TestClient]:
    """A client of an app that has warmed up."""
    with TestClient(app, raise_server_exceptions=False) as client:
        while client.get("/health/ready").status_code != 200:  # pytest's timeout ends it
            pass
        yield client


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """The app in a real server, in a thread of this process; its host and port."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:  # pytest's timeout ends it
            time.sleep(0.01)
        host, port = server.servers[0].sockets[0].getsockname()[:2]
        while httpx.get(f"http://{host}:{port}/health/ready").status_code != 200:
            time.sleep(0.01)
        yield f"{host}:{port}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def speech() -> FakeSpeech:
    return FakeSpeech()


@pytest.fixture
def app(speech: FakeSpeech) -> FastAPI:
    return create_app(Settings(max_file_seconds=5, max_queue_seconds=20), {"tiny": speech})


@pytest.fixture
def client(app: FastAPI) -> Iterator[TestClient]:
    with ready_client(app) as client:
        yield client


@pytest.fixture(scope="module")
def patient_client() -> Iterator[TestClient]:
    """One app for many examples."""
    app = create_app(Settings(max_file_seconds=5), {"tiny": FakeSpeech()})
    with ready_client(app) as client:
        yield client


@pytest.fixture(scope="session")
def wave() -> Wave:
    """1.5 s of noise that swells and fades: its units change and repeat."""
    noise = np.random.default_rng(0).normal(0, 1, 24_000)
    return (noise * (0.02 + 0.18 * np.sin(np.linspace(0, 2 * np.pi, 24_000)) ** 2)).astype(np.float32)


Encode = Callable[..., bytes]


@pytest.fixture(scope="session")
def encode() -> Encode:
    """A wave as the bytes of an audio file."""

    def encode(wave: Wave, rate: int = 16_000, format: str = "WAV", subtype: str | None = None) -> bytes:
        file = io.BytesIO()
        soundfile.write(file, wave, rate, format=format, subtype=subtype)
        return file.getvalue()

    return encode


def publish(folder: Path, seed: int = 0, num_images: int = 0) -> Path:
    """An untrained model of 3 layers × 32, published by hand, with or without images."""
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    config = EncoderConfig(
        stem_channels=16, dim=32, num_layers=3, num_heads=2, ffn_dim=64, position_groups=4, position_kernel=3
    )
    save_encoder(Encoder(config), folder, layer=2, **({"num_images": num_images} if num_images else {}))
    if num_images:
        save_grounder(Grounder(32, 3, GroundingConfig(layer=1, dim=8), with_images=False), folder)
        vectors = np.random.default_rng(seed).normal(size=(num_images, 8)).astype(np.float32)
        pictures = [Picture(f"{row}.png", "train", (f"{COLOURS[row % 5]}",) * (row % 2)) for row in range(num_images)]
        Gallery(vectors, pictures).save(folder, [jpeg(COLOURS[row % 5]) if row else None for row in range(num_images)])
    centroids = np.random.default_rng(seed).normal(size=(7, 32)).astype(np.float32)
    Codebook(centroids, np.zeros(32, np.float32), np.ones(32, np.float32)).save(folder / "codebook.safetensors")
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `sonorant publish` writes it."""
    return publish(tmp_path_factory.mktemp("artifacts") / "model")


class RunningServer:
    """`python -m serving` in a process of its own, on a free port."""

    def __init__(self, model: Path | str, folder: Path, variables: Mapping[str, str]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.folder = folder
        self._log = folder / "server.log"
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "serving", "--model", str(model), "--port", str(self.port)],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT / "src"), **variables},
                stderr=log,
                stdout=log,
            )

    def wait(self) -> None:
        """Until it is ready."""
        while True:  # pytest's timeout ends it
            assert self.process.poll() is None, self.log()
            try:
                if httpx.get(f"{self.url}/health/ready").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.05)

    def log(self) -> str:
        return self._log.read_text()

    def workers(self) -> list[int]:
        """The processes that run the model."""
        listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(self.process.pid)], capture_output=True, text=True)
        return [int(pid) for pid in listed.stdout.split()]

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def stop(self) -> str:
        """Stop it in order; what it wrote."""
        self.signal(signal.SIGTERM)
        # uvicorn shuts down in order, then ends by the signal it was sent.
        assert self.process.wait(timeout=60) in (0, -signal.SIGTERM), self.log()
        return self.log()


RunServer = Callable[..., RunningServer]


@pytest.fixture
def run_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunServer]:
    """Starts servers, and ends those that are left. Keywords are environment variables."""
    servers: list[RunningServer] = []

    def start(model: Path | str, wait: bool = True, **variables: str) -> RunningServer:
        server = RunningServer(model, tmp_path_factory.mktemp("server"), variables)
        servers.append(server)
        if wait:
            server.wait()
        return server

    yield start
    for server in servers:
        server.process.kill()
        server.process.wait()
