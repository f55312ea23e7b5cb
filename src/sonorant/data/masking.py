"""Span masks (pretraining.md §0): which frames the masked view hides."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sonorant.config import MaskingConfig


def span_mask(num_frames: int, config: MaskingConfig, rng: np.random.Generator) -> NDArray[np.bool_]:
    """⌊p·T/length + u⌋ spans (at least one) from distinct starts in [0, T − length), overlaps allowed: (T,).

    u is drawn per utterance, so that a mask does not depend on the batch; fairseq shares one within a batch.
    An utterance shorter than two spans has spans of half its length.
    """
    mask = np.zeros(num_frames, dtype=bool)
    length = min(config.length, max(1, num_frames // 2))
    room = max(1, num_frames - length)
    count = min(room, max(1, int(config.share * num_frames / length + rng.random())))
    starts = rng.choice(room, size=count, replace=False)
    mask[(starts[:, None] + np.arange(length)).ravel()] = True
    return mask


def equalise(masks: Sequence[NDArray[np.bool_]], rng: np.random.Generator) -> list[NDArray[np.bool_]]:
    """Randomly un-mask every mask down to the smallest count, as fairseq does; spans may be cut."""
    fewest = min(int(mask.sum()) for mask in masks)
    equal = []
    for mask in masks:
        kept = np.zeros_like(mask)
        kept[rng.choice(np.flatnonzero(mask), size=fewest, replace=False)] = True
        equal.append(kept)
    return equal
