"""Changes to speech that leave its phones: another vocal tract and tempo, another channel, noise.

Offline units stay those of the untouched utterance, so that what is learned from them does not depend on who
speaks where. Every range of zero leaves the wave as it is.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sonorant.config import AlignmentConfig, PerturbationConfig
from sonorant.data.audio import standardise
from sonorant.data.frames import HOP_SAMPLES, WINDOW_SAMPLES

Wave = NDArray[np.float32]


def perturb(
    wave: Wave, warp: float, other: Wave, config: PerturbationConfig, rng: np.random.Generator
) -> Wave:
    """`wave` (S,) played `warp` times as fast, tilted, with noise or `other` speech behind it: (⌊S / warp⌋,).

    Playing it faster raises pitch and formants together, as a smaller speaker would. `other` is cut or
    repeated to the same length.
    """
    if config == PerturbationConfig():
        return wave
    num_samples = int(len(wave) / warp)
    if warp != 1:
        wave = np.interp(np.arange(num_samples) * warp, np.arange(len(wave)), wave).astype(np.float32)
    tilt = rng.uniform(-config.max_tilt, config.max_tilt)
    wave = wave + np.float32(tilt) * np.concatenate((wave[:1], wave[:-1]))
    snr = rng.uniform(config.min_snr_db, config.max_snr_db)
    if rng.random() < config.noise_share:
        is_speech = rng.random() < 0.5
        noise = np.resize(other, len(wave)) if is_speech else rng.standard_normal(len(wave), dtype=np.float32)
        wave = standardise(wave) + standardise(noise) * np.float32(10 ** (-snr / 20))
    return standardise(wave)


def draw_warp(config: PerturbationConfig, rng: np.random.Generator) -> float:
    """How many times as fast an utterance is played: log-uniform in [1 / (1 + max_warp), 1 + max_warp]."""
    limit = np.log1p(config.max_warp)
    return float(np.exp(rng.uniform(-limit, limit))) if limit else 1.0


def frames_before(num_frames: int, warp: float, num_source_frames: int) -> NDArray[np.int64]:
    """For each frame of a warped wave the frame of the wave before that lies nearest, (T,)."""
    middle = WINDOW_SAMPLES / 2
    source = ((np.arange(num_frames) * HOP_SAMPLES + middle) * warp - middle) / HOP_SAMPLES
    return np.clip(np.rint(source), 0, num_source_frames - 1).astype(np.int64)


def make_twins(wave: Wave, config: AlignmentConfig, rng: np.random.Generator) -> tuple[Wave, Wave]:
    """`wave` (S,) and its copy at another speed and pitch, in either order (alignment.md §2.1)."""
    speed, sign = float(rng.choice(config.speeds)), 1 if rng.random() < 0.5 else -1
    copy = change_speed(change_pitch(wave, sign * config.semitones), speed)
    return (copy, wave) if rng.random() < 0.5 else (wave, copy)


def change_speed(wave: Wave, speed: float) -> Wave:
    """The wave played so many times as fast, pitch included: (about S / speed,)."""
    import torch
    from torchaudio.functional import resample

    if speed == 1:
        return wave
    # Hundredths keep the filters small.
    changed: Wave = resample(torch.from_numpy(wave), round(100 * speed), 100).numpy()
    return changed


def change_pitch(wave: Wave, semitones: float) -> Wave:
    """The wave so many semitones higher, as long as it was."""
    import torch
    from torchaudio.functional import pitch_shift

    if semitones == 0:
        return wave
    # The rate only tells how finely the ratio of pitches is rounded, and so how long filters are: at 16,000 it takes
    # seconds, at 500 a semitone is off by less than a thirtieth.
    shifted: Wave = pitch_shift(torch.from_numpy(wave), 500, semitones, n_fft=512).numpy()
    return shifted
