"""The engine: each view once, nothing that nobody asked for, and what is not trained does not move."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import pytest
import torch
from torch import nn

from sonorant.config import OptimConfig
from sonorant.training.engine import Engine
from sonorant.training.optim import build_optimizer
from tests.tiny import make_batch, make_engine


def count_calls(engine: Engine, weights: Mapping[str, float]) -> Counter[str]:
    """How often each part runs in one forward pass."""
    parts: dict[str, nn.Module] = {
        "stem": engine.encoder.stem,
        "context": engine.encoder.context,
        **{f"task {name}": task for name, task in engine.tasks.items()},
    }
    if engine.teacher is not None:
        parts["teacher"] = engine.teacher
    calls: Counter[str] = Counter()
    hooks = [part.register_forward_hook(lambda *_, name=name: calls.update([name])) for name, part in parts.items()]
    engine(make_batch([5_000, 3_000]), weights)
    for hook in hooks:
        hook.remove()
    return calls


@pytest.mark.parametrize(
    ("weights", "parts"),
    [
        ({"units": 1.0, "teacher": 1.0}, {"stem", "context", "teacher", "task units", "task teacher"}),
        ({"units": 1.0, "teacher": 0.0}, {"stem", "context", "task units"}),
        ({"units": 1.0}, {"stem", "context", "task units"}),
        ({"units": 0.0, "teacher": 0.1}, {"stem", "context", "teacher", "task teacher"}),
    ],
)
def test_each_part_runs_once_and_only_if_wanted(weights: dict[str, float], parts: set[str]) -> None:
    assert count_calls(make_engine(), weights) == Counter(parts)


def test_the_loss_is_the_weighted_sum() -> None:
    engine, batch = make_engine(), make_batch([5_000, 3_000])
    with torch.no_grad():
        units, teacher = (float(engine(batch, {name: 1.0})[0]) for name in ("units", "teacher"))
        both, sums = engine(batch, {"units": 0.3, "teacher": 2.0})
    # One float32 addition.
    assert float(both) == pytest.approx(0.3 * units + 2.0 * teacher, rel=1e-6)
    assert float(sums["units/loss"]) == pytest.approx(units, rel=1e-6)
    assert float(sums["teacher/loss"]) == pytest.approx(teacher, rel=1e-6)


@pytest.mark.parametrize("weights", [{"units": 1.0}, {"units": 1.0, "teacher": 0.0}, {"teacher": 1.0}])
def test_a_task_without_weight_does_not_move(weights: dict[str, float]) -> None:
    engine, batch = make_engine(), make_batch([5_000, 3_000])
    optimizer = build_optimizer(engine, OptimConfig(learning_rate=0.1, weight_decay=0.5))
    before = {name: parameter.detach().clone() for name, parameter in engine.named_parameters()}
    for _ in range(2):
        optimizer.zero_grad(set_to_none=True)
        engine(batch, weights)[0].backward()
        optimizer.step()
    idle = "tasks.teacher" if weights.get("units") else "tasks.units"
    for name, parameter in engine.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved == (not name.startswith((idle, "teacher."))), name


def test_frozen_modules_do_not_move() -> None:
    engine, batch = make_engine(), make_batch([5_000, 3_000])
    engine.encoder.stem.requires_grad_(False)
    optimizer = build_optimizer(engine, OptimConfig(learning_rate=0.1, weight_decay=0.5))
    before = {name: parameter.detach().clone() for name, parameter in engine.encoder.named_parameters()}
    engine(batch, {"units": 1.0, "teacher": 1.0})[0].backward()
    optimizer.step()
    for name, parameter in engine.encoder.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith("stem."), name


def test_without_a_teacher_there_is_nothing_to_follow() -> None:
    engine = make_engine()
    student = Engine(engine.encoder, {"units": engine.tasks["units"]})  # type: ignore[dict-item]
    student.after_update(1)
    assert torch.isfinite(student(make_batch([5_000]), {"units": 1.0})[0])


def test_bfloat16_keeps_losses_and_targets_in_float32() -> None:
    engine, batch = make_engine(), make_batch([5_000, 3_000])
    with torch.no_grad():
        exact = {name: float(engine(batch, {name: 1.0})[0]) for name in ("units", "teacher")}
        with torch.autocast("cpu", torch.bfloat16):
            for name, wanted in exact.items():
                loss, _ = engine(batch, {name: 1.0})
                assert loss.dtype == torch.float32
                # bfloat16 has 8 bits: half a per cent a product, which averages out over frames.
                assert float(loss) == pytest.approx(wanted, rel=0.02)
