"""Damaged audio, slow readers and clients that leave: never a 5xx, never a crash, and memory stays where it is."""

from __future__ import annotations

import asyncio
import io
import os
import socket
import struct
import time
from collections import Counter
from pathlib import Path

import httpx
import numpy as np
import pytest
import soundfile

from serving.schemas import ErrorEnvelope
from tests.serving.conftest import RunningServer, RunServer

FORMATS = [
    (form, subtype)
    for form, subtype in [
        ("WAV", "PCM_16"),
        ("WAV", "PCM_24"),
        ("WAV", "FLOAT"),
        ("WAV", "IMA_ADPCM"),
        ("WAVEX", "PCM_16"),
        ("RF64", "PCM_16"),
        ("FLAC", "PCM_16"),
        ("OGG", "VORBIS"),
        ("OGG", "OPUS"),
        ("AIFF", "PCM_16"),
        ("CAF", "ALAC_16"),
        ("AU", "ULAW"),
        ("W64", "PCM_16"),
        ("MP3", "MPEG_LAYER_III"),
    ]
    if soundfile.check_format(form, subtype)
]
LIES = [0, 1, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF, 192, 1_000_000, 384_001]
PATHS = ("/v1/units", "/v1/embeddings", "/v1/embeddings?pooling=mean")
SLACK_BYTES = 200 << 20
"""What allocators keep for later, bytes."""


class Damage:
    """Bodies that are nearly audio."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.whole: list[bytes] = []
        for index, (form, subtype) in enumerate(FORMATS):
            file = io.BytesIO()
            rate = 16_000 if index % 2 else 48_000
            wave = self.rng.normal(0, 0.1, (rate // 4, 1 + index % 2)).astype(np.float32)
            soundfile.write(file, wave, rate, format=form, subtype=subtype)
            self.whole.append(file.getvalue())

    def body(self) -> bytes:
        """One of: bits flipped, cut off, a header that lies, spliced with another, random, whole."""
        rng = self.rng
        body = bytearray(self.whole[rng.integers(len(self.whole))])
        kind = rng.integers(6)
        if kind == 0:
            for place in rng.integers(len(body), size=rng.integers(1, 20)):
                body[place] ^= 1 << rng.integers(8)
        elif kind == 1:
            del body[rng.integers(len(body)) :]
        elif kind == 2:
            for _ in range(rng.integers(1, 4)):
                place = int(rng.integers(min(len(body), 120) - 4))
                order = "<I" if rng.integers(2) else ">I"
                struct.pack_into(order, body, place, LIES[rng.integers(len(LIES))])
        elif kind == 3:
            other = self.whole[rng.integers(len(self.whole))]
            body[rng.integers(len(body)) :] = other[rng.integers(len(other)) :]
        elif kind == 4:
            body[4:] = rng.bytes(rng.integers(1, 5_000))
        return bytes(body)


def memory_of(server: RunningServer) -> int:
    """Resident bytes of the server and its workers."""
    pids = [server.process.pid, *server.workers()]
    pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
    return pages * os.sysconf("SC_PAGE_SIZE")


async def attack(server: RunningServer, num_bodies: int, num_clients: int, seed: int) -> Counter[int]:
    """Damaged bodies from so many clients; some read slowly, some leave in the middle."""
    damage, statuses = Damage(seed), Counter[int]()

    async def client(number: int) -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as http:
            for turn in range(num_bodies // num_clients):
                body, path = damage.body(), PATHS[turn % len(PATHS)]
                if number % 8 == 7:
                    await asyncio.to_thread(leave, server.port, path, body)
                    continue
                async with http.stream("POST", path, content=body, headers={"Content-Type": "audio/wav"}) as answer:
                    if number % 8 == 6:
                        await asyncio.sleep(0.05)
                    text = await answer.aread()
                statuses[answer.status_code] += 1
                if answer.status_code != 200:
                    assert "\n" not in ErrorEnvelope.model_validate_json(text).error.message

    await asyncio.gather(*(client(number) for number in range(num_clients)))
    return statuses


def leave(port: int, path: str, body: bytes) -> None:
    """Promise a body, send half or all of it, and be gone without reading the answer."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: audio/wav\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body[: len(body) // (1 + len(body) % 2)])
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def withstand(server: RunningServer, num_bodies: int, num_clients: int) -> None:
    """Attack twice: the second time memory must not grow any more."""
    asyncio.run(attack(server, max(200, num_bodies // 5), num_clients, seed=1))
    before = memory_of(server)
    statuses = asyncio.run(attack(server, num_bodies, num_clients, seed=2))
    assert set(statuses) <= {200, 400, 413, 429}, statuses
    assert statuses[200] > num_bodies // 20, statuses
    assert statuses[400] > num_bodies // 3, statuses
    deadline = time.monotonic() + 10
    while "sonorant_queue_audio_seconds 0.0" not in httpx.get(f"{server.url}/metrics").text:
        assert time.monotonic() < deadline, "audio is in hand that nobody waits for"
        time.sleep(0.1)
    assert memory_of(server) - before < SLACK_BYTES
    assert "Traceback" not in server.log()
    assert "sonorant_workers_lost_total 0.0" in httpx.get(f"{server.url}/metrics").text


def test_damaged_audio_from_many_clients(model, run_server: RunServer):
    withstand(run_server(model), 400, 16)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_thousand_damaged_bodies(model, run_server: RunServer):
    withstand(run_server(model), 10_000, 8)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_thousand_damaged_bodies_from_64_clients(model, run_server: RunServer):
    withstand(run_server(model), 10_000, 64)
