"""Span masks: what must hold of each, and how much of the speech they cover."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from sonorant.config import MaskingConfig
from sonorant.data.masking import equalise, span_mask

CONFIGS = st.builds(MaskingConfig, share=st.floats(0, 1), length=st.integers(1, 20))


def runs(mask: NDArray[np.bool_]) -> list[int]:
    """Lengths of the stretches of masked frames."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], mask.astype(int), [0]))))
    return (edges[1::2] - edges[::2]).tolist()


@given(st.integers(1, 300), CONFIGS, st.integers(0, 1000))
def test_a_mask_is_made_of_whole_spans(frames: int, config: MaskingConfig, seed: int) -> None:
    mask = span_mask(frames, config, np.random.default_rng(seed))
    assert mask.shape == (frames,)
    assert mask.any()
    length = min(config.length, max(1, frames // 2))
    assert min(runs(mask)) >= length
    spans = max(1, int(config.share * frames / length + 1))
    assert mask.sum() <= spans * length
    if frames > 1:
        # Starts are distinct, so n spans cover at least n - 1 frames more than one; they are drawn from
        # [0, T - length), so the last frame is never masked (pretraining.md §0).
        assert mask.sum() >= min(frames - length, int(config.share * frames / length)) + length - 1
        assert not mask[-1]


@given(st.integers(1, 300), CONFIGS, st.integers(0, 1000))
def test_the_generator_alone_decides(frames: int, config: MaskingConfig, seed: int) -> None:
    one, two = (span_mask(frames, config, np.random.default_rng(seed)) for _ in range(2))
    np.testing.assert_array_equal(one, two)


def clips(num_batches: int) -> list[list[int]]:
    """Batches of 12 clips of 10 to 20 s, in frames."""
    rng = np.random.default_rng(0)
    return [rng.integers(499, 1000, size=12).tolist() for _ in range(num_batches)]


@pytest.mark.parametrize(("share", "before"), [(0.65, 0.49), (0.8, 0.57)])
def test_coverage_is_what_was_measured_of_fairseq(share: float, before: float) -> None:
    rng = np.random.default_rng(1)
    config = MaskingConfig(share=share)
    masks = [[span_mask(n, config, rng) for n in batch] for batch in clips(100)]
    covered = np.mean([mask.mean() for batch in masks for mask in batch])
    # The table has two decimals; 1,200 masks of about 0.03 standard deviation have a standard error of 0.001.
    assert covered == pytest.approx(before, abs=0.005 + 0.003)


@pytest.mark.parametrize(("share", "low", "high"), [(0.65, 0.44, 0.46), (0.8, 0.51, 0.53)])
def test_coverage_after_equalising_equal_clips(share: float, low: float, high: float) -> None:
    # Clips are cropped to the batch's shortest before they are masked there, so each batch has one length.
    rng = np.random.default_rng(2)
    config = MaskingConfig(share=share)
    covered = [
        np.mean([mask.mean() for mask in equalise([span_mask(min(batch), config, rng) for _ in batch], rng)])
        for batch in clips(100)
    ]
    # Half a unit of the table's last decimal on either side.
    assert low - 0.005 <= np.mean(covered) <= high + 0.005


@given(st.lists(st.integers(2, 200), min_size=1, max_size=8), st.integers(0, 100))
def test_equalised_masks_have_one_count_and_only_lose_frames(lengths: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    masks = [span_mask(n, MaskingConfig(), rng) for n in lengths]
    equal = equalise(masks, rng)
    fewest = min(int(mask.sum()) for mask in masks)
    assert [int(mask.sum()) for mask in equal] == [fewest] * len(masks)
    for mask, kept in zip(masks, equal, strict=True):
        assert not (kept & ~mask).any()


def test_equalising_takes_frames_from_everywhere() -> None:
    # A first-come rule would always keep the beginning.
    full, short = np.ones(1000, bool), np.zeros(1000, bool)
    short[:500] = True
    kept, _ = equalise([full, short], np.random.default_rng(0))
    # Hypergeometric: 250 ± 11 in either half.
    assert abs(int(kept[:500].sum()) - 250) < 60
