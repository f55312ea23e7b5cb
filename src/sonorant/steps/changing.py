"""How far units change where what is said does not: an utterance faster, higher, in noise or in a room."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from sonorant.data.audio import standardise
from sonorant.data.corpus import Utterance, read_waves
from sonorant.data.frames import SAMPLE_RATE
from sonorant.data.perturbation import change_pitch, change_speed
from sonorant.data.progress import shown_progress
from sonorant.evaluation.intervals import Estimate, ratio_of_sums
from sonorant.evaluation.units import count_edits
from sonorant.inference import Speech

Wave = NDArray[np.float32]
SPEED, SEMITONES, SNR_DB, REVERBERATION = 1.1, 2.0, 10.0, 0.4
DIRECT_TO_TAIL = 1.0
"""Energy of what comes straight over that of what the walls send back: a few metres away in a living room."""


def in_noise(wave: Wave, rng: np.random.Generator) -> Wave:
    """With white noise of so much less energy."""
    noise = rng.standard_normal(len(wave), dtype=np.float32)
    return standardise(wave) + np.float32(10 ** (-SNR_DB / 20)) * noise


def in_room(wave: Wave, rng: np.random.Generator) -> Wave:
    """With a tail of noise that falls by 60 dB in `REVERBERATION` seconds, as late reflections do; no longer."""
    seconds = np.arange(int(REVERBERATION * SAMPLE_RATE)) / SAMPLE_RATE
    tail = rng.standard_normal(len(seconds)) * 10 ** (-3 * seconds / REVERBERATION)
    tail[0] = 0
    response = tail / np.sqrt(np.square(tail).sum() * DIRECT_TO_TAIL)
    response[0] = 1
    size = len(wave) + len(response)
    heard = np.fft.irfft(np.fft.rfft(wave, size) * np.fft.rfft(response, size), size)
    return heard[: len(wave)].astype(np.float32)


def faster(wave: Wave, _: np.random.Generator) -> Wave:
    """Played `SPEED` times as fast."""
    return change_speed(wave, SPEED)


def higher_or_lower(wave: Wave, rng: np.random.Generator) -> Wave:
    """Another pitch at the same speed."""
    return change_pitch(wave, SEMITONES if rng.random() < 0.5 else -SEMITONES)


CHANGES: Mapping[str, Callable[[Wave, np.random.Generator], Wave]] = {
    "speed": faster,
    "pitch": higher_or_lower,
    "noise": in_noise,
    "room": in_room,
}
"""By the end of their scores' keys."""


def measure_changes(speech: Speech, utterances: Sequence[Utterance], seed: int, label: str) -> dict[str, Estimate]:
    """Of each change, units that differ over units, both without repeats: 0 where nothing changes.

    What is drawn for an utterance depends on the seed and its id alone.
    """
    edits: dict[str, dict[str, tuple[float, float]]] = {name: {} for name in CHANGES}
    with shown_progress(label, "utterances") as report:
        for place, (utterance, wave) in enumerate(zip(utterances, read_waves(utterances), strict=True), start=1):
            rng = np.random.default_rng([seed, zlib.crc32(utterance.id.encode())])
            plain, *changed = speech.units([wave, *(change(wave, rng) for change in CHANGES.values())])
            for name, units in zip(CHANGES, changed, strict=True):
                edits[name][utterance.id] = count_edits(plain, units)
            report(place, len(utterances))
    return {f"unit_edits_{name}": ratio_of_sums(parts) for name, parts in edits.items()}
