"""Weights over time: what a phase gives to whom, and which recipes are refused in words that help."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from sonorant.config import LinearWeight, Phase, PretrainConfig, StemConfig, StepWeight
from sonorant.training.loop import check_alive, schedule_at, weights_at
from tests.tiny import pretrain_config, pretrain_values


def fault(section: type[Any], **values: Any) -> str:
    """The one message of a configuration that is refused."""
    with pytest.raises(ValidationError) as caught:
        section.model_validate(values)
    messages = [str(error["msg"]) for error in caught.value.errors()]
    assert all("\n" not in message for message in messages)
    return " | ".join(messages)


# ---------------------------------------------------------------------------------------------------------- weights


@given(st.floats(0, 10), st.floats(0, 10), st.floats(0, 1))
def test_a_line_goes_from_its_start_to_its_end(start: float, end: float, done: float) -> None:
    weight = LinearWeight(start=start, end=end)
    assert weight.weight(0) == start
    assert weight.weight(1) == pytest.approx(end)
    # Of the whole way, the share that is done.
    assert weight.weight(done) == pytest.approx((1 - done) * start + done * end, abs=1e-9)


@pytest.mark.parametrize(("done", "wanted"), [(0, 1), (0.1999, 1), (0.2, 0), (0.5, 0), (0.7, 5), (0.99, 5)])
def test_a_staircase_jumps_at_its_shares(done: float, wanted: float) -> None:
    assert StepWeight(values=(1, 0, 5), at=(0.2, 0.7)).weight(done) == wanted


def test_a_phase_gives_each_task_its_weight() -> None:
    phase = Phase.model_validate(
        {"weights": {"units": 2, "teacher": {"start": 1, "end": 0}, "contrast": {"values": [0, 3], "at": [0.5]}}}
    )
    assert phase.tasks == {"units", "teacher", "contrast"}
    assert phase.weights_at(0.0) == {"units": 2, "teacher": 1, "contrast": 0}
    assert phase.weights_at(0.5) == {"units": 2, "teacher": 0.5, "contrast": 3}


def test_a_task_counts_if_it_ever_has_weight() -> None:
    weights = {"units": 1, "teacher": 0, "contrast": {"start": 0, "end": 0}, "codebooks": {"values": [0, 0], "at": [1]}}
    assert Phase.model_validate({"weights": weights}).tasks == {"units"}
    weights |= {"contrast": {"start": 0, "end": 0.1}, "codebooks": {"values": [0, 1], "at": [0.9]}}
    assert Phase.model_validate({"weights": weights}).tasks == {"units", "contrast", "codebooks"}


def test_phases_follow_one_another_and_each_begins_anew() -> None:
    phases = [
        {"share": 0.4, "weights": {"units": 1.0}},
        {"share": 0.4, "weights": {"units": {"start": 1, "end": 0}, "teacher": 1}},
        {"share": 0.2, "weights": {"teacher": {"values": [1, 2], "at": [0.5]}}},
    ]
    config = pretrain_config(num_updates=10, phases=phases)
    assert [weights_at(config, update) for update in range(10)] == [
        *[(0, {"units": 1.0})] * 4,
        *[(1, {"units": pytest.approx(1 - step / 4), "teacher": 1}) for step in range(4)],
        (2, {"teacher": 1}),
        (2, {"teacher": 2}),
    ]
    assert config.tasks == {"units", "teacher"}


@given(st.lists(st.integers(1, 20), min_size=1, max_size=5), st.integers(1, 60))
def test_every_update_is_of_some_phase_in_their_order(parts: list[int], num_updates: int) -> None:
    phases = [{"share": part / sum(parts), "weights": {"units": {"start": 1, "end": 2}}} for part in parts]
    config = pretrain_config(num_updates=num_updates, phases=phases)
    indices = []
    for update in range(num_updates):
        index, weights = weights_at(config, update)
        indices.append(index)
        assert 1 <= weights["units"] < 2, "the share that is done is below one while a phase lasts"
    assert indices == sorted(indices)
    for index, part in enumerate(parts):
        # Each end is rounded by at most half an update.
        assert abs(indices.count(index) - num_updates * part / sum(parts)) <= 1 + 1e-6


# ----------------------------------------------------------------------------------------------------------- faults


def test_the_learning_rate_begins_anew_where_a_phase_says_so() -> None:
    phases = [
        {"share": 0.2, "weights": {"units": 1.0}, "reset_optimizer": True},
        {"share": 0.3, "weights": {"teacher": 1.0}},
        {"share": 0.5, "weights": {"units": 1.0}, "reset_optimizer": True},
    ]
    config = pretrain_config(phases=phases, num_updates=20)
    assert [schedule_at(config, update) for update in (0, 3, 4, 9)] == [(0, 10)] * 4
    assert [schedule_at(config, update) for update in (10, 19)] == [(10, 20)] * 2


@pytest.mark.parametrize(
    "weights",
    [
        {"units": 0.0},
        {},
        {"units": {"start": 0, "end": 0}, "teacher": 0},
        {"units": {"values": [0, 0], "at": [0.5]}},
    ],
)
def test_a_phase_that_trains_nothing_is_refused(weights: dict[str, Any]) -> None:
    assert "are all zero: give at least one task a weight above 0" in fault(Phase, weights=weights)


@pytest.mark.parametrize(
    "weights",
    [
        {"units": {"start": 0, "end": 1}},
        {"units": {"values": [0, 1], "at": [0.01]}},
        {"units": {"values": [1, 0], "at": [0.99]}},
        {"units": {"values": [1, 0, 1], "at": [0.3, 0.4]}},
        {"units": {"values": [1, 0], "at": [0.6]}, "teacher": {"values": [0, 1], "at": [0.65]}},
    ],
)
def test_a_phase_that_trains_nothing_for_a_while_is_refused(weights: dict[str, Any]) -> None:
    assert "all zero for a part of the phase: end the phase there or raise one" in fault(Phase, weights=weights)


@pytest.mark.parametrize(
    "weights",
    [
        {"units": {"start": 1, "end": 0}},
        {"units": {"start": 0, "end": 1}, "teacher": {"start": 1, "end": 0}},
        {"units": {"values": [1, 0], "at": [0.6]}, "teacher": {"values": [0, 1], "at": [0.6]}},
        {"units": {"values": [1, 0], "at": [1]}},
        {"units": {"values": [0, 1], "at": [0]}},
    ],
)
def test_a_phase_in_which_someone_always_trains_is_accepted(weights: dict[str, Any]) -> None:
    phase = Phase.model_validate({"weights": weights})
    assert all(any(phase.weights_at(step / 1000).values()) for step in range(1000))


@pytest.mark.parametrize(
    ("values", "at"), [((1, 2), ()), ((1, 2), (0.2, 0.4)), ((1, 2, 3), (0.5, 0.2)), ((1, 2, 3, 4), (0.5, 0.6))]
)
def test_a_crooked_staircase_is_refused(values: tuple[float, ...], at: tuple[float, ...]) -> None:
    assert "wanted rising shares and one value more: change one" in fault(StepWeight, values=values, at=at)


@pytest.mark.parametrize("weight", [-1, {"start": -1, "end": 1}, {"values": [1, -1], "at": [0.5]}, {"start": 1}])
def test_weights_are_not_negative_and_complete(weight: Any) -> None:
    assert fault(Phase, weights={"units": weight, "teacher": 1})


def test_a_stranger_among_tasks_is_refused() -> None:
    assert "'units'" in fault(Phase, weights={"unitz": 1})


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"phases": [{"share": 0.5, "weights": {"units": 1}}]}, "sum to 0.5, wanted 1: change the shares"),
        ({"teacher": {"num_layers": 3}}, "teacher.num_layers 3 exceeds encoder.num_layers 2: lower it"),
        ({"teacher": {"layers": [1, 4]}}, "teacher.layers 4 exceeds encoder.num_layers 2: lower it"),
        ({"spectrum": {"layer": 3}}, "spectrum.layer 3 exceeds encoder.num_layers 2: lower it"),
        (
            {"phases": [{"weights": {"units": 1, "diversity": 1}}], "contrast": {"targets": "projected"}},
            'found contrast.targets "projected", wanted "quantised": set that',
        ),
        ({"sharding": "full", "log_gradients": True}, "unset log_gradients and balance.at, or sharding"),
        ({"sharding": "full", "balance": {"at": 5}}, "unset log_gradients and balance.at, or sharding"),
        ({"quantiser": {"num_groups": 3}}, "dim 8 is not divisible by num_groups 3: change one of them"),
        ({"utterance": {"min_snr_db": 50.0}}, "min_snr_db 50 exceeds max_snr_db 40: swap them"),
        ({"stem": {"freeze": "copy"}}, "stem.freeze copy does not go with stem.freeze_at None: set both or neither"),
    ],
)
def test_what_does_not_go_together_is_said_on_one_line(changes: dict[str, Any], wanted: str) -> None:
    assert wanted in fault(PretrainConfig, **pretrain_values(**changes))


def test_a_stem_that_is_frozen_is_told_when() -> None:
    assert "set both or neither" in fault(StemConfig, freeze_at=5)
    assert StemConfig(freeze="freeze", freeze_at=0).freeze_at == 0


# ------------------------------------------------------------------------------------------------------------ guard


@pytest.mark.parametrize(
    ("name", "low"),
    [
        ("teacher/target_std", 0.09),
        ("teacher/prediction_std", 0.009),
        ("codebooks/perplexity", 1.9),
        ("contrast/perplexity", 1.0),
        ("alignment/effective_rank", 1.2),
    ],
)
def test_a_collapse_ends_the_run_in_words(name: str, low: float) -> None:
    config = pretrain_config(guard={"after_updates": 10})
    check_alive(config, {name: low}, 10)
    check_alive(config, {name: 2.5}, 11)
    check_alive(config, {"loss": 0.0}, 11)
    with pytest.raises(ValueError, match=rf"found {name} {low:.4g} at update 11, wanted at least") as caught:
        check_alive(config, {name: low}, 11)
    assert "\n" not in str(caught.value)
