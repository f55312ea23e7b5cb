"""What a recipe freezes moves up to that update and not a bit after it; nothing else stops."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from sonorant.config import OptimConfig
from sonorant.tasks.task import Per
from sonorant.training.distributed import Ranks
from sonorant.training.engine import Engine
from sonorant.training.optim import build_optimizer
from sonorant.training.update import count, run_update
from tests.tiny import ALL_TASKS, GROUP_NORM, LAYOUTS, make_batch, make_encoder, make_engine, noise, pretrain_config

FRONT = ("encoder.stem.", "encoder.stem_norm.", "encoder.projection.")
COPY = ("teacher.front.",)
AT = 2


def state(engine: Engine) -> dict[str, Tensor]:
    """Everything in a checkpoint."""
    return {name: value.clone() for name, value in engine.state_dict().items()}


def train(engine: Engine, weights: Mapping[str, float], num_updates: int) -> list[set[str]]:
    """What each update moved. Weight decay and momentum would move what merely has no gradient of its own."""
    engine.train()
    optimizer = build_optimizer(engine, OptimConfig(learning_rate=0.01, weight_decay=0.5))
    config, ranks = pretrain_config(), Ranks(0, 1, torch.device("cpu"))
    moved = []
    for update in range(num_updates):
        before, batch = state(engine), make_batch([5_000, 2_600, 4_100, 3_000], seed=update)
        counts: dict[Per, float] = {**count([batch]), "update": 1.0}
        run_update(config, engine, engine, optimizer, [batch], weights, counts, update, ranks)
        engine.after_update(update + 1)
        moved.append({name for name, value in engine.state_dict().items() if not torch.equal(value, before[name])})
    return moved


def of(names: set[str], prefixes: tuple[str, ...]) -> set[str]:
    """Those that begin so."""
    return {name for name in names if name.startswith(prefixes)}


def all_of(engine: Engine, prefixes: tuple[str, ...]) -> set[str]:
    """All parameters that begin so."""
    return of({name for name, _ in engine.named_parameters()}, prefixes)


# A mask embedding moves by masked tasks alone, a codeword only when chosen: whole modules, then, not every value.
@pytest.mark.parametrize("tasks", [("units", "teacher"), ALL_TASKS])
def test_a_frozen_stem_stands_still_with_its_projection(tasks: tuple[str, ...]) -> None:
    engine = make_engine(tasks=tasks, sections={"stem": {"freeze": "freeze", "freeze_at": AT}})
    moved = train(engine, dict.fromkeys(tasks, 1.0), 4)
    front, rest = all_of(engine, FRONT), all_of(engine, ("encoder.context.", "tasks."))
    for update, names in enumerate(moved):
        assert of(names, FRONT) == (front if update < AT else set()), update
        assert rest <= names, update


def test_without_freezing_everything_goes_on() -> None:
    engine = make_engine(tasks=ALL_TASKS)
    everything = {name for name, _ in engine.named_parameters()}
    assert all(everything <= names for names in train(engine, dict.fromkeys(ALL_TASKS, 1.0), 3))


def test_the_teachers_copy_of_the_stem_stands_still_and_the_students_goes_on() -> None:
    sections = {"stem": {"freeze": "copy", "freeze_at": AT}}
    engine = make_engine(tasks=["units", "teacher"], sections=sections)
    weights = {"units": 1.0, "teacher": 1.0}
    moved = train(engine, weights, AT)
    student, copied = all_of(engine, FRONT), all_of(engine, COPY)
    assert len(copied) == len(student) > 0
    # The copy is made when the second update is done, of what the student is then.
    assert [of(names, COPY) for names in moved] == [set(), copied]
    assert engine.teacher is not None
    assert engine.teacher.front is not None
    theirs = [p for part in (engine.encoder.stem, engine.encoder.stem_norm, engine.encoder.projection)
              for p in part.parameters()]  # fmt: skip
    for mine, other in zip(engine.teacher.front.parameters(), theirs, strict=True):
        assert torch.equal(mine, other)
        assert mine.data_ptr() != other.data_ptr(), "an alias would go on moving (pretraining.md §1.3)"
        assert not mine.requires_grad


def test_the_copy_is_not_made_again() -> None:
    engine = make_engine(tasks=["units", "teacher"], sections={"stem": {"freeze": "copy", "freeze_at": AT}})
    moved = train(engine, {"units": 1.0, "teacher": 1.0}, 5)
    student = all_of(engine, FRONT)
    assert [of(names, COPY) != set() for names in moved] == [False, True, False, False, False]
    assert all(of(names, FRONT) == student for names in moved)


def test_the_teacher_hears_through_the_copy_from_then_on() -> None:
    engine = make_engine(tasks=["teacher"], sections={"stem": {"freeze": "copy", "freeze_at": AT}})
    assert engine.teacher is not None
    with torch.no_grad():
        for parameter in engine.encoder.projection.parameters():
            parameter.mul_(-1.5)
    batch, tasks = make_batch([5_000, 2_600]), {"teacher": engine.task("teacher")}
    own = engine.encoder.project(batch.waves, batch.num_samples)
    copied = engine.teacher.project(batch.waves, batch.num_samples)
    assert not torch.allclose(own, copied)
    for update, z in ((0, own), (AT - 1, own), (AT, copied), (AT + 1, copied)):
        views = engine.views(batch, tasks, update)
        assert views.targets is not None
        assert torch.equal(views.targets, engine.teacher.targets(z, views.frames, batch.mask)), update


@pytest.mark.parametrize("freeze", ["freeze", "copy"])
def test_frozen_from_the_start(freeze: str) -> None:
    engine = make_engine(tasks=["units", "teacher"], sections={"stem": {"freeze": freeze, "freeze_at": 0}})
    prefixes = FRONT if freeze == "freeze" else COPY
    assert all(not of(names, prefixes) for names in train(engine, {"units": 1.0, "teacher": 1.0}, 2))


@pytest.mark.parametrize(
    ("section", "name"), [("teacher", "teacher.context."), ("codebooks", "tasks.codebooks.state")]
)
def test_teacher_and_codebooks_stand_still_after_their_update(section: str, name: str) -> None:
    changes: dict[str, Any] = {"teacher": {"num_layers": 2, "start_decay": 0.9}, "codebooks": {"num_codes": 6}}
    changes[section]["freeze_at"] = AT
    engine = make_engine(tasks=["codebooks"], sections=changes)
    moved = train(engine, {"codebooks": 1.0}, 4)
    assert [bool(of(names, (name,))) for names in moved] == [True, True, False, False]
    # Each stands still alone.
    other = {"teacher.context.", "tasks.codebooks.state", "tasks.codebooks.heads", "encoder.stem"} - {name}
    assert all(of(names, (prefix,)) for names in moved for prefix in other)


def test_a_frozen_teacher_is_the_average_of_the_updates_before() -> None:
    """Not a copy of the student as it was, nor one that goes on with its positional convolution."""
    changes = {"teacher": {"num_layers": 2, "start_decay": 0.5, "end_decay": 0.5, "freeze_at": 1}}
    engine = make_engine(tasks=["teacher"], sections=changes)
    assert engine.teacher is not None
    start = {name: value.clone() for name, value in engine.teacher.context.named_parameters()}
    train(engine, {"teacher": 1.0}, 1)
    student = {name: value.clone() for name, value in engine.encoder.context.named_parameters()}
    train(engine, {"teacher": 1.0}, 1)  # counts from 0 again: this is update 1 as well
    engine.after_update(2)
    halfway = {name: value.clone() for name, value in engine.teacher.context.named_parameters()}
    for update in (2, 3, 400):
        engine.after_update(update)
    for name, value in engine.teacher.context.named_parameters():
        assert torch.equal(value, halfway[name])
        assert not torch.equal(value, start[name])
        assert not torch.equal(value, student[name])


def test_the_stems_gradient_is_multiplied_and_nothing_else_is() -> None:
    batch, gradients, losses = make_batch([5_000, 2_600]), [], []
    for factor in (1.0, 0.1, 0.0):
        engine = make_engine(tasks=["units", "magnitude"], sections={"stem": {"gradient": factor}})
        loss = engine(batch, {"units": 1.0, "magnitude": 1.0})[0]
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: p.grad for name, p in engine.named_parameters()})
    # Bit for bit the same value.
    assert losses[0] == losses[1] == losses[2]
    for name, whole in gradients[0].items():
        assert whole is not None
        for factor, other in ((0.1, gradients[1][name]), (0.0, gradients[2][name])):
            assert other is not None
            wanted = whole * factor if name.startswith("encoder.stem.") else whole
            # The factor is one float32 rounding; sums over frames are of numbers of either sign.
            torch.testing.assert_close(other, wanted, atol=1e-6 * float(whole.abs().max()), rtol=1e-4, msg=name)


WAVLM = {**GROUP_NORM, "relative_buckets": 8, "relative_max_distance": 16}


@pytest.mark.parametrize("layout", [*LAYOUTS.values(), WAVLM], ids=[*LAYOUTS, "wavlm"])
@pytest.mark.parametrize("num_layers", [0, 1, 2, 3])
def test_what_lies_below_the_trained_layers_takes_no_gradient_and_no_dropout(
    layout: dict[str, Any], num_layers: int
) -> None:
    """Dropout of one half everywhere: the lowest layers' states are those of evaluation all the same."""
    encoder = make_encoder(**{**layout, "num_layers": 3, "dropout": 0.5, "attention_dropout": 0.5, "layer_drop": 0.0})
    waves, lengths = torch.from_numpy(noise(8_000)), [8_000]
    still = encoder(waves, lengths).states
    encoder.freeze_below(num_layers)
    encoder.train()
    hidden = encoder(waves, lengths)
    for layer in range(4):
        is_still = layer <= 3 - num_layers
        # With a bias attention has another kernel where gradients are kept: a rounding, where dropout makes a half.
        assert torch.allclose(hidden.states[layer], still[layer], atol=1e-5) == is_still
        assert hidden.states[layer].requires_grad != is_still
    top = {f"context.layers.{3 - 1 - place}." for place in range(num_layers)}
    named = dict(encoder.named_parameters())
    if num_layers:
        hidden.output.square().sum().backward()
    assert {name for name, parameter in named.items() if parameter.grad is not None} == {
        name for name in named if any(name.startswith(prefix) for prefix in top)
    }
    # A second pass through evaluation and back leaves it frozen.
    encoder.eval().train()
    assert torch.allclose(encoder(waves, lengths).states[3 - num_layers], still[3 - num_layers], atol=1e-5)
