"""What a run says of itself while it lasts, and how it is asked to stop."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from types import FrameType

from sonorant.training.distributed import Ranks


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that SIGTERM and SIGINT are added to instead of ending the process."""
    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        seen.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Pace:
    """How fast it goes and how long it will take."""

    def __init__(self, first_update: int, num_updates: int) -> None:
        self.first, self.num_updates = first_update, num_updates
        self.start, self.seconds = time.monotonic(), 0.0

    def add(self, seconds: float) -> None:
        """Count audio that an update has seen."""
        self.seconds += seconds

    def show(self, update: int) -> str:
        """Audio-seconds per second and the time left."""
        elapsed = time.monotonic() - self.start
        left = elapsed / max(1, update - self.first) * (self.num_updates - update)
        return f"  {self.seconds / elapsed:.1f} audio-s/s  ETA {int(left // 60)}:{int(left % 60):02d}"

    def summary(self, update: int) -> str:
        """The whole run in one line."""
        elapsed = time.monotonic() - self.start
        done = update - self.first
        hours, rate = self.seconds / 3600, self.seconds / elapsed
        return f"{done} updates, {hours:.2f} h of audio in {elapsed:.0f} s, {rate:.1f} audio-s/s"


def show(entry: Mapping[str, float]) -> str:
    """An entry's numbers on one line."""
    return "  ".join(f"{name} {value:.4g}" for name, value in entry.items())


def say(ranks: Ranks, line: str) -> None:
    """Print from the first rank alone."""
    if ranks.is_first:
        print(line, file=sys.stderr, flush=True)
