"""Audio: any rate, channels, bit depth and container that soundfile knows become 16 kHz mono, then standardised."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from fractions import Fraction
from math import isqrt
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from sonorant.config import EncoderConfig
from sonorant.data.frames import SAMPLE_RATE, STEM_KERNELS, STEM_STRIDES, WINDOW_SAMPLES

MAX_CHANNELS = 32  # of a stranger's file
MIN_RATE, MAX_RATE = 1_000, 384_000  # Hz, of a stranger's file
CONTAINERS = (
    b"RIFF",
    b"RF64",
    b"fLaC",
    b"OggS",
    b"ID3",
    b"FORM",
    b".snd",
    b"caff",
    b"riff",
)  # their first bytes
BLOCK_VALUES = 1 << 18  # decoded at a time, all channels together, or measured
STANDARD_EPS = 1e-5  # added to the variance
MAX_KERNEL_VALUES = 4_000_000  # of the resampling filter bank: 32 MB in float64

_CUT_OFF = re.compile(r"^\s*(?:data|SSND|Data Size)\s*: (\d+) \(should be (\d+)\)", re.MULTILINE)
_STREAMED_BYTES = 0x7F00_0000  # a writer that cannot seek back claims about 2 or 4 GiB
_UNKNOWN_FRAMES = 1 << 62  # libsndfile's word for a FLAC stream of which the writer did not say


class TooLongError(ValueError):
    """The audio goes on beyond the longest that is wanted."""


def read_wave(file: Path | BinaryIO, max_seconds: float | None = None) -> NDArray[np.float32]:
    """All samples of an audio file as 16 kHz mono, (S,); 1 is full scale.

    `max_seconds` is for a stranger's file. Nothing its header claims is believed: it is decoded block by
    block, no further than that, and must be finite, not empty, and of a container, a rate and a channel count
    that speech is recorded with.
    Raises ValueError where the file cannot be decoded or is cut off, TooLongError beyond `max_seconds`.
    """
    import soundfile  # here, for the training engine is used on machines that have it not

    name = str(file) if isinstance(file, Path) else "audio"
    try:
        with file.open("rb") if isinstance(file, Path) else nullcontext(file) as opened:
            if max_seconds is not None:
                _check_container(name, opened)
            with soundfile.SoundFile(Steady(opened)) as sound:
                if max_seconds is not None:
                    _check_header(name, sound)
                wave = _decode(name, sound, max_seconds)
                rate = int(sound.samplerate)
    except (soundfile.SoundFileError, OSError, TypeError) as error:
        raise _unreadable(name, getattr(error, "error_string", str(error))) from None
    if max_seconds is not None:
        if not len(wave):
            raise ValueError(f"{name}: found 0 samples, wanted at least one: send audio that is not empty")
        if not np.isfinite(wave).all():
            raise ValueError(f"{name}: found NaN or infinite samples, wanted finite ones: export the file again")
    return resample(wave, rate)


class Steady:
    """An open file in which no seek fails: where a damaged header leads to before its beginning it stays where it is.

    libsndfile's callbacks cannot raise; Python would write their traceback to the terminal.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        """All else is the file's own."""
        return getattr(self._file, name)

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go there if there is such a place."""
        try:
            return self._file.seek(offset, whence)
        except (OSError, ValueError, OverflowError):
            return self._file.tell()


def _unreadable(name: str, reason: str) -> ValueError:
    reason = " ".join(reason.split()).rstrip(".")
    return ValueError(f"{name}: found no readable audio ({reason}), wanted WAV, FLAC, Ogg or MP3: check the file")


def _check_container(name: str, file: BinaryIO) -> None:
    """Leave libsndfile's rarer parsers, some of which write to the terminal, to files of one's own."""
    start = file.read(4)
    file.seek(0)
    is_mp3 = len(start) > 1 and start[0] == 0xFF and start[1] >= 0xE0
    if not start.startswith(CONTAINERS) and not is_mp3:
        raise _unreadable(name, f"it begins with {start.hex(' ')}" if start else "no bytes")


def _check_header(name: str, sound: Any) -> None:
    if sound.channels > MAX_CHANNELS:
        raise ValueError(f"{name}: found {sound.channels} channels, wanted 1 to {MAX_CHANNELS}: mix it down first")
    if not MIN_RATE <= sound.samplerate <= MAX_RATE:
        raise ValueError(
            f"{name}: found a rate of {sound.samplerate} Hz, wanted {MIN_RATE} to {MAX_RATE} Hz: resample it first"
        )


