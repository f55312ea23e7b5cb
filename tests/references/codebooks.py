"""Slow oracles of online codebooks: one frame, one codeword, one dimension at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tests.references.losses import Matrix, cross_entropy


def distances(frame: Sequence[float], codewords: Matrix) -> list[float]:
    """‖t − e_v‖² for every v."""
    return [sum((t - e) ** 2 for t, e in zip(frame, codeword, strict=True)) for codeword in codewords]


def sums_and_counts(frames: Matrix, codes: Sequence[int], num_codes: int) -> list[list[float]]:
    """Of every code: the sum of the frames that came to it, then how many came."""
    rows = [[0.0] * (len(frames[0]) + 1) for _ in range(num_codes)]
    for frame, code in zip(frames, codes, strict=True):
        for dim, value in enumerate([*frame, 1.0]):
            rows[code][dim] += value
    return rows


def codebook_loss(logits: Sequence[Matrix], codes: Sequence[Sequence[int]]) -> float:
    """Σ over frames of the cross-entropy, mean over codebooks."""
    return sum(cross_entropy(rows, row) for rows, row in zip(logits, codes, strict=True)) / len(logits)


def perplexity(codes: Sequence[int]) -> float:
    """exp(−Σ p ln p) of how often each code occurs."""
    shares = [codes.count(code) / len(codes) for code in set(codes)]
    return math.exp(-sum(p * math.log(p) for p in shares))
