"""Being told to stop while others work."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """Whether and how this process was told to stop."""

    def __init__(self) -> None:
        self.signals: list[int] = []
        self.told = threading.Event()

    def __bool__(self) -> bool:
        return bool(self.signals)

    def note(self, number: int, frame: FrameType | None) -> None:
        """Take a signal."""
        del frame
        self.signals.append(number)
        self.told.set()

    def wait(self, seconds: float) -> bool:
        """Whether it was told to within so long."""
        return self.told.wait(seconds)

    def leave(self) -> None:
        """End as the step itself does when it is told to stop."""
        raise KeyboardInterrupt if signal.SIGTERM not in self.signals else SystemExit(0)


@contextmanager
def stop_requests() -> Iterator[Stop]:
    """SIGTERM and SIGINT are noted, instead of ending the process, while the context lasts."""
    stop = Stop()
    before = {number: signal.signal(number, stop.note) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
