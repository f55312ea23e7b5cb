"""The tasks: each loss against a loop, MT4SSL's whole loss and its gradients against an independent one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sonorant.data.frames import Ragged
from sonorant.models.teacher import instance_norm
from sonorant.tasks import build_tasks
from sonorant.tasks.codebooks import Codebooks
from sonorant.tasks.task import moments, perplexity, precise, spread
from sonorant.tasks.teacher import squared_error
from sonorant.tasks.units import cross_entropy
from tests.references import codebooks as slow_codebooks
from tests.references import losses as slow
from tests.references.dinosr import Codebook, dinosr_update
from tests.references.mt4ssl import mt4ssl_loss
from tests.references.network import Shape
from tests.tiny import ALL_TASKS, POST_NORM, alone, encoder_config, make_batch, make_engine, pretrain_config

SHAPES = st.tuples(st.integers(1, 6), st.integers(2, 5), st.integers(0, 10_000))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    """Standard normal values in float64."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


@settings(deadline=None)
@given(SHAPES)
def test_cross_entropy_is_the_loop(shape: tuple[int, int, int]) -> None:
    frames, units, seed = shape
    logits = 5 * normal(frames, units, seed=seed)
    labels = torch.from_numpy(np.random.default_rng(seed).integers(units, size=frames))
    # The loss is float32: seven digits.
    assert float(cross_entropy(logits, labels)) == pytest.approx(
        slow.cross_entropy(logits.tolist(), labels.tolist()), rel=1e-5, abs=1e-5
    )


def test_cross_entropy_of_ignorance_is_log_of_the_units() -> None:
    # Scale at the start: ln 504 = 6.2 a frame (pretraining.md §2.3).
    found = float(cross_entropy(torch.zeros(10, 504), torch.arange(10)))
    assert found == pytest.approx(10 * math.log(504), rel=1e-6)


def test_cross_entropy_survives_large_logits_of_half_precision() -> None:
    logits = torch.tensor([[300.0, -300.0], [-300.0, 300.0]], dtype=torch.bfloat16)
    found = cross_entropy(logits, torch.tensor([0, 0]))
    assert found.dtype == torch.float32
    # 300 is 300 in bfloat16 too (8 bits: 300 = 75 · 4).
    assert float(found) == pytest.approx(600)


def test_gradient_of_cross_entropy_is_softmax_minus_truth() -> None:
    logits = normal(7, 4).requires_grad_()
    labels = torch.tensor([0, 1, 2, 3, 0, 1, 2])
    (gradient,) = torch.autograd.grad(cross_entropy(logits, labels), logits)
    wanted = logits.detach().softmax(1) - torch.nn.functional.one_hot(labels, 4)
    # The loss is float32.
    torch.testing.assert_close(gradient, wanted, atol=1e-6, rtol=0)


def test_losses_have_the_right_gradients() -> None:
    logits, labels = normal(7, 4).requires_grad_(), torch.tensor([0, 1, 2, 3, 0, 1, 2])
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, labels), (logits,))
    predictions, targets = normal(5, 3).requires_grad_(), normal(5, 3, seed=1)
    assert torch.autograd.gradcheck(lambda x: squared_error(x, targets), (predictions,))


def test_what_is_precise_stays_and_what_is_not_becomes_float32() -> None:
    kinds = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float32}
    for given_as, wanted in {**kinds, torch.float64: torch.float64}.items():
        assert precise(torch.zeros(1, dtype=given_as)).dtype == wanted


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 50), min_size=4, max_size=4).filter(any), min_size=1, max_size=3))
def test_perplexity_is_the_loop(counts: list[list[int]]) -> None:
    found = perplexity(torch.tensor(counts))
    for row, value in zip(counts, found.tolist(), strict=True):
        codes = [code for code, count in enumerate(row) for _ in range(count)]
        assert value == pytest.approx(slow_codebooks.perplexity(codes))
    assert perplexity(torch.zeros(1, 4)).tolist() == [1.0]


