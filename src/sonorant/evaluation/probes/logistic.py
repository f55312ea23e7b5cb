"""Linear probes: what a linear classifier reads off frozen features.

Multinomial logistic regression on standardised dimensions, fitted to its one optimum, so that a probe adds neither
capacity nor luck to what is measured. Features are (N, D), labels (N,) of any names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Features = NDArray[np.floating[Any]]
TOLERANCE = 1e-5
"""Of the gradient and of the loss's change, in nats: far below what moves an accuracy."""


@dataclass(frozen=True)
class Probe:
    """Logits are weight (C, D) · (feature - shift) · scale + bias (C,); row c speaks for labels[c]."""

    labels: tuple[str, ...]
    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    shift: NDArray[np.float32]
    scale: NDArray[np.float32]

    def predict(self, features: Features) -> list[str]:
        """The likeliest label of each row of (N, D)."""
        logits = ((features - self.shift) * self.scale) @ self.weight.T + self.bias
        return [self.labels[row] for row in logits.argmax(axis=1)]

    def accuracy(self, features: Features, labels: Sequence[str]) -> float:
        """Share of rows whose label is predicted; a label that was never fitted counts as missed."""
        return float(np.mean([a == b for a, b in zip(self.predict(features), labels, strict=True)]))


def fit_probe(features: Features, labels: Sequence[str], *, penalty: float = 1e-3, max_iterations: int = 100) -> Probe:
    """The probe of least mean cross-entropy plus penalty / 2 · |weight|², by L-BFGS from zero.

    A dimension that never varies is left as it is. Raises ValueError where there is no row or not one label a row.
    """
    if not len(features) or len(features) != len(labels):
        raise ValueError(f"probe: found {len(features)} rows and {len(labels)} labels, wanted as many, and some: add")
    names = tuple(sorted(set(labels)))
    place = {name: row for row, name in enumerate(names)}
    targets = torch.tensor([place[label] for label in labels])
    shift, spread = features.mean(0, dtype=np.float64), features.std(0, dtype=np.float64)
    scale = 1 / np.where(spread > 0, spread, 1)
    rows = torch.from_numpy(((features - shift) * scale).astype(np.float32))
    weight = torch.zeros(len(names), rows.shape[1], requires_grad=True)
    bias = torch.zeros(len(names), requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_iterations,
        tolerance_grad=TOLERANCE,
        tolerance_change=TOLERANCE,
        line_search_fn="strong_wolfe",
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        logits = torch.addmm(bias, rows, weight.T)
        loss = torch.nn.functional.cross_entropy(logits, targets) + penalty / 2 * weight.square().sum()
        torch.autograd.backward(loss)
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    fitted = (weight.detach().numpy(), bias.detach().numpy())
    return Probe(names, *fitted, shift.astype(np.float32), scale.astype(np.float32))


def held_out_accuracy(
    features: Features, labels: Sequence[str], *, num_folds: int = 4, seed: int = 0, penalty: float = 1e-3
) -> float:
    """Accuracy over all rows, each predicted by a probe that was fitted without its fold.

    Every label's rows are dealt to the folds in turn, so that each fold has of each label what it can.
    """
    folds = deal(labels, num_folds, np.random.default_rng(seed))
    num_right = 0.0
    for fold in range(num_folds):
        held = folds == fold
        if held.any() and not held.all():
            kept = [label for label, out in zip(labels, held, strict=True) if not out]
            asked = [label for label, out in zip(labels, held, strict=True) if out]
            probe = fit_probe(features[~held], kept, penalty=penalty)
            num_right += len(asked) * probe.accuracy(features[held], asked)
    return num_right / len(labels)


def deal(labels: Sequence[str], num_folds: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """A fold for each row, (N,): the rows of one label, shuffled, go to the folds in turn."""
    names = np.asarray(labels)
    folds = np.zeros(len(names), np.int64)
    for name in sorted(set(labels)):
        rows = rng.permutation(np.flatnonzero(names == name))
        folds[rows] = np.arange(len(rows)) % num_folds
    return folds
