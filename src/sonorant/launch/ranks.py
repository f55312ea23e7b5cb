"""torchrun, which also says which rank failed and what it said last: `python -m sonorant.launch.ranks WORDS`.

The words are torchrun's own: `--nproc-per-node 2 -m sonorant pretrain …`. SIGTERM goes to the ranks, which take the
time they need to write a checkpoint, where torchrun would kill them after 30 seconds; the exit status is then
EX_TEMPFAIL, for a workflow must try again. The last words of a failed rank go where Kubernetes reads why a container
ended, or into the file that $SONORANT_REPORT names.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from sonorant.launch.processes import children_of, end_with_parent, tell
from sonorant.launch.stopping import Stop, stop_requests

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

REPORT = "SONORANT_REPORT"
TERMINATION_LOG = Path("/dev/termination-log")
"""What a container writes here, Kubernetes shows as the reason of its end."""
NUM_LINES = 8
"""Of a traceback or the like."""
WITNESS = "ranks: found one of"
"""How a rank that lost another begins, which is not to blame."""


def main(words: list[str]) -> None:
    """Run the ranks; exit with 1 where one fails, with EX_TEMPFAIL where they were stopped."""
    if REPORT in os.environ:
        end_with_parent()
    with stop_requests() as stop, TemporaryDirectory(prefix="ranks-") as logs:
        threading.Thread(target=pass_on, args=[stop], daemon=True).start()
        said = run_ranks(words, Path(logs))
        if stop:
            raise SystemExit(os.EX_TEMPFAIL)
    if said:
        if REPORT not in os.environ:
            print(said, file=sys.stderr)
        report = Path(os.environ.get(REPORT, TERMINATION_LOG))
        if REPORT in os.environ or report.exists():
            report.write_text(said)
        raise SystemExit(1)


def run_ranks(words: list[str], logs: Path) -> str:
    """Run torchrun to its end; empty, or one line on the rank that failed."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    os.environ.setdefault("TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE", "rank ${rank}: ")
    # SIGQUIT alone is torchrun's: the others are passed on by us.
    arguments = parse_args(  # type: ignore[no-untyped-call]
        ["--log-dir", str(logs), "--tee", "3", "--signals-to-handle", "SIGQUIT", *words]
    )
    try:
        run(arguments)  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        rank, failure = blamed(error.failures, logs)
        return describe(rank, failure, last_lines(logs, failure.local_rank))
    return ""


def pass_on(stop: Stop) -> None:
    """Tell every rank once, also those that are started later, to stop when this process is."""
    told: set[int] = set()
    stop.told.wait()
    while True:
        new = set(children_of(os.getpid())) - told
        tell(new, signal.SIGTERM)
        told |= new
        time.sleep(0.2)


def blamed(failures: dict[int, ProcessFailure], logs: Path) -> tuple[int, ProcessFailure]:
    """The rank that failed first: others end because of it, silent, as witnesses, or told by torchrun."""

    def innocence(item: tuple[int, ProcessFailure]) -> int:
        _, failure = item
        lines = last_lines(logs, failure.local_rank)
        if failure.exitcode < 0:
            return 4 if failure.exitcode == -signal.SIGTERM else 0
        return 3 if not lines else 2 if WITNESS in lines[-1] else 1

    return min(failures.items(), key=innocence)


def last_lines(logs: Path, local_rank: int) -> list[str]:
    """What a rank said last on stderr."""
    lines = [
        line
        for path in sorted(logs.glob(f"*/attempt_*/{local_rank}/stderr.log"))
        for line in path.read_text(errors="replace").splitlines()
        if line.strip()
    ]
    return lines[-NUM_LINES:]


def describe(rank: int, failure: ProcessFailure, lines: list[str]) -> str:
    """One line on how a rank ended."""
    how = f"was ended by {failure.signal_name()}" if failure.exitcode < 0 else f"exited with {failure.exitcode}"
    # A traceback says what happened in its last lines, an error of ours in one.
    is_traceback = any(line.startswith("Traceback ") for line in lines) or failure.exitcode < 0
    words = lines if is_traceback else lines[-1:]
    return f"rank {rank} {how}, its last words: {' | '.join(' '.join(line.split()) for line in words) or 'none'}"


if __name__ == "__main__":
    main(sys.argv[1:])
