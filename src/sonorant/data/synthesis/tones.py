"""A stand-in for speech: a pulse train and noise through formants.

Each phone is a distinct sound, but nobody would call it speech. It is there so that every step still runs,
where espeak-ng cannot be had, on audio whose phones and words are known exactly; what is measured on it says
nothing about speech.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sonorant.data.synthesis.voices import LEXICON, NUM_VOICES, VOICE_RATE, Span, Spoken

BLOCK = 220  # samples, 10 ms: the grid of the tones; phones begin and end on it
MURMUR = (200, 1000, 2300)  # Hz, formants behind a closed mouth


@dataclass(frozen=True)
class Part:
    """A stretch of a phone: formants in Hz, and how loud voice, breath and hiss (at `hiss_hz`) are."""

    share: float
    formants: tuple[int, int, int]
    voice: float = 0.0
    breath: float = 0.0
    hiss: float = 0.0
    hiss_hz: int = 4000


def _vowel(ms: int, *targets: tuple[int, int, int]) -> tuple[int, tuple[Part, ...]]:
    return ms, tuple(Part(1 / len(targets), target, voice=1.0) for target in targets)


def _sonorant(ms: int, formants: tuple[int, int, int], voice: float) -> tuple[int, tuple[Part, ...]]:
    return ms, (Part(1.0, formants, voice=voice),)


def _fricative(ms: int, hz: int, hiss: float, voice: float = 0.0) -> tuple[int, tuple[Part, ...]]:
    return ms, (Part(1.0, MURMUR, voice=voice, hiss=hiss, hiss_hz=hz),)


def _stop(ms: int, closure: float, hz: int, hiss: float, voice: float = 0.0) -> tuple[int, tuple[Part, ...]]:
    return ms, (Part(closure, MURMUR, voice=voice), Part(1 - closure, MURMUR, hiss=hiss, hiss_hz=hz))


# Vowel formants after Peterson & Barney (1952), men; the rest are textbook values.
SOUNDS: dict[str, tuple[int, tuple[Part, ...]]] = {
    "aa": _vowel(140, (730, 1090, 2440)),
    "ae": _vowel(130, (660, 1720, 2410)),
    "ah": _vowel(70, (560, 1300, 2400)),
    "ao": _vowel(140, (570, 840, 2410)),
    "aw": _vowel(160, (730, 1150, 2400), (450, 950, 2300)),
    "ay": _vowel(160, (730, 1200, 2400), (400, 2000, 2550)),
    "eh": _vowel(110, (530, 1840, 2480)),
    "er": _vowel(120, (490, 1350, 1690)),
    "ih": _vowel(80, (390, 1990, 2550)),
    "iy": _vowel(130, (270, 2290, 3010)),
    "ow": _vowel(140, (520, 950, 2400), (380, 800, 2300)),
    "uw": _vowel(130, (300, 870, 2240)),
    "l": _sonorant(65, (360, 1050, 2800), 0.6),
    "r": _sonorant(65, (340, 1150, 1550), 0.6),
    "w": _sonorant(65, (290, 620, 2200), 0.6),
    "y": _sonorant(60, (270, 2250, 3000), 0.6),
    "m": _sonorant(70, (250, 1100, 2200), 0.35),
    "n": _sonorant(65, (250, 1600, 2600), 0.35),
    "ng": _sonorant(75, (250, 2100, 2700), 0.35),
    "f": _fricative(90, 4200, 0.12),
    "s": _fricative(100, 6200, 0.5),
    "dh": _fricative(45, 3600, 0.06, voice=0.3),
    "v": _fricative(55, 4200, 0.06, voice=0.3),
    "z": _fricative(80, 6000, 0.3, voice=0.2),
    "hh": (70, (Part(1.0, (600, 1300, 2500), breath=0.3),)),
    "p": _stop(100, 0.7, 900, 0.25),
    "t": _stop(100, 0.6, 5000, 0.45),
    "k": _stop(105, 0.6, 1900, 0.35),
    "b": _stop(75, 0.8, 800, 0.25, voice=0.12),
    "d": _stop(75, 0.8, 4200, 0.35, voice=0.12),
    "g": _stop(80, 0.75, 1800, 0.3, voice=0.12),
    "jh": _stop(110, 0.45, 2900, 0.45, voice=0.12),
}
"""Usual length in ms and the parts of each phone of the lexicon."""


class ToneEngine:
    """Speaks in tones. Its voices differ in f0 and in the scale of their formants alone."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def say(self, words: Sequence[str], voice: int, speed: float, pitch: float) -> Spoken:
        """Speak `words`; see Engine."""
        place = voice / (NUM_VOICES - 1)
        f0 = 85 * (250 / 85) ** place * 2 ** (pitch / 4)
        # The golden ratio spreads the scales independently of f0.
        scale = 0.88 + 0.1 * place + 0.22 * (voice * 0.618034 % 1)
        phones: list[Span] = []
        spans: list[Span] = []
        parts: list[Part] = []
        for word in words:
            begin = len(parts) * BLOCK
            for phone in LEXICON[word]:
                ms, stretches = SOUNDS[phone]
                start = len(parts)
                num_blocks = max(4, round(ms / 10 / speed * self._rng.uniform(0.85, 1.15)))
                edges = np.round(np.cumsum([0, *(part.share for part in stretches)]) * num_blocks).astype(int)
                for part, (first, last) in zip(stretches, itertools.pairwise(edges), strict=True):
                    parts += [part] * int(last - first)
                phones.append((phone, start * BLOCK, len(parts) * BLOCK))
            spans.append((word, begin, len(parts) * BLOCK))
        return Spoken(self._render(parts, f0, scale), tuple(phones), tuple(spans))

    def _render(self, parts: Sequence[Part], f0: float, scale: float) -> NDArray[np.float64]:
        from scipy.ndimage import uniform_filter1d
        from scipy.signal import sosfilt

        def loudness(kind: str) -> NDArray[np.float64]:
            steps: NDArray[np.float64] = np.repeat([float(getattr(part, kind)) for part in parts], BLOCK)
            smooth: NDArray[np.float64] = uniform_filter1d(steps, BLOCK // 4)
            return smooth

        num_samples = len(parts) * BLOCK
        drift = 1 + 0.02 * np.sin(np.arange(num_samples) / 3000)
        phase = np.cumsum(f0 * np.linspace(1.08, 0.88, num_samples) * drift / VOICE_RATE)
        # A glottal pulse opens slowly and closes at once; the lips favour what is high.
        buzz = 4 * np.diff((phase % 1) ** 2, prepend=0.0)
        noise = self._rng.standard_normal((2, num_samples))
        excitation = loudness("voice") * buzz + loudness("breath") * noise[0]
        wave: NDArray[np.float64] = 0.3 * loudness("hiss") * noise[1]
        start = 0
        for part, run in itertools.groupby(parts):
            end = start + len(list(run)) * BLOCK
            centre = np.array([part.hiss_hz * scale])
            if part.hiss > 0:
                wave[start:end] = sosfilt(resonators(centre, 0.4 * centre), wave[start:end])
            start = end
        tracks = uniform_filter1d(np.array([part.formants for part in parts], np.float64) * scale, 3, axis=0)
        state = np.zeros((3, 2))
        for i, sections in enumerate(resonators(tracks, np.array([70, 100, 150]))):
            block = slice(i * BLOCK, (i + 1) * BLOCK)
            formed, state = sosfilt(sections, excitation[block], zi=state)
            wave[block] += formed
        wave *= 0.1
        return wave


def resonators(hz: NDArray[np.float64], width: NDArray[Any]) -> NDArray[np.float64]:
    """Second-order sections of resonators at `hz`, `width` Hz wide (Klatt 1980), (..., F, 6)."""
    radius = np.exp(-np.pi * width / VOICE_RATE)
    b = 2 * radius * np.cos(2 * np.pi * hz / VOICE_RATE)
    c = np.broadcast_to(-(radius**2), b.shape)
    zero, one = np.zeros_like(b), np.ones_like(b)
    sections: NDArray[np.float64] = np.stack([1 - b - c, zero, zero, one, -b, -c], axis=-1)
    return sections