def _decode(name: str, sound: Any, max_seconds: float | None) -> NDArray[np.float32]:
    """The mean of the channels, (S,) at the file's own rate."""
    sound.seekable = lambda: False  # soundfile seeks after each read, which fails at the end of a streamed FLAC
    blocks: list[NDArray[np.float32]] = []
    decoded, most = 0, None if max_seconds is None else max_seconds * sound.samplerate
    while len(block := sound.read(max(1, BLOCK_VALUES // sound.channels), dtype="float32", always_2d=True)):
        decoded += len(block)
        if most is not None and decoded > most:
            raise TooLongError(f"{name}: found more than {max_seconds:g} s, wanted at most {max_seconds:g} s: cut it")
        with np.errstate(over="ignore"):  # of absurd floats: infinite, and refused as such
            blocks.append(block[:, 0] if sound.channels == 1 else block.mean(axis=1, dtype=np.float32))
    claimed = [(int(c), int(h)) for c, h in _CUT_OFF.findall(sound.extra_info) if int(h) < int(c) < _STREAMED_BYTES]
    if claimed:
        raise ValueError(f"{name}: found {claimed[0][1]} bytes of {claimed[0][0]}, wanted all: the file was cut off")
    if sound.format in ("FLAC", "MP3") and decoded < sound.frames < _UNKNOWN_FRAMES:
        raise ValueError(f"{name}: found {decoded} samples of {sound.frames}, wanted all: the file was cut off")
    return np.concatenate(blocks) if blocks else np.zeros(0, np.float32)


def resample(wave: NDArray[np.float32], rate: int) -> NDArray[np.float32]:
    """`wave` (S,) at `rate` Hz, brought to 16 kHz by torchaudio's windowed sinc.

    Its filter bank holds the product of the two rates in lowest terms: 0.6 MB at 44.1 kHz, 5.6 GB at
    44,101 Hz. Where that is more than MAX_KERNEL_VALUES, the rate is taken for its nearest neighbour that
    needs less, at most 0.026 % away (a speaker's pitch wanders by more).
    """
    if rate == SAMPLE_RATE or not len(wave):
        return wave
    import torch
    import torchaudio.functional

    given, wanted = simple_ratio(rate, SAMPLE_RATE)
    resampled: NDArray[np.float32] = torchaudio.functional.resample(torch.from_numpy(wave), given, wanted).numpy()
    return resampled


def simple_ratio(rate: int, wanted: int) -> tuple[int, int]:
    """Two integers in the ratio of the rates, or nearly so, of product at most MAX_KERNEL_VALUES."""
    low, high = sorted((rate, wanted))
    ratio = Fraction(low, high)
    if ratio.numerator * ratio.denominator > MAX_KERNEL_VALUES:
        ratio = ratio.limit_denominator(isqrt(int(MAX_KERNEL_VALUES / ratio)))
    return ratio.as_integer_ratio() if rate == low else (ratio.denominator, ratio.numerator)


@dataclass(frozen=True, eq=False)
class Moments:
    """What an encoder's norms over time need to know of a recording, so that a window of it is heard as all of it is.

    mean and scale: of the samples, 0 and 1 where the encoder hears them as recorded; first_mean (10,) and
    first_covariance (10, 10): of the windows of the first convolution, where a GroupNorm follows it.
    """

    mean: float
    scale: float
    first_mean: NDArray[np.float64] | None = None
    first_covariance: NDArray[np.float64] | None = None


def measure(wave: NDArray[np.float32], config: EncoderConfig) -> Moments | None:
    """The moments of a recording (S,) that an encoder needs to hear its windows; None where it needs none.

    Works in blocks, so that memory does not grow with the recording. Raises ValueError where it is shorter than one
    frame's window.
    """
    check_wave(wave)
    grouped = config.stem_norm == "group"
    if not (config.standardised or grouped):
        return None
    moments = Moments(0.0, 1.0)
    if config.standardised:
        blocks = [wave[start : start + BLOCK_VALUES] for start in range(0, len(wave), BLOCK_VALUES)]
        mean = sum(block.sum(dtype=np.float64) for block in blocks) / len(wave)
        variance = sum(np.square(block - mean).sum() for block in blocks) / len(wave)
        moments = Moments(float(mean), float(np.sqrt(variance + STANDARD_EPS)))
    if not grouped:
        return moments
    kernel, stride = STEM_KERNELS[0], STEM_STRIDES[0]
    count = (len(wave) - kernel) // stride + 1
    rows = BLOCK_VALUES // kernel

    def heard() -> Iterator[NDArray[np.float64]]:
        for row in range(0, count, rows):
            part = wave[row * stride : (min(count, row + rows) - 1) * stride + kernel]
            part = standardise(part, moments) if config.standardised else part
            yield np.lib.stride_tricks.sliding_window_view(part, kernel)[::stride].astype(np.float64)

    first_mean = np.sum([windows.sum(0) for windows in heard()], 0) / count
    covariance = np.zeros((kernel, kernel))
    for windows in heard():
        windows -= first_mean
        covariance += windows.T @ windows
    return replace(moments, first_mean=first_mean, first_covariance=covariance / count)


def standardise(wave: NDArray[np.float32], moments: Moments | None = None) -> NDArray[np.float32]:
    """`wave` (S,) with mean 0 and (biased) variance 1 over the whole utterance, eps 1e-5
    (pretraining.md §0); where it is part of one, by that one's `moments`.
    """
    mean = wave.mean(dtype=np.float64) if moments is None else np.float64(moments.mean)
    centred: NDArray[np.float64] = wave - mean
    scale = np.sqrt(centred.var(dtype=np.float64) + STANDARD_EPS) if moments is None else np.float64(moments.scale)
    standardised: NDArray[np.float32] = (centred / scale).astype(np.float32)
    return standardised


def check_wave(wave: NDArray[np.float32]) -> None:
    """Raise ValueError where a wave is not mono or too short to make a frame."""
    if wave.ndim != 1 or len(wave) < WINDOW_SAMPLES:
        raise ValueError(
            f"wave: found shape {wave.shape}, wanted (samples,) with at least {WINDOW_SAMPLES} "
            f"({1000 * WINDOW_SAMPLES // SAMPLE_RATE} ms at 16 kHz): send longer audio"
        )
