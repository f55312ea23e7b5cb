"""Slow oracles of soft-DTW: one path at a time, and one cell at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator

from tests.references.losses import Matrix

Cell = tuple[int, int]


def is_inside(i: int, j: int, n: int, m: int, radius: float) -> bool:
    """|i - j (n-1)/(m-1)| ≤ radius."""
    return abs(i - (j * (n - 1) / (m - 1) if m > 1 else 0)) <= radius + 1e-9 if n > 1 else True


def paths(n: int, m: int, radius: float = math.inf) -> Iterator[list[Cell]]:
    """All monotone paths from the first cell to the last, inside."""

    def onward(path: list[Cell]) -> Iterator[list[Cell]]:
        i, j = path[-1]
        if (i, j) == (n - 1, m - 1):
            yield path
        for cell in ((i + 1, j + 1), (i + 1, j), (i, j + 1)):
            if cell[0] < n and cell[1] < m and is_inside(*cell, n, m, radius):
                yield from onward([*path, cell])

    return onward([(0, 0)])


def by_paths(costs: Matrix, gamma: float, radius: float = math.inf) -> tuple[float, list[list[float]]]:
    """-γ log Σ_paths exp(-cost / γ), and how likely each cell is on a path drawn with these weights."""
    n, m = len(costs), len(costs[0])
    found = [(sum(costs[i][j] for i, j in path), path) for path in paths(n, m, radius)]
    least = min(cost for cost, _ in found)
    weights = [(math.exp((least - cost) / gamma), path) for cost, path in found]
    total = sum(weight for weight, _ in weights)
    expected = [[0.0] * m for _ in range(n)]
    for weight, path in weights:
        for i, j in path:
            expected[i][j] += weight / total
    return least - gamma * math.log(total), expected


def by_cells(costs: Matrix, gamma: float, radius: float = math.inf) -> tuple[float, list[list[float]]]:
    """The recursion of Cuturi and Blondel (2017), algorithms 1 and 2, over R itself; γ = 0 is the hard minimum."""
    n, m = len(costs), len(costs[0])
    r = {(-1, -1): 0.0}
    for i in range(n):
        for j in range(m):
            if is_inside(i, j, n, m, radius):
                before = [r[cell] for cell in ((i - 1, j - 1), (i - 1, j), (i, j - 1)) if cell in r]
                least = min(before)
                soft = gamma * math.log(sum(math.exp((least - b) / gamma) for b in before)) if gamma else 0.0
                r[i, j] = costs[i][j] + least - soft
    expected = [[0.0] * m for _ in range(n)]
    expected[-1][-1] = 1.0
    for i in reversed(range(n)) if gamma else ():
        for j in reversed(range(m)):
            for x, y in ((i + 1, j + 1), (i + 1, j), (i, j + 1)):
                if (i, j) in r and (x, y) in r:
                    expected[i][j] += expected[x][y] * math.exp((r[x, y] - r[i, j] - costs[x][y]) / gamma)
    return r[n - 1, m - 1], expected
