"""A small model that computes real numbers from the wave, and the app around it."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile
from fastapi import FastAPI
from fastapi.testclient import TestClient
from numpy.typing import NDArray

from serving.app import create_app
from serving.settings import Settings
from sonorant.data.frames import HOP_SAMPLES, WINDOW_SAMPLES

Wave = NDArray[np.float32]


class FakeSpeech:
    """Statistics of each frame's window as its embedding, its loudness as its unit."""

    layer, num_layers, dim, num_units = 2, 3, 4, 10

    def __init__(self) -> None:
        self.about = {"digest": "0" * 8, "corpus": "none"}
        self.batches: list[int] = []
        self.may_run = threading.Event()
        self.may_run.set()

    def embed(self, waves: Sequence[Wave], layer: int | None = None) -> list[NDArray[np.float32]]:
        self.may_run.wait()
        self.batches.append(len(waves))
        return [self._frames(wave) * np.float32(1 + (self.layer if layer is None else layer)) for wave in waves]

    def units(self, waves: Sequence[Wave]) -> list[NDArray[np.int64]]:
        loudness = [frames[:, 1] / (1 + self.layer) for frames in self.embed(waves)]
        return [np.minimum(self.num_units - 1, (30 * rms).astype(np.int64)) for rms in loudness]

    def _frames(self, wave: Wave) -> NDArray[np.float32]:
        if len(wave) < WINDOW_SAMPLES:
            raise ValueError(f"wave: found {len(wave)} samples, wanted at least {WINDOW_SAMPLES}: send longer audio")
        windows = np.lib.stride_tricks.sliding_window_view(wave, WINDOW_SAMPLES)[::HOP_SAMPLES]
        rms = np.sqrt(np.square(windows, dtype=np.float64).mean(1))
        statistics = [windows.mean(1), rms, windows.max(1), (np.diff(np.sign(windows)) != 0).mean(1)]
        return np.stack(statistics, axis=1).astype(np.float32)


@pytest.fixture
def speech() -> FakeSpeech:
    return FakeSpeech()


@pytest.fixture
def app(speech: FakeSpeech) -> FastAPI:
    return create_app(speech, Settings(model=Path("artifacts/tiny"), max_file_seconds=5, max_queue_seconds=20))


@pytest.fixture
def client(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def patient_client() -> Iterator[TestClient]:
    """One app for many examples."""
    app = create_app(FakeSpeech(), Settings(max_file_seconds=5))
    with TestClient(app, raise_server_exceptions=False) as client:
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
