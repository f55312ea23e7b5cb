"""Grounding and alignment on several ranks, in parts, or interrupted: what one undisturbed process makes."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from sonorant.artifacts import digest_folder
from sonorant.steps import align, ground, pretrain
from sonorant.steps.step import Step
from tests.running import begun, command, journal_of
from tests.tiny import with_changes, write_pairs_corpus

pytestmark = pytest.mark.usefixtures("runs")
ENCODER = {"stem_channels": 16, "dim": 32, "num_layers": 3, "num_heads": 2, "ffn_dim": 64}
ENCODER |= {"dropout": 0.0, "attention_dropout": 0.0, "layer_drop": 0.0}
BATCHING = {"batch_seconds": 6.0, "crop_seconds": 2.0}
COMMON: dict[str, Any] = {
    "num_updates": 8,
    "batching": BATCHING,
    "optim": {"learning_rate": 0.002, "warmup_share": 0.1, "decay_share": 0.3},
    "log_every": 2,
    "checkpoint_every": 3,
}
GROUND: dict[str, Any] = {
    **COMMON,
    "phases": [
        {"share": 0.5, "weights": {"units": 0.5, "grounding": 0.5}},
        {"share": 0.5, "weights": {"grounding": 1.0, "utterance": 0.1}, "reset_optimizer": True},
    ],
    "grounding": {"layer": 2, "queue_size": 8},
}
ALIGN: dict[str, Any] = {**COMMON, "phases": [{"weights": {"alignment": 1.0, "units": 0.1}}], "num_trained_layers": 1}
STEPS: list[tuple[Step, dict[str, Any]]] = [(ground, GROUND), (align, ALIGN)]
both = pytest.mark.parametrize(("step", "values"), STEPS, ids=lambda value: getattr(value, "name", ""))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A corpus of tones, each with its image, units, and an encoder of two updates."""
    folder = tmp_path_factory.mktemp("pairs")
    corpus, units = write_pairs_corpus(folder)
    values = {**COMMON, "num_updates": 2, "phases": [{"weights": {"units": 1.0}}], "encoder": ENCODER}
    values["teacher"] = {"num_layers": 2}
    pretrain(values, corpus=corpus, units=units, encoder=folder / "encoder", scratch=folder / "scratch")
    return {"corpus": corpus, "units": units, "encoder": folder / "encoder"}


@pytest.fixture(scope="module")
def undisturbed(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What one process makes of one batch an update, by step."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for step, values in STEPS:
        (name,) = step.outputs
        step(values, **inputs, **{name: folder / name}, scratch=folder / f"scratch-{name}")
    return {step.name: folder / step.outputs[0] for step, _ in STEPS}


def assert_same(found: Path, wanted: Path) -> None:
    """One loss curve and one model, but for rounding: sums over parts are made in another order."""
    one, two = journal_of(found), journal_of(wanted)
    assert [entry["update"] for entry in one] == [entry["update"] for entry in two]
    for entry, other in zip(one, two, strict=True):
        assert entry == pytest.approx(other, rel=1e-4, abs=1e-4)
    assert {path.name for path in found.iterdir()} == {path.name for path in wanted.iterdir()}
    tensors, others = load_file(found / "model.safetensors"), load_file(wanted / "model.safetensors")
    for name, tensor in tensors.items():
        # Adam's first steps are as long as the learning rate, whatever the size of a gradient that is nearly zero.
        assert (tensor - others[name]).abs().max() < 8 * 0.002, name


@both
def test_accumulated_micro_batches_are_one_batch(
    step: Step, values: dict[str, Any], inputs: dict[str, Path], undisturbed: dict[str, Path], tmp_path: Path
) -> None:
    (name,) = step.outputs
    parts = with_changes(values, {"batching": {**BATCHING, "micro_batches": 3}})
    step(parts, **inputs, **{name: tmp_path / name})
    assert_same(tmp_path / name, undisturbed[step.name])


@both
def test_two_ranks_are_one_process_with_the_double_batch(
    step: Step, values: dict[str, Any], inputs: dict[str, Path], undisturbed: dict[str, Path], tmp_path: Path
) -> None:
    words = command(tmp_path, values, inputs, ranks=2, step=step)
    answer = subprocess.run(words, capture_output=True, text=True, check=False, timeout=250)
    assert answer.returncode == 0, answer.stderr
    assert_same(tmp_path / step.outputs[0], undisturbed[step.name])


@both
def test_a_stopped_run_goes_on_to_the_same_bytes(
    step: Step,
    values: dict[str, Any],
    inputs: dict[str, Path],
    undisturbed: dict[str, Path],
    tmp_path: Path,
    runs: Path,
) -> None:
    """Stopped as soon as its first checkpoint is there, and started again."""
    with begun(command(tmp_path, values, inputs, step=step), runs, update=3) as process:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=100)
    (name,) = step.outputs
    step(values, **inputs, **{name: tmp_path / name})
    assert digest_folder(tmp_path / name) == digest_folder(undisturbed[step.name])