@settings(deadline=None)
@given(SHAPES)
def test_squared_error_and_spread_are_the_loops(shape: tuple[int, int, int]) -> None:
    frames, dims, seed = shape
    predictions, targets = normal(frames, dims, seed=seed), normal(frames, dims, seed=seed + 1)
    # float32: seven digits.
    found = float(squared_error(predictions, targets.float()))
    assert found == pytest.approx(slow.squared_error(predictions.tolist(), targets.tolist()), rel=1e-5)
    assert float(spread(moments(predictions))) == pytest.approx(slow.spread(predictions.tolist()), rel=1e-5)


def test_gradient_of_squared_error() -> None:
    predictions, targets = normal(5, 9).requires_grad_(), normal(5, 9, seed=1)
    (gradient,) = torch.autograd.grad(squared_error(predictions, targets.float()), predictions)
    # 2 (ŷ − y) / √9, in float32.
    torch.testing.assert_close(gradient, 2 * (predictions.detach() - targets) / 3, atol=1e-6, rtol=0)


def test_spread_of_frames_that_agree_is_a_thousandth() -> None:
    # √1e-6: what the guard against collapse then compares with 0.1 and 0.01.
    assert float(spread(moments(torch.ones(8, 3)))) == pytest.approx(1e-3, rel=1e-4)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(2, 7), min_size=1, max_size=4), st.integers(1, 3), st.integers(0, 10_000))
def test_targets_are_the_loop(lengths: list[int], layers: int, seed: int) -> None:
    frames = Ragged(tuple(lengths))
    ffn = [3 * normal(frames.total, 4, seed=seed + layer) + 2 for layer in range(layers)]
    found = torch.stack([instance_norm(x.float(), frames) for x in ffn]).mean(0)
    for rows in frames.slices():
        wanted = torch.tensor(slow.averaged([layer[rows].tolist() for layer in ffn]))
        # float32 of values around 1, where a small variance may cost three digits.
        torch.testing.assert_close(found[rows], wanted, atol=1e-4, rtol=1e-4)


def test_instance_norm_has_the_right_gradient() -> None:
    frames = Ragged((3, 5))
    x = normal(8, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: instance_norm(a, frames), (x,))


def test_a_single_frame_has_the_target_zero() -> None:
    # Its variance is 0: (x - mean) / √(0 + eps) = 0.
    assert instance_norm(normal(4, 3), Ragged((1, 3)))[0].tolist() == [0.0, 0.0, 0.0]


# ------------------------------------------------------------------------------------------------------ tasks

SHAPE = Shape(depth=3, groups=4, num_layers=3, num_heads=2)
"""Of POST_NORM's tiny encoder with three layers."""


