"""The step `pretrain` on a corpus of tones: it learns, it survives, and ranks change nothing."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModel

from sonorant.artifacts import read_record
from sonorant.data.corpus import read_corpus
from sonorant.data.units import UnitStore
from sonorant.inference import load_trained
from sonorant.models.huggingface import load_encoder
from sonorant.steps import pretrain
from tests.running import begun, command, journal_of
from tests.tiny import noise, pretrain_values

LONG = 40
"""Updates of the runs that are interrupted: a few seconds."""
pytestmark = pytest.mark.usefixtures("runs")


# ------------------------------------------------------------------------------------------------- learning


def test_it_beats_chance_at_what_it_cannot_see(tone_corpus: dict[str, Path], tmp_path: Path) -> None:
    values = pretrain_values(
        num_updates=60, optim={"learning_rate": 0.005}, units={"unmasked_weight": 0.5}, log_every=20,
        checkpoint_every=1000, phases=[{"weights": {"units": 1.0}}],
    )  # fmt: skip
    metrics = pretrain(values, **tone_corpus, encoder=tmp_path / "encoder")
    store = UnitStore(tone_corpus["units"])
    spoken = [store[utterance.id] for utterance in read_corpus(tone_corpus["corpus"], split="train")]
    counts = np.bincount(np.concatenate(spoken))
    # Always to say the commonest unit is right for 37 % of the frames; what surrounds a masked frame tells 67 %.
    assert metrics["units/accuracy"] > 1.5 * counts.max() / counts.sum()
    curve = journal_of(tmp_path / "encoder")
    assert [entry["update"] for entry in curve] == [20, 40, 60]
    assert metrics == {k: v for k, v in curve[-1].items() if k not in ("update", "learning_rate")}


def test_phases_switch_the_weights(tone_corpus: dict[str, Path], tmp_path: Path) -> None:
    phases = [
        {"share": 0.5, "weights": {"units": 1.0, "teacher": 0.0}},
        {"share": 0.25, "weights": {"teacher": 2.0}},
        {"share": 0.25, "weights": {"units": 0.5, "teacher": 1.0}},
    ]
    values = pretrain_values(num_updates=8, phases=phases, log_every=3)
    pretrain(values, **tone_corpus, encoder=tmp_path / "encoder")
    entries = {int(entry["update"]): entry for entry in journal_of(tmp_path / "encoder")}
    # Every third, and where a phase ends: an entry never mixes two of them.
    assert sorted(entries) == [3, 4, 6, 8]
    for update, tasks in ((3, {"units"}), (4, {"units"}), (6, {"teacher"}), (8, {"units", "teacher"})):
        assert {name.split("/")[0] for name in entries[update] if "/" in name} == tasks
    # float64 sums of float32 losses.
    assert entries[4]["loss"] == pytest.approx(entries[4]["units/loss"], rel=1e-6)
    assert entries[6]["loss"] == pytest.approx(2 * entries[6]["teacher/loss"], rel=1e-6)
    both = 0.5 * entries[8]["units/loss"] + entries[8]["teacher/loss"]
    assert entries[8]["loss"] == pytest.approx(both, rel=1e-6)


# ----------------------------------------------------------------------------------------------- the artifact


@pytest.fixture(scope="module")
def undisturbed(tone_corpus: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The encoder of one run from beginning to end."""
    encoder = tmp_path_factory.mktemp("undisturbed") / "encoder"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SONORANT_RUNS", str(encoder.parent / "runs"))
        pretrain(long_values(), **tone_corpus, encoder=encoder)
    assert list((encoder.parent / "runs").iterdir()) == [], "a finished run keeps no checkpoints"
    return encoder


def long_values() -> dict[str, Any]:
    """A run with dropout and dropped layers, logged between checkpoints, over two phases."""
    phases = [{"share": 0.4, "weights": {"units": 1.0}}, {"share": 0.6, "weights": {"units": 1.0, "teacher": 1.0}}]
    noisy = {"dropout": 0.1, "attention_dropout": 0.1, "ffn_dropout": 0.1, "layer_drop": 0.1}
    return pretrain_values(
        num_updates=LONG, phases=phases, encoder=noisy, log_every=3, checkpoint_every=5, optim={"learning_rate": 5e-4}
    )


def same_bytes(one: Path, two: Path) -> bool:
    """Whether two artifacts are identical, their records included."""
    return {p.name: p.read_bytes() for p in one.iterdir()} == {p.name: p.read_bytes() for p in two.iterdir()}


def test_two_runs_are_identical(undisturbed: Path, tone_corpus: dict[str, Path], tmp_path: Path) -> None:
    pretrain(long_values(), **tone_corpus, encoder=tmp_path / "encoder")
    assert same_bytes(undisturbed, tmp_path / "encoder")
    pretrain(long_values() | {"seed": 1}, **tone_corpus, encoder=tmp_path / "other")
    assert read_record(tmp_path / "other", "")["digest"] != read_record(undisturbed, "")["digest"]


def test_the_encoder_opens_everywhere(undisturbed: Path) -> None:
    names = {path.name for path in undisturbed.iterdir()}
    weights = {"model.safetensors", "teacher.safetensors", "heads.safetensors"}
    assert names == {"artifact.json", "config.json", "journal.jsonl", "preprocessor_config.json", *weights}
    encoder, about = load_encoder(undisturbed)
    assert about["encoder"] == encoder.config.model_dump(mode="json")
    assert AutoModel.from_pretrained(undisturbed).config.hidden_size == encoder.config.dim
    wave = noise(8_000)
    [student], [teacher] = (load_trained(undisturbed, network).embed([wave]) for network in ("student", "teacher"))
    assert student.shape == teacher.shape == (24, 32)
    assert not np.allclose(student, teacher)
    assert np.isfinite(student).all()


