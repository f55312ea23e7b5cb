"""THE time grid. Every length, rate and offset in this project follows from the constants below.

The stem is seven unpadded convolutions. Together they make one frame from 400 samples (25 ms) every
320 samples (20 ms), so 16,000 samples make 49 frames, not 50: no other module may know this.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
from numpy.typing import NDArray

SAMPLE_RATE = 16_000  # Hz
STEM_KERNELS = (10, 3, 3, 3, 3, 2, 2)
STEM_STRIDES = (5, 2, 2, 2, 2, 2, 2)
HOP_SAMPLES = prod(STEM_STRIDES)  # 320
WINDOW_SAMPLES = 1 + sum((k - 1) * prod(STEM_STRIDES[:i]) for i, k in enumerate(STEM_KERNELS))  # 400
FRAME_RATE = SAMPLE_RATE / HOP_SAMPLES  # 50 Hz
FRAME_SECONDS = HOP_SAMPLES / SAMPLE_RATE  # 0.02 s
FRAME_MS = 1000 * HOP_SAMPLES // SAMPLE_RATE  # 20 ms


def num_frames(num_samples: int) -> int:
    """Frames that an utterance of `num_samples` makes; 0 where it is shorter than one window."""
    return max(0, (num_samples - WINDOW_SAMPLES) // HOP_SAMPLES + 1)


def num_samples(num_frames: int) -> int:
    """Fewest samples that make `num_frames` frames; 0 for none."""
    return WINDOW_SAMPLES + HOP_SAMPLES * (num_frames - 1) if num_frames > 0 else 0


def frame_centres(num_frames: int) -> NDArray[np.float64]:
    """Middle of each frame's window in seconds, (T,)."""
    return (np.arange(num_frames) * HOP_SAMPLES + WINDOW_SAMPLES / 2) / SAMPLE_RATE


def frames_within(start: float, end: float, num_frames: int) -> slice:
    """Of `num_frames` frames, those whose centre lies in the half-open span of seconds."""
    first, stop = np.searchsorted(frame_centres(num_frames), (start, end), side="left")
    return slice(int(first), int(stop))


def frame_labels(
    segments: Iterable[tuple[str, float, float]], num_frames: int, outside: str = "SIL"
) -> list[str]:
    """The label of the segment that holds each frame's centre, else `outside`.

    `segments` are (label, start, end) in seconds, half-open, in any order; where two overlap the later start
    wins.
    """
    labels = [outside] * num_frames
    centres = frame_centres(num_frames)
    for label, start, end in sorted(segments, key=lambda segment: segment[1]):
        first, last = np.searchsorted(centres, (start, end), side="left")
        labels[first:last] = [label] * int(last - first)
    return labels


def pack_waves(waves: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Waveforms end to end, each from a multiple of one hop on, so that all lie on one frame grid: (N,)."""
    parts = [part for wave in waves for part in (wave, np.zeros(-len(wave) % HOP_SAMPLES, np.float32))]
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def frame_starts(num_samples: Sequence[int]) -> NDArray[np.int64]:
    """First sample of every frame of waves packed by `pack_waves`, (F,)."""
    parts, start = [np.zeros(0, np.int64)], 0
    for count in num_samples:
        parts.append(start + HOP_SAMPLES * np.arange(num_frames(count)))
        start += -(-count // HOP_SAMPLES) * HOP_SAMPLES
    return np.concatenate(parts)


@dataclass(frozen=True)
class Ragged:
    """Sequences of different lengths laid end to end without padding, in one array of `total` rows."""

    lengths: tuple[int, ...]

    @classmethod
    def of_samples(cls, num_samples: Sequence[int]) -> Ragged:
        """The frames of utterances of so many samples each."""
        return cls(tuple(num_frames(n) for n in num_samples))

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """First row of each sequence."""
        return (
            tuple(int(o) for o in np.concatenate(([0], np.cumsum(self.lengths)[:-1]))) if self.lengths else ()
        )

    @cached_property
    def total(self) -> int:
        """Rows in all."""
        return sum(self.lengths)

    @cached_property
    def is_uniform(self) -> bool:
        """Whether all sequences have one length, so that rows can be viewed as (B, T)."""
        return len(set(self.lengths)) <= 1

    def slices(self) -> list[slice]:
        """Where each sequence lies."""
        return [slice(o, o + n) for o, n in zip(self.offsets, self.lengths, strict=True)]
