"""One ABX cell as libri-light scores it: every pair's distances by a broadcast product, DTW with a walk back."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

Side = tuple[NDArray[np.floating[Any]], NDArray[np.int64]]
"""Items (I, T, D) of unit vectors, zeros behind the shorter ones, and their lengths."""


def cell_error(a: Side, b: Side, x: Side, *, is_same: bool) -> float:
    """The error of the cell; with `is_same` X and A are the same items, and none is compared with itself."""
    to_a, to_b = distances(x, a), distances(x, b)
    if is_same:
        np.fill_diagonal(to_a, -np.inf)  # never wrong
    gap = to_b[:, None, :] - to_a[:, :, None]
    wrong = (gap < 0).sum() + 0.5 * (gap == 0).sum()
    return float(wrong / (len(to_a) * (to_a.shape[1] - is_same) * to_b.shape[1]))


def distances(x: Side, y: Side) -> NDArray[np.float64]:
    """(I, J): costs of the best paths over their lengths."""
    cosines = (x[0][:, None, :, None] * y[0][None, :, None]).sum(axis=-1)
    angles = np.arccos(np.clip(cosines, -1, 1)) / np.pi
    return np.array([[warp(angles[i, j, :n, :m]) for j, m in enumerate(y[1])] for i, n in enumerate(x[1])])


@njit(cache=True)  # type: ignore[untyped-decorator]
def warp(costs: Any) -> Any:
    """Cost of the best path over the number of its cells; ties go to the diagonal, left, up."""
    n, m = costs.shape
    total = np.empty((n, m))
    for i in range(n):
        for j in range(m):
            best = 0.0 if i == 0 and j == 0 else np.inf
            if i > 0 and j > 0:
                best = total[i - 1, j - 1]
            if j > 0:
                best = min(best, total[i, j - 1])
            if i > 0:
                best = min(best, total[i - 1, j])
            total[i, j] = best + costs[i, j]
    i, j, steps = n - 1, m - 1, 1
    while i > 0 or j > 0:
        if i == 0:
            j -= 1
        elif j == 0:
            i -= 1
        else:
            best = min(total[i - 1, j - 1], min(total[i, j - 1], total[i - 1, j]))
            if total[i - 1, j - 1] == best:
                i, j = i - 1, j - 1
            elif total[i, j - 1] == best:
                j -= 1
            else:
                i -= 1
        steps += 1
    return total[n - 1, m - 1] / steps
