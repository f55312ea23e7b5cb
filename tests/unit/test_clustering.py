"""K-means against slow loops, on data whose clusters are known, and on its edges."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sonorant.clustering import (
    Batch,
    Pass,
    assign,
    fit_kmeans,
    lloyd,
    lloyd_faiss,
    perplexity,
    plus_plus,
    scaling,
    shuffle,
)
from tests.references import kmeans as slow

# float32 scores are squared norms minus twice a product: with values of size 10 in 8 dimensions these are
# about 1,000, and 1,000 × 2⁻²³ × a few roundings is 1e-3.
DISTANCE_TOLERANCE = 2e-3


def blobs(num_frames: int, num_blobs: int, num_dims: int, seed: int = 0) -> NDArray[np.float32]:
    """Frames in round heaps of standard deviation 1, far apart; frame i belongs to heap i % num_blobs."""
    rng = np.random.default_rng(seed)
    centres = 30 * rng.standard_normal((num_blobs, num_dims))
    frames = centres[np.arange(num_frames) % num_blobs] + rng.standard_normal((num_frames, num_dims))
    return frames.astype(np.float32)


def batch_of(frames: NDArray[np.float32]) -> Batch:
    """The frames in their own order."""
    rows = torch.from_numpy(np.concatenate([frames, np.ones((len(frames), 1), np.float32)], axis=1))
    return Batch(rows, rows[:, :-1].square().sum(1))


@given(num_frames=st.integers(1, 60), num_units=st.integers(1, 12), seed=st.integers(0, 999))
@settings(deadline=None, max_examples=40)
def test_a_pass_is_the_loop(num_frames: int, num_units: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    frames = rng.uniform(-10, 10, (num_frames, 8)).astype(np.float32)
    centroids = rng.uniform(-10, 10, (num_units, 8)).astype(np.float32)
    sums, counts, distances = assign(batch_of(frames), torch.from_numpy(centroids))

    units, wanted = slow.assign(frames.astype(np.float64), centroids.astype(np.float64))
    np.testing.assert_allclose(distances.numpy(), wanted, atol=DISTANCE_TOLERANCE)
    assert counts.tolist() == [units.count(k) for k in range(num_units)]
    by_unit = np.zeros((num_units, 8))
    np.add.at(by_unit, units, frames.astype(np.float64))
    # At most 60 float32 additions of values up to 10: 600 × 2⁻²⁴ × a few.
    np.testing.assert_allclose(sums.numpy(), by_unit, atol=2e-4)


def test_a_pass_over_many_chunks_is_a_pass_over_one() -> None:
    frames = blobs(3 * 16 * 4096 + 5, 7, 4)
    centroids = torch.from_numpy(frames[:7].copy())
    sums, counts, distances = assign(batch_of(frames), centroids)
    units = np.square(frames[:, None].astype(np.float64) - centroids.numpy()).sum(2).argmin(1)
    assert counts.tolist() == np.bincount(units, minlength=7).tolist()
    # Sums of 28,000 values, in float32 within a block of 65,536 rows: 1e-5 relative is 100 roundings.
    wanted = np.zeros((7, 4))
    np.add.at(wanted, units, frames.astype(np.float64))
    np.testing.assert_allclose(sums.numpy(), wanted, rtol=1e-5)
    assert len(distances) == len(frames)


def test_lloyd_is_the_loop() -> None:
    frames = blobs(300, 6, 5)
    start = frames[[0, 6, 1, 7, 2, 3]]
    passes: list[Pass] = []
    state = lloyd(batch_of(frames), torch.from_numpy(start.copy()), 0.0, passes.append)
    centroids, inertias = slow.lloyd(frames.astype(np.float64), start.astype(np.float64), len(passes))
    # Inertia near convergence is about 5 and norms about 4,500: 4,500 × 2⁻²² = 1e-3.
    np.testing.assert_allclose([done.inertia for done in passes], inertias, rtol=1e-3)
    # It stops when a pass gains nothing, so the update that was left out moves nothing.
    np.testing.assert_allclose(state.centroids.numpy(), centroids, atol=1e-3)


def test_inertia_never_grows() -> None:
    frames = np.random.default_rng(0).standard_normal((5000, 6)).astype(np.float32)
    passes: list[Pass] = []
    fit_kmeans(frames, 20, num_restarts=1, progress=passes.append)
    full = [done.inertia for done in passes if done.num_frames == len(frames)]
    assert len(full) > 2
    # Lloyd's theorem; float32 rounding of squared norms of about 6 may add 1e-6.
    assert all(after <= before + 1e-6 for before, after in itertools.pairwise(full))


def test_known_clusters_are_found() -> None:
    frames = blobs(20_000, 40, 10)
    fit = fit_kmeans(frames, 40)
    units = fit.codebook.assign(frames)
    assert all(len(set(units[heap::40].tolist())) == 1 for heap in range(40)), "a heap was split"
    assert len(set(units[:40].tolist())) == 40, "two heaps were merged"
    # The variance of ten dimensions of a standard normal: 10, known to 10 · √(2 / (10 · 20,000)) = 0.03.
    assert fit.inertia == pytest.approx(10, abs=0.15)
    assert perplexity(fit.counts) == pytest.approx(40)


def test_what_is_reported_is_what_the_codebook_does() -> None:
    frames = np.random.default_rng(1).gamma(2, 3, (4000, 7)).astype(np.float32)
    for normalise in (False, True):
        fit = fit_kmeans(frames, 16, normalise=normalise)
        scaled = (frames - fit.codebook.shift) * fit.codebook.scale
        units = fit.codebook.assign(frames)
        found = np.square(scaled - fit.codebook.centroids[units]).sum(1, dtype=np.float64).mean()
        assert fit.inertia == pytest.approx(found, rel=1e-4)  # 2⁻²³ times norms some 10² times the inertia
        # A frame as near to two centroids as float32 can tell may go to either.
        assert np.abs(np.bincount(units, minlength=16) - fit.counts).sum() <= 4


def test_normalised_units_do_not_depend_on_a_dimensions_unit() -> None:
    frames = np.random.default_rng(2).standard_normal((3000, 5)).astype(np.float32)
    # Powers of two and a shift of 0: scaling is exact, so the units are equal and not merely close.
    stretch = np.array([1, 1024, 1 / 64, 4, 1], np.float32)
    one, other = fit_kmeans(frames, 12, normalise=True), fit_kmeans(frames * stretch, 12, normalise=True)
    np.testing.assert_array_equal(one.codebook.assign(frames), other.codebook.assign(frames * stretch))
    assert other.inertia == pytest.approx(one.inertia, rel=1e-5)


def test_scaling_gives_mean_zero_and_variance_one_and_spares_a_constant() -> None:
    frames = np.random.default_rng(3).normal(100, 7, (10_000, 3)).astype(np.float32)
    frames[:, 1] = 5
    shift, scale = scaling(frames, normalise=True)
    scaled = ((frames - shift) * scale).astype(np.float64)
    np.testing.assert_allclose(scaled.mean(0), 0, atol=1e-5)  # values near 100 are known to 100 × 2⁻²⁴ / 7
    np.testing.assert_allclose(scaled.std(0), [1, 0, 1], atol=1e-5)
    assert scale[1] == 1


def test_the_seed_decides() -> None:
    frames = np.random.default_rng(4).standard_normal((6000, 9)).astype(np.float32)
    first, again, other = (fit_kmeans(frames, 30, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.codebook.centroids, again.codebook.centroids)
    assert not np.array_equal(first.codebook.centroids, other.codebook.centroids)


def test_a_shuffled_batch_holds_every_frame_once() -> None:
    frames = np.arange(9000, dtype=np.float32)[:, None]
    batch = shuffle(frames, np.zeros(1, np.float32), np.ones(1, np.float32), torch.Generator().manual_seed(0))
    order = batch.rows[:, 0].numpy()
    assert sorted(order.tolist()) == frames[:, 0].tolist()
    # The mean of 500 draws from 0 … 8,999 has a standard deviation of 116; in order it would be 250.
    assert abs(order[:500].mean() - 4500) < 5 * 116
    np.testing.assert_array_equal(batch.squares.numpy(), order**2)


def test_plus_plus_spreads_its_centroids() -> None:
    frames = blobs(2000, 25, 6)
    rng = np.random.default_rng(0)

    def heaps_met(centroids: NDArray[np.float32]) -> int:
        centres = np.stack([frames[heap::25].mean(0) for heap in range(25)])
        return len({int(np.square(centres - c).sum(1).argmin()) for c in centroids})

    found = heaps_met(plus_plus(batch_of(frames), 25, torch.Generator().manual_seed(0)).numpy())
    by_chance = heaps_met(frames[rng.choice(2000, 25)])
    # 25 draws at random meet 25 · (1 − e⁻¹) = 16 heaps. Heaps lie hundreds apart: k-means++ has no choice.
    assert found == 25
    assert by_chance < 21


def test_a_unit_that_lost_its_frames_starts_again() -> None:
    frames = blobs(400, 4, 3)
    start = np.stack([frames[0], frames[1], frames[2], np.full(3, 1e4, np.float32)])
    state = lloyd(batch_of(frames), torch.from_numpy(start), 1e-4, lambda _: None)
    assert sorted(state.counts.tolist()) == [100, 100, 100, 100]


def test_fewer_different_frames_than_units_leaves_dead_units() -> None:
    frames = np.repeat(np.arange(3, dtype=np.float32)[:, None], 10, axis=0)
    fit = fit_kmeans(frames, 5)
    assert (fit.counts > 0).sum() == 3
    assert fit.inertia == pytest.approx(0, abs=1e-6)
    assert np.isfinite(fit.codebook.centroids).all()


def test_more_units_than_frames_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"found 7 frames for 8 units, wanted .*: lower num_units"):
        fit_kmeans(np.zeros((7, 2), np.float32), 8)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_frame_that_is_no_number_is_an_error(value: float) -> None:
    frames = np.zeros((5000, 2), np.float32)
    frames[4321, 1] = value
    with pytest.raises(ValueError, match="row 4321 not finite"):
        fit_kmeans(frames, 4)


def test_perplexity_counts_units_in_use() -> None:
    assert perplexity(np.array([5, 5, 0, 5, 5])) == pytest.approx(4)
    assert perplexity(np.array([0, 9])) == 1
    assert perplexity(np.zeros(3, np.int64)) == 1


def test_faiss_and_ours_agree() -> None:
    """The passes a GPU's faiss would make, made on the CPU: the same algorithm, so the same optimum."""
    pytest.importorskip("faiss")
    frames = blobs(3000, 8, 5)
    batch = batch_of(frames)
    start = torch.from_numpy(frames[:8].copy())
    theirs = lloyd_faiss(batch, start, num_gpus=0)
    ours = lloyd(batch, start, 0.0, lambda _: None).centroids
    # Means of 375 values of size 30: 375 × 2⁻²⁴ × 30 at worst.
    torch.testing.assert_close(theirs, ours, atol=1e-3, rtol=0)


def test_it_is_as_good_as_scikit_learn() -> None:
    """Three restarts on data without clear clusters, against the best of ten runs of Lloyd's algorithm."""
    cluster = pytest.importorskip("sklearn.cluster")
    frames = np.random.default_rng(5).standard_normal((3000, 6)).astype(np.float32)
    theirs = cluster.KMeans(30, n_init=10, random_state=0).fit(frames).inertia_ / len(frames)
    # scikit-learn's single runs lie up to 1.3 % above their best of ten on this data.
    assert fit_kmeans(frames, 30).inertia < 1.02 * theirs
