"""A canary: the candidate in a service of its own, tried out with real speech before production gets it."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sonorant.artifacts import read_record
from sonorant.config.release import CanaryConfig
from sonorant.params import parse_section
from sonorant.release.announcement import Status, conclude
from sonorant.release.service import CANARY, PRODUCTION, open_store, resolve

if TYPE_CHECKING:
    from sonorant.client import Client
    from sonorant.inference import Speech

Wave = NDArray[np.float32]
POLL_SECONDS = 1.0
ANSWER_SECONDS = 60.0


def stage(store: str, candidate: str, model: Path) -> str:
    """Fetch the candidate into the folder `model`, see that it works, then show it to the canary; its digest.

    Raises ValueError, the canary untouched, where it is no model that could serve.
    """
    shelf = open_store(store)
    if not candidate.startswith("model@"):
        raise ValueError(f"candidate: found {candidate!r}, wanted model@sha256:DIGEST or model@ALIAS: name one")
    shelf.fetch(candidate, model)
    digest = str(read_record(model, "model")["digest"])
    spell_noise(candidate, model)
    shelf.move(f"model@sha256:{digest}", CANARY)
    print(f"stage: model@{CANARY} is model@sha256:{digest}", flush=True)
    return digest


def spell_noise(candidate: str, model: Path) -> None:
    """Load the model and make units of a second of noise; ValueError where that cannot be done."""
    from safetensors import SafetensorError

    try:
        speech = opened(model)
        speech.units([np.random.default_rng(0).normal(0, 0.1, 16_000).astype(np.float32)])
    except (ValueError, LookupError, OSError, RuntimeError, SafetensorError) as error:
        fault = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"{candidate}: found a model that does not work ({fault}), wanted one that serves") from None


def opened(model: Path) -> Speech:
    """The published model in `model`, which must have a codebook."""
    from sonorant.inference import load

    speech = load(model)
    if not speech.num_units:
        raise ValueError(f"model {model}: found no codebook, wanted one to make units")
    return speech


def await_model(limits: Mapping[str, Any], url: str, digest: str) -> None:
    """Wait until the service at `url` reports that model, several times in a row, for it may have several pods.

    limits: a CanaryConfig's values. Raises ValueError after its wait_seconds.
    """
    config = parse(limits)
    deadline = time.monotonic() + config.wait_seconds
    found, num_reports = "nothing", 0
    while num_reports < config.num_reports:
        found = report_of(url)
        num_reports = num_reports + 1 if found == digest else 0
        if time.monotonic() > deadline:
            raise ValueError(
                f"{url}: found {found} after {config.wait_seconds:g} s, wanted the model {digest} from every pod: "
                "see what its container `follow` says"
            )
        # The same pods' next answers tell nothing new sooner.
        time.sleep(POLL_SECONDS / 10 if num_reports else POLL_SECONDS)
    print(f"{url}: serves {digest}", flush=True)


def report_of(url: str) -> str:
    """The digest of the service's first model, asked on a connection of its own, or why there was no answer."""
    from sonorant.client import Client, ServiceError

    try:
        with Client(url, timeout=10, retries=0) as client:
            return str(client.models()[0]["digest"])
    except ServiceError as error:
        return f"no answer ({error})"


def check(
    limits: Mapping[str, Any], speech: Path, model: Path, canary: str, production: str, incumbent: str
) -> dict[str, float]:
    """Send the same speech to the canary and to production by turns; what was measured, also printed on one line.

    Every answer must come, from the model in the folder `model` and from the digest `incumbent`; the canary's units
    must be what the model makes of the speech here, and its latency near production's. Where nothing is in production
    (incumbent "") it is not asked. speech: a corpus, whose test split is sent, or a folder of audio files.
    Raises ValueError at the first fault.
    """
    from sonorant.client import Client

    config = parse(limits)
    digest = str(read_record(model, "model")["digest"])
    here = opened(model)
    waves = draw_waves(speech, config)
    wanted = [here.units_long(wave) for _, wave in waves]
    asked = {"canary": (canary, digest)} | ({"production": (production, incumbent)} if incumbent else {})
    clients = {name: Client(url, timeout=ANSWER_SECONDS, retries=0) for name, (url, _) in asked.items()}
    latencies: dict[str, list[float]] = {name: [] for name in asked}
    num_equal = num_units = 0
    # The first round finds caches cold and is not counted.
    for turn in range(-1, config.num_requests):
        place = turn % len(waves)
        for name, client in clients.items():
            seconds, units = ask(name, client, asked[name][1], *waves[place])
            if turn < 0:
                continue
            latencies[name].append(seconds)
            if name == "canary":
                num_units += len(wanted[place])
                num_equal += int((units == wanted[place]).sum()) if len(units) == len(wanted[place]) else 0
    for client in clients.values():
        client.close()
    found = {"num_requests": float(config.num_requests), "equal_units": num_equal / num_units}
    found |= {f"{name}_p95_ms": 1000 * percentile(values, 0.95) for name, values in latencies.items()}
    print("check: " + ", ".join(f"{name} {value:.6g}" for name, value in found.items()), flush=True)
    judge_canary(config, found)
    return found


