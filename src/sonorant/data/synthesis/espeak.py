"""espeak-ng through ctypes: its voices, and phone and word times exact to a sample.

It keeps state from one call to the next and threads corrupt it without a word, so: one engine in a process,
opened once, used by one thread. The library is GPL-3.0-or-later; it is never copied into this project.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sonorant.data.synthesis.voices import LEXICON, NUM_VOICES, STOPS, VOICE_RATE, VOWELS, Span, Spoken

# Voices without echo (it fills the closures), whisper, or robot effects; of near copies one.
VARIANTS = (
    "Alex", "Andrea", "Andy", "Annie", "Denis", "Diogo", "Gene", "Henrique", "Hugo", "Lee", "Mario",
    "Michael", "Mike", "Nguyen", "Reed", "Storm", "Tweaky", "adam", "anika", "antonio", "aunty",
    "belinda", "benjamin", "boris", "david", "ed", "edward", "f1", "grandma", "grandpa", "gustave", "ian",
    "iven3", "iven4", "john", "kaukovalta", "klatt3", "klatt4", "klatt6", "linda", "m1", "m3", "m4", "m5",
    "m6", "m7", "m8", "max", "michel", "mike2", "paul", "pedro", "quincy", "rob", "sandro", "shelby",
    "steph", "travis", "victor", "zac",
)  # fmt: skip
assert len(VARIANTS) == NUM_VOICES

PHONES = {
    "b": "b", "d": "d", "dʒ": "jh", "f": "f", "h": "hh", "j": "y", "k": "k", "l": "l", "m": "m", "n": "n",
    "p": "p", "s": "s", "t": "t", "tʃ": "ch", "v": "v", "w": "w", "z": "z", "ð": "dh", "ŋ": "ng",
    "ɡ": "g", "ɹ": "r", "ɾ": "d", "ʃ": "sh", "ʒ": "zh", "θ": "th", "əl": "l", "": "SIL", "aɪ": "ay",
    "aɪə": "ay", "aʊ": "aw", "eɪ": "ey", "i": "iy", "iː": "iy", "oʊ": "ow", "oːɹ": "ao", "uː": "uw",
    "æ": "ae", "ɐ": "ah", "ɑː": "aa", "ɑːɹ": "aa", "ɔ": "ao", "ɔː": "ao", "ɔɪ": "oy", "ɔːɹ": "ao",
    "ə": "ah", "ɚ": "er", "ɛ": "eh", "ɛɹ": "eh", "ɜː": "er", "ɪ": "ih", "ɪɹ": "ih", "ʊ": "uh", "ʊɹ": "uh",
    "ʌ": "ah", "ᵻ": "ih",
}  # fmt: skip
"""espeak-ng's IPA names for American English, without stress marks, and the phone each is folded into."""

# From espeak-ng's speak_lib.h.
SYNCHRONOUS, PHONEME_EVENTS, PHONEME_IPA, DONT_EXIT = 2, 0x1, 0x2, 0x8000
EVENT_END_OF_LIST, EVENT_PHONEME = 0, 7
RATE, PITCH = 1, 3
CHARACTERS, UTF8 = 1, 1


class EventId(ctypes.Union):
    """What an event names: eight bytes without a terminator where they are all used."""

    _fields_ = (("number", ctypes.c_int), ("name", ctypes.c_void_p), ("string", ctypes.c_ubyte * 8))


