"""Each task's pull on the encoder: measured, compared, balanced; and the same however an update is divided."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from sonorant.config import PretrainConfig
from sonorant.data.batching import Batch
from sonorant.tasks.task import Per, Shares
from sonorant.training.distributed import Ranks
from sonorant.training.engine import Engine, Parts
from sonorant.training.gradients import balanced_scales, named_gradients, task_gradients
from sonorant.training.loop import is_balanced
from sonorant.training.update import count, run_update, scaled_weights
from tests.tiny import ALL_TASKS, alone, make_batch, make_engine, pretrain_config

RANKS = Ranks(0, 1, torch.device("cpu"))
LENGTHS = [5_000, 2_600, 6_100, 3_000, 4_321, 7_000]
"""Three speakers of two sources (tests/tiny.py): every kind of negative there is."""
WEIGHTS = dict(zip(ALL_TASKS, (1.0, 0.5, 2.0, 1.0, 0.1, 10.0, 1.0, 0.3, 0.7), strict=True))
PER_FRAME = [name for name in ALL_TASKS if name not in ("diversity", "utterance")]


def counted(batches: Sequence[Batch]) -> dict[Per, float]:
    """What these batches are the whole of."""
    return {**count(batches), "update": 1.0}


def gradients_of(engine: Engine) -> dict[str, Tensor]:
    """Every parameter's, where there is one."""
    return {name: p.grad.clone() for name, p in engine.named_parameters() if p.grad is not None}


