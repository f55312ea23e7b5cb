"""The probe names what the frames' mean tells, and nothing where they are noise."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from sonorant.evaluation.probes.fitting import Budget, deal
from sonorant.evaluation.probes.naming import Named, fit_namer

BUDGET = Budget(num_updates=200, learning_rate=1e-2, batch_frames=400, evaluate_every=50)


def speak(count: int, seed: int, *, tells: bool = True) -> list[Named]:
    """Noise of two layers; in the second one a dimension's mean tells which of four voices it is, if any does."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        voice = int(rng.integers(4))
        states = rng.standard_normal((2, int(rng.integers(20, 40)), 6)).astype(np.float32)
        if tells:
            states[1, :, voice] += 3
        made.append(Named(states, f"voice {voice}"))
    return made


def test_a_voice_is_named_by_the_layer_that_tells() -> None:
    found = fit_namer(speak(80, 0), speak(20, 1), BUDGET)
    assert found.names == tuple(f"voice {n}" for n in range(4))
    assert found.error(speak(60, 2)) <= 0.02
    assert found.head.mix.shares.argmax() == 1
    assert found.head.mix.shares.sum() == pytest.approx(1, abs=1e-6)


def test_noise_has_no_name() -> None:
    found = fit_namer(speak(80, 0, tells=False), speak(20, 1, tells=False), BUDGET)
    # Chance is .75; 200 utterances' standard error .03.
    assert 0.6 < found.error(speak(200, 2, tells=False)) < 0.9


def test_a_name_never_heard_is_missed() -> None:
    found = fit_namer(speak(80, 0), speak(20, 1), replace(BUDGET, num_updates=50))
    assert found.error([Named(speak(1, 3)[0].states, "another")]) == 1


@pytest.mark.parametrize(
    ("train", "dev", "message"),
    [
        ([], None, "probe: found no train utterance, wanted some"),
        (None, [], "probe: found no dev utterance, wanted some"),
        ([Named(np.zeros((2, 3, 6), np.float32), "a")], None, "found the name a alone in train, wanted two at least"),
        (None, [Named(np.zeros((1, 3, 6), np.float32), "a")], "found states (1, 3, 6) of dev utterance 0, wanted (2,"),
        (None, [Named(np.full((2, 3, 6), np.inf), "a")], "dev utterance 0 that are not finite"),
    ],
)
def test_what_cannot_be_named_is_refused(train: list[Named] | None, dev: list[Named] | None, message: str) -> None:
    good = speak(8, 0)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        fit_namer(good if train is None else train, good if dev is None else dev, BUDGET)
    assert "\n" not in str(caught.value)


def test_folds_share_every_name_out() -> None:
    folds = deal(["a"] * 8 + ["b"] * 4 + ["c"], 4, np.random.default_rng(0))
    assert [sorted(folds[:8]), sorted(folds[8:12])] == [[0, 0, 1, 1, 2, 2, 3, 3], [0, 1, 2, 3]]
