"""The embedding server against a plain FastAPI + transformers app with the same weights.

    python benchmarks/serving.py                              # HuBERT base: eighteen minutes on two cores
    python benchmarks/serving.py --size small --seconds 6     # seven
    python benchmarks/serving.py --only latency               # overload, and short requests behind long ones, alone

Needs the extras `serve` and `dev`. A model with random weights is published (base: 12 layers of 768, small: 6 of 384;
units from the middle layer, as HuBERT's of layer 6 of 12). The audio is recorded speech from ../shared/data where that
lies beside the checkout, else shaped noise. The plain app is what one writes in an afternoon: a `def` endpoint that
decodes with soundfile, runs `HubertModel` on the one file and assigns the nearest centroid; FastAPI's threads spread
requests over the cores, as many at once as there are cores, each with one torch thread.

All servers run throughout; each round asks one after the other, in closed loops of 1, 8 and 32 clients that send files
of 3 s (fixed) or 0.8 to 12 s (mixed), so that they share the machine's moods. A ratio is ours over the plain app's
requests a second, the median of rounds; `…_reduced` is the server with `--precision bfloat16`. The client's work is in
it: it runs on the same cores.

latency: (1) three times as many requests as can be served come at even intervals, each allowed two seconds: what is
admitted is answered by then, the rest gets 429. (2) Two clients send 1 s while four others send 30 s without a pause:
`short_behind_long` is the plain app's p99 of the short ones over ours.

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import itertools
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import torch

from sonorant.config import EncoderConfig
from sonorant.inference import SAMPLE_RATE, Codebook, Speech, load
from sonorant.models.encoder import Encoder
from sonorant.models.huggingface import save_encoder

ROOT = Path(__file__).resolve().parents[1]
SIZES = {
    "base": {"stem_channels": 512, "dim": 768, "num_layers": 12, "num_heads": 12, "ffn_dim": 3072},
    "small": {"stem_channels": 256, "dim": 384, "num_layers": 6, "num_heads": 6, "ffn_dim": 1536},
}
SHARED = {"stem_norm": "group", "pre_norm": False, "position_depth": 1, "position_kernel": 128, "position_groups": 16}
NUM_UNITS = 100
CLIENTS = (1, 8, 32)
WAV = {"Content-Type": "audio/wav"}
ALLOWED_SECONDS = 2.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20, help="that each load lasts in a round")
    parser.add_argument("--only", choices=("throughput", "latency"))
    parser.add_argument("--peer-threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--plain", type=Path, help=argparse.SUPPRESS)  # the peer's own process
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plain:
        serve_plainly(options.plain, options.port, options.peer_threads)
        return
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        recordings = Recordings(np.random.default_rng(0))
        publish(model, options.size, recordings)
        here = [sys.executable, str(Path(__file__).resolve())]
        commands = {
            "plain": [*here, "--plain", str(model), "--peer-threads", str(options.peer_threads)],
            "ours": [sys.executable, "-m", "serving", "--model", str(model)],
            "reduced": [sys.executable, "-m", "serving", "--model", str(model), "--precision", "bfloat16"],
        }
        with running(commands) as servers:
            check(servers, recordings, load(model))
            ratios: dict[str, float] = {}
            if options.only != "latency":
                ratios |= asyncio.run(throughput(servers, recordings, options.rounds, options.seconds))
            if options.only != "throughput":
                ratios |= asyncio.run(latency(servers, recordings, options.seconds))
            for server in servers.values():
                print(f"peak memory of {server.name}: {server.peak_bytes() / 2**20:.0f} MiB in all its processes")
    print(json.dumps({"benchmark": "serving", "size": options.size, "ratios": ratios}))


# ------------------------------------------------------------------------------------------------ model and audio


class Recordings:
    """Speech of any length, cut from recordings."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        files = sorted((ROOT.parent / "shared" / "data" / "timit_sample").rglob("*.flac"))
        files = files or sorted((ROOT.parent / "shared" / "data" / "timit_sample").rglob("*.wav"))
        if files:
            import soundfile

            parts = [soundfile.read(file, dtype="float32") for file in files[:60]]
            self.speech = np.concatenate([wave for wave, rate in parts if rate == SAMPLE_RATE and wave.ndim == 1])
        else:
            noise = rng.normal(0, 0.1, 60 * SAMPLE_RATE)
            self.speech = (noise * (1 + np.sin(np.arange(len(noise)) / 700))).astype(np.float32)

    def wave(self, seconds: float) -> np.ndarray:
        """A stretch from anywhere."""
        start = int(self.rng.integers(len(self.speech)))
        return np.take(self.speech, range(start, start + int(seconds * SAMPLE_RATE)), mode="wrap")

    def file(self, seconds: float) -> bytes:
        """The same as a WAV file."""
        import soundfile

        file = io.BytesIO()
        soundfile.write(file, self.wave(seconds), SAMPLE_RATE, format="WAV")
        return file.getvalue()

    def load(self, kind: str) -> list[bytes]:
        """What clients send in turn."""
        lengths = [3.0] * 64 if kind == "fixed" else self.rng.uniform(0.8, 12, 64).tolist()
        return [self.file(seconds) for seconds in lengths]


