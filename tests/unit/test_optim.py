"""AdamW and the tri-stage learning rate."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sonorant.config import OptimConfig
from sonorant.training.optim import build_optimizer, learning_rate
from tests.tiny import make_engine

MT4SSL = OptimConfig()
UPDATES = 400_000


@pytest.mark.parametrize(
    ("update", "rate"),
    [
        # pretraining.md §2.3: 12k warm-up from 1 %, 360k hold, 28k decay to 1 % of 5e-4.
        (0, 5e-6),
        (6_000, 5e-4 * 0.505),
        (12_000, 5e-4),
        (371_999, 5e-4),
        (372_000, 5e-4),
        (386_000, 5e-5),
        (399_999, 5e-4 * math.exp(math.log(0.01) * 27_999 / 28_000)),
    ],
)
def test_the_three_stages_of_mt4ssl(update: int, rate: float) -> None:
    assert learning_rate(update, UPDATES, MT4SSL) == pytest.approx(rate, rel=1e-12)


@given(
    st.integers(1, 300),
    st.floats(0, 0.5),
    st.floats(0, 0.5),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_the_rate_rises_holds_and_falls(updates: int, warmup: float, decay: float, start: float, final: float) -> None:
    config = OptimConfig(
        learning_rate=1.0, warmup_share=warmup, decay_share=decay, start_scale=start, final_scale=final
    )
    rates = [learning_rate(update, updates, config) for update in range(updates)]
    assert all(0 <= rate <= 1 for rate in rates)
    rising = round(warmup * updates)
    falling = min(round(decay * updates), updates - rising)
    assert rates[:rising] == sorted(rates[:rising])
    assert set(rates[rising : updates - falling]) <= {1.0}
    assert rates[updates - falling :] == sorted(rates[updates - falling :], reverse=True)


def test_weight_decay_is_decoupled_and_on_everything_that_trains() -> None:
    engine = make_engine()
    optimizer = build_optimizer(engine, OptimConfig(learning_rate=0.5, weight_decay=0.1))
    before = {name: p.detach().clone() for name, p in engine.named_parameters()}
    for parameter in engine.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in engine.named_parameters():
        # No gradient, so AdamW leaves p · (1 − rate · decay).
        factor = 0.95 if parameter.requires_grad else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor, msg=name)
