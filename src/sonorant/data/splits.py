"""Splits that never share a speaker."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence

from sonorant.config import Split
from sonorant.data.corpus import Row


def split_speakers(rows: Sequence[Row], dev_share: float, test_share: float, seed: int) -> dict[str, Split]:
    """Each speaker's split, of one source's rows: as its rows say, else drawn by a seeded hash of its name.

    Raises ValueError where a speaker's rows are in two splits.
    """
    splits: dict[str, Split] = {}
    for row in rows:
        if row.split is not None and splits.setdefault(row.speaker, row.split) != row.split:
            raise ValueError(
                f"source {row.source}: found speaker {row.speaker!r} in {splits[row.speaker]} and in "
                f"{row.split} ({row.id}), wanted it in one: correct it, or leave it out to have it drawn"
            )
    drawn = {row.speaker for row in rows} - set(splits)
    return splits | draw_splits(rows[0].source, drawn, dev_share, test_share, seed) if drawn else splits


def draw_splits(
    source: str, speakers: Iterable[str], dev_share: float, test_share: float, seed: int
) -> dict[str, Split]:
    """A split for each speaker; whatever their order, the same seed and names give the same splits."""
    order = sorted(
        speakers, key=lambda name: (hashlib.sha256(f"{seed}:{source}/{name}".encode()).digest(), name)
    )
    num_dev, num_test = num_held_out(len(order), dev_share, test_share)
    return {
        name: "dev" if rank < num_dev else "test" if rank < num_dev + num_test else "train"
        for rank, name in enumerate(order)
    }


def num_held_out(num_speakers: int, dev_share: float, test_share: float) -> tuple[int, int]:
    """Speakers in dev and in test: from three on, at least one where its share is above 0, but never all."""

    def count(share: float) -> int:
        # 0.29 · 100 is 28.999999999999996
        return max(math.floor(share * num_speakers + 1e-9), 1 if share > 0 and num_speakers >= 3 else 0)

    num_dev, num_test = count(dev_share), count(test_share)
    if num_dev + num_test == num_speakers > 0:
        return (num_dev - 1, num_test) if num_dev > num_test else (num_dev, num_test - 1)
    return num_dev, num_test
