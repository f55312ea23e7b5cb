"""Probes find what is linearly there, nothing where nothing is, and agree with scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from sonorant.evaluation.probes.logistic import deal, fit_probe, held_out_accuracy


def clouds(
    num_rows: int, num_classes: int, distance: float, num_dims: int = 8, seed: int = 0
) -> tuple[NDArray[np.float64], list[str]]:
    """Rows around one centre a class, `distance` times the noise apart, and their classes."""
    rng = np.random.default_rng(seed)
    which = rng.integers(num_classes, size=num_rows)
    centres = distance * rng.standard_normal((num_classes, num_dims))
    return centres[which] + rng.standard_normal((num_rows, num_dims)), [f"c{row}" for row in which]


def test_separable_classes_are_read_off_whatever_the_dimensions_scale() -> None:
    rows, labels = clouds(600, 5, distance=6)
    rows = rows * 10.0 ** np.arange(-4, 4) + 100.0
    probe = fit_probe(rows[:400], labels[:400])
    assert probe.accuracy(rows[400:], labels[400:]) > 0.99
    assert held_out_accuracy(rows, labels) > 0.99


def test_noise_tells_nothing() -> None:
    rows, labels = clouds(2000, 5, distance=0)
    # 2,000 independent guesses at 1 in 5: four standard deviations are 3.6 %.
    assert held_out_accuracy(rows, labels) == pytest.approx(0.2, abs=0.036)


def test_agrees_with_scikit_learn() -> None:
    rows, labels = clouds(500, 4, distance=0.7)
    penalty = 0.01
    probe = fit_probe(rows, labels, penalty=penalty)
    scaled = (rows - rows.mean(0)) / rows.std(0)
    # Its C weighs the sum of losses against |weight|² / 2.
    theirs = LogisticRegression(C=1 / (penalty * len(rows)), tol=1e-8, max_iter=1000).fit(scaled, labels)
    # Ours stops where the loss changes by 1e-5: as convex as the penalty makes it, that is √(2e-5 / 0.01) away at most.
    np.testing.assert_allclose(probe.weight, theirs.coef_, atol=0.045)
    agreed = np.mean([a == b for a, b in zip(probe.predict(rows), theirs.predict(scaled), strict=True)])
    assert agreed > 0.99


def test_a_flat_dimension_and_an_unknown_label_do_no_harm() -> None:
    rows, labels = clouds(200, 2, distance=6)
    rows[:, 0] = 3.0
    probe = fit_probe(rows, labels)
    assert probe.accuracy(rows, labels) > 0.99
    assert probe.accuracy(rows[:2], ["never heard"] * 2) == 0


def test_folds_share_every_label_out() -> None:
    labels = ["a"] * 8 + ["b"] * 4 + ["c"]
    folds = deal(labels, 4, np.random.default_rng(0))
    assert [sorted(folds[:8]), sorted(folds[8:12])] == [[0, 0, 1, 1, 2, 2, 3, 3], [0, 1, 2, 3]]
    assert held_out_accuracy(np.eye(13), labels) <= 12 / 13  # the only c is never predicted


def test_needs_a_label_a_row() -> None:
    with pytest.raises(ValueError, match="found 3 rows and 2 labels"):
        fit_probe(np.zeros((3, 1)), ["a", "b"])