class Event(ctypes.Structure):
    """espeak_EVENT: `text_position` counts characters from 1, `sample` at VOICE_RATE."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", EventId),
    )


SynthCallback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(Event))


class EspeakEngine:
    """espeak-ng in this process. The same seed and then the same calls give the same samples."""

    def __init__(self, library: Path, data: Path, seed: int) -> None:
        self._variants = data / "voices" / "!v"
        self._library = ctypes.CDLL(str(library))
        options = PHONEME_EVENTS | PHONEME_IPA | DONT_EXIT
        rate = self._library.espeak_Initialize(SYNCHRONOUS, 0, bytes(data), options)
        if rate != VOICE_RATE:
            raise OSError(
                f"sample rate {rate} from the espeak-ng data {data} instead of {VOICE_RATE} "
                "(reinstall espeakng-loader or set voice: tones)"
            )
        self._audio: list[bytes] = []
        self._events: list[tuple[int, int, str]] = []
        self._callback = SynthCallback(self._hear)
        self._library.espeak_SetSynthCallback(self._callback)
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(seed))

    def say(self, words: Sequence[str], voice: int, speed: float, pitch: float) -> Spoken:
        """Speak `words`; see Engine."""
        variant = VARIANTS[voice]
        # The library takes an unknown variant for the plain voice and says nothing.
        if not (self._variants / variant).is_file():
            raise OSError(
                f"no voice {variant!r} in the espeak-ng data {self._variants} "
                "(reinstall espeakng-loader or set voice: tones)"
            )
        library, text = self._library, " ".join(words).encode()
        self._audio.clear()
        self._events.clear()
        results = (
            library.espeak_SetVoiceByName(f"en-us+{variant}".encode()),
            library.espeak_SetParameter(RATE, round(175 * speed), 0),
            library.espeak_SetParameter(PITCH, round(50 + 25 * pitch), 0),
            library.espeak_Synth(text, ctypes.c_size_t(len(text) + 1), 0, CHARACTERS, 0, UTF8, None, None),
        )
        assert not any(results), results
        pcm = np.frombuffer(b"".join(self._audio), np.int16)
        segments = fold(self._events, pcm)
        phones = tuple((s.label, s.start, s.end) for s in segments)
        return Spoken(pcm / 32768, phones, tuple(find_words(words, segments)))

    def _hear(self, wave: Any, num_samples: int, events: Any) -> int:
        if wave and num_samples:
            self._audio.append(ctypes.string_at(wave, 2 * num_samples))
        for event in events:
            if event.type == EVENT_END_OF_LIST:
                break
            if event.type == EVENT_PHONEME:
                name = bytes(event.id.string).split(b"\0")[0].decode()
                self._events.append((event.text_position, event.sample, name.strip("ˈˌ_:")))
        return 0


@dataclass
class Segment:
    """A phone in the making: `position` is that of its word in the text, from 1; start and end in samples."""

    label: str
    position: int
    start: int
    end: int


def fold(events: Sequence[tuple[int, int, str]], pcm: NDArray[np.int16]) -> list[Segment]:
    """The phones that espeak-ng's phoneme events (text position, sample, IPA name) stand for.

    Two habits of the library are put right. An `l` that closes a syllable goes to its vowel, at whose end it
    is announced. Silence at the end of a segment goes to the stop that follows: it is its closure. What then
    has no length is dropped.
    """
    segments: list[Segment] = []
    ends = [sample for _, sample, _ in events[1:]] + [len(pcm)]
    for i, ((position, start, name), end) in enumerate(zip(events, ends, strict=True)):
        follower = events[i + 1] if i + 1 < len(events) else (0, 0, "")
        closes = follower[0] != position or PHONES[follower[2]] not in VOWELS
        previous = segments[-1] if segments else None
        if name == "l" and closes and previous and previous.position == position and previous.label in VOWELS:
            previous.end = end
        else:
            segments.append(Segment(PHONES[name], position, start, end))
    # 40 dB below the mean level: closures are digital silence but for a few decaying samples.
    loud = np.abs(pcm.astype(np.float64)) > 0.01 * np.sqrt(np.mean(pcm.astype(np.float64) ** 2))
    for before, stop in itertools.pairwise(segments):
        if stop.label in STOPS:
            sounding = np.flatnonzero(loud[before.start : before.end])
            before.end = stop.start = before.start + (int(sounding[-1]) + 1 if sounding.size else 0)
    return [segment for segment in segments if segment.end > segment.start]


def find_words(words: Sequence[str], segments: Sequence[Segment]) -> Iterator[Span]:
    """Where each word is. espeak-ng joins such as "of a" under the first of them: the lexicon parts these."""
    groups: dict[int, list[Segment]] = {}
    for segment in segments:
        if segment.label != "SIL":
            groups.setdefault(segment.position, []).append(segment)
    starts = [1 + sum(len(word) + 1 for word in words[:i]) for i in range(len(words))]
    for i, word in enumerate(words):
        own = groups[starts[i]]
        if i + 1 < len(words) and starts[i + 1] not in groups:
            num = len(LEXICON[word])
            own, groups[starts[i + 1]] = own[:num], own[num:]
        yield word, own[0].start, own[-1].end


@contextlib.contextmanager
def open_espeak(seed: int) -> Iterator[EspeakEngine]:
    """The installed library's engine; OSError where its files are not what they should be."""
    import espeakng_loader

    with short_path(Path(espeakng_loader.get_data_path())) as data:
        yield EspeakEngine(Path(espeakng_loader.get_library_path()), data, seed)


@contextlib.contextmanager
def short_path(folder: Path, most_bytes: int = 120) -> Iterator[Path]:
    """`folder`, or a short link to it: beyond about 160 bytes espeak-ng does not find its data."""
    if len(bytes(folder)) <= most_bytes:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="espeak-") as short:
        link = Path(short) / "data"
        link.symlink_to(folder.resolve(), target_is_directory=True)
        yield link
