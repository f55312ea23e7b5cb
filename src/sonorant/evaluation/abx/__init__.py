"""ABX: how often a phone x is nearer to another token of its own phone (a) than to one of another phone (b).

A *cell* is one ordered phone pair in one context, A and B spoken by one speaker and X by the same ("within")
or by another ("across"). Its error is the share of triplets where x is nearer to b, ties counting one half.
Errors are averaged over contexts and X speakers, then over speakers of A and B, then over phone pairs, as the
ZeroSpeech challenges do (Schatz et al., Interspeech 2013).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sonorant.data.frames import FRAME_RATE
from sonorant.evaluation.abx.cells import Context, Speaker, across_blocks, group_items, weigh, within_blocks
from sonorant.evaluation.abx.distances import Distance, score_blocks, stack
from sonorant.evaluation.abx.items import Item, Slicing, frame_span


@dataclass(frozen=True, slots=True)
class Score:
    """An ABX error in [0, 1] (nan where there is no cell) and what it was measured on."""

    error: float
    num_cells: int
    num_pairs: int
    """Ordered phone pairs."""
    num_items: int
    """Items left after sub-sampling."""
    num_dropped: int
    """Items that hold no frame."""
    influence: Mapping[str, float]
    """By file: of first order, what the error would change if the file were there once more."""


def score_abx(
    items: Iterable[Item],
    features: Mapping[str, NDArray[Any]],
    *,
    speaker: Speaker,
    context: Context,
    slicing: Slicing = "fixed",
    distance: Distance = "angular",
    rate: float = FRAME_RATE,
    max_items: int | None = 10,
    max_speakers: int | None = 5,
    seed: int = 0,
) -> Score:
    """The ABX error of `features`, (T, D) by file, or of unit tokens, (T,), with the "identical" distance.

    At most `max_items` items are drawn from each (context, speaker, phone) and, across speakers, at most
    `max_speakers` X speakers for each cell's A and B; None draws all. "angular" computes in the features' own
    precision. The result does not depend on the order of the items.

    Raises ValueError where a file has no features, or features that cannot be compared.
    """
    spans, num_dropped = [], 0
    for item in sorted(items):
        if item.file not in features:
            raise ValueError(f"abx: found no features for {item.file!r}, wanted some: compute them too")
        first, stop = frame_span(item, len(features[item.file]), slicing, rate)
        if stop > first:
            spans.append((item, first, stop))
        else:
            num_dropped += 1
    rng = np.random.default_rng(seed)
    spans, groups = group_items(spans, context, max_items, rng)
    blocks = within_blocks(groups) if speaker == "within" else across_blocks(groups, max_speakers, rng)
    if not blocks:
        return Score(math.nan, 0, 0, len(spans), num_dropped, {})
    cells = np.concatenate([block.cells for block in blocks])
    weights, num_pairs = weigh(groups, cells)
    offsets = np.cumsum([0, *(stop - first for _, first, stop in spans)], dtype=np.int64)
    frames = stack([features[item.file][first:stop] for item, first, stop in spans], distance)
    errors, influence = score_blocks(blocks, weights, groups, frames, offsets, distance)
    by_file: dict[str, float] = {}
    for (item, _, _), value in zip(spans, influence.tolist(), strict=True):
        by_file[item.file] = by_file.get(item.file, 0.0) + value
    return Score(float(weights @ errors), len(cells), num_pairs, len(spans), num_dropped, by_file)
