"""Perturbed speech: what was asked for, its labels where its frames went, the same whatever the ranks."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sonorant.config import AlignmentConfig, PerturbationConfig
from sonorant.data.frames import HOP_SAMPLES, SAMPLE_RATE, WINDOW_SAMPLES, num_frames, num_samples
from sonorant.data.perturbation import change_pitch, change_speed, draw_warp, frames_before, make_twins, perturb
from tests.tiny import noise

SILENT = np.zeros(1, np.float32)


def test_ranges_of_zero_leave_speech_as_it_is() -> None:
    wave = noise(2_000)
    assert draw_warp(PerturbationConfig(), np.random.default_rng(0)) == 1.0
    assert perturb(wave, 1.0, SILENT, PerturbationConfig(), np.random.default_rng(0)) is wave


@pytest.mark.parametrize("warp", [0.8, 1.25])
def test_a_warped_tone_is_shorter_and_higher(warp: float) -> None:
    tone = np.sin(2 * np.pi * 500 * np.arange(SAMPLE_RATE) / SAMPLE_RATE).astype(np.float32)
    config = PerturbationConfig(max_warp=0.5)
    found = perturb(tone, warp, SILENT, config, np.random.default_rng(0))
    assert len(found) == int(SAMPLE_RATE / warp)
    spectrum = np.abs(np.fft.rfft(found * np.hanning(len(found))))
    # One bin of the transform is 16,000 / length Hz.
    assert spectrum.argmax() * SAMPLE_RATE / len(found) == pytest.approx(500 * warp, abs=SAMPLE_RATE / len(found))


@given(st.integers(0, 10_000))
def test_warps_stay_in_their_range(seed: int) -> None:
    warp = draw_warp(PerturbationConfig(max_warp=0.15), np.random.default_rng(seed))
    assert 1 / 1.15 <= warp <= 1.15


@settings(deadline=None)
@given(st.floats(1 / 1.5, 1.5), st.integers(4, 400))
def test_a_frame_keeps_the_label_of_what_it_hears(warp: float, source_frames: int) -> None:
    frames = num_frames(int(num_samples(source_frames) / warp))
    source = frames_before(frames, warp, source_frames)
    assert len(source) == frames > 0
    assert 0 <= source.min() <= source.max() < source_frames
    heard = (np.arange(frames) * HOP_SAMPLES + WINDOW_SAMPLES / 2) * warp
    labelled = source * HOP_SAMPLES + WINDOW_SAMPLES / 2
    # The nearest frame is half a hop away at most; only the ends, which have no frame of their own, are clipped.
    inside = (heard >= WINDOW_SAMPLES / 2) & (heard <= (source_frames - 1) * HOP_SAMPLES + WINDOW_SAMPLES / 2)
    assert (np.abs(heard - labelled)[inside] <= HOP_SAMPLES / 2 + 1e-6).all()


@pytest.mark.parametrize("snr_db", [0.0, 20.0])
def test_noise_has_the_ratio_asked_for(snr_db: float) -> None:
    config = PerturbationConfig(noise_share=1.0, min_snr_db=snr_db, max_snr_db=snr_db)
    wave, other = noise(SAMPLE_RATE, 1), noise(5_000, 2)
    correlations = [
        float(np.corrcoef(wave, perturb(wave, 1.0, other, config, np.random.default_rng(seed)))[0, 1])
        for seed in range(8)
    ]
    # Signal of power 1 in noise of power 10^(-snr/10), independent: the sample correlation is good to 1 / √16,000.
    assert correlations == pytest.approx([(1 + 10 ** (-snr_db / 10)) ** -0.5] * 8, abs=0.03)


def test_what_comes_out_is_standardised() -> None:
    config = PerturbationConfig(max_tilt=0.5, noise_share=0.5)
    for seed in range(5):
        found = perturb(noise(4_000), 1.0, noise(4_000, 1), config, np.random.default_rng(seed))
        # eps 1e-5 beside a variance of about 1.
        assert (float(found.mean()), float(found.std())) == pytest.approx((0, 1), abs=1e-4)
        assert found.dtype == np.float32


# ------------------------------------------------------------------------------------------------------- twins


def loudest(wave: NDArray[np.float32]) -> float:
    """The frequency of the strongest component, in hertz."""
    spectrum = np.abs(np.fft.rfft(wave * np.hanning(len(wave)), 8 * len(wave)))
    return float(spectrum.argmax()) * SAMPLE_RATE / (8 * len(wave))


TONE = np.sin(2 * np.pi * 500 * np.arange(2 * SAMPLE_RATE) / SAMPLE_RATE).astype(np.float32)


@pytest.mark.parametrize("speed", [0.8, 0.85, 0.9, 1.1, 1.15, 1.2])
def test_another_speed_takes_the_pitch_along(speed: float) -> None:
    found = change_speed(TONE, speed)
    assert len(found) == math.ceil(len(TONE) / speed - 1e-9)
    # The transform's bins lie 1 / (8 · 2 s) apart.
    assert loudest(found) == pytest.approx(500 * speed, abs=0.2)


@pytest.mark.parametrize("semitones", [-12.0, -2.0, -0.5, 2.0, 12.0])
def test_another_pitch_leaves_the_length(semitones: float) -> None:
    found = change_pitch(TONE, semitones)
    assert (len(found), found.dtype) == (len(TONE), np.float32)
    # A thirtieth of a semitone, 0.2 %, is what the ratio is rounded to.
    assert loudest(found) == pytest.approx(500 * 2 ** (semitones / 12), rel=2 ** (1 / 360) - 1)


def test_nothing_changes_at_the_same_speed_and_pitch() -> None:
    assert change_speed(TONE, 1.0) is change_pitch(TONE, 0.0) is TONE


def test_twins_are_the_wave_and_a_copy_at_each_speed_and_pitch_in_either_order() -> None:
    config, seen, tone = AlignmentConfig(speeds=(0.9, 1.0, 1.1), semitones=2.0), set(), TONE[: SAMPLE_RATE // 2]
    for seed in range(60):
        twins = make_twins(tone, config, np.random.default_rng(seed))
        (place,) = [place for place, twin in enumerate(twins) if twin is tone]
        copy = twins[1 - place]
        ratio = loudest(copy) * len(copy) / len(tone) / 500
        seen.add((place, round(len(tone) / len(copy), 1), round(12 * math.log2(ratio))))
        again = make_twins(tone, config, np.random.default_rng(seed))
        assert all(np.array_equal(one, other) for one, other in zip(twins, again, strict=True))
    # By chance 60 draws miss one of the twelve in 1 of 15 cases: these seeds do not.
    assert seen == set(product((0, 1), (0.9, 1.0, 1.1), (-2, 2)))


@given(st.sampled_from([0.3, 0.57, 0.8, 1.2, 3.0]), st.integers(0, 400))
@settings(deadline=None, max_examples=20)
def test_twins_of_the_shortest_utterance_have_a_frame_each(speed: float, more_samples: int) -> None:
    # 0.1 s on the frame grid: what min_seconds and crop_seconds allow.
    wave = noise(num_samples(num_frames(SAMPLE_RATE // 10)) + more_samples)
    twins = make_twins(wave, AlignmentConfig(speeds=(speed,)), np.random.default_rng(0))
    assert all(num_frames(len(twin)) >= 1 and np.isfinite(twin).all() for twin in twins)
