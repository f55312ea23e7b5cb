"""Predict log-power spectrum and MFCC from a middle layer of the clean view (MGF-style: the frame scale).

pretraining.md §3.2: 25 ms windows every 20 ms on the frame grid, each dimension standardised within its utterance.

Shapes: F frames, T frames of one utterance, N samples of a packed buffer, P 257 powers, B mel bands, Q 39 cepstral
values (13 and their first and second differences).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sonorant.config import SpectrumConfig
from sonorant.data.frames import SAMPLE_RATE, WINDOW_SAMPLES, frame_starts
from sonorant.models.teacher import instance_norm
from sonorant.tasks.task import Monitored, Outcome, Per, Shares, View, Views, moments, precise, spread

FFT_SAMPLES = 512
NUM_POWERS = FFT_SAMPLES // 2 + 1
NUM_BANDS = 40
NUM_CEPSTRA = 13
FLOOR = 1e-5


def log_powers(windows_FW: Tensor) -> Tensor:
    """ln of the power spectrum of Hann windows, floored at 1e-5: (F, 400) to (F, 257), float32."""
    hann_W = torch.hann_window(windows_FW.shape[1], device=windows_FW.device, dtype=windows_FW.dtype)
    spectrum_FP = torch.fft.rfft(windows_FW * hann_W, FFT_SAMPLES)
    powers_FP: Tensor = spectrum_FP.real.square() + spectrum_FP.imag.square()
    return powers_FP.clamp(min=FLOOR).log()


def cepstra(log_powers_FP: Tensor) -> Tensor:
    """13 cepstral coefficients: orthonormal DCT-II of the log energies of 40 mel bands, (F, 257) to (F, 13)."""
    bands_PB = torch.from_numpy(mel_bands(NUM_BANDS)).to(log_powers_FP)
    n_B = torch.arange(NUM_BANDS, device=log_powers_FP.device, dtype=log_powers_FP.dtype)
    basis_BQ = torch.cos(math.pi / NUM_BANDS * (n_B[:, None] + 0.5) * n_B[:NUM_CEPSTRA])
    basis_BQ = basis_BQ * math.sqrt(2 / NUM_BANDS)
    basis_BQ[:, 0] /= math.sqrt(2)
    return (log_powers_FP.exp() @ bands_PB).clamp(min=FLOOR).log() @ basis_BQ


def differences(x_TQ: Tensor) -> Tensor:
    """Slope of each dimension over five frames by least squares, ends repeated: (T, Q) to (T, Q)."""
    padded = torch.cat([x_TQ[:1].expand(2, -1), x_TQ, x_TQ[-1:].expand(2, -1)])
    far, near = padded[4:] - padded[:-4], padded[3:-1] - padded[1:-3]
    return (2 * far + near) / 10


def mel_bands(num_bands: int) -> NDArray[np.float32]:
    """Triangular filters equally wide in mel (2595 lg(1 + f / 700)) from 0 to 8 kHz, (257, B)."""
    highest = 2595 * math.log10(1 + SAMPLE_RATE / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, highest, num_bands + 2) / 2595) - 1)
    hertz = np.arange(NUM_POWERS) * SAMPLE_RATE / FFT_SAMPLES
    rise = (hertz[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    fall = (edges[2:] - hertz[:, None]) / (edges[2:] - edges[1:-1])
    bands: NDArray[np.float32] = np.clip(np.minimum(rise, fall), 0, None).astype(np.float32)
    return bands


def absolute_error(predictions_FX: Tensor, targets_FX: Tensor) -> Tensor:
    """Σ over frames of the mean absolute error over dimensions, float32."""
    return (precise(predictions_FX) - precise(targets_FX)).abs().mean(1).sum()


class Spectrum(Monitored):
    """One hidden layer to 257 log-powers and 39 cepstral values."""

    per: ClassVar[Per] = "frame"

    def __init__(self, dim: int, num_layers: int, config: SpectrumConfig) -> None:
        super().__init__()
        self.layer = config.layer or (num_layers + 1) // 2
        self.views: Mapping[View, int | None] = {"clean": self.layer}
        self.head = nn.Sequential(
            nn.Linear(dim, config.hidden_dim), nn.GELU(), nn.Linear(config.hidden_dim, NUM_POWERS + 3 * NUM_CEPSTRA)
        )
        self.register_buffer("window", torch.zeros(3, NUM_POWERS + 3 * NUM_CEPSTRA, dtype=torch.float64))

    def forward(self, views: Views, whole: Shares) -> Outcome:
        """L1 on the spectrum plus L1 on the cepstra, over all frames."""
        del whole
        assert views.clean is not None
        targets_FX = self.targets(views)
        predictions_FX = self.head(views.clean.states[self.layer])
        powers = absolute_error(predictions_FX[:, :NUM_POWERS], targets_FX[:, :NUM_POWERS])
        mel = absolute_error(predictions_FX[:, NUM_POWERS:], targets_FX[:, NUM_POWERS:])
        sums = {"power_error": powers.detach(), "cepstral_error": mel.detach()}
        return Outcome(powers + mel, sums, moments(predictions_FX))

    @torch.no_grad()
    def targets(self, views: Views) -> Tensor:
        """(F, 257 + 39), each dimension with mean 0 and variance 1 within its utterance."""
        waves_N = views.waves
        with torch.autocast(waves_N.device.type, enabled=False):
            starts_F = torch.from_numpy(frame_starts(views.num_samples)).to(waves_N.device)
            windows_FW = waves_N.float()[starts_F[:, None] + torch.arange(WINDOW_SAMPLES, device=waves_N.device)]
            powers_FP = log_powers(windows_FW)
            static_FQ = cepstra(powers_FP)
            parts = []
            for rows in views.frames.slices():
                first_TQ = differences(static_FQ[rows])
                parts.append(torch.cat([static_FQ[rows], first_TQ, differences(first_TQ)], dim=1))
            return instance_norm(torch.cat([powers_FP, torch.cat(parts)], dim=1), views.frames)

    def watch(self) -> dict[str, float]:
        """The spread of the predictions, of which the targets have one."""
        return {"prediction_std": float(spread(self.window))}
