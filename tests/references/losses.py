"""Slow oracles of the losses: plain loops over lists of numbers, one frame and one dimension at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

Matrix = Sequence[Sequence[float]]


def cross_entropy(logits: Matrix, units: Sequence[int]) -> float:
    """-Σ log softmax(logits)[unit], in nats."""
    total = 0.0
    for row, unit in zip(logits, units, strict=True):
        largest = max(row)
        total -= row[unit] - largest - math.log(sum(math.exp(value - largest) for value in row))
    return total


def squared_error(predictions: Matrix, targets: Matrix) -> float:
    """Σ ‖ŷ − y‖² / √D."""
    total = 0.0
    for prediction, target in zip(predictions, targets, strict=True):
        total += sum((a - b) ** 2 for a, b in zip(prediction, target, strict=True)) / math.sqrt(len(target))
    return total


def spread(frames: Matrix) -> float:
    """√(variance over frames + 1e-6), averaged over dimensions."""
    deviations = []
    for column in zip(*frames, strict=True):
        mean = sum(column) / len(column)
        deviations.append(math.sqrt(sum((value - mean) ** 2 for value in column) / len(column) + 1e-6))
    return sum(deviations) / len(deviations)


def instance_norm(frames: Matrix) -> list[list[float]]:
    """One utterance's frames, each dimension to mean 0 and (biased) variance 1 over time, eps 1e-5."""
    columns = []
    for column in zip(*frames, strict=True):
        mean = sum(column) / len(column)
        variance = sum((value - mean) ** 2 for value in column) / len(column)
        columns.append([(value - mean) / math.sqrt(variance + 1e-5) for value in column])
    return [list(row) for row in zip(*columns, strict=True)]


def averaged(layers: Sequence[Matrix]) -> list[list[float]]:
    """The mean over layers of one utterance's instance-normalised frames."""
    normed = [instance_norm(layer) for layer in layers]
    return [
        [sum(layer[t][d] for layer in normed) / len(layers) for d in range(len(layers[0][0]))]
        for t in range(len(layers[0]))
    ]
