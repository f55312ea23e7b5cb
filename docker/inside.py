"""What `docker/images.py test` runs inside an image, with the image's own Python: is all as it must be?"""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
import wave
from importlib.util import find_spec
from pathlib import Path
from typing import Any

COMPILERS = ("gcc", "cc", "c++", "g++", "clang", "ld", "as", "make", "nvcc")
FOR_TRAINING = ("kfp", "kubeflow", "kubernetes", "dvc", "lhotse", "numba", "scipy", "matplotlib", "triton")
TINY = """
prepare: {sources: [{kind: synthetic, num_utterances: 36, num_speakers: 9, dev_share: 0.25, test_share: 0.35}]}
cluster: {num_units: 8, num_restarts: 1}
pretrain:
  num_updates: 2
  phases: [{weights: {units: 1.0}}]
  encoder: {stem_channels: 16, dim: 32, num_layers: 3, num_heads: 2, ffn_dim: 64}
  teacher: {num_layers: 2}
  batching: {batch_seconds: 4.0, crop_seconds: 2.0}
"""


def check(holds: bool, thing: str, found: object, wanted: object) -> None:
    """End with one line where something is not as it must be."""
    if not holds:
        sys.exit(f"{thing}: found {found}, wanted {wanted}")
    print(f"ok: {thing}: {found}")


def run(*words: str, seconds: float = 200) -> None:
    """A command that must end well."""
    answer = subprocess.run(words, capture_output=True, text=True, timeout=seconds)
    said = (answer.stdout + answer.stderr).strip()
    check(answer.returncode == 0, " ".join(words[:3]), f"exit {answer.returncode}", f"exit 0: {said[-1500:]}")


def check_environment(read_only: bool, lacking: str) -> None:
    """Who runs here, what cannot be written, what no image may hold."""
    check(os.getuid() == 10001, "user", os.getuid(), 10001)
    if read_only:
        check(bool(os.statvfs("/").f_flag & os.ST_RDONLY), "root file system", "read-only", "read-only")
    compilers = [name for name in COMPILERS if shutil.which(name)]
    check(not compilers, "compilers", compilers, "none")
    checked = subprocess.run(
        ["pip", "--no-cache-dir", "--python", sys.executable, "check"], capture_output=True, text=True, timeout=120
    )
    said = [line for line in (checked.stdout + checked.stderr).splitlines() if "notice" not in line]
    check(said == [lacking], "pip check", said, [lacking])


def tone(seconds: float) -> bytes:
    """A WAV file: 440 Hz, 16 kHz."""
    samples = (int(9000 * math.sin(2 * math.pi * 440 * n / 16000)) for n in range(int(seconds * 16000)))
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(16000)
        out.writeframes(b"".join(sample.to_bytes(2, "little", signed=True) for sample in samples))
    return file.getvalue()


def wait_until_ready(server: subprocess.Popen[bytes], seconds: float) -> float:
    """How long the server took until it answers that it is ready."""
    begin = time.monotonic()
    while time.monotonic() - begin < seconds:
        if server.poll() is not None:
            sys.exit(f"server: found exit {server.returncode} at its start, wanted it running")
        try:
            urllib.request.urlopen("http://127.0.0.1:8000/health/ready", timeout=5).close()
            return time.monotonic() - begin
        except OSError:
            time.sleep(0.2)
    sys.exit(f"server: found not ready after {seconds} s, wanted ready")


def serve(image: dict[str, Any]) -> dict[str, float]:
    """The image's command, its health check, one embedding, an orderly end."""
    installed = [name for name in FOR_TRAINING if find_spec(name)]
    check(not installed, "training libraries", installed, "none")
    run("sonorant", "store", "--help")
    server = subprocess.Popen(image["command"])
    try:
        ready = wait_until_ready(server, 120)
        check(bool(image["health"]), "health check", image["health"], "a command")
        run(*image["health"])
        request = urllib.request.Request("http://127.0.0.1:8000/v1/embeddings", tone(1), {"Content-Type": "audio/wav"})
        begin = time.monotonic()
        with urllib.request.urlopen(request, timeout=60) as answer:
            [result] = json.load(answer)["results"]
        embedding = time.monotonic() - begin
        check(result["num_frames"] == 49, "frames of one second", result["num_frames"], 49)
        finite = all(math.isfinite(value) for frame in result["embedding"] for value in frame)
        check(finite, "embedding", "finite" if finite else "not finite", "finite")
        server.send_signal(signal.SIGTERM)
        # Drained in time; then uvicorn ends by the signal that it was sent.
        check(server.wait(45) in (0, -signal.SIGTERM), "server's end", server.returncode, "0 or SIGTERM")
    finally:
        server.kill()
    return {"ready_seconds": ready, "embedding_seconds": embedding}


def train() -> dict[str, float]:
    """The command line, then a corpus, its units and an encoder of two updates, in /runs."""
    run("sonorant", "--help")
    config = Path("/runs/tiny.yaml")
    config.write_text(TINY)
    times = {}
    steps = {"prepare": ["corpus"], "cluster": ["corpus", "units"], "pretrain": ["corpus", "units", "encoder"]}
    for step, names in steps.items():
        begin = time.monotonic()
        paths = [word for name in names for word in (f"--{name}", f"/runs/{name}")]
        run("sonorant", step, "--config", str(config), *paths)
        times[f"{step}_seconds"] = time.monotonic() - begin
    last = json.loads(Path("/runs/encoder/journal.jsonl").read_text().splitlines()[-1])
    check(last["update"] == 2, "updates", last["update"], 2)
    check(math.isfinite(last["loss"]), "loss", last["loss"], "finite")
    return times


def main() -> None:
    image = json.loads(sys.argv[1])
    check_environment(image["read_only"], image["lacking"])
    times = serve(image) if image["name"] == "serve" else train()
    print(json.dumps({name: round(seconds, 2) for name, seconds in times.items()}))


if __name__ == "__main__":
    main()
