"""The pretraining component under torchrun: what it makes, how it fails, how it stops, what it leaves behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from kfp import dsl

import components
from sonorant.artifacts import read_record
from sonorant.config import SECTIONS, LaunchConfig, PretrainConfig, TrainConfig
from sonorant.launch import is_elsewhere
from sonorant.launch.processes import children_of, descendants_of
from sonorant.launch.torchrun import run_command
from sonorant.params import parse_section, read_params
from sonorant.steps import pretrain
from tests.running import journal_of
from tests.tiny import pretrain_values

ROOT = Path(__file__).resolve().parents[2]
TWO = {"launcher": "torchrun", "num_processes": 2.0, "num_gpus": 0.0}
"""As Kubeflow hands it over: its dict parameters have no whole numbers."""
ENDLESS = {"num_updates": 100_000, "checkpoint_every": 2, "log_every": 1000}
pytestmark = pytest.mark.usefixtures("runs")


def run_component(folder: Path, tone_corpus: dict[str, Path], values: dict[str, Any]) -> tuple[dsl.Model, dsl.Metrics]:
    """What the component makes of the corpus in `folder`."""
    encoder = dsl.Model(name="encoder", uri=str(folder / "encoder"))
    metrics = dsl.Metrics(name="metrics", uri=str(folder / "metrics"))
    inputs = {name: dsl.Dataset(name=name, uri=str(path)) for name, path in tone_corpus.items()}
    components.pretrain.python_func(values, **inputs, encoder=encoder, metrics=metrics)
    return encoder, metrics


def is_running(pid: int) -> bool:
    """Whether it is there, and has not merely not been waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def strangers() -> list[int]:
    """Children of this process that another test has started and still needs."""
    return children_of(os.getpid())


