"""Splits that never share a speaker, or never an image."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from typing import Literal

from sonorant.config import Split
from sonorant.data.corpus import Row


def split_rows(
    rows: Sequence[Row],
    by: Literal["speaker", "image"],
    names: Sequence[str],
    dev_share: float,
    test_share: float,
    seed: int,
) -> list[Split]:
    """Each row's split, of one source's rows: that of all rows of its name, which is its speaker's or its image's.

    It is what any of these rows says, else drawn by a seeded hash of the name.
    Raises ValueError where a name's rows are in two splits.
    """
    splits: dict[str, Split] = {}
    for row, name in zip(rows, names, strict=True):
        if row.split is not None and splits.setdefault(name, row.split) != row.split:
            way_out = ", or set split_by: image" if by == "speaker" and row.image else ""
            raise ValueError(
                f"source {row.source}: found {by} {name!r} in {splits[name]} and in {row.split} ({row.id}), "
                f"wanted it in one: correct it, or leave it out to have it drawn{way_out}"
            )
    drawn = set(names) - set(splits)
    splits |= draw_splits(rows[0].source, drawn, dev_share, test_share, seed) if drawn else {}
    return [splits[name] for name in names]


def draw_splits(source: str, names: Iterable[str], dev_share: float, test_share: float, seed: int) -> dict[str, Split]:
    """A split for each name; whatever their order, the same seed and names give the same splits."""
    order = sorted(names, key=lambda name: (hashlib.sha256(f"{seed}:{source}/{name}".encode()).digest(), name))
    num_dev, num_test = num_held_out(len(order), dev_share, test_share)
    return {
        name: "dev" if rank < num_dev else "test" if rank < num_dev + num_test else "train"
        for rank, name in enumerate(order)
    }


def num_held_out(num_names: int, dev_share: float, test_share: float) -> tuple[int, int]:
    """Names in dev and in test: from three on, at least one where its share is above 0, but never all."""

    def count(share: float) -> int:
        # 0.29 · 100 is 28.999999999999996
        return max(math.floor(share * num_names + 1e-9), 1 if share > 0 and num_names >= 3 else 0)

    num_dev, num_test = count(dev_share), count(test_share)
    if num_dev + num_test == num_names > 0:
        return (num_dev - 1, num_test) if num_dev > num_test else (num_dev, num_test - 1)
    return num_dev, num_test
