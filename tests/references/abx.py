"""Slow ABX: nested loops over items, an explicit DTW table and a walk back along its path."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sonorant.evaluation.abx.items import Item


def angle(u: NDArray[Any], v: NDArray[Any]) -> float:
    """Angle over π; a null vector is at 1 from every other and at 0 from a null vector."""
    u_null, v_null = not np.any(u), not np.any(v)
    if u_null or v_null:
        return 0.0 if u_null and v_null else 1.0
    u, v = u.astype(np.float64), v.astype(np.float64)
    norms = math.sqrt(sum(p * p for p in u)) * math.sqrt(sum(q * q for q in v))
    cosine = sum(p * q for p, q in zip(u, v, strict=True)) / norms
    return math.acos(max(-1.0, min(1.0, cosine))) / math.pi


def identical(u: Any, v: Any) -> float:
    """0 for the same unit, else 1."""
    return 0.0 if u == v else 1.0


def dtw(x: Sequence[Any], y: Sequence[Any], distance: Any) -> float:
    """Cost of the best path over the number of its cells."""
    cost: dict[tuple[int, int], float] = {}
    for i in range(len(x)):
        for j in range(len(y)):
            before = [cost[p] for p in [(i - 1, j - 1), (i, j - 1), (i - 1, j)] if p in cost]
            cost[i, j] = distance(x[i], y[j]) + (min(before) if before else 0.0)
    place = (len(x) - 1, len(y) - 1)
    steps = 1
    while place != (0, 0):
        i, j = place
        options = [p for p in [(i - 1, j - 1), (i, j - 1), (i - 1, j)] if p in cost]
        best = min(cost[p] for p in options)
        place = next(p for p in options if cost[p] == best)
        steps += 1
    return cost[len(x) - 1, len(y) - 1] / steps


def frames_of(item: Item, features: NDArray[Any], slicing: str, rate: float) -> NDArray[Any]:
    """The frames whose centre lies in the item."""
    inside = [i for i in range(10_000) if item.onset - 1e-9 <= (i + 0.5) / rate <= item.offset + 1e-9]
    if slicing == "librilight":
        inside = inside[:-1]
    return features[[i for i in inside if i < len(features)]]


def score(
    items: Sequence[Item],
    features: Mapping[str, NDArray[Any]],
    *,
    speaker: str,
    context: str,
    slicing: str = "fixed",
    distance: str = "angular",
    rate: float = 50.0,
    tie: float = 1e-7,
    copies: Mapping[str, float] | None = None,
) -> tuple[float, int]:
    """The error without sub-sampling (nan without cells) and the number of cells; `copies` of a file count so often."""
    measure = {"angular": angle, "identical": identical}[distance]
    groups: dict[tuple[Any, str, str], list[tuple[NDArray[Any], float]]] = defaultdict(list)
    for item in items:
        frames = frames_of(item, features[item.file], slicing, rate)
        if len(frames):
            around = (item.previous, item.following) if context == "in" else None
            groups[around, item.speaker, item.phone].append((frames, (copies or {}).get(item.file, 1.0)))
    cells: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for (around, own, phone_a), a_items in groups.items():
        for (around_b, own_b, phone_b), b_items in groups.items():
            for (around_x, other, phone_x), x_items in groups.items():
                if not (around == around_b == around_x and own == own_b and phone_a == phone_x != phone_b):
                    continue
                if (other == own) != (speaker == "within"):
                    continue
                outcomes, weights = [], []
                for i, (x, x_copies) in enumerate(x_items):
                    for j, (a, a_copies) in enumerate(a_items):
                        if speaker == "within" and i == j:
                            continue
                        for b, b_copies in b_items:
                            gap = dtw(x, b, measure) - dtw(x, a, measure)
                            outcomes.append(0.5 if abs(gap) <= tie else float(gap < 0))
                            weights.append(x_copies * a_copies * b_copies)
                if outcomes:
                    cells[phone_a, phone_b][own].append(fmean(outcomes, weights))
    if not cells:
        return math.nan, 0
    error = fmean(fmean(fmean(errors) for errors in speakers.values()) for speakers in cells.values())
    return error, sum(len(errors) for speakers in cells.values() for errors in speakers.values())