def assert_no_process_is_left(pids: list[int]) -> None:
    deadline = time.monotonic() + 20
    while left := [pid for pid in pids if is_running(pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def ranks_below(pid: int) -> tuple[list[int], int]:
    """The ranks that work below a process, in order, and torchrun, which started them."""
    for child in children_of(pid):
        if "sonorant.launch.ranks" in Path(f"/proc/{child}/cmdline").read_text():
            return sorted(children_of(child)), child
    raise AssertionError("no torchrun")


def wait_for_checkpoint(runs: Path) -> None:
    deadline = time.monotonic() + 100
    while not list(runs.glob("pretrain-*/checkpoint-*")):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextmanager
def meanwhile(runs: Path, act: Any) -> Iterator[list[int]]:
    """Do something to the processes below this one once they have written a checkpoint; all that came since."""
    seen: list[int] = []
    strangers = children_of(os.getpid())

    def wait_and_act() -> None:
        wait_for_checkpoint(runs)
        seen.extend(descendants_of(os.getpid(), but=strangers))
        act()

    thread = threading.Thread(target=wait_and_act)
    thread.start()
    yield seen
    thread.join(timeout=120)
    assert seen


def test_two_ranks_through_the_component_are_one_process(
    tone_corpus: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str], runs: Path
) -> None:
    encoder, metrics = run_component(tmp_path, tone_corpus, pretrain_values(launch=TWO))
    said = capfd.readouterr().err
    # The first rank's progress comes through as it is made; only that rank speaks.
    assert said.count("pretrain: 6/6 ") == 1
    found = pretrain(pretrain_values(), **tone_corpus, encoder=tmp_path / "one")
    one, two = (read_record(folder, "encoder") for folder in (tmp_path / "one", Path(encoder.path)))
    for key in ("step", "config", "inputs", "lineage", "libraries", "sonorant"):
        assert one[key] == two[key]
    # Sums over ranks are made in another order: as in test_ranks.
    assert metrics.metadata == pytest.approx(found, rel=1e-4, abs=1e-4)
    assert encoder.metadata["digest"] == two["digest"]
    for first, second in zip(journal_of(tmp_path / "one"), journal_of(Path(encoder.path)), strict=True):
        assert first == pytest.approx(second, rel=1e-4, abs=1e-4)
    assert list(runs.iterdir()) == []
    assert json.loads(Path(metrics.path).read_text()) == metrics.metadata


@pytest.mark.slow
def test_one_rank_under_torchrun_makes_the_same_bytes(tone_corpus: dict[str, Path], tmp_path: Path) -> None:
    run_component(tmp_path, tone_corpus, pretrain_values(launch={**TWO, "num_processes": "auto"}))
    pretrain(pretrain_values(), **tone_corpus, encoder=tmp_path / "one")
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert sorted(path.name for path in (tmp_path / "encoder").iterdir()) == files
    for name in files:
        assert (tmp_path / "encoder" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name


def test_a_failing_ranks_last_line_is_the_error(
    tone_corpus: dict[str, Path], tmp_path: Path, strangers: list[int]
) -> None:
    values = pretrain_values(guard={"after_updates": 0, "min_target_std": 99.0}, launch=TWO)
    with pytest.raises(ValueError, match=r"it has collapsed; lower optim\.learning_rate") as caught:
        run_component(tmp_path, tone_corpus, values)
    message = str(caught.value)
    # All ranks find the same; whichever ends first is named.
    assert re.match(r"pretrain: rank [01] exited with 1, its last words: pretrain: found teacher/target_std", message)
    assert "\n" not in message
    assert not (tmp_path / "encoder").exists()
    assert descendants_of(os.getpid(), but=strangers) == []


def test_a_killed_rank_is_named_and_none_is_left(tone_corpus: dict[str, Path], tmp_path: Path, runs: Path) -> None:
    with (
        meanwhile(runs, lambda: os.kill(ranks_below(os.getpid())[0][1], signal.SIGKILL)) as pids,
        pytest.raises(ValueError, match=r"^pretrain: rank 1 was ended by SIGKILL, .*goes on from the last checkpoint"),
    ):
        run_component(tmp_path, tone_corpus, pretrain_values(**ENDLESS, launch=TWO))
    assert len(pids) >= 3
    assert_no_process_is_left(pids)


@pytest.mark.slow
def test_no_rank_outlives_torchrun(tone_corpus: dict[str, Path], tmp_path: Path, runs: Path) -> None:
    with (
        meanwhile(runs, lambda: os.kill(ranks_below(os.getpid())[1], signal.SIGKILL)) as pids,
        pytest.raises(ValueError, match=r"^pretrain: torchrun exited with -9"),
    ):
        run_component(tmp_path, tone_corpus, pretrain_values(**ENDLESS, launch=TWO))
    assert_no_process_is_left(pids)


def test_time_that_is_up_ends_the_ranks(tone_corpus: dict[str, Path], tmp_path: Path, strangers: list[int]) -> None:
    values = pretrain_values(**ENDLESS, launch={**TWO, "hours": 2 / 3600})
    with pytest.raises(ValueError, match=r"^pretrain: found no end after launch.hours 0\.0005.*raise launch.hours"):
        run_component(tmp_path, tone_corpus, values)
    assert descendants_of(os.getpid(), but=strangers) == []


def test_processes_of_others_are_left_alone(tmp_path: Path) -> None:
    """Also those that a stranger has started: who calls a step in Python may have workers of its own."""
    stranger = subprocess.Popen(["sh", "-c", "sleep 100 & wait"], start_new_session=True)
    try:
        deadline = time.monotonic() + 20
        while not children_of(stranger.pid):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        [sleeper] = children_of(stranger.pid)
        command = ["sh", "-c", "sleep 100 & exit 3"]
        assert run_command(command, tmp_path / "report", hours=1, step="pretrain") == 3
        assert is_running(stranger.pid)
        assert is_running(sleeper)
    finally:
        os.killpg(stranger.pid, signal.SIGKILL)
        stranger.wait()


COMPONENT = """
import json, sys
from pathlib import Path
from tests.pipeline.test_launch import run_component
folder, corpus, units, values = sys.argv[1:]
run_component(Path(folder), {"corpus": Path(corpus), "units": Path(units)}, json.loads(values))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_a_stopped_component_keeps_a_checkpoint_and_is_tried_again(
    tone_corpus: dict[str, Path],
    tmp_path: Path,
    runs: Path,
    capfd: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    """Stopped, or killed: the ranks write a checkpoint, and one process goes on from there."""
    values = pretrain_values(**{**ENDLESS, "num_updates": 60}, optim={"learning_rate": 1e-4})
    words = [str(tmp_path), *map(str, tone_corpus.values()), json.dumps({**values, "launch": TWO})]
    process = subprocess.Popen([sys.executable, "-c", COMPONENT, *words], cwd=ROOT)
    try:
        wait_for_checkpoint(runs)
        pids = descendants_of(process.pid)
        assert len(pids) >= 3
        process.send_signal(number)
        assert process.wait(timeout=100) == (os.EX_TEMPFAIL if number == signal.SIGTERM else -number)
    finally:
        process.kill()
        process.wait()
    assert_no_process_is_left(pids)
    assert "pretrain: stopped at update" in capfd.readouterr().err
    pretrain(values, **tone_corpus, encoder=tmp_path / "encoder")
    assert "pretrain: resuming at update" in capfd.readouterr().err


def test_a_rank_is_not_launched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = LaunchConfig(launcher="torchrun")
    assert is_elsewhere(launch)
    assert not is_elsewhere(LaunchConfig())
    monkeypatch.setenv("RANK", "0")
    assert not is_elsewhere(launch)


@pytest.mark.parametrize(
    ("launch", "wanted"),
    [
        ({"num_processes": 2}, "launcher process does not go with num_processes 2: set launcher torchrun"),
        ({"launcher": "torchrun", "num_nodes": 2}, "launcher torchrun does not go with num_nodes 2: set launcher"),
        ({"launcher": "trainjob", "num_processes": 4, "num_gpus": 2}, "num_processes 4 exceeds num_gpus 2"),
        ({"launcher": "mpirun"}, "found 'mpirun', wanted 'process', 'torchrun' or 'trainjob'"),
        ({"num_processes": 0}, "num_processes.*found 0"),
    ],
)
def test_what_does_not_go_together_is_refused(launch: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ValueError, match=rf"^pretrain\.launch.*{wanted}"):
        parse_section("pretrain", PretrainConfig, pretrain_values(launch=launch))


@pytest.mark.parametrize(
    ("launch", "own", "processes"),
    [
        ({}, 1, 1),
        ({"num_gpus": 0}, 0, 1),
        ({"launcher": "torchrun", "num_gpus": 8}, 8, 8),
        ({"launcher": "trainjob", "num_gpus": 8, "num_nodes": 4}, 0, 8),
        ({"launcher": "trainjob", "num_gpus": 0, "num_processes": 2}, 0, 2),
    ],
)
def test_gpus_belong_to_whoever_works(launch: dict[str, Any], own: int, processes: int) -> None:
    config = LaunchConfig(**launch)
    assert (config.num_own_gpus, config.processes_per_node) == (own, processes)


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_section_is_handed_over_whole(recipe: Path) -> None:
    """What the dump leaves out included, and through JSON."""
    ((step, values),) = read_params([recipe]).items()
    values |= {"checkpointing": True, "launch": {"num_gpus": 7}}
    values["batching"]["micro_batches"] = 3
    section = parse_section(step, SECTIONS[step], values)
    again = SECTIONS[step].model_validate(json.loads(json.dumps(section.written())))
    assert again == section
    assert isinstance(again, TrainConfig)
    assert (again.checkpointing, again.batching.micro_batches, again.launch.num_gpus) == (True, 3, 7)
    assert "launch" not in section.model_dump()
