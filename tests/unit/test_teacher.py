"""The teacher: an average that follows, never learns, and never drops out."""

from __future__ import annotations

import copy

import pytest
import torch

from sonorant.config import OptimConfig, TeacherConfig
from sonorant.data.frames import Ragged
from sonorant.models.teacher import Teacher, instance_norm
from sonorant.training.optim import build_optimizer
from tests.tiny import LAYOUTS, make_batch, make_encoder, make_engine, shaken

BOTH = {"units": 1.0, "teacher": 1.0}


def test_it_begins_as_a_copy_that_shares_nothing() -> None:
    student = make_encoder()
    teacher = Teacher(student, TeacherConfig(num_layers=2))
    for mine, theirs in zip(teacher.context.parameters(), student.context.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.data_ptr() != theirs.data_ptr()


def test_no_gradient_reaches_it_or_passes_through_it() -> None:
    engine, batch = make_engine(), make_batch([5_000, 3_000])
    engine(batch, BOTH)[0].backward()
    assert engine.teacher is not None
    assert all(p.grad is None and not p.requires_grad for p in engine.teacher.parameters())
    z = torch.randn(12, 32, requires_grad=True)
    hidden = engine.teacher(z, Ragged((12,)))
    assert not any(t.requires_grad for t in (*hidden.states, *hidden.ffn, hidden.output))


def test_the_optimizer_does_not_move_it() -> None:
    engine, batch = make_engine(), make_batch([5_000])
    before = copy.deepcopy(engine.teacher)
    optimizer = build_optimizer(engine, OptimConfig(learning_rate=0.1))
    engine(batch, BOTH)[0].backward()
    optimizer.step()
    assert before is not None
    assert engine.teacher is not None
    for old, new in zip(before.parameters(), engine.teacher.parameters(), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_after_an_update_it_is_the_formula(layout: str) -> None:
    teacher = {"num_layers": 2, "start_decay": 0.999, "end_decay": 0.9999, "ramp_updates": 30_000}
    engine = make_engine(sections={"teacher": teacher}, **LAYOUTS[layout])
    assert engine.teacher is not None
    before = copy.deepcopy(engine.teacher.context)
    shaken(engine.encoder, seed=9)
    student = dict(engine.encoder.context.named_parameters())
    engine.after_update(3_000)
    # λ(3,000) = 0.999 + 0.1 · 0.0009: a tenth of the ramp.
    decay = 0.99909
    old = dict(before.named_parameters())
    for name, found in engine.teacher.context.named_parameters():
        if name.startswith("position."):
            assert torch.equal(found, student[name]), f"{name} is copied"
            continue
        wanted = decay * old[name].double() + (1 - decay) * student[name].double()
        # Rounding of one float32 operation on values around 1.
        torch.testing.assert_close(found.double(), wanted, atol=2e-7, rtol=0, msg=name)
        assert not torch.equal(found, old[name])


def test_it_stays_float32_beside_a_student_of_lower_precision() -> None:
    # At λ = 0.9999 a bfloat16 average would not move at all (pretraining.md §1.6).
    student = make_encoder()
    config = TeacherConfig(num_layers=2, start_decay=0.9999, end_decay=0.9999)
    teacher = Teacher(copy.deepcopy(student).bfloat16(), config)
    before = copy.deepcopy(teacher)
    assert {p.dtype for p in teacher.parameters()} == {torch.float32}
    shaken(student)
    teacher.follow(student, 1)
    moved = [not torch.equal(a, b) for a, b in zip(before.parameters(), teacher.parameters(), strict=True)]
    assert all(moved)
    assert teacher(torch.randn(9, 32).bfloat16(), Ragged((9,))).output.dtype == torch.float32


@pytest.mark.parametrize(("update", "decay"), [(0, 0.999), (15_000, 0.99945), (30_000, 0.9999), (400_000, 0.9999)])
def test_the_decay_ramps_and_then_stays(update: int, decay: float) -> None:
    teacher = Teacher(make_encoder(), TeacherConfig(num_layers=2))
    assert teacher.decay(update) == pytest.approx(decay, abs=1e-12)


def test_without_a_ramp_the_decay_is_its_end() -> None:
    config = TeacherConfig(num_layers=2, start_decay=0.5, end_decay=0.75, ramp_updates=0)
    assert Teacher(make_encoder(), config).decay(0) == 0.75


def test_a_training_engine_leaves_it_in_evaluation() -> None:
    engine = make_engine(dropout=0.5, attention_dropout=0.5, layer_drop=0.5).train()
    assert engine.teacher is not None
    assert engine.encoder.training
    assert not any(module.training for module in engine.teacher.modules())
    z, frames = torch.randn(12, 32), Ragged((12,))
    assert torch.equal(engine.teacher(z, frames).output, engine.teacher(z, frames).output)


def test_instance_norm_gives_each_utterance_mean_zero_and_variance_one() -> None:
    frames = Ragged((40, 7, 90))
    scales = torch.logspace(0, 2, 16)
    x = torch.randn(frames.total, 16, generator=torch.Generator().manual_seed(0)) * scales + 5 * scales
    for rows in frames.slices():
        normed = instance_norm(x, frames)[rows]
        # float32 sums of up to 90 values around 1; eps 1e-5 beside a variance of about 1 takes 1e-5 off it.
        torch.testing.assert_close(normed.mean(0), torch.zeros(16), atol=1e-5, rtol=0)
        torch.testing.assert_close(normed.var(0, correction=0), torch.ones(16), atol=5e-5, rtol=0)
