"""How a study's steps are run: who may work in a folder, what is said of a step that ends, and how it is ended."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sonorant.launch.stopping import Stop
from sonorant.studies import running
from sonorant.studies.plan import Work
from sonorant.studies.running import is_done, path_of, reason_of, run_all, runs_of, stop, taken

TONES = {"kind": "synthetic", "num_utterances": 3, "num_speakers": 3, "voice": "tones"}
HOLD = "import fcntl, sys; file = open(sys.argv[1], 'a'); fcntl.flock(file, fcntl.LOCK_EX); print(flush=True); input()"
STUBBORN = """
import signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.signal(15, signal.SIG_IGN); signal.pause()"])
print(child.pid, flush=True)
signal.pause()
"""


@contextmanager
def python(source: str, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """A program in a session of its own, as steps are."""
    command = [sys.executable, "-c", source, *words]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_two_studies_do_not_work_in_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "PATIENCE_SECONDS", 0.3)
    said: list[str] = []
    with python(HOLD, str(tmp_path / "lock")) as other:
        assert other.stdout
        other.stdout.readline()
        with pytest.raises(ValueError, match=r"found another one at work in .*, wanted none: wait for it or"):
            taken(tmp_path, said.append).__enter__()
    assert len(said) == 1
    assert said[0].startswith(f"another one is at work in {tmp_path}: waiting for its end")


def test_what_a_killed_study_has_left_is_waited_for(tmp_path: Path) -> None:
    said: list[str] = []
    with python(HOLD, str(tmp_path / "lock")) as other:
        assert other.stdout
        other.stdout.readline()
        end = threading.Timer(0.5, other.kill)
        end.start()
        with taken(tmp_path, said.append) as lock:
            assert other.poll() is not None or other.wait(10) is not None
            assert lock > 2
        end.join()
    assert len(said) == 1
    # Free now: no one is waited for.
    with taken(tmp_path, said.append):
        assert len(said) == 1


def test_why_a_step_ended(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"one: 1/2\nValueError: it is wrong \xff\n\n")
    assert reason_of(1, log) == "ValueError: it is wrong \N{REPLACEMENT CHARACTER}"
    assert reason_of(-signal.SIGKILL, log) == "ended by SIGKILL"
    log.write_text("\n")
    assert reason_of(1, log) == "it said nothing"


def is_running(pid: int) -> bool:
    """Whether there is such a process that is not yet done."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_step_that_does_not_end_is_killed_with_what_it_started() -> None:
    told = Stop()
    told.note(signal.SIGINT, None)
    told.note(signal.SIGINT, None)
    with python(STUBBORN) as process:
        assert process.stdout
        child = int(process.stdout.readline())
        stop([process], told)
        assert process.returncode == -signal.SIGKILL
        # The end of its output: nobody holds it any more.
        assert process.stdout.read() == b""
    deadline = time.monotonic() + 10
    while is_running(child):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_needs_a_failed_step_is_left_out(tmp_path: Path) -> None:
    good = Work("prepare", {"sources": [TONES], "num_workers": 1})
    bad = Work("prepare", {"sources": [{**TONES, "kind": "folder", "path": "nowhere"}]})
    units = Work("cluster", {"num_units": 4}, {"corpus": bad})
    encoder = Work("pretrain", {}, {"corpus": bad, "units": units})
    said: list[str] = []
    failed = run_all([bad, units, encoder, good], tmp_path, 2, said.append)
    assert set(failed) == {bad.key, units.key, encoder.key}
    assert len(set(failed.values())) == 1, "the reason is that of the step that failed"
    assert failed[bad.key].startswith("prepare: ")
    assert is_done(good, tmp_path)
    assert not runs_of(good, tmp_path).exists()
    assert said[0] == "4 pieces of work, 0 of them done before"
    assert len(said) == 3
    # Again, what has failed is tried again and nothing else.
    assert run_all([bad, units, encoder, good], tmp_path, 2, said.append) == failed
    assert said[3] == "4 pieces of work, 1 of them done before"
    assert len(said) == 5


def test_a_study_is_found_by_name_or_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "recipes" / "studies"
    folder.mkdir(parents=True)
    for path in (folder / "known.yaml", tmp_path / "mine.yaml"):
        path.touch()
    monkeypatch.chdir(tmp_path)
    assert path_of("known") == Path("recipes/studies/known.yaml")
    assert path_of("mine.yaml") == Path("mine.yaml")
    with pytest.raises(ValueError, match=r"found no study recipes, wanted a file or one of \['known'\]"):
        path_of("recipes")
