"""Slow k-means: every distance in a loop, in float64."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def assign(frames: Array, centroids: Array) -> tuple[list[int], list[float]]:
    """The nearest centroid of each frame and the squared distance to it; ties go to the lower one."""
    units, distances = [], []
    for frame in frames:
        all_distances = [float(((frame - centroid) ** 2).sum()) for centroid in centroids]
        units.append(int(np.argmin(all_distances)))
        distances.append(min(all_distances))
    return units, distances


def lloyd(frames: Array, centroids: Array, num_passes: int) -> tuple[Array, list[float]]:
    """Centroids after so many updates, and the inertia per frame before each. No unit may die."""
    inertias = []
    for _ in range(num_passes):
        units, distances = assign(frames, centroids)
        inertias.append(sum(distances) / len(frames))
        members = [[x for x, unit in zip(frames, units, strict=True) if unit == k] for k in range(len(centroids))]
        centroids = np.stack([np.mean(frames_of_unit, axis=0) for frames_of_unit in members])
    return centroids, inertias
