"""Slow oracles of MGF-style's sample, frame and sentence scales: one sample, one bin, one pair at a time."""

from __future__ import annotations

import cmath
import math
from collections.abc import Sequence

from tests.references.losses import Matrix

RATE, FFT, FLOOR = 16_000, 512, 1e-5
KERNELS, STRIDES = (10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2)


def absolute_error(predictions: Sequence[float], targets: Sequence[float]) -> float:
    """Σ |ŷ − y|."""
    return sum(abs(a - b) for a, b in zip(predictions, targets, strict=True))


def transposed_convolution(frames: Matrix, weight: Sequence[Matrix], stride: int) -> list[list[float]]:
    """Every frame adds its taps to what begins `stride` values after the one before: weight[in][out][tap]."""
    outs, taps = len(weight[0]), len(weight[0][0])
    found = [[0.0] * outs for _ in range((len(frames) - 1) * stride + taps)]
    for t, frame in enumerate(frames):
        for value, rows in zip(frame, weight, strict=True):
            for out, row in enumerate(rows):
                for tap, factor in enumerate(row):
                    found[t * stride + tap][out] += value * factor
    return found


def powers(window: Sequence[float]) -> list[float]:
    """|DFT|² of a window under a (periodic) Hann curve, zeros behind it up to 512, from 0 to 8 kHz."""
    shaped = [x * (0.5 - 0.5 * math.cos(2 * math.pi * n / len(window))) for n, x in enumerate(window)]
    found = []
    for p in range(FFT // 2 + 1):
        total = sum(x * cmath.exp(-2j * math.pi * p * n / FFT) for n, x in enumerate(shaped))
        found.append(abs(total) ** 2)
    return found


def log_powers(window: Sequence[float]) -> list[float]:
    """ln of each power, at least ln 1e-5."""
    return [math.log(max(power, FLOOR)) for power in powers(window)]


def mel_filter(band: int, num_bands: int, hertz: float) -> float:
    """The weight of a frequency in a triangle whose corners are equally far apart in mel."""
    highest = 2595 * math.log10(1 + 8_000 / 700)
    left, top, right = (700 * (10 ** (highest * (band + i) / (num_bands + 1) / 2595) - 1) for i in range(3))
    if left < hertz <= top:
        return (hertz - left) / (top - left)
    if top < hertz < right:
        return (right - hertz) / (right - top)
    return 0.0


def cepstra(log_powers_of_frame: Sequence[float]) -> list[float]:
    """DCT-II, orthonormal, of the logarithms of 40 mel energies: the first 13."""
    energies = []
    for band in range(40):
        total = sum(
            mel_filter(band, 40, p * RATE / FFT) * math.exp(value) for p, value in enumerate(log_powers_of_frame)
        )
        energies.append(math.log(max(total, FLOOR)))
    found = []
    for q in range(13):
        total = sum(energy * math.cos(math.pi * q * (2 * b + 1) / 80) for b, energy in enumerate(energies))
        found.append(total * math.sqrt((1 if q == 0 else 2) / 40))
    return found


def differences(frames: Matrix) -> list[list[float]]:
    """Σ_n n (x_{t+n} − x_{t−n}) / 2 Σ n² for n = 1, 2; beyond an end its last frame goes on."""

    def at(t: int, dim: int) -> float:
        return frames[min(max(t, 0), len(frames) - 1)][dim]

    return [
        [sum(n * (at(t + n, dim) - at(t - n, dim)) for n in (1, 2)) / 10 for dim in range(len(frames[0]))]
        for t in range(len(frames))
    ]


def mean_absolute_error(predictions: Matrix, targets: Matrix) -> float:
    """Σ over frames of the mean over dimensions of |ŷ − y|."""
    return sum(absolute_error(a, b) / len(a) for a, b in zip(predictions, targets, strict=True))


def nt_xent(
    rows: Matrix, speakers: Sequence[int], sources: Sequence[int], temperature: float, same: bool, others: bool
) -> tuple[float, float]:
    """Mean over halves of −log of the partner's share among partner and negatives, and the share that is won.

    Halves 2i and 2i + 1 are partners. Of `speakers` the same one's other utterances are negatives only if `same`, of
    `sources` another one's only if `others`.
    """
    total, wins = 0.0, 0
    for own, row in enumerate(rows):
        partner = own + 1 if own % 2 == 0 else own - 1
        scores = [sum(x * y for x, y in zip(row, other, strict=True)) / temperature for other in rows]
        negatives = [
            other
            for other in range(len(rows))
            if other not in (own, partner)
            and (same or speakers[other] != speakers[own])
            and (others or sources[other] == sources[own])
        ]
        denominator = math.exp(scores[partner]) + sum(math.exp(scores[other]) for other in negatives)
        total -= scores[partner] - math.log(denominator)
        wins += bool(negatives) and all(scores[partner] >= scores[other] for other in negatives)
    return total / len(rows), wins / len(rows)