def test_mt4ssl_is_its_specification() -> None:
    engine = make_engine(**POST_NORM, num_layers=3)
    batch = make_batch([2_600, 400, 1_700])
    loss = engine(batch, {"units": 1.0, "teacher": 1.0})[0] / batch.mask.sum()
    loss.backward()
    found = {name: p.grad for name, p in engine.named_parameters() if p.grad is not None}

    parameters = {
        name: p.detach().double().requires_grad_(p.requires_grad) for name, p in engine.named_parameters()
    }
    parts = alone(batch)
    wanted = mt4ssl_loss(
        parameters,
        [part.waves.double() for part in parts],
        [part.mask for part in parts],
        [part.units for part in parts if part.units is not None],
        SHAPE,
        num_targets=2,
    )
    wanted.backward()
    # Float32 against float64: seven digits, of which long sums cost one or two.
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    trained = {name for name, p in parameters.items() if p.requires_grad}
    assert found.keys() == trained == {name for name in trained if parameters[name].grad is not None}
    assert not any(name.startswith("teacher") for name in trained)
    for name in trained:
        gradient = parameters[name].grad
        assert gradient is not None
        assert gradient.abs().max() > 1e-6, f"{name}: a gradient of nothing proves nothing"
        torch.testing.assert_close(found[name].double(), gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_dinosr_is_its_specification() -> None:
    """Loss, gradients, and what two consecutive updates make of the codebooks."""
    sections = {"codebooks": {"num_codes": 6, "decay": 0.9}}
    engine = make_engine(tasks=["codebooks"], sections=sections, **POST_NORM, num_layers=3)
    task = engine.task("codebooks")
    assert isinstance(task, Codebooks)
    assert task.state.shape == (2, 6, 33)
    books = [Codebook(book[:, :-1].tolist(), book[:, -1].tolist()) for book in task.state.double()]
    optimizer = torch.optim.SGD([p for p in engine.parameters() if p.requires_grad], lr=0.1)
    hit, before = [], task.state.clone()
    for update, lengths in enumerate([[2_600, 400, 1_700], [2_000, 900]]):
        batch = make_batch(lengths, seed=update)
        parameters = {
            name: p.detach().double().requires_grad_(p.requires_grad) for name, p in engine.named_parameters()
        }
        optimizer.zero_grad()
        loss = engine(batch, {"codebooks": 1.0}, update)[0] / batch.mask.sum()
        loss.backward()
        parts = alone(batch)
        waves, masks = [part.waves.double() for part in parts], [part.mask for part in parts]
        wanted = dinosr_update(parameters, books, waves, masks, SHAPE, decay=0.9)
        wanted.backward()
        # Float32 against float64: seven digits, of which long sums cost one or two.
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
        for name, p in engine.named_parameters():
            assert (p.grad is None) == (parameters[name].grad is None) == name.startswith("teacher"), name
            if p.grad is None:
                continue
            gradient = parameters[name].grad
            assert gradient is not None
            assert gradient.abs().max() > 1e-6, f"{name}: a gradient of nothing proves nothing"
            torch.testing.assert_close(p.grad.double(), gradient, atol=1e-5, rtol=1e-5, msg=name)
        optimizer.step()
        assert torch.equal(task.state, before), "the codebooks move when the update is done, not before"
        engine.after_update(update + 1)
        hit.append((task.state != before).any(2))
        before = task.state.clone()
        rows = [[[*s, n] for s, n in zip(book.sums, book.counts, strict=True)] for book in books]
        # Sums of a few frames of values around 1, in float32.
        torch.testing.assert_close(task.state.double(), torch.tensor(rows, dtype=torch.float64), atol=1e-5, rtol=1e-5)
    moved = torch.stack(hit)
    assert moved.any(), "nothing was hit"
    assert not moved.all(), "no code was spared: the test says nothing about these"


def test_unmasked_frames_count_as_much_as_they_are_told() -> None:
    batch = make_batch([4_000, 3_000])
    losses = [make_engine(unmasked_weight=w)(batch, {"units": 1.0})[0].item() for w in (0.0, 0.5, 1.0)]
    assert losses[0] < losses[1] < losses[2]
    assert losses[1] - losses[0] == pytest.approx(losses[2] - losses[1], rel=1e-4)
    engine = make_engine()
    z = engine.encoder.project(batch.waves, batch.num_samples)
    frames = Ragged.of_samples(batch.num_samples)
    hidden = engine.encoder.context(engine.encoder.mask(z, batch.mask), frames)
    assert batch.units is not None
    everything = cross_entropy(engine.tasks["units"].head(hidden.output), batch.units)
    assert losses[2] == pytest.approx(everything.item(), rel=1e-5)


def test_accuracy_counts_masked_frames_that_are_right() -> None:
    engine, batch = make_engine(unmasked_weight=0.5), make_batch([4_000, 3_000])
    assert batch.units is not None
    task = engine.task("units")
    views = engine.views(batch, {"units": task}, update=0)
    assert views.masked is not None
    guesses = task.head(views.masked.output).argmax(1)
    right = int(((guesses == batch.units) & batch.mask).sum())
    assert int(task(views, ()).sums["accuracy"]) == right
    views.units = guesses
    assert int(task(views, ()).sums["accuracy"]) == int(batch.mask.sum())


def test_a_head_has_as_many_classes_as_there_are_units() -> None:
    tasks = build_tasks(pretrain_config(), encoder_config(), num_units=7)
    assert tasks["units"].head.out_features == 7
    assert tasks["teacher"].head.out_features == 32


def test_tasks_are_built_if_any_phase_wants_them() -> None:
    phases = [{"share": 0.5, "weights": {"units": 1.0, "teacher": 0.0}}, {"share": 0.5, "weights": {"units": 0.5}}]
    assert set(build_tasks(pretrain_config(phases=phases), encoder_config(), 4)) == {"units"}
    phases[1]["weights"] = {"teacher": 2.0}
    assert set(build_tasks(pretrain_config(phases=phases), encoder_config(), 4)) == {"units", "teacher"}


def test_the_targets_are_read_from_the_last_layers() -> None:
    engine, batch = make_engine(num_layers=4), make_batch([4_000])
    assert engine.teacher is not None
    frames = Ragged.of_samples(batch.num_samples)
    with torch.no_grad():
        found = float(engine(batch, {"teacher": 1.0})[0])
        z = engine.encoder.project(batch.waves, batch.num_samples)
        student = engine.encoder.context(engine.encoder.mask(z, batch.mask), frames)
        predicted = engine.tasks["teacher"].head(student.output)
        ffn = engine.teacher(z, frames).ffn
        normed = [instance_norm(x, frames)[batch.mask] for x in ffn]
        losses = [
            float(squared_error(predicted[batch.mask], torch.stack(normed[-count:]).mean(0))) for count in (1, 2, 3)
        ]
    # make_engine's teacher reads two layers.
    assert losses[1] == pytest.approx(found, rel=1e-5)
    assert abs(losses[0] - found) > 1e-3 * found < abs(losses[2] - found)


MONITORS = {
    "units": {"prediction_perplexity"},
    "teacher": {"target_std", "prediction_std"},
    "codebooks": {"perplexity", "active_codes"},
    "contrast": {"perplexity", "active_codes"},
    "diversity": set(),
    "magnitude": set(),
    "waveform": {"prediction_std"},
    "spectrum": {"prediction_std"},
    "utterance": {"embedding_std"},
}
"""What each task watches itself by; diversity is itself a watch on contrast's codes, magnitude cannot collapse."""


@pytest.mark.parametrize("name", ALL_TASKS)
def test_every_task_watches_itself(name: str) -> None:
    engine, batch = make_engine(tasks=[name]).train(), make_batch([5_000, 3_000, 4_000, 6_000])
    assert engine.monitor() == {}
    engine(batch, {name: 1.0})
    assert engine.monitor() == {}, "a task takes in nothing before the update is done"
    engine.after_update(1)
    # What is watched is in the checkpoint: a resumed run logs what an undisturbed one does.
    resumed = make_engine(tasks=[name])
    resumed.load_state_dict(engine.state_dict())
    found = engine.monitor()
    assert found.keys() == {f"{name}/{key}" for key in MONITORS[name]}
    assert all(value > 0 and math.isfinite(value) for value in found.values())
    assert resumed.monitor() == found
    assert engine.monitor() == {}


def test_the_monitor_of_units_is_the_loop_over_guesses() -> None:
    engine, guesses = make_engine(tasks=["units"]), []
    for update in range(2):
        batch = make_batch([5_000, 3_000], seed=update)
        views = engine.views(batch, {"units": engine.task("units")}, update)
        assert views.masked is not None
        guesses += engine.tasks["units"].head(views.masked.output[batch.mask]).argmax(1).tolist()
        engine(batch, {"units": 1.0}, update)
        engine.after_update(update + 1)
    assert engine.monitor() == {"units/prediction_perplexity": pytest.approx(slow_codebooks.perplexity(guesses))}


def test_the_monitor_of_the_teacher_is_both_sides_spread() -> None:
    engine, batch = make_engine(tasks=["teacher"]), make_batch([5_000, 3_000])
    views = engine.views(batch, {"teacher": engine.task("teacher")}, 0)
    assert views.masked is not None
    assert views.targets is not None
    predictions = engine.tasks["teacher"].head(views.masked.output[batch.mask])
    engine(batch, {"teacher": 1.0})
    engine.after_update(1)
    # Sums are carried as float32.
    assert engine.monitor() == {
        "teacher/target_std": pytest.approx(slow.spread(views.targets.mean(0).tolist()), rel=1e-4),
        "teacher/prediction_std": pytest.approx(slow.spread(predictions.tolist()), rel=1e-4),
    }
