"""Checkpoints and the journal: whole or absent, exact, pruned, never pickled."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sonorant.config import OptimConfig
from sonorant.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from sonorant.training.engine import Engine
from sonorant.training.journal import Journal, last_numbers, read_journal
from sonorant.training.optim import build_optimizer
from tests.tiny import make_batch, make_engine

BOTH = {"units": 1.0, "teacher": 1.0}


def update(engine: Engine, optimizer: torch.optim.Optimizer, index: int, weights: dict[str, float] = BOTH) -> float:
    """One update on a batch of its own; its loss."""
    optimizer.zero_grad(set_to_none=True)
    loss = engine(make_batch([4_000, 2_000], seed=index), weights)[0]
    loss.backward()
    optimizer.step()
    engine.after_update(index)
    return float(loss.detach())


@pytest.mark.parametrize("weights", [BOTH, {"units": 1.0}], ids=["all", "one task never trained"])
def test_training_goes_on_bit_for_bit(tmp_path: Path, weights: dict[str, float]) -> None:
    config = OptimConfig(learning_rate=0.01)
    engine = make_engine(seed=0)
    optimizer = build_optimizer(engine, config)
    for index in range(2):
        update(engine, optimizer, index, weights)
    save_checkpoint(tmp_path, 2, engine, optimizer, {"note": [1, 2.5]}, keep=1)
    undisturbed = [update(engine, optimizer, index) for index in range(2, 5)]

    other = make_engine(seed=7)
    resumed = build_optimizer(other, config)
    path = latest_checkpoint(tmp_path)
    assert path is not None
    about = load_checkpoint(path, other, resumed)
    assert about == {"update": 2, "note": [1, 2.5]}
    assert [update(other, resumed, index) for index in range(2, 5)] == undisturbed
    for (name, one), two in zip(engine.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(one, two), name


def test_only_the_newest_are_kept_and_read(tmp_path: Path) -> None:
    engine = make_engine()
    optimizer = build_optimizer(engine, OptimConfig())
    assert latest_checkpoint(tmp_path) is None
    for index in (5, 50, 500, 5_000):
        save_checkpoint(tmp_path, index, engine, optimizer, {}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-00000500", "checkpoint-00005000"]
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-00005000"


def test_what_a_kill_left_half_written_is_neither_read_nor_in_the_way(tmp_path: Path) -> None:
    engine = make_engine()
    optimizer = build_optimizer(engine, OptimConfig())
    save_checkpoint(tmp_path, 1, engine, optimizer, {}, keep=2)
    half = tmp_path / ".checkpoint-00000002.partial"
    half.mkdir()
    (half / "state.safetensors").write_bytes(b"\0" * 10)
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-00000001"
    save_checkpoint(tmp_path, 2, engine, optimizer, {}, keep=2)
    assert not half.exists()
    assert load_checkpoint(tmp_path / "checkpoint-00000002", engine, optimizer)["update"] == 2


def test_a_checkpoint_that_exists_is_left_alone(tmp_path: Path) -> None:
    engine = make_engine()
    optimizer = build_optimizer(engine, OptimConfig())
    path = save_checkpoint(tmp_path, 1, engine, optimizer, {}, keep=1)
    before = (path / "state.safetensors").stat()
    assert save_checkpoint(tmp_path, 1, engine, optimizer, {}, keep=1) == path
    assert (path / "state.safetensors").stat() == before


def test_it_describes_itself_and_holds_no_pickle(tmp_path: Path) -> None:
    engine = make_engine()
    path = save_checkpoint(tmp_path, 3, engine, build_optimizer(engine, OptimConfig()), {"config": {"a": 1}}, keep=1)
    assert sorted(p.name for p in path.iterdir()) == ["about.json", "state.safetensors"]
    assert json.loads((path / "about.json").read_text()) == {"update": 3, "config": {"a": 1}}


# ---------------------------------------------------------------------------------------------------- journal


def test_a_journal_forgets_what_will_be_done_again(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    for index in range(1, 6):
        journal.write(update=index, learning_rate=0.1, loss=1 / index)
    Journal(path, after=3).write(update=4, learning_rate=0.2, loss=9.0)
    assert [entry["update"] for entry in read_journal(path)] == [1, 2, 3, 4]
    assert read_journal(path)[2]["loss"] == 1 / 3
    assert last_numbers(path) == {"loss": 9.0}
    assert [p.name for p in tmp_path.iterdir()] == ["journal.jsonl"]


def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path).write(update=1, loss=2.0)
    with path.open("a") as file:
        file.write('{"update": 2, "lo')
    assert read_journal(path) == [{"update": 1, "loss": 2.0}]
    Journal(path, after=1).write(update=2, loss=1.0)
    assert [entry["update"] for entry in read_journal(path)] == [1, 2]
