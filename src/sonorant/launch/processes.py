"""Processes below this one, from Linux's /proc: a rank of torchrun has a session of its own, so no group is all."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Collection, Iterator
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


def children_of(pid: int) -> list[int]:
    """Processes that it has started and that are not yet waited for."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += map(int, path.read_text().split())
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def descendants_of(pid: int, but: Collection[int] = ()) -> list[int]:
    """Its children, theirs, and so on; without some of its children and what these have started."""
    own = [child for child in children_of(pid) if child not in but]
    return [*own, *(deeper for child in own for deeper in descendants_of(child))]


@contextlib.contextmanager
def adopted_orphans() -> Iterator[None]:
    """Be the parent of descendants whose own parent dies, while the context lasts."""
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def end_with_parent() -> None:
    """Be told to stop when whoever started this process dies."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def tell(pids: Collection[int], number: int) -> None:
    """Send a signal to those that are still there."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def kill_all(pids: Collection[int], seconds: float = 10) -> None:
    """End processes at once, and wait, so long at most, until they are gone."""
    tell(pids, signal.SIGKILL)
    deadline = time.monotonic() + seconds
    left = set(pids)
    while left and time.monotonic() < deadline:
        for pid in tuple(left):
            # What was adopted is this process's to wait for; others' are gone when /proc forgets them.
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
            if not Path(f"/proc/{pid}").exists():
                left.discard(pid)
        time.sleep(0.01)
