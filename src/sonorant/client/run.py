"""Many files through the server at once: what is done is kept, what is refused is listed."""

from __future__ import annotations

import io
import itertools
import json
import queue
import sys
import threading
import time
import wave
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sonorant.client.service import Client, ServiceError
from sonorant.client.store import Folder, open_store, printable, written_whole

REFUSALS_OF_ALL = {401, 403, 404, 429}
"""Statuses that say nothing of the file."""
SECONDS_BETWEEN_CHECKS = 60.0
SECONDS_BETWEEN_LINES = 5.0
SHOWN_FAILURES = 20


@dataclass(frozen=True)
class Asked:
    """What is wanted of every file. kind: embeddings or units; options: as the server's query has them."""

    kind: str
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Failure:
    """A file without an answer, and why."""

    file: str
    error: ServiceError


def embed_files(client: Client, asked: Asked, files: Sequence[str], output: Path, num_jobs: int) -> list[Failure]:
    """Ask for every file that has no answer in `output` yet; those that were refused, in order.

    Raises ValueError where it makes no sense to go on: another server, other options, no key. What was finished by
    then is kept.
    """
    settings = settle(client, asked)
    with open_store(output, settings) as store:
        store.check_files(files)
        waiting = store.missing(files)
        if done := len(files) - len(waiting):
            say(f"{done} of {len(files)} files are done already")
        failures: list[Failure] = []
        try:
            with shown_progress(len(waiting)) as progress, Crew(client, asked, store, waiting, num_jobs) as crew:
                check = Check(client, settings, crew)
                for outcome in crew.outcomes():
                    if isinstance(outcome, Failure):
                        failures.append(outcome)
                    progress(0.0 if isinstance(outcome, Failure) else outcome.seconds)
                    check.add(outcome)
                check.make()
        except ServiceError as error:
            left = "what is finished is kept: run the same command again to go on"
            raise ValueError(f"{error}; {left}") from None
        finally:
            place = {file: index for index, file in enumerate(files)}
            failures.sort(key=lambda failure: place[failure.file])
            write_failures(store.failures, failures)
        failed = {failure.file for failure in failures}
        store.finish([file for file in files if file not in failed])
        return failures


def settle(client: Client, asked: Asked) -> dict[str, Any]:
    """All that answers depend on beside the audio, as the server understands it; ValueError where it refuses it.

    A little sound is sent, so that wrong options are one complaint and not one for every file.
    """
    start, end = asked.options.get("start"), asked.options.get("end")
    if end is not None and end <= (start or 0):
        raise ValueError(f"--end: found {end:g}, wanted more than --start, which is {start or 0:g}: correct it")
    sound = {name: value for name, value in asked.options.items() if name not in ("start", "end")}
    head = client.ask(asked.kind, short_sound(), sound).head
    card = find_card(client, head["model"])
    said = {name: head[name] for name in ("layer", "pooling", "normalise", "dim", "num_units") if name in head}
    settings = {"kind": asked.kind, "layer": card["layer"], **said, "model": head["model"], "digest": card["digest"]}
    settings["precision"] = card.get("precision")
    return settings | {name: asked.options.get(name) for name in ("deduplicate", "start", "end")}


def find_card(client: Client, name: str) -> dict[str, Any]:
    """What the server says of a model."""
    for card in client.models():
        if card["id"] == name:
            return card
    raise ValueError(f"{client.url}: found no model {name} any more, wanted it: name another --model")


def short_sound() -> bytes:
    """A tenth of a second of a buzz, as WAV."""
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(16_000)
        sound.writeframes(bytes(range(256)) * 13)  # 1664 samples, read as 16-bit
    return file.getvalue()


# ---------------------------------------------------------------------------------------------------- the crew


@dataclass(frozen=True)
class Success:
    """A file whose answer is kept, and how long it is."""

    file: str
    seconds: float


