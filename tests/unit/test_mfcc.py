"""MFCC are those of torchaudio's Kaldi front end, and lie on the encoder's grid."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchaudio
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sonorant.data.frames import num_frames
from sonorant.data.mfcc import NUM_DIMS, dense_mfcc, mfcc


def noise(num_samples: int, seed: int = 0) -> NDArray[np.float32]:
    """A quiet hiss."""
    return 0.1 * np.random.default_rng(seed).standard_normal(num_samples).astype(np.float32)


@given(st.integers(0, 10_000_000))
@example(399)
@example(400)
@example(559)
@example(560)
@example(719)
@example(720)
@example(16_000)
@settings(deadline=None)
def test_every_second_kaldi_window_is_a_frame(num_samples: int) -> None:
    # Kaldi's count with snip_edges: windows of 400 every 160 samples that fit; [::2] keeps the 1st, 3rd, …
    windows = 1 + (num_samples - 400) // 160 if num_samples >= 400 else 0
    assert len(range(windows)[::2]) == num_frames(num_samples)


@given(st.integers(0, 6000))
@example(399)
@example(400)
@example(719)
@example(720)
@settings(deadline=None, max_examples=60)
def test_one_row_a_frame(num_samples: int) -> None:
    frames = mfcc(noise(num_samples))
    assert frames.shape == (num_frames(num_samples), NUM_DIMS)
    assert frames.dtype == np.float32
    assert np.isfinite(frames).all()


def test_it_is_what_hubert_is_given() -> None:
    """fairseq's recipe: Kaldi MFCC with its defaults and no energy, deltas and their deltas along time."""
    wave = noise(30_000)
    cepstra = torchaudio.compliance.kaldi.mfcc(
        torch.from_numpy(wave)[None], sample_frequency=16_000, use_energy=False
    ).T
    deltas = torchaudio.functional.compute_deltas(cepstra)
    stacked = torch.cat([cepstra, deltas, torchaudio.functional.compute_deltas(deltas)]).T.numpy()
    np.testing.assert_array_equal(dense_mfcc(wave), stacked)
    np.testing.assert_array_equal(mfcc(wave), stacked[::2])


def test_frames_lie_where_the_encoder_puts_them() -> None:
    """A click in the middle of frame 20's window is loudest, by the 0th cepstrum, in that frame."""
    wave = noise(16_000) * 1e-3
    wave[20 * 320 + 200] = 1
    assert int(mfcc(wave)[:, 0].argmax()) == 20


def test_the_same_wave_gives_the_same_values() -> None:
    wave = noise(8000)
    np.testing.assert_array_equal(mfcc(wave), mfcc(wave.copy()))


@pytest.mark.parametrize("wave", [np.zeros(4000, np.float32), noise(4000)[::-1], np.zeros(0, np.float32)])
def test_silence_views_and_nothing_are_fine(wave: NDArray[np.float32]) -> None:
    frames = mfcc(wave)
    assert len(frames) == num_frames(len(wave))
    assert np.isfinite(frames).all()
