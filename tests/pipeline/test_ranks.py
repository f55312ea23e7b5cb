"""Several ranks, or parts of an update, change nothing; a lost rank ends the run in one line."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from sonorant.params import read_params
from sonorant.steps import pretrain
from tests.running import begun, command, journal_of
from tests.tiny import ALL_TASKS, pretrain_values, with_changes

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
METHODS = sorted(path.stem for path in RECIPES.glob("*.yaml") if "pretrain" in read_params([path]))
LONG = 40
"""Updates of the runs that are interrupted: a few seconds."""
pytestmark = pytest.mark.usefixtures("runs")


def assert_same_curve(found: Path, wanted: Path) -> None:
    """One loss curve, but for rounding: sums over parts are made in another order.

    Measured: losses differ by 1e-6, gradients' norms by 2e-5 (they are sums of terms that cancel), cosines by 2e-5.
    """
    one, two = journal_of(found), journal_of(wanted)
    assert [entry["update"] for entry in one] == [entry["update"] for entry in two]
    for entry, other in zip(one, two, strict=True):
        assert entry == pytest.approx(other, rel=1e-4, abs=1e-4)


def run_ranks(folder: Path, values: dict[str, Any], tone_corpus: dict[str, Path], ranks: int) -> str:
    """The whole run on so many ranks; what it said."""
    answer = subprocess.run(
        command(folder, values, tone_corpus, ranks), capture_output=True, text=True, check=False, timeout=250
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stderr


# -------------------------------------------------------------------------------------------------- all tasks


def many_values(**changes: Any) -> dict[str, Any]:
    """Some tasks alone, then all together, weighed and watched; checkpoints fall between log entries."""
    rising = {"start": 0.0, "end": 1.0}
    phases = [
        {"share": 0.5, "weights": {"units": 1.0, "utterance": rising}},
        {"share": 0.125, "weights": {"codebooks": 1.0}},
        {"share": 0.375, "weights": dict.fromkeys(ALL_TASKS, 1.0)},
    ]
    whole = {"num_updates": 8, "checkpoint_every": 3, "log_every": 2, "phases": phases}
    return with_changes(
        pretrain_values(**whole, balance={"at": 2, "every": 4}, log_gradients=True), changes
    )


@pytest.fixture(scope="module")
def one_rank(tone_corpus: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of one batch an update."""
    encoder = tmp_path_factory.mktemp("one_rank") / "encoder"
    pretrain(many_values(), **tone_corpus, encoder=encoder, scratch=encoder.parent / "scratch")
    assert [entry["update"] for entry in journal_of(encoder)] == [2, 4, 5, 6, 8]
    return encoder


@pytest.mark.parametrize("parts", [2, 3])
def test_accumulated_micro_batches_are_one_batch(
    parts: int, one_rank: Path, tone_corpus: dict[str, Path], tmp_path: Path
) -> None:
    pretrain(many_values(batching={"micro_batches": parts}), **tone_corpus, encoder=tmp_path / "encoder")
    assert_same_curve(tmp_path / "encoder", one_rank)


