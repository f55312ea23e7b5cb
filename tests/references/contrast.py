"""Slow oracles of wav2vec 2.0's losses and its quantiser: one frame, one negative, one code at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tests.references.losses import Matrix


def allowed(positions: Sequence[int], own: int, min_distance: int) -> list[int]:
    """Which masked frames of an utterance, by rank, may be negatives of the one with rank `own`."""
    return [rank for rank, place in enumerate(positions) if abs(place - positions[own]) >= min_distance]


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    """a · b / (‖a‖ ‖b‖)."""
    product = sum(x * y for x, y in zip(a, b, strict=True))
    return product / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


def info_nce(true: float, others: Sequence[float]) -> float:
    """-log of the true score's share among itself and the others."""
    return math.log(sum(math.exp(score - true) for score in (true, *others)))


def contrast(
    predicted: Matrix,
    targets: Matrix,
    codes: Sequence[Sequence[int]] | None,
    positions: Sequence[int],
    uniform: Matrix,
    min_distance: int,
    temperature: float,
) -> tuple[float, int]:
    """One utterance's loss over its masked frames, and how many are told from all their negatives.

    Each number of `uniform` picks from the allowed frames as from a list. A negative with the true target's codes
    does not count; a frame without any negative has nothing to be told from.
    """
    loss, right = 0.0, 0
    for own, frame in enumerate(predicted):
        choices = allowed(positions, own, min_distance)
        drawn = [choices[int(u * len(choices))] for u in uniform[own]] if choices else []
        negatives = [rank for rank in drawn if codes is None or list(codes[rank]) != list(codes[own])]
        true = cosine(frame, targets[own]) / temperature
        others = [cosine(frame, targets[rank]) / temperature for rank in negatives]
        loss += info_nce(true, others)
        right += bool(others) and true >= max(others)
    return loss, right


def cosine_logits(frames: Matrix, units: Matrix, temperature: float) -> list[list[float]]:
    """cos(frame, unit) / τ of all with all."""
    return [[cosine(frame, unit) / temperature for unit in units] for frame in frames]


def unused_share(probabilities: Sequence[Matrix]) -> float:
    """(GV − Σ_g exp(−Σ_v p̄ log p̄)) / GV, p̄ the mean over frames: `probabilities` are frames of groups of codes."""
    groups, codes = len(probabilities[0]), len(probabilities[0][0])
    used = 0.0
    for g in range(groups):
        means = [sum(frame[g][v] for frame in probabilities) / len(probabilities) for v in range(codes)]
        used += math.exp(-sum(p * math.log(p) for p in means if p > 0))
    return (groups * codes - used) / (groups * codes)


def mean_square(frames: Matrix) -> float:
    """Σ over frames of the mean over channels of x²."""
    return sum(sum(x * x for x in frame) / len(frame) for frame in frames)


def softmax(scores: Sequence[float]) -> list[float]:
    """exp(s_v) / Σ exp(s)."""
    powers = [math.exp(score - max(scores)) for score in scores]
    return [power / sum(powers) for power in powers]
