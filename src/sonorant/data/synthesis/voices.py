"""What speaks the built-in corpus: espeak-ng, or plain tones where it cannot be had.

Both know when each phone begins, name it in ARPAbet (39 phones and SIL) and have `NUM_VOICES` voices. An
`l` that closes a syllable ("small") is part of its vowel, for espeak-ng announces it only where the vowel
ends.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

EngineName = Literal["espeak", "tones"]
VOICE_RATE = 22_050  # Hz, espeak-ng's own; the tones follow it
Span = tuple[str, int, int]
"""(label, start, end) in samples."""

LEXICON = {
    word: tuple(phones.split())
    for word, phones in {
        "a": "ah", "is": "ih z", "above": "ah b ah v", "below": "b ih l ow", "to": "t ah", "the": "dh ah",
        "left": "l eh f t", "right": "r ay t", "of": "ah v", "small": "s m ao", "large": "l aa jh",
        "red": "r eh d", "orange": "ao r ih n jh", "yellow": "y eh l ow", "green": "g r iy n",
        "blue": "b l uw", "purple": "p er p l", "pink": "p ih ng k", "brown": "b r aw n",
        "black": "b l ae k", "white": "w ay t", "circle": "s er k l", "square": "s k w eh",
        "triangle": "t r ay ae ng g l", "diamond": "d ay m ah n d", "star": "s t aa", "cross": "k r ao s",
        "heart": "hh aa t",
    }.items()
}  # fmt: skip
"""How each word of the grammar is said; espeak-ng adds an r where "square" or "star" runs into a vowel."""
STOPS = frozenset(["p", "t", "k", "b", "d", "g", "ch", "jh"])
VOWELS = frozenset(["aa", "ae", "ah", "ao", "aw", "ay", "eh", "er", "ey", "ih", "iy", "ow", "oy", "uh", "uw"])

NUM_VOICES = 60


@dataclass(frozen=True)
class Spoken:
    """Speech in [-1, 1], (S,), and its phones, which follow each other without gaps, and words."""

    wave: NDArray[np.float64]
    phones: tuple[Span, ...]
    words: tuple[Span, ...]


class Engine(Protocol):
    """What speaks."""

    def say(self, words: Sequence[str], voice: int, speed: float, pitch: float) -> Spoken:
        """Speak `words` at VOICE_RATE in one of NUM_VOICES voices; speed 1 is usual, pitch -1 low, 1 high."""


def is_espeak_installed() -> bool:
    """Whether the `synthesis` extra is there."""
    return importlib.util.find_spec("espeakng_loader") is not None


@contextlib.contextmanager
def open_engine(name: EngineName, seed: int) -> Iterator[Engine]:
    """The engine, seeded: the same seed and then the same calls give the same samples."""
    if name == "tones":
        from sonorant.data.synthesis.tones import ToneEngine

        yield ToneEngine(seed)
    else:
        from sonorant.data.synthesis.espeak import open_espeak

        with open_espeak(seed) as engine:
            yield engine