@pytest.mark.parametrize("micro_batches", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_two_ranks_are_one_process_with_the_double_batch(
    micro_batches: int, one_rank: Path, tone_corpus: dict[str, Path], tmp_path: Path
) -> None:
    said = run_ranks(tmp_path, many_values(batching={"micro_batches": micro_batches}), tone_corpus, ranks=2)
    assert_same_curve(tmp_path / "encoder", one_rank)
    # Only the first rank speaks.
    assert said.count("pretrain: 8/8 ") == 1


@pytest.mark.parametrize("micro_batches", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_sharded_model_is_a_whole_one(micro_batches: int, tone_corpus: dict[str, Path], tmp_path: Path) -> None:
    """FSDP2 on two ranks, activations made again: losses, gradients and artifact are those of one process."""
    plain = {"balance": {"at": None, "every": 0}, "log_gradients": False, "optim": {"max_grad_norm": 1.0}}
    pretrain(many_values(**plain), **tone_corpus, encoder=tmp_path / "one")
    sharded = many_values(**plain, sharding="full", checkpointing=True, batching={"micro_batches": micro_batches})
    run_ranks(tmp_path, sharded, tone_corpus, ranks=2)
    assert_same_curve(tmp_path / "encoder", tmp_path / "one")
    files = {path.name for path in (tmp_path / "encoder").iterdir()}
    assert files == {path.name for path in (tmp_path / "one").iterdir()}


def test_parameters_that_no_loss_reaches_stop_no_rank(tone_corpus: dict[str, Path], tmp_path: Path) -> None:
    # The final norm, where heads read their own layers; codewords, where nothing chooses between them.
    values = pretrain_values(
        phases=[{"weights": {"codebooks": 1.0, "diversity": 0.1}}], codebooks={"num_codes": 6, "reads": "own"}
    )
    pretrain(values, **tone_corpus, encoder=tmp_path / "one")
    run_ranks(tmp_path, values, tone_corpus, ranks=2)
    assert_same_curve(tmp_path / "encoder", tmp_path / "one")


# ---------------------------------------------------------------------------------------------- every recipe


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_of_a_recipe_are_one(method: str, tone_corpus: dict[str, Path], tmp_path: Path) -> None:
    recipe = read_params([RECIPES / f"{method}.yaml", RECIPES / "sizes" / "tiny.yaml"])["pretrain"]
    values = with_changes(recipe, {"num_updates": 5, "balance": {"at": 2}})
    pretrain(values, **tone_corpus, encoder=tmp_path / "one")
    run_ranks(tmp_path, values, tone_corpus, ranks=2)
    assert_same_curve(tmp_path / "encoder", tmp_path / "one")


# ----------------------------------------------------------------------------------------------- interrupted


def children(pid: int) -> list[int]:
    """Processes that it started, in order."""
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False).stdout
    return sorted(int(word) for word in found.split())


@pytest.mark.parametrize("ranks_after", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_killed_rank_ends_the_run_in_one_line_and_others_go_on(
    ranks_after: int, tone_corpus: dict[str, Path], tmp_path: Path, runs: Path
) -> None:
    phases = [{"weights": {"codebooks": 1.0, "utterance": 0.1, "units": 1.0}}]
    values = pretrain_values(num_updates=LONG, checkpoint_every=2, log_every=5, phases=phases)
    with begun(command(tmp_path, values, tone_corpus, ranks=2), runs, update=6) as process:
        _, second = children(process.pid)
        os.kill(second, signal.SIGKILL)
        start = time.monotonic()
        _, errors = process.communicate(timeout=100)
        assert time.monotonic() - start < 60
    assert process.returncode == 1
    # torchrun adds a report of its own; the step says one line.
    lines = [line for line in errors.splitlines() if line.startswith("pretrain: ranks: ")]
    assert len(lines) == 1, errors
    wanted = r"pretrain: ranks: found one of 2 lost \(.*\), wanted all: run the same command again, .*"
    assert re.fullmatch(wanted, lines[0])
    assert "sonorant/training" not in errors, "a traceback of ours"
    assert not (tmp_path / "encoder").exists()

    if ranks_after == 1:
        pretrain(values, **tone_corpus, encoder=tmp_path / "encoder")
    else:
        run_ranks(tmp_path, values, tone_corpus, ranks_after)
    pretrain(values, **tone_corpus, encoder=tmp_path / "undisturbed")
    assert_same_curve(tmp_path / "encoder", tmp_path / "undisturbed")


@pytest.mark.slow
def test_a_silent_rank_ends_the_run_within_a_minute(tone_corpus: dict[str, Path], tmp_path: Path, runs: Path) -> None:
    values = pretrain_values(num_updates=400, checkpoint_every=2)
    with begun(command(tmp_path, values, tone_corpus, ranks=2), runs, update=6) as process:
        _, second = children(process.pid)
        os.kill(second, signal.SIGSTOP)
        start = time.monotonic()
        assert process.stderr is not None
        lost = "pretrain: ranks: found one of 2 lost"
        assert any(line.startswith(lost) for line in process.stderr)
        assert time.monotonic() - start < 60
        # torchrun waits for half a minute until it kills a process that does not end when told.
        _, rest = process.communicate(timeout=100)
    assert process.returncode == 1
    assert lost not in rest, "said once"


@pytest.mark.slow
def test_two_ranks_stop_together_and_one_goes_on(tone_corpus: dict[str, Path], tmp_path: Path, runs: Path) -> None:
    # A checkpoint after every update, none of them logged: whenever the stop comes, the ranks' sums must meet.
    values = pretrain_values(num_updates=LONG, checkpoint_every=1, log_every=1000, optim={"learning_rate": 1e-4})
    with begun(command(tmp_path, values, tone_corpus, ranks=2), runs, update=5) as process:
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=100)
    (run,) = runs.iterdir()
    last = max(int(path.name.split("-")[1]) for path in run.glob("checkpoint-*"))
    assert errors.count(f"pretrain: stopped at update {last} of {LONG}") == 1
    assert last < LONG
    found = pretrain(values, **tone_corpus, encoder=tmp_path / "encoder")
    undivided = pretrain(values, **tone_corpus, encoder=tmp_path / "undivided")
    for name in ("loss", "units/loss", "teacher/loss", "gradient_norm"):
        # As in assert_same_curve, over five times as many updates.
        assert found[name] == pytest.approx(undivided[name], rel=1e-4), name