def assert_same_gradients(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Float32 sums in another order: six digits of a tensor's largest gradient."""
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        largest = float(gradient.abs().max())
        torch.testing.assert_close(found[name], gradient, atol=2e-5 * largest + 1e-7, rtol=1e-4, msg=name)


# ------------------------------------------------------------------------------------------------------- division


@pytest.mark.parametrize("name", PER_FRAME)
def test_a_packed_batch_is_the_sum_of_its_utterances(name: str) -> None:
    engine, batch = make_engine(tasks=[name]).train(), make_batch(LENGTHS)
    loss, sums = engine(batch, {name: 1.0})
    loss.backward()
    together = gradients_of(engine)
    assert all(float(gradient.abs().max()) > 0 for gradient in together.values())
    engine.zero_grad()
    total, totals = 0.0, dict.fromkeys(sums, 0.0)
    for part in alone(batch):
        loss_alone, sums_alone = engine(part, {name: 1.0})
        loss_alone.backward()
        total += loss_alone.item()
        for key, value in sums_alone.items():
            totals[key] += float(value)
    # Float32 sums in another order.
    assert total == pytest.approx(loss.item(), rel=1e-5)
    assert totals == pytest.approx({key: float(value) for key, value in sums.items()}, rel=1e-5)
    assert_same_gradients(gradients_of(engine), together)


@pytest.mark.parametrize("name", ["diversity", "utterance"])
def test_parts_that_know_of_one_another_add_up_to_the_whole(name: str) -> None:
    engine, batch, weights = make_engine(tasks=[name]).train(), make_batch(LENGTHS), {name: 1.0}
    loss, _ = engine(batch, weights)
    loss.backward()
    together = gradients_of(engine)
    assert all(float(gradient.abs().max()) > 0 for gradient in together.values())
    engine.zero_grad()
    parts = alone(batch)
    shares = [engine.shares(part, weights, 0)[name] for part in parts]

    def gather(own: Mapping[str, Shares]) -> Parts:
        return dict.fromkeys(own, shares)

    for index, part in enumerate(parts):
        loss_of_part, _ = engine(part, weights, 0, gather, index)
        # Every part computes the whole update's loss. Float32 sums in another order.
        assert loss_of_part.item() == pytest.approx(loss.item(), rel=1e-5)
        loss_of_part.backward()
    assert_same_gradients(gradients_of(engine), together)


def test_a_part_that_knows_of_no_other_is_another_loss() -> None:
    engine, batch = make_engine(tasks=["diversity", "utterance"]).train(), make_batch(LENGTHS)
    for name in ("diversity", "utterance"):
        whole = engine(batch, {name: 1.0})[0].item()
        mean = sum(engine(part, {name: 1.0})[0].item() for part in alone(batch)) / len(LENGTHS)
        assert abs(mean - whole) > 0.01 * whole


def test_shares_are_heard_as_they_will_be_computed() -> None:
    """With dropout and other views about, the run without gradient draws what the run with gradient does."""
    noisy = {"dropout": 0.5, "attention_dropout": 0.5, "layer_drop": 0.3, "num_layers": 4}
    engine, batch = make_engine(tasks=ALL_TASKS, **noisy).train(), make_batch(LENGTHS)
    torch.manual_seed(5)
    heard = engine.shares(batch, WEIGHTS, 0)
    own: dict[str, Shares] = {}

    def listen(shares: Mapping[str, Shares]) -> Parts:
        own.update(shares)
        return {name: [share] for name, share in shares.items()}

    torch.manual_seed(5)
    engine(batch, WEIGHTS, 0, listen)
    assert heard.keys() == own.keys() == {"diversity", "utterance"}
    for name, share in own.items():
        for one, other in zip(share, heard[name], strict=True):
            assert torch.equal(one, other), name


def update_of(
    batches: Sequence[Batch], whole: Batch, weights: Mapping[str, float]
) -> tuple[Engine, dict[str, float]]:
    """An engine after one update over these batches, which together are `whole`, and what is logged of it."""
    engine = make_engine(tasks=ALL_TASKS).train()
    config = pretrain_config(phases=[{"weights": weights}], batching={"micro_batches": len(batches)})
    optimizer = torch.optim.SGD([p for p in engine.parameters() if p.requires_grad], lr=0.01)
    sums = run_update(config, engine, engine, optimizer, batches, weights, counted([whole]), 0, RANKS)
    assert all(math.isfinite(value) for value in sums.values())
    engine.after_update(1)
    return engine, sums


@pytest.mark.parametrize("task", [*ALL_TASKS, "all"])
def test_accumulation_is_one_larger_batch(task: str) -> None:
    """Gradients, and all that an update leaves behind: codebooks moved once, teacher, what monitors show."""
    weights = WEIGHTS if task == "all" else {task: 1.0}
    whole = make_batch(LENGTHS)
    (one, logged_once), (many, logged) = (update_of(parts, whole, weights) for parts in ([whole], alone(whole)))
    # Float32 sums in another order.
    assert logged == pytest.approx(logged_once, rel=1e-4)
    assert_same_gradients(gradients_of(many), gradients_of(one))
    states = one.state_dict()
    assert any("window" in name for name in states)
    for name, value in many.state_dict().items():
        # Sums of thousands of values in float32, in another order.
        torch.testing.assert_close(value, states[name], atol=1e-4, rtol=1e-4, msg=name)
    assert many.monitor() == pytest.approx(one.monitor(), rel=1e-3)


# ----------------------------------------------------------------------------------------------------- measurement


def measured(
    config: PretrainConfig, engine: Engine, batches: Sequence[Batch], weights: Mapping[str, float]
) -> tuple[list[str], Tensor]:
    """The products of the weighted gradients of an update over these batches."""
    return task_gradients(config, engine, batches, weights, counted(batches), 0, RANKS)


def by_hand(engine: Engine, batch: Batch, weights: Mapping[str, float]) -> dict[str, Tensor]:
    """Each task's weighted gradient on the encoder as one vector, by a backward pass of its own."""
    scaled = scaled_weights(engine, weights, counted([batch]))
    vectors = {}
    for name, weight in scaled.items():
        engine.zero_grad(set_to_none=True)
        engine(batch, {name: weight})[0].backward()
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in engine.encoder.parameters()]
        vectors[name] = torch.cat([part.flatten() for part in parts]).double()
        engine.pending = {}
    engine.zero_grad(set_to_none=True)
    return vectors


@pytest.mark.parametrize("divided", [False, True])
def test_inner_products_are_those_of_a_backward_pass_each(divided: bool) -> None:
    engine, batch = make_engine(tasks=ALL_TASKS).train(), make_batch(LENGTHS)
    weights = {**WEIGHTS, "spectrum": 0.0}
    before = {name: value.clone() for name, value in engine.state_dict().items()}
    vectors = by_hand(engine, batch, weights)
    names, products = measured(pretrain_config(), engine, alone(batch) if divided else [batch], weights)
    assert names == [name for name in ALL_TASKS if name != "spectrum"], "a task without weight pulls on nothing"
    assert products.dtype == torch.float64
    norms = torch.stack([vectors[name].norm() for name in names])
    wanted = torch.stack([torch.stack([vectors[a] @ vectors[b] for b in names]) for a in names])
    # Float32 gradients, summed in another order where the update is divided.
    scale = norms[:, None] * norms
    torch.testing.assert_close(products / scale, wanted / scale, atol=1e-4, rtol=0)
    assert not engine.pending
    assert all(p.grad is None for p in engine.parameters())
    for name, value in engine.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} was changed by a measurement"


