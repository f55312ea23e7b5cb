"""Recordings in overlapping windows on the file's frame grid: all at once, or while the audio comes in."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sonorant.data.frames import HOP_SAMPLES, SAMPLE_RATE, num_frames, num_samples


@dataclass(frozen=True)
class Window:
    """A stretch of a recording that is heard by itself.

    samples: of the recording, what it hears; frames: of the recording, what it is kept for; kept: where those lie
    among the frames it makes.
    """

    samples: slice
    frames: slice
    kept: slice


@dataclass(frozen=True)
class Cut:
    """How a recording is cut, in frames of 20 ms: each window is kept for `step` of them.

    Its audio begins `before` frames earlier and ends `after` frames later, or where the recording does; the last
    window takes what is left, which is less than `step` + `after`. No window hears more than their sum, and none less
    than one frame's audio. A recording of at most `whole` frames is one window. Raises ValueError where `step` is
    below 1 or another below 0.
    """

    step: int
    before: int
    after: int
    whole: int = 0

    def __post_init__(self) -> None:
        for name, fewest in (("step", 1), ("before", 0), ("after", 0), ("whole", 0)):
            found = getattr(self, name)
            if found < fewest:
                raise ValueError(f"cut: found {name} {found}, wanted at least {fewest} frames: choose a longer one")

    def windows(self, num_samples: int) -> list[Window]:
        """The windows of a recording of so many samples, in order; none where it is too short for a frame.

        The last one hears it to its very end, with the samples that make no frame.
        """
        total = num_frames(num_samples)
        count = 0 if total <= self.whole else max(0, (total - self.after) // self.step)
        windows = [self.full(index) for index in range(count)]
        return [*windows, self.rest(count, num_samples)] if count * self.step < total else windows

    def full(self, index: int) -> Window:
        """The window of that number in a recording that goes on for long enough."""
        first, start = index * self.step, self._start(index)
        stop = first + self.step
        samples = slice(start * HOP_SAMPLES, start * HOP_SAMPLES + num_samples(stop + self.after - start))
        return Window(samples, slice(first, stop), slice(first - start, stop - start))

    def rest(self, index: int, num_samples: int) -> Window:
        """The window of that number as the last of a recording of so many samples."""
        first, start, stop = index * self.step, self._start(index), num_frames(num_samples)
        return Window(slice(start * HOP_SAMPLES, num_samples), slice(first, stop), slice(first - start, stop - start))

    def _start(self, index: int) -> int:
        return max(0, index * self.step - self.before)


LONG = Cut(step=1000, before=250, after=250, whole=num_frames(30 * SAMPLE_RATE))
"""For recordings that are there as a whole: 20 s with 5 s of context on both sides; up to 30 s in one piece.

Beyond, frames differ from those of one pass over all by 1 to 3 % of their spread and units agree for 98 to 99 % (tiny
encoders, real speech of 2 minutes), by 14 % and for 93 % where attention reaches far (the demo), and as much in the
middle of a window as at its borders, from 1 s of context on: it is attention that sees less. Units tell as much about
phones as those of one pass. benchmarks/windows.py long.
"""
STREAM = Cut(step=16, before=200, after=24)
"""For speech as it is spoken: 0.32 s at a time, 0.48 s later, after 4 s of what came before.

Costs about 12 times the computing of one pass over all. Of the demo's units 78 % agree with those of one pass, 67 % in
the first 2 s and 81 % after 10 s, for its codebook is centred and the mean is learnt on the way; with less context or
look-ahead fewer agree, with more hardly more. benchmarks/windows.py stream.
"""


class Listener:
    """Cuts a recording that is still coming in into the windows that `Cut.windows` cuts it into once it is there."""

    def __init__(self, cut: Cut = STREAM) -> None:
        assert cut.whole == 0, "whether a recording is short is not known before its end"
        self.cut = cut
        self._parts: list[NDArray[np.float32]] = []
        self._start = self._heard = self._index = 0
        self._finished = False

    @property
    def num_held(self) -> int:
        """Samples that are still needed."""
        return self._heard - self._start

    def feed(self, samples: NDArray[np.float32]) -> list[tuple[Window, NDArray[np.float32]]]:
        """Hear more of it, (S,) at 16 kHz: the windows that this completes, in order, each with its audio."""
        assert not self._finished, "a finished recording does not go on"
        assert samples.ndim == 1
        if len(samples):
            self._parts.append(np.array(samples, np.float32))
            self._heard += len(samples)
        windows = []
        while (window := self.cut.full(self._index)).samples.stop <= self._heard:
            windows.append(window)
            self._index += 1
        return self._with_audio(windows)

    def finish(self) -> list[tuple[Window, NDArray[np.float32]]]:
        """The recording has ended: the last window, if frames are left for it."""
        assert not self._finished, "a recording ends once"
        self._finished = True
        last = self.cut.rest(self._index, self._heard)
        return self._with_audio([last] if last.frames.start < last.frames.stop else [])

    def _with_audio(self, windows: list[Window]) -> list[tuple[Window, NDArray[np.float32]]]:
        if not windows:
            return []
        held, first = np.concatenate(self._parts), self._start
        found = [(w, held[w.samples.start - first : w.samples.stop - first].copy()) for w in windows]
        self._start = self._heard if self._finished else self.cut.full(self._index).samples.start
        self._parts = [held[self._start - first :].copy()]
        return found
