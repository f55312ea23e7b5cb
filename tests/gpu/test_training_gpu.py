"""Training on a real GPU: what a CPU computes, and the same bits each time, however often it is interrupted."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from sonorant.data.frames import Ragged
from sonorant.inference import load
from sonorant.models.layers import Layer
from sonorant.training.engine import Engine
from tests.running import begun, command
from tests.tiny import (
    LAYOUTS,
    encoder_config,
    make_batch,
    make_engine,
    noise,
    pretrain_values,
    write_model,
    write_tone_corpus,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DRAWN_NOWHERE = ("units", "teacher", "codebooks", "magnitude", "waveform", "spectrum", "utterance")
"""Tasks without random numbers of their own, which differ between devices."""


def gradients_of(engine: Engine, device: str, lengths: tuple[int, ...]) -> tuple[dict[str, float], dict[str, Any]]:
    """Each task's loss and every parameter's gradient of their sum."""
    engine = copy.deepcopy(engine).to(device)
    loss, parts = engine(make_batch(lengths).to(torch.device(device)), dict.fromkeys(engine.tasks, 0.01), 0)
    loss.backward()
    found = {name: p.grad.cpu().double() for name, p in engine.named_parameters() if p.grad is not None}
    return {name: float(value) for name, value in parts.items()}, found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lengths", [(9_000, 9_000), (4_000, 16_000, 7_777)])
def test_losses_and_gradients_are_those_of_the_cpu(
    layout: str, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    engine = make_engine(tasks=DRAWN_NOWHERE, **LAYOUTS[layout])
    wanted, gradients = gradients_of(engine, "cpu", lengths)
    parts, found = gradients_of(engine, "cuda", lengths)
    assert parts == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        error = (found[name] - gradient).norm() / (gradient.norm() + 1e-6)
        # The spectrum task sums signs of differences, and a sign turns with the last digit.
        assert float(error) < 1e-2, name


def test_packed_attention_sees_one_utterance_at_a_time() -> None:
    torch.manual_seed(0)
    layer = Layer(encoder_config(dim=256, num_heads=4, ffn_dim=512)).cuda()
    frames = Ragged((130, 7, 256, 1, 511))
    x_FD = torch.randn(frames.total, 256, device="cuda", requires_grad=True)
    way_FD = torch.randn(frames.total, 256, device="cuda")
    found = {}
    for name in ("packed", "alone", "float32"):
        with torch.autocast("cuda", torch.bfloat16, enabled=name != "float32"):
            if name == "alone":
                parts = [layer(x_FD[rows], Ragged((rows.stop - rows.start,)))[0] for rows in frames.slices()]
                output_FD = torch.cat(parts)
            else:
                output_FD, _ = layer(x_FD, frames)
        gradients = torch.autograd.grad((output_FD * way_FD).sum(), [x_FD, *layer.parameters()])
        found[name] = [output_FD.detach().float(), *gradients]
    for name in ("packed", "alone"):
        for mine, exact in zip(found[name], found["float32"], strict=True):
            assert float((mine - exact).norm() / exact.norm()) < 0.02, name


@pytest.mark.timeout(600)
def test_training_makes_the_same_bits_killed_or_not(tmp_path: Path) -> None:
    corpus, units = write_tone_corpus(tmp_path)
    inputs = {"corpus": corpus, "units": units}
    tasks = ("units", "teacher", "codebooks", "contrast", "diversity", "magnitude", "waveform", "spectrum", "utterance")
    noisy = {"dropout": 0.1, "ffn_dropout": 0.1, "layer_drop": 0.1}
    values = pretrain_values(
        num_updates=24, phases=[{"weights": dict.fromkeys(tasks, 0.1)}], encoder=noisy, log_every=6, checkpoint_every=6,
        precision="bfloat16", optim={"learning_rate": 5e-4},
    )  # fmt: skip
    made = []
    for name in ("one", "two", "killed"):
        folder = tmp_path / name
        folder.mkdir()
        words, runs = command(folder, values, inputs), folder / "runs"
        environment = {**os.environ, "SONORANT_RUNS": str(runs)}
        if name == "killed":
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("SONORANT_RUNS", str(runs))
                with begun(words, runs, update=12) as process:
                    process.send_signal(signal.SIGKILL)
                    process.communicate()
            assert not (folder / "encoder").exists()
        answer = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
        assert answer.returncode == 0, answer.stderr
        made.append({path.name: path.read_bytes() for path in (folder / "encoder").iterdir()})
    assert made[0] == made[1]
    assert made[0] == made[2]


def test_a_published_model_answers_as_on_the_cpu(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    waves = [noise(length, seed) for seed, length in enumerate((16_000, 3_000, 40_000))]
    here, there = load(model), load(model, device="cuda")
    assert there.device.startswith("cuda")
    for mine, theirs in zip(there.embed(waves), here.embed(waves), strict=True):
        torch.testing.assert_close(torch.from_numpy(mine), torch.from_numpy(theirs), rtol=1e-3, atol=1e-3)
