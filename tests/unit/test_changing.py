"""Changed copies of utterances: how loud, how long, and the same for the same seed."""

from __future__ import annotations

import numpy as np
import pytest

from sonorant.steps.changing import CHANGES, REVERBERATION, SNR_DB, in_noise, in_room


def tone(seconds: float = 1.0) -> np.ndarray:
    """A tone of 200 Hz whose loudness rises and falls."""
    times = np.arange(int(16_000 * seconds)) / 16_000
    return (np.sin(2 * np.pi * 200 * times) * np.sin(2 * np.pi * 2 * times)).astype(np.float32)


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_one_and_the_seed_tells_which(name: str) -> None:
    wave = tone()
    once, again = (CHANGES[name](wave, np.random.default_rng(3)) for _ in range(2))
    assert once.dtype == np.float32
    assert np.array_equal(once, again)
    assert len(once) == (pytest.approx(16_000 / 1.1, abs=2) if name == "speed" else 16_000)
    assert np.isfinite(once).all()
    size = min(len(once), 16_000)
    assert np.corrcoef(once[:size], wave[:size])[0, 1] < 0.999


def test_noise_has_so_much_less_energy() -> None:
    wave = tone(4.0)
    noise = in_noise(wave, np.random.default_rng(0)) - (wave - wave.mean()) / wave.std()
    # 64,000 samples: the energy of white noise is known to 0.6 %, .02 dB, and three times that is allowed.
    assert -10 * np.log10(np.square(noise).mean()) == pytest.approx(SNR_DB, abs=0.07)


def test_a_room_rings_for_as_long_as_it_says() -> None:
    click = np.zeros(16_000, np.float32)
    click[0] = 1
    response = in_room(click, np.random.default_rng(0))
    assert response[0] == pytest.approx(1, abs=1e-6)
    assert np.square(response[1:]).sum() == pytest.approx(1, abs=1e-4)  # as much as comes straight
    # Energy falls by 60 dB in the whole time: by 30 in half of it, to what 800 samples tell of noise, .2 dB.
    early, late = (np.square(response[start : start + 800]).sum() for start in (1, 1 + int(8_000 * REVERBERATION)))
    assert 10 * np.log10(early / late) == pytest.approx(30, abs=1)