def publish(folder: Path, size: str, recordings: Recordings) -> None:
    """A model with random weights whose units are centroids of its own frames."""
    folder.mkdir()
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig.model_validate({**SIZES[size], **SHARED})).eval()
    layer = encoder.config.num_layers // 2
    save_encoder(encoder, folder, layer=layer)
    [frames] = Speech(encoder, layer).embed([recordings.wave(20)])
    chosen = np.random.default_rng(0).choice(len(frames), NUM_UNITS, replace=False)
    zeros, ones = np.zeros(frames.shape[1], np.float32), np.ones(frames.shape[1], np.float32)
    Codebook(frames[chosen], zeros, ones).save(folder / "codebook.safetensors")


# ------------------------------------------------------------------------------------------------------- servers


def serve_plainly(folder: Path, port: int, threads: int) -> None:
    """The peer: FastAPI, soundfile and transformers, one file a call."""
    import soundfile
    import uvicorn
    from anyio import to_thread
    from fastapi import Body, FastAPI
    from transformers import AutoFeatureExtractor, AutoModel

    torch.set_num_threads(1)
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    layer = json.loads((folder / "config.json").read_text())["sonorant"]["layer"]
    centroids = torch.from_numpy(Codebook.load(folder / "codebook.safetensors").centroids)
    app = FastAPI()

    @app.on_event("startup")
    async def limit() -> None:
        to_thread.current_default_thread_limiter().total_tokens = threads

    @app.get("/health/ready")
    async def ready() -> dict[str, str]:
        return {"status": "ready"}

    @app.post("/v1/units")
    def units(audio: bytes = Body(media_type="audio/wav")) -> dict[str, object]:
        wave, rate = soundfile.read(io.BytesIO(audio), dtype="float32")
        values = extractor(wave, sampling_rate=rate, return_tensors="pt").input_values
        with torch.inference_mode():
            frames = model(values, output_hidden_states=True).hidden_states[layer][0]
            found = torch.cdist(frames[None], centroids[None])[0].argmin(1)
        return {"results": [{"units": found.tolist()}]}

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


@dataclass
class Server:
    """A server in a process of its own."""

    name: str
    url: str
    process: subprocess.Popen[bytes]

    def peak_bytes(self) -> int:
        """The largest resident memory of its processes, added up."""
        listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(self.process.pid)], capture_output=True, text=True)
        total = 0
        for pid in (self.process.pid, *map(int, listed.stdout.split())):
            status = Path(f"/proc/{pid}/status").read_text()
            total += 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
        return total


@contextmanager
def running(commands: dict[str, list[str]]) -> Iterator[dict[str, Server]]:
    """The servers, once they are ready."""
    servers: dict[str, Server] = {}
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    variables["SONORANT_SERVE_LOG_FORMAT"] = "text"
    try:
        for name, command in commands.items():
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            process = subprocess.Popen(
                [*command, "--port", str(port)], cwd=ROOT, env=variables, stderr=subprocess.DEVNULL
            )
            servers[name] = Server(name, f"http://127.0.0.1:{port}", process)
        for server in servers.values():
            started = time.monotonic()
            while True:
                if server.process.poll() is not None or time.monotonic() - started > 120:
                    sys.exit(f"{server.name}: found no server that is ready, wanted one: run its command by hand")
                try:
                    if httpx.get(f"{server.url}/health/ready").status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                time.sleep(0.1)
        yield servers
    finally:
        for server in servers.values():
            server.process.send_signal(signal.SIGTERM)
        for server in servers.values():
            try:
                server.process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                server.process.kill()


def check(servers: dict[str, Server], recordings: Recordings, speech: Speech) -> None:
    """All give the same units: in float32 but for ties, reduced as far as random weights let them."""
    agreements: dict[str, list[float]] = {name: [] for name in servers}
    for seconds in (0.8, 3, 7, 12):
        body = recordings.file(seconds)
        import soundfile

        [expected] = speech.units([soundfile.read(io.BytesIO(body), dtype="float32")[0]])
        for name, server in servers.items():
            answer = httpx.post(f"{server.url}/v1/units", content=body, headers=WAV, timeout=120)
            answer.raise_for_status()
            agreements[name].append(float(np.mean(np.array(answer.json()["results"][0]["units"]) == expected)))
    for name, shares in agreements.items():
        print(f"units of {name} that equal sonorant.inference's in float32: {statistics.mean(shares):.4f}")
        if name != "reduced" and statistics.mean(shares) < 0.995:
            sys.exit(f"{name}: found other units than float32's, wanted the same")


# ------------------------------------------------------------------------------------------------------ loads


@dataclass
class Outcome:
    """What clients saw: seconds of each request that was answered, and how many of each status."""

    seconds: float = 0
    latencies: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)

    @property
    def rate(self) -> float:
        return len(self.latencies) / self.seconds

    def percentile(self, share: float) -> float:
        return float(np.percentile(self.latencies, 100 * share)) if self.latencies else float("nan")