def judge_canary(config: CanaryConfig, found: Mapping[str, float]) -> None:
    """Raise ValueError where what was measured of the canary does not do."""
    if found["equal_units"] < config.min_equal_units:
        raise ValueError(
            f"canary: found {found['equal_units']:.2%} of its units equal to the model's own, wanted at least "
            f"{config.min_equal_units:.2%}: its weights, its precision or its code are others"
        )
    former = found.get("production_p95_ms", math.inf)
    bound = former * config.max_slowdown + config.slack_ms
    if found["canary_p95_ms"] > bound:
        raise ValueError(
            f"canary: found a 95th percentile of {found['canary_p95_ms']:.0f} ms, wanted at most {bound:.0f} ms "
            f"(production's is {former:.0f} ms): make it faster, or raise max_slowdown"
        )


def ask(name: str, client: Client, digest: str, utterance: str, wave: Wave) -> tuple[float, NDArray[np.int64]]:
    """How long the answer took, and the units (T,); ValueError where there is none or another model made it."""
    import soundfile

    from sonorant.client import ServiceError

    file = io.BytesIO()
    soundfile.write(file, wave, 16_000, format="WAV", subtype="FLOAT")
    start = time.perf_counter()
    try:
        answer = client.ask("units", file.getvalue(), {})
    except ServiceError as error:
        raise ValueError(f"{name}, {utterance}: {error}") from None
    seconds = time.perf_counter() - start
    if answer.head.get("digest") != digest:
        raise ValueError(
            f"{name}, {utterance}: found an answer of model {answer.head.get('digest')}, wanted {digest}: "
            "another release is under way, or not all pods follow"
        )
    return seconds, answer.arrays["units"]


def draw_waves(speech: Path, config: CanaryConfig) -> list[tuple[str, Wave]]:
    """At most num_requests utterances by name, evenly from a corpus's test split or a folder's files.

    What is too long or too short is left out; ValueError where nothing is left.
    """
    from sonorant.data.audio import read_wave
    from sonorant.data.corpus import CUTS, read_corpus
    from sonorant.data.frames import SAMPLE_RATE, num_frames

    if (speech / CUTS).is_file():
        drawn = spread(read_corpus(speech, "test"), config.num_requests)
        named = [(utterance.id, utterance.wave()) for utterance in drawn]
    else:
        from sonorant.client.inputs import find_files

        files = [Path(file) for file in spread(find_files([str(speech)]), config.num_requests)]
        named = [(file.name, read_wave(file)) for file in files]
    most = config.max_seconds * SAMPLE_RATE
    usable = [(name, wave) for name, wave in named if len(wave) <= most and num_frames(len(wave)) > 0]
    if not usable:
        raise ValueError(
            f"speech {speech}: found nothing of up to {config.max_seconds:g} s, wanted some: name other speech"
        )
    return usable


def spread(items: Sequence[Any], most: int) -> Sequence[Any]:
    """At most so many of the items, evenly spaced."""
    return [items[index * len(items) // most] for index in range(most)] if len(items) > most else items


def percentile(values: Sequence[float], share: float) -> float:
    """The least of the values that so large a share of them does not exceed."""
    return sorted(values)[math.ceil(share * len(values)) - 1]


def promote(limits: Mapping[str, Any], store: str, digest: str, url: str) -> None:
    """Put the model into production, and wait until the service at `url` reports it.

    Where it does not, production goes back to what it had, and ValueError says why.
    """
    shelf = open_store(store)
    former = resolve(store, f"model@{PRODUCTION}")
    shelf.move(f"model@sha256:{digest}", PRODUCTION)
    print(f"promote: model@{PRODUCTION} is model@sha256:{digest}", flush=True)
    try:
        await_model(limits, url, digest)
    except ValueError as error:
        if former in ("", digest):
            raise
        # Taken back, not moved back: a later rollback must not lead to this candidate.
        shelf.rollback(f"model@{PRODUCTION}")
        raise ValueError(f"{error}; model@{PRODUCTION} is model@sha256:{former} again") from None


def withdraw(store: str) -> None:
    """Let the canary follow what is in production, if anything is."""
    former, staged = (resolve(store, f"model@{alias}") for alias in (PRODUCTION, CANARY))
    if former and staged != former:
        open_store(store).move(f"model@sha256:{former}", CANARY)
        print(f"withdraw: model@{CANARY} is model@sha256:{former} again", flush=True)


def end(status: Status, store: str, pipeline: str, run: str) -> None:
    """Withdraw the canary, whatever became of it, and say how the run ended."""
    try:
        withdraw(store)
    finally:
        conclude(status, pipeline, run)


def parse(limits: Mapping[str, Any]) -> CanaryConfig:
    """The limits, checked."""
    config = parse_section("canary", CanaryConfig, limits)
    assert isinstance(config, CanaryConfig)
    return config
