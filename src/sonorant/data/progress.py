"""How far work has come: a bar in a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Report = Callable[[int, int], None]
"""Called with how much is done and how much there is."""
SECONDS_BETWEEN_LINES = 5.0


@contextmanager
def shown_progress(title: str, noun: str) -> Iterator[Report]:
    """Show on stderr what is reported: `title`, and the `noun` of the things that are counted."""
    if not sys.stderr.isatty():
        yield print_lines(title, noun)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TextColumn(noun), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def print_lines(title: str, noun: str) -> Report:
    """A report that prints a line at most every few seconds, and one when all is done."""
    started = last = time.monotonic()
    before: int | None = None

    def report(done: int, total: int) -> None:
        nonlocal last, before
        now = time.monotonic()
        # What was done before this run says nothing of its speed.
        before = done if before is None else before
        if done > before and (done == total or now - last >= SECONDS_BETWEEN_LINES):
            last = now
            rate = (done - before) / max(now - started, 1e-3)
            rest = f", {(total - done) / rate:.0f} s left" if done < total else ""
            line = f"{title}: {done:.0f}/{total:.0f} {noun}, {rate:.1f} a second{rest}"
            print(line, file=sys.stderr, flush=True)

    return report