async def ask(client: httpx.AsyncClient, body: bytes, outcome: Outcome, headers: dict[str, str] | None = None) -> None:
    """One request, counted."""
    started = time.monotonic()
    answer = await client.post("/v1/units", content=body, headers={**WAV, **(headers or {})})
    outcome.statuses[answer.status_code] += 1
    if answer.status_code == 200:
        outcome.latencies.append(time.monotonic() - started)


async def closed_loop(client: httpx.AsyncClient, bodies: Sequence[bytes], num_clients: int, seconds: float) -> Outcome:
    """So many clients, each sending its next file when it has its answer."""
    outcome, files = Outcome(), itertools.cycle(bodies)
    started = time.monotonic()

    async def one() -> None:
        while time.monotonic() - started < seconds:
            await ask(client, next(files), outcome)

    await asyncio.gather(*(one() for _ in range(num_clients)))
    outcome.seconds = time.monotonic() - started
    return outcome


def connect(server: Server) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx.AsyncClient(base_url=server.url, timeout=300, limits=limits)


async def throughput(
    servers: dict[str, Server], recordings: Recordings, num_rounds: int, seconds: float
) -> dict[str, float]:
    """Requests a second, and how ours compare."""
    loads = {kind: recordings.load(kind) for kind in ("fixed", "mixed")}
    found: dict[tuple[str, str], list[Outcome]] = {}
    keys = [(kind, count) for kind in loads for count in CLIENTS]
    for number in range(num_rounds):
        for kind, count in keys:
            for name, server in servers.items():
                async with connect(server) as client:
                    await closed_loop(client, loads[kind][:1], 1, 0.1)
                    outcome = await closed_loop(client, loads[kind], count, seconds)
                found.setdefault((f"{kind}_c{count}", name), []).append(outcome)
                print(f"round {number + 1}: {kind}_c{count} {name}: {outcome.rate:.2f} requests/s", file=sys.stderr)
    print(f"\n{'load':10} {'server':8} {'requests/s':>10} {'ratio':>6} {'p50 ms':>8} {'p99 ms':>8}")
    ratios = {}
    for key in dict.fromkeys(key for key, _ in found):
        for name in servers:
            outcomes = found[key, name]
            ratio = statistics.median(
                ours.rate / plain.rate for ours, plain in zip(outcomes, found[key, "plain"], strict=True)
            )
            rate = statistics.median(outcome.rate for outcome in outcomes)
            p50, p99 = (1000 * statistics.median(o.percentile(q) for o in outcomes) for q in (0.5, 0.99))
            print(f"{key:10} {name:8} {rate:10.2f} {ratio:6.2f} {p50:8.0f} {p99:8.0f}")
            if name != "plain":
                ratios[key + ("_reduced" if name == "reduced" else "")] = round(ratio, 3)
    return ratios


async def latency(servers: dict[str, Server], recordings: Recordings, seconds: float) -> dict[str, float]:
    """Overload, and short requests behind long ones."""
    ours, plain = servers["ours"], servers["plain"]
    bodies = recordings.load("fixed")
    async with connect(ours) as client:
        rate = (await closed_loop(client, bodies, 8, seconds)).rate
        outcome, tasks = Outcome(), []
        for number in range(int(3 * rate * 2 * seconds)):
            headers = {"X-Request-Timeout": str(ALLOWED_SECONDS)}
            tasks.append(asyncio.create_task(ask(client, bodies[number % len(bodies)], outcome, headers)))
            await asyncio.sleep(1 / (3 * rate))
        await asyncio.gather(*tasks)
    statuses = ", ".join(f"{count} × {status}" for status, count in sorted(outcome.statuses.items()))
    print(f"\noverload, three times {rate:.1f} requests/s, each allowed {ALLOWED_SECONDS:g} s: {statuses}; ", end="")
    print(f"answered within p50 {outcome.percentile(0.5):.2f} s, p99 {outcome.percentile(0.99):.2f} s")
    short, long = [recordings.file(1.0)], [recordings.file(30.0)]
    tails = {}
    for server in (plain, ours):
        async with connect(server) as client:
            asked = await asyncio.gather(
                closed_loop(client, short, 2, 3 * seconds), closed_loop(client, long, 4, 3 * seconds)
            )
        tails[server.name] = asked[0].percentile(0.99)
        print(
            f"1 s files beside 30 s ones, {server.name}: {asked[0].rate:.2f} and {asked[1].rate:.2f} requests/s, "
            f"short p50 {asked[0].percentile(0.5):.2f} s, p99 {tails[server.name]:.2f} s"
        )
    return {
        "overload_p99_over_allowed": round(outcome.percentile(0.99) / ALLOWED_SECONDS, 3),
        "short_behind_long": round(tails["plain"] / tails["ours"], 2),
    }


if __name__ == "__main__":
    main()