def test_the_journal_holds_no_time(undisturbed: Path) -> None:
    entries = journal_of(undisturbed)
    assert [entry["update"] for entry in entries] == [3, 6, 9, 12, 15, 16, *range(18, LONG, 3), LONG]
    losses = {"loss", "units/loss", "units/accuracy", "units/cross_entropy", "units/prediction_perplexity"}
    online = {"teacher/loss", "teacher/target_std", "teacher/prediction_std"}
    assert set(entries[0]) == {"update", "learning_rate", "gradient_norm", *losses}
    assert set(entries[-1]) == {"update", "learning_rate", "gradient_norm", *losses, *online}


# --------------------------------------------------------------------------------------------- interruptions


@pytest.fixture
def started(tone_corpus: dict[str, Path], tmp_path: Path, runs: Path) -> Iterator[subprocess.Popen[str]]:
    """The long run as a process that has written its second checkpoint."""
    with begun(command(tmp_path, long_values(), tone_corpus), runs, update=10) as process:
        yield process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_interrupted_and_run_again_is_identical(
    number: signal.Signals,
    code: int,
    started: subprocess.Popen[str],
    undisturbed: Path,
    tone_corpus: dict[str, Path],
    tmp_path: Path,
    runs: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    started.send_signal(number)
    output, errors = started.communicate(timeout=100)
    assert started.returncode == code
    assert output == ""
    assert not (tmp_path / "encoder").exists()
    (run,) = runs.iterdir()
    last = max(int(path.name.split("-")[1]) for path in run.glob("checkpoint-*"))
    assert 10 <= last < LONG
    if number != signal.SIGKILL:
        wanted = rf"pretrain: stopped at update {last} of {LONG}; the same command goes on from .*runs/pretrain-\w+"
        assert re.fullmatch(wanted, errors.splitlines()[-1])
        assert not (tmp_path / ".encoder.partial").exists()

    pretrain(long_values(), **tone_corpus, encoder=tmp_path / "encoder")
    assert f"resuming at update {last} from" in capfd.readouterr().err
    assert same_bytes(undisturbed, tmp_path / "encoder")
    assert list(runs.iterdir()) == []


def test_killed_after_the_last_update_it_only_writes_the_artifact(
    undisturbed: Path, tone_corpus: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two"):
        # A scratch folder of one's own is kept, so the second run finds the first one's last checkpoint.
        pretrain(long_values(), **tone_corpus, encoder=tmp_path / name, scratch=tmp_path / "scratch")
    assert f"resuming at update {LONG} from" in capfd.readouterr().err
    assert same_bytes(tmp_path / "one", tmp_path / "two")
    assert same_bytes(undisturbed, tmp_path / "two")
    assert len(list((tmp_path / "scratch").glob("checkpoint-*"))) == 2


@pytest.mark.parametrize("full", ["runs", "artifacts"])
def test_a_full_disk_is_one_line(full: str, tone_corpus: dict[str, Path], tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system: found no right to mount one, wanted root")
    try:
        folders = {name: small if name == full else tmp_path / name for name in ("runs", "artifacts")}
        folders["artifacts"].mkdir(exist_ok=True)
        answer = subprocess.run(
            [*command(tmp_path, pretrain_values(), tone_corpus)[:-1], str(folders["artifacts"] / "encoder")],
            env={**os.environ, "SONORANT_RUNS": str(folders["runs"])}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        left = sorted(path.name for path in folders["artifacts"].iterdir())
    finally:
        subprocess.run(["umount", str(small)], check=True)
    assert answer.returncode == 1
    assert answer.stdout == ""
    assert "Traceback" not in answer.stderr
    *progress, complaint = answer.stderr.splitlines()
    assert all(re.match(r"pretrain: (\d+/\d+ |\d+ updates)", line) for line in progress)
    assert re.match(r"pretrain: .*No space left on device.*: free some space and run the same command again", complaint)
    assert left == []


# ----------------------------------------------------------------------------------------------------- guards


def test_what_is_not_finite_is_named_with_its_update(tone_corpus: dict[str, Path], tmp_path: Path) -> None:
    values = pretrain_values(optim={"learning_rate": 1e30, "warmup_share": 0.0})
    wanted = r"pretrain: found (units/loss|the gradient of \S+).* not finite at update 2, wanted numbers: lower"
    with pytest.raises(ValueError, match=wanted) as caught:
        pretrain(values, **tone_corpus, encoder=tmp_path / "encoder")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "encoder").exists()


@pytest.mark.parametrize(("guard", "name"), [("min_target_std", "target"), ("min_prediction_std", "prediction")])
def test_a_collapse_is_named_once_it_counts(
    guard: str, name: str, tone_corpus: dict[str, Path], tmp_path: Path
) -> None:
    values = pretrain_values(guard={"after_updates": 3, guard: 10.0})
    wanted = rf"pretrain: found teacher/{name}_std 0\.\d+ at update 4, wanted at least 10: it has collapsed"
    with pytest.raises(ValueError, match=wanted) as caught:
        pretrain(values, **tone_corpus, encoder=tmp_path / "encoder")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "encoder").exists()


def test_a_checkpoint_of_another_configuration_is_refused(tone_corpus: dict[str, Path], tmp_path: Path) -> None:
    paths = {**tone_corpus, "encoder": tmp_path / "encoder"}
    pretrain(pretrain_values(), **paths, scratch=tmp_path / "run")
    with pytest.raises(ValueError, match="of another configuration"):
        pretrain(pretrain_values(seed=1), **paths, scratch=tmp_path / "run")
