"""A study's work done: so many steps at once, each a process of its own; what is done is not done again."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from sonorant.launch.processes import end_with_parent
from sonorant.launch.stopping import Stop, stop_requests
from sonorant.params import read_params
from sonorant.studies.plan import OUTPUTS, Work, ordered, plan_study, read_study

TICK_SECONDS = 0.2
PATIENCE_SECONDS = 30.0
"""For a step that was told to stop to write its checkpoint, and for one that was left by a study that was killed."""
Say = Callable[[str], None]


def place_of(work: Work, folder: Path) -> Path:
    """Where what it makes lies."""
    return folder / "work" / work.key


def runs_of(work: Work, folder: Path) -> Path:
    """Where it keeps what outlives a kill. Each has its own: arms that write the same in other words make the same."""
    return folder / "runs" / work.key


def is_done(work: Work, folder: Path) -> bool:
    """Whether it is there, whole: steps put it in place when it is."""
    return (place_of(work, folder) / "artifact.json").is_file()


def run_all(works: Sequence[Work], folder: Path, num_jobs: int, say: Say) -> dict[str, str]:
    """Do what is missing, in this order where inputs allow; returns, by key, why some of it could not be done.

    What needs something that failed is left out. Stopped at any instant, the same call goes on: finished work is kept,
    and steps that train go on from their checkpoints. Raises KeyboardInterrupt when told to stop, ValueError where the
    folder is another's; no step is left then.
    """
    import yaml

    for name in ("work", "logs"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    with taken(folder, say) as lock, stop_requests() as told:
        waiting = [work for work in works if not is_done(work, folder)]
        say(f"{len(works)} pieces of work, {len(works) - len(waiting)} of them done before")
        failed: dict[str, str] = {}
        running: dict[subprocess.Popen[bytes], tuple[Work, float]] = {}
        began, num_finished, num_missing = time.monotonic(), 0, len(waiting)

        def start(work: Work) -> None:
            config = folder / "work" / f"{work.key}.yaml"
            config.write_text(yaml.safe_dump({work.step: dict(work.values)}, sort_keys=False))
            with (folder / "logs" / f"{work.key}.log").open("ab") as log:
                # A session of its own: Ctrl-C reaches it through us alone.
                process = subprocess.Popen(
                    command_of(work, config, folder), env=environment(work, folder), stdin=subprocess.DEVNULL,
                    stdout=log, stderr=log, start_new_session=True, pass_fds=[lock],
                    preexec_fn=end_with_parent if sys.platform == "linux" else None,
                )  # fmt: skip
            running[process] = (work, time.monotonic())

        try:
            while (waiting or running) and not told:
                for work in [one for one in waiting if blocked_by(one, failed)]:
                    failed[work.key] = failed[blocked_by(work, failed)]
                    waiting.remove(work)
                ready = [one for one in waiting if all(is_done(need, folder) for need in one.inputs.values())]
                for work in ready[: num_jobs - len(running)]:
                    waiting.remove(work)
                    start(work)
                for process in [one for one in running if one.poll() is not None]:
                    work, since = running.pop(process)
                    num_finished += 1
                    minutes = (time.monotonic() - began) / num_finished * (len(waiting) + len(running)) / 60
                    line = f"[{num_finished}/{num_missing}, about {minutes:.0f} min left] {work.key}: "
                    line += f"{time.monotonic() - since:.0f} s"
                    if process.returncode or not is_done(work, folder):
                        failed[work.key] = reason_of(process.returncode, folder / "logs" / f"{work.key}.log")
                        line += f", failed: {failed[work.key]}"
                    else:
                        shutil.rmtree(runs_of(work, folder), ignore_errors=True)
                    say(line)
                told.wait(TICK_SECONDS if running else 0)
        finally:
            stop(list(running), told)
    if told:
        raise KeyboardInterrupt
    return failed


@contextlib.contextmanager
def taken(folder: Path, say: Say) -> Iterator[int]:
    """Nobody else works in the folder at the same time; yields a descriptor that holds it for whoever inherits it.

    Raises ValueError where another one stays.
    """
    with (folder / "lock").open("a") as file:
        until, is_said = time.monotonic() + PATIENCE_SECONDS, False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise ValueError(
                        f"study: found another one at work in {folder}, wanted none: wait for it or name another "
                        "--folder"
                    ) from None
            if not is_said:
                say(f"another one is at work in {folder}: waiting for its end, {PATIENCE_SECONDS:.0f} s at most")
                is_said = True
            time.sleep(TICK_SECONDS)
        yield file.fileno()


def blocked_by(work: Work, failed: Mapping[str, str]) -> str:
    """The key of an input that could not be made; empty where there is none."""
    return next((need.key for need in work.inputs.values() if need.key in failed), "")


def command_of(work: Work, config: Path, folder: Path) -> list[str]:
    """The step as a command line, which may as well be given by hand."""
    paths = {name: place_of(need, folder) for name, need in work.inputs.items()}
    paths[OUTPUTS[work.step]] = place_of(work, folder)
    given = [word for name, path in paths.items() for word in (f"--{name}", str(path))]
    return [sys.executable, "-m", "sonorant", work.step, "--config", str(config), *given]


def environment(work: Work, folder: Path) -> dict[str, str]:
    """One thread a process: as many steps run at once as there are cores for."""
    return {"OMP_NUM_THREADS": "1", **os.environ, "SONORANT_RUNS": str(runs_of(work, folder))}


def reason_of(code: int, log: Path) -> str:
    """Why a step ended: the last line of its log, unless somebody ended it."""
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    lines = log.read_text("utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")


def stop(processes: Sequence[subprocess.Popen[bytes]], told: Stop) -> None:
    """Have steps write their checkpoints and end; what does not, or all where told twice, is killed."""
    for process in processes:
        process.terminate()
    until = time.monotonic() + PATIENCE_SECONDS
    while any(one.poll() is None for one in processes) and time.monotonic() < until and len(told.signals) < 2:
        time.sleep(TICK_SECONDS / 4)
    for process in processes:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


# ------------------------------------------------------------------------------------------------ whole studies


def run_studies(
    names: Sequence[str],
    configs: Sequence[Path],
    overrides: Sequence[str],
    folder: Path,
    num_jobs: int,
    seeds: Sequence[int] | None,
) -> None:
    """Run studies by name or file, write each one's findings and the page of all that lie in the folder.

    Raises ValueError where a study or a section is not what it should be, before anything is run, and in the end where
    no run of a study has come through.
    """
    from sonorant.evaluation.report.study import as_markdown, as_text, render_studies
    from sonorant.steps.weigh import FILE, read_findings, weighed_of, write_findings

    paths: dict[str, Path] = {}
    for path in map(path_of, names):
        if paths.setdefault(path.stem, path) != path:
            raise ValueError(f"study: found two studies of the name {path.stem}, wanted one: rename a file")
    studies = {name: read_study(path) for name, path in paths.items()}
    common = read_params(configs, overrides)
    reports = {name: plan_study(study, paths[name].parent, common, seeds) for name, study in studies.items()}
    wanted = [work for runs in reports.values() for works in runs.values() for work in works]
    failed = run_all(ordered(wanted), folder, num_jobs, say)
    lost_studies = []
    for name, study in studies.items():
        done = [w for works in reports[name].values() for w in works if all(is_done(one, folder) for one in works)]
        lost = {
            run: next(failed[w.key] for w in works if w.key in failed)
            for run, works in reports[name].items()
            if any(work.key in failed for work in works)
        }
        if not done:
            lost_studies.append(f"{name} ({next(iter(lost.values()))})")
            continue
        weighed = weighed_of(study, name, [place_of(work, folder) for work in done], lost)
        (folder / "findings" / name).mkdir(parents=True, exist_ok=True)
        write_findings(folder / "findings" / name, weighed)
    found = [read_findings(path.parent) for path in sorted((folder / "findings").glob(f"*/{FILE}"))]
    if found:
        (folder / "study.html").write_text(render_studies(found))
        (folder / "study.md").write_text(as_markdown(found))
        for weighed in found:
            if weighed.name in studies:
                print(as_text(weighed))
        print(f"page: {folder / 'study.html'}")
    if lost_studies:
        raise ValueError(f"study: found no run that came through of {', '.join(lost_studies)}: mend that")


def say(line: str) -> None:
    """Progress, beside what the command prints."""
    print(f"study: {line}", file=sys.stderr, flush=True)


def path_of(name: str) -> Path:
    """The file of a study: one of recipes/studies below this folder, or the path itself."""
    for path in (Path("recipes") / "studies" / f"{name}.yaml", Path(name)):
        if path.is_file():
            return path
    known = sorted(path.stem for path in Path("recipes/studies").glob("*.yaml"))
    raise ValueError(f"study: found no study {name}, wanted a file or one of {known}: check it, or go to the checkout")