def test_a_frozen_stem_has_no_part_in_it() -> None:
    sections = {"stem": {"freeze": "freeze", "freeze_at": 0}}
    engine = make_engine(tasks=["units", "magnitude"], sections=sections)
    names, products = measured(pretrain_config(), engine, [make_batch(LENGTHS)], {"units": 1.0, "magnitude": 1.0})
    assert names == ["units", "magnitude"]
    assert float(products[0, 0]) > 0
    assert float(products[1, 1]) == 0, "all that magnitude pulls on stands still"


def test_norms_and_cosines_have_names() -> None:
    a, b, c = torch.tensor([3.0, 4.0]), torch.tensor([4.0, 3.0]), torch.zeros(2)
    rows = torch.stack([a, b, c]).double()
    found = named_gradients(["one", "two", "none"], rows @ rows.T)
    assert found == {
        "one/encoder_gradient": pytest.approx(5.0),
        "two/encoder_gradient": pytest.approx(5.0),
        "none/encoder_gradient": 0.0,
        "one+two/gradient_cosine": pytest.approx(24 / 25),
        "one+none/gradient_cosine": 0.0,
        "two+none/gradient_cosine": 0.0,
    }


# --------------------------------------------------------------------------------------------------------- balance


def test_scales_are_the_formula() -> None:
    # Norms 3, 1 and 0 at weights 1, 3 and 1: wanted 4 · 1/4 and 4 · 3/4, and nothing can make the third one pull.
    products = torch.diag(torch.tensor([9.0, 1.0, 0.0]).double())
    found = balanced_scales(["a", "b", "c"], products, {"a": 1.0, "b": 3.0, "c": 1.0}, {})
    assert found == {"a": pytest.approx(1 / 3), "b": pytest.approx(3.0)}
    # The same measured with scales 2 and 1/2 already in the weights: they are multiplied, not forgotten.
    found = balanced_scales(["a", "b"], products[:2, :2], {"a": 2.0, "b": 1.5}, {"a": 2.0, "b": 0.5, "idle": 7.0})
    assert found == {"a": pytest.approx(2 / 3), "b": pytest.approx(1.5), "idle": 7.0}
    assert balanced_scales(["a"], torch.zeros(1, 1), {"a": 1.0}, {"a": 2.0}) == {"a": 2.0}


@pytest.mark.parametrize("scales", [{}, {"units": 3.0, "waveform": 0.1}])
def test_after_balancing_norms_are_as_the_weights(scales: dict[str, float]) -> None:
    plain = {"units": 1.0, "teacher": 2.0, "waveform": 0.5, "utterance": 0.1}
    engine, batch = make_engine(tasks=list(plain)).train(), make_batch(LENGTHS)
    config = pretrain_config()
    weights = {name: weight * scales.get(name, 1.0) for name, weight in plain.items()}
    names, products = measured(config, engine, [batch], weights)
    before = products.diagonal().sqrt()
    found = balanced_scales(names, products, weights, scales)
    again = {name: weight * found[name] for name, weight in plain.items()}
    norms = dict(zip(names, measured(config, engine, [batch], again)[1].diagonal().sqrt().tolist(), strict=True))
    # Norms of float32 gradients.
    assert sum(norms.values()) == pytest.approx(float(before.sum()), rel=1e-5)
    pulls = [norms[name] / plain[name] for name in plain]
    assert all(one == pytest.approx(other, rel=1e-5) for one, other in pairwise(pulls))
    assert before.max() / before.min() > 3, "they were unbalanced"


@pytest.mark.parametrize(
    ("balance", "updates"),
    [({}, []), ({"at": 3}, [3]), ({"at": 3, "every": 4}, [3, 7, 11]), ({"at": 1, "every": 5}, [1, 6, 11])],
)
def test_weights_are_rescaled_when_the_recipe_says(balance: dict[str, int], updates: list[int]) -> None:
    config = pretrain_config(num_updates=12, balance=balance)
    assert [update for update in range(12) if is_balanced(config, update)] == updates
