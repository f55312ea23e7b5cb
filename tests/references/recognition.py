"""Slow oracles of recognition: one edit, one frame, one path at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from itertools import product


def edits(reference: Sequence[str], hypothesis: Sequence[str]) -> int:
    """The fewest insertions, deletions and substitutions that make one of the other."""

    @cache
    def between(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        kept = between(i - 1, j - 1) + (reference[i - 1] != hypothesis[j - 1])
        return min(kept, between(i - 1, j) + 1, between(i, j - 1) + 1)

    return between(len(reference), len(hypothesis))


def spell(path: Sequence[int]) -> list[int]:
    """What CTC reads in a label a frame: where it changes, and is no blank (0)."""
    return [label for place, label in enumerate(path) if label and (place == 0 or path[place - 1] != label)]


def ctc_loss(probabilities: Sequence[Sequence[float]], labels: Sequence[int]) -> float:
    """-log of the summed probability of all paths that spell the labels, frame by frame one row."""
    total = 0.0
    for path in product(range(len(probabilities[0])), repeat=len(probabilities)):
        if spell(path) == list(labels):
            total += math.prod(row[label] for row, label in zip(probabilities, path, strict=True))
    return -math.log(total)