class Crew:
    """Threads that each take the next file, ask, and keep the answer."""

    def __init__(self, client: Client, asked: Asked, store: Folder, files: Sequence[str], num_jobs: int) -> None:
        self.client, self.asked, self.store, self.num_files = client, asked, store, len(files)
        self._waiting = iter(files)
        self._turn = threading.Lock()
        self._done: queue.SimpleQueue[Success | Failure | BaseException] = queue.SimpleQueue()
        self._stopped = threading.Event()
        # Daemons, for Ctrl-C shall not wait for answers.
        self._threads = [
            threading.Thread(target=self._work, daemon=True) for _ in range(min(num_jobs, self.num_files))
        ]

    def __enter__(self) -> Crew:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()

    def stop(self) -> list[str]:
        """Give up what is under way; the files that were finished and not told yet."""
        self._stopped.set()
        self.client.close()
        for thread in self._threads:
            thread.join(timeout=5)
        untold = []
        while not self._done.empty():
            if isinstance(outcome := self._done.get(), Success):
                untold.append(outcome.file)
        return untold

    def outcomes(self) -> Iterator[Success | Failure]:
        """What became of each file, as soon as it is known; an error that concerns them all is raised."""
        for _ in range(self.num_files):
            outcome = self._done.get()
            if isinstance(outcome, BaseException):
                raise outcome
            yield outcome

    def _work(self) -> None:
        while not self._stopped.is_set():
            with self._turn:
                file = next(self._waiting, None)
            if file is None:
                return
            try:
                self._done.put(self._ask(file))
            except BaseException as error:  # raised where the outcomes are read
                self._done.put(error)
                return

    def _ask(self, file: str) -> Success | Failure:
        asked_ns = time.time_ns()
        try:
            answer = self.client.ask(self.asked.kind, file, self.asked.options)
        except ServiceError as error:
            if self._concerns_all(error):
                raise
            return Failure(file, error)
        except OSError as error:
            message = f"audio: found it unreadable ({error.strerror or error}), wanted a file: check its permissions"
            return Failure(file, ServiceError(0, "unreadable", message))
        if not self._stopped.is_set():
            self.store.put(file, answer, asked_ns)
        return Success(file, answer.about["seconds"])

    def _concerns_all(self, error: ServiceError) -> bool:
        """Whether other files would meet the same."""
        if error.status in REFUSALS_OF_ALL or 300 <= error.status < 400 or error.code in ("bad_answer", "closed"):
            return True
        if error.status >= 500 or error.is_passing:
            # A server that answers others had trouble with this file.
            try:
                self.client.models()
            except ServiceError:
                return True
        return False


class Check:
    """Sees now and then that the model is still the same: answers do not say by which one they were made."""

    def __init__(self, client: Client, settings: Mapping[str, Any], crew: Crew) -> None:
        self.client, self.settings, self.crew = client, settings, crew
        self.unsure: list[str] = []
        self.last = time.monotonic()

    def add(self, outcome: Success | Failure) -> None:
        """An answer has come."""
        if isinstance(outcome, Success):
            self.unsure.append(outcome.file)
        if time.monotonic() - self.last > SECONDS_BETWEEN_CHECKS:
            self.make()

    def make(self) -> None:
        """ValueError where the model is another; answers since the last check are forgotten then."""
        if not self.unsure:
            return
        digest = find_card(self.client, self.settings["model"])["digest"]
        if digest != self.settings["digest"]:
            self.crew.store.drop([*self.unsure, *self.crew.stop()])
            raise ValueError(
                f"model {self.settings['model']}: found digest {digest}, wanted {self.settings['digest']} as when the "
                "run began: name another --output, or serve the former model again"
            )
        self.unsure, self.last = [], time.monotonic()


# ----------------------------------------------------------------------------------------------- what is shown


Progress = Callable[[float], None]
"""Called once a file, with the seconds of audio that were answered."""


def say(line: str) -> None:
    """A line for whoever watches."""
    print(f"embed: {line}", file=sys.stderr, flush=True)


@contextmanager
def shown_progress(num_files: int) -> Iterator[Progress]:
    """A bar in a terminal, a plain line every few seconds elsewhere, and at the end a summary."""
    started, heard, done = time.monotonic(), 0.0, itertools.count(1)

    def pace() -> str:
        return f"{heard / max(1e-3, time.monotonic() - started):.1f} audio-s/s"

    if not num_files:
        yield lambda _: None
        return
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("embed"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("files  {task.fields[pace]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("embed", total=num_files, pace="")

            def advance(seconds: float) -> None:
                nonlocal heard
                heard += seconds
                next(done)
                bar.update(task, advance=1, pace=pace())

            yield advance
    else:
        last = started

        def print_line(seconds: float) -> None:
            nonlocal heard, last
            heard += seconds
            count, now = next(done), time.monotonic()
            if now - last >= SECONDS_BETWEEN_LINES and count < num_files:
                last = now
                left = (now - started) / count * (num_files - count)
                say(f"{count}/{num_files} files, {pace()}, {left:.0f} s left")

        yield print_line
    say(f"{num_files} files, {heard:.0f} s of audio in {time.monotonic() - started:.1f} s, {pace()}")


def write_failures(path: Path, failures: Sequence[Failure]) -> None:
    """List the files that were refused, or remove an older list where none was."""
    if not failures:
        path.unlink(missing_ok=True)
        return
    with written_whole(path) as file:
        for failure in failures:
            error = failure.error
            said = {"status": error.status, "code": error.code, "message": error.message}
            line = {"path": printable(failure.file), **said, "request_id": error.request_id}
            file.write(json.dumps(line).encode() + b"\n")


def show_failures(failures: Sequence[Failure], listed: Path) -> None:
    """The first of them, and where all are listed."""
    for failure in failures[:SHOWN_FAILURES]:
        say(f"{printable(failure.file)}: {failure.error.message}")
    rest = len(failures) - SHOWN_FAILURES
    more = f"and {rest} more; " if rest > 0 else ""
    say(f"{more}{len(failures)} files have no answer, listed in {listed}; the same command tries them again")
