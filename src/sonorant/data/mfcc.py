"""MFCC as HuBERT's first round of targets uses them, brought to the encoder's frames."""

from __future__ import annotations

import numpy as np
import torch
import torchaudio.compliance.kaldi
import torchaudio.functional
from numpy.typing import NDArray

from sonorant.data.frames import HOP_SAMPLES, SAMPLE_RATE, WINDOW_SAMPLES

NUM_DIMS = 39
"""13 cepstra, their deltas, and the deltas of these."""
DENSITY = 2
"""MFCC windows per encoder frame: both last 25 ms, but one starts every 10 ms, the other every 20 ms."""


def mfcc(wave: NDArray[np.float32]) -> NDArray[np.float32]:
    """13 MFCC, deltas and delta-deltas of each encoder frame: (S,) to (T, 39). No dither.

    The deltas are taken at 100 Hz, as fairseq does (examples/hubert/simple_kmeans); then every second window
    is kept. Window 2t is frame t: it starts with it and is as long. Hence T is frames.num_frames(S).
    """
    return dense_mfcc(wave)[::DENSITY].copy()


def dense_mfcc(wave: NDArray[np.float32]) -> NDArray[np.float32]:
    """The same at 100 Hz, HuBERT's own grid: (S,) to (N, 39). Never labels for the encoder: see `mfcc`."""
    if len(wave) < WINDOW_SAMPLES:
        return np.zeros((0, NUM_DIMS), dtype=np.float32)
    with torch.inference_mode():
        cepstra = torchaudio.compliance.kaldi.mfcc(
            torch.from_numpy(np.ascontiguousarray(wave, dtype=np.float32))[None],
            sample_frequency=SAMPLE_RATE,
            frame_length=1000 * WINDOW_SAMPLES / SAMPLE_RATE,
            frame_shift=1000 * HOP_SAMPLES / SAMPLE_RATE / DENSITY,
            use_energy=False,
            dither=0.0,
        ).T
        deltas = torchaudio.functional.compute_deltas(cepstra)
        stacked = torch.cat([cepstra, deltas, torchaudio.functional.compute_deltas(deltas)])
        values: NDArray[np.float32] = stacked.T.contiguous().numpy()
    return values
