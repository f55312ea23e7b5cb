"""Speakers, and what lies between a mouth and a file: vocal tract, microphone, room and noise.

Rate and pitch alone make no differences that MFCC or a model would notice; warp, tilt, noise and room do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sonorant.config import Split
from sonorant.data.frames import SAMPLE_RATE
from sonorant.data.synthesis.voices import Span, Spoken


@dataclass(frozen=True)
class Speaker:
    """One voice and what lies between its mouth and the file."""

    name: str
    split: Split
    voice: int
    """Which of the engine's."""
    speed: float
    pitch: float
    """-1 to 1."""
    warp: int
    """Samples at 16 kHz made of 100 of the engine's; 73 leaves the voice as it is, fewer raise it."""
    tilt: float
    """First-order filter 1 - tilt·z⁻¹: above 0 brighter, below darker."""
    noise_colour: float
    """0 white, towards 1 more of the low."""
    decay: float
    """Seconds in which the room's sound falls by 60 dB."""
    distance_db: float
    """The direct sound over the room's."""
    room: int
    """Seed of the room's echoes."""


def record(spoken: Spoken, speaker: Speaker, rng: np.random.Generator) -> Spoken:
    """What a microphone at 16 kHz makes of `spoken`: warped, tilted, in a room, with noise at 5 to 25 dB.

    None of this delays the direct sound, so times stay exact to a sample; the wave is in [-1, 1].
    """
    from scipy.signal import fftconvolve, lfilter, resample_poly

    warped = resample_poly(spoken.wave, speaker.warp, 100)
    before, after = (int(n) for n in rng.integers(SAMPLE_RATE // 20, SAMPLE_RATE // 5, 2))
    clean = np.pad(lfilter([1.0, -speaker.tilt], [1.0], warped), (before, after))
    heard = fftconvolve(clean, room_response(speaker))[: len(clean)]
    noise = lfilter([1.0], [1.0, -speaker.noise_colour], rng.standard_normal(len(clean)))
    level = np.sqrt(np.mean(heard[before : before + len(warped)] ** 2))
    noise *= level * 10 ** (-rng.uniform(5, 25) / 20) / np.sqrt(np.mean(noise**2))
    wave = (heard + noise) * (10 ** (rng.uniform(-30, -20) / 20) / level)
    wave *= min(1.0, 0.97 / np.abs(wave).max())

    def moved(spans: Sequence[Span]) -> Iterator[Span]:
        for label, start, end in spans:
            yield label, before + round(start * speaker.warp / 100), before + round(end * speaker.warp / 100)

    return Spoken(wave, surround(list(moved(spoken.phones)), len(wave)), tuple(moved(spoken.words)))


def room_response(speaker: Speaker) -> NDArray[np.float64]:
    """The speaker's room: the direct sound, then from 2 ms on noise that decays, (R,) at 16 kHz."""
    rng = np.random.default_rng(speaker.room)
    times = np.arange(round(speaker.decay * SAMPLE_RATE)) / SAMPLE_RATE
    tail = rng.standard_normal(len(times)) * 10 ** (-3 * times / speaker.decay) * (times >= 0.002)
    response: NDArray[np.float64] = tail * 10 ** (-speaker.distance_db / 20) / np.sqrt(np.sum(tail**2))
    response[0] = 1.0
    return response


def surround(phones: Sequence[Span], num_samples: int) -> tuple[Span, ...]:
    """`phones` with SIL before and after them up to the ends of the file, and neighbouring SIL made one."""
    whole = [("SIL", 0, phones[0][1]), *phones, ("SIL", phones[-1][2], num_samples)]
    merged: list[Span] = []
    for label, start, end in whole:
        if label == "SIL" and merged and merged[-1][0] == "SIL":
            merged[-1] = ("SIL", merged[-1][1], end)
        elif end > start:
            merged.append((label, start, end))
    return tuple(merged)
