"""Slow oracles of what keeps frames apart in alignment, and of what shows a collapse: one pair of frames at a time."""

from __future__ import annotations

import math

from tests.references.contrast import cosine
from tests.references.losses import Matrix


def distance(a: list[float], b: list[float]) -> float:
    """‖a - b‖."""
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)))


def contrast_in_time(frames: list[list[float]], margin: float, window: int, is_relative: bool) -> float:
    """LASER's I(Z) (alignment.md §2.2), or with times in utterances and a mean over pairs of two."""
    total, count = 0.0, len(frames)
    for i in range(count):
        for j in range(count):
            lag = (i - j) / count if is_relative else i - j
            apart = distance(frames[i], frames[j])
            if abs(i - j) > window:
                total += (lag**2 + 1) * max(0.0, margin - apart)
            else:
                total += apart / (lag**2 + 1)
    return total / max(count * (count - 1), 1) if is_relative else total / count**2


def mean_cosine(frames: Matrix) -> float:
    """Over all pairs of two frames."""
    pairs = [(a, b) for i, a in enumerate(frames) for b in frames[i + 1 :]]
    return sum(cosine(a, b) for a, b in pairs) / len(pairs)
