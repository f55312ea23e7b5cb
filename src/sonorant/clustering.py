"""K-means: greedy k-means++, then Lloyd's algorithm on nested growing batches of the frames.

Passes over all frames are what k-means costs, so most of the way is gone on a sixteenth and a quarter of
them. A pass is one matrix product and one row maximum per chunk that stays in the cache.
benchmarks/clustering.py holds it to scikit-learn and to faiss. Where faiss sees a GPU, faiss makes the passes
over all frames.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sonorant.models.codebook import Codebook

CHUNK_FRAMES = 4096  # per thread: the scores against 100 units are 1.6 MB and stay in the L2 cache
CHUNKS_PER_BLOCK = 16  # float32 sums move on to float64 after so many chunks
SEEDING_FRAMES = 20  # per unit: what k-means++ draws from
SMALLEST_BATCH = 50  # frames per unit: fewer say too little of where centroids belong
STAGES = (
    (16, 1e-3),
    (4, 5e-4),
    (1, 1e-4),
)  # (one frame in so many, relative gain that asks for another pass)
MAX_PASSES = 50  # over one batch
Frames = NDArray[np.float32]


@dataclass(frozen=True)
class Pass:
    """One pass over a batch of `num_frames`, and the inertia per frame of the centroids it began with."""

    num_frames: int
    inertia: float


@dataclass(frozen=True)
class Fit:
    """A codebook and how well it fits the frames it was made from.

    inertia: mean squared distance of a frame to its centroid, in the codebook's scaled space.
    counts (K,): the frames of each unit.
    """

    codebook: Codebook
    inertia: float
    counts: NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """Scaled frames in random order, so that any first part of them is a fair sample.

    rows (N, D + 1): a frame and a 1, so that one product with (centroid, -|centroid|²/2) scores it, and a sum
    of rows counts them too. squares (N,): the frames' squared norms.
    """

    rows: Tensor
    squares: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def head(self, num_frames: int) -> Batch:
        """The first `num_frames`."""
        return Batch(self.rows[:num_frames], self.squares[:num_frames])


@dataclass(frozen=True)
class State:
    """Centroids (K, D), and what a pass over a batch found: inertia per frame, frames of each unit (K,)."""

    centroids: Tensor
    inertia: float
    counts: Tensor


def fit_kmeans(
    frames: Frames,
    num_units: int,
    *,
    num_restarts: int = 3,
    seed: int = 0,
    normalise: bool = False,
    progress: Callable[[Pass], None] | None = None,
) -> Fit:
    """Fit `num_units` centroids to `frames` (N, D).

    The restarts compete on the smallest batch and the best one goes on. With `normalise`, each dimension is
    first brought to mean 0 and variance 1, and the codebook remembers how. The same seed on the same number
    of threads gives the same bits.

    Raises ValueError where there are fewer frames than units, or a frame is not finite.
    """
    if len(frames) < num_units:
        raise ValueError(
            f"k-means: found {len(frames)} frames for {num_units} units, wanted at least one frame a unit: "
            "lower num_units or prepare more speech"
        )
    shift, scale = scaling(frames, normalise)
    generator = torch.Generator().manual_seed(seed)
    batch = shuffle(frames, shift, scale, generator)
    report = progress or (lambda _: None)

    smallest = min(len(batch), SMALLEST_BATCH * num_units)
    heads = [(batch.head(max(len(batch) // share, smallest)), gain) for share, gain in STAGES]
    starts = [plus_plus(batch, num_units, generator) for _ in range(num_restarts)]
    (first, first_gain), *others = heads
    state = min((lloyd(first, start, first_gain, report) for start in starts), key=lambda found: found.inertia)
    for head, gain in others:
        centroids = state.centroids
        if len(head) == len(batch) and (num_gpus := num_faiss_gpus()):
            centroids = lloyd_faiss(head, centroids, num_gpus)
        state = lloyd(head, centroids, gain, report)
    codebook = Codebook(state.centroids.numpy(), shift, scale)
    return Fit(codebook, state.inertia, state.counts.numpy())


def perplexity(counts: NDArray[np.int64]) -> float:
    """How many of K units are in use, by the entropy of their histogram (K,): 1 to K."""
    shares = counts[counts > 0] / max(1, counts.sum())
    return float(np.exp(-(shares * np.log(shares)).sum()))


def scaling(frames: Frames, normalise: bool) -> tuple[Frames, Frames]:
    """The shift and scale (D,) that give each dimension mean 0 and variance 1, or that change nothing.

    A dimension that never varies keeps its scale.
    """
    num_dims = frames.shape[1]
    if not normalise:
        return np.zeros(num_dims, np.float32), np.ones(num_dims, np.float32)
    parts = [frames[start : start + CHUNK_FRAMES] for start in range(0, len(frames), CHUNK_FRAMES)]
    mean = sum(part.sum(0, dtype=np.float64) for part in parts) / len(frames)
    variance = sum(np.square(part - mean).sum(0) for part in parts) / len(frames)
    return mean.astype(np.float32), np.where(variance > 0, variance, 1).astype(np.float32) ** np.float32(-0.5)


def shuffle(frames: Frames, shift: Frames, scale: Frames, generator: torch.Generator) -> Batch:
    """All frames, scaled and in random order. Raises ValueError where one is not finite."""
    order = torch.randperm(len(frames), generator=generator).numpy()
    rows = np.empty((len(frames), frames.shape[1] + 1), np.float32)
    squares = np.empty(len(frames), np.float32)
    rows[:, -1] = 1
    for start in range(0, len(frames), CHUNK_FRAMES):
        chunk = slice(start, start + CHUNK_FRAMES)
        scaled = (frames[order[chunk]] - shift) * scale
        rows[chunk, :-1] = scaled
        squares[chunk] = np.einsum("td,td->t", scaled, scaled)
    if not np.isfinite(squares.sum()):
        row = int(order[np.flatnonzero(~np.isfinite(squares))[0]])
        raise ValueError(f"k-means: found row {row} not finite, wanted finite numbers: check the features it is given")
    return Batch(torch.from_numpy(rows), torch.from_numpy(squares))


def plus_plus(batch: Batch, num_units: int, generator: torch.Generator) -> Tensor:
    """First centroids (K, D) by greedy k-means++ (Arthur and Vassilvitskii 2007).

    Each is the best of 2 + ⌊ln K⌋ candidates, drawn in proportion to the squared distance to the nearest
    centroid so far.
    """
    num_frames = min(len(batch), SEEDING_FRAMES * num_units)
    start = int(torch.randint(len(batch) - num_frames + 1, (1,), generator=generator))
    frames = batch.rows[start : start + num_frames, :-1].contiguous()
    squares = batch.squares[start : start + num_frames]
    chosen = [int(torch.randint(num_frames, (1,), generator=generator))]
    distances = (squares - 2 * (frames @ frames[chosen[0]]) + squares[chosen[0]]).clamp_(min=0)
    for _ in range(1, num_units):
        mass = distances.cumsum(0, dtype=torch.float64)
        draws = torch.rand(2 + int(math.log(num_units)), generator=generator, dtype=torch.float64) * mass[-1]
        candidates = torch.searchsorted(mass, draws).clamp_(max=num_frames - 1)
        from_candidates = torch.addmm(squares[candidates, None], frames[candidates], frames.T, alpha=-2)
        nearest = torch.minimum(from_candidates.add_(squares).clamp_(min=0), distances)
        best = int(nearest.sum(1).argmin())
        distances = nearest[best]
        chosen.append(int(candidates[best]))
    return frames[chosen]


def lloyd(batch: Batch, centroids: Tensor, min_gain: float, report: Callable[[Pass], None]) -> State:
    """Lloyd's algorithm until a pass gains less than `min_gain` of the inertia.

    A unit that loses all its frames starts again from the frame that is farthest from its centroid.
    """
    before = math.inf
    for _ in range(MAX_PASSES):
        sums, counts, distances = assign(batch, centroids)
        state = State(centroids, float(distances.sum(dtype=torch.float64)) / len(batch), counts)
        report(Pass(len(batch), state.inertia))
        dead = (counts == 0).nonzero()[:, 0]
        if before - state.inertia <= min_gain * before < math.inf and not len(dead):
            break
        before = state.inertia
        centroids = torch.where(counts[:, None] > 0, sums / counts[:, None], centroids).float()
        farthest = distances.topk(len(dead)).indices
        centroids[dead] = batch.rows[farthest, :-1]
    return state


def assign(batch: Batch, centroids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One pass: sum (K, D) and number (K,) of the frames nearest to each centroid; squared distances (N,)."""
    num_units, num_dims = centroids.shape
    weights = torch.cat([centroids, centroids.square().sum(1, keepdim=True).mul_(-0.5)], 1).T.contiguous()
    chunk = CHUNK_FRAMES * torch.get_num_threads()
    scores = torch.empty(chunk, num_units)
    distances = torch.empty(len(batch))
    sums = torch.zeros(num_units, num_dims + 1, dtype=torch.float64)
    block_sums = torch.zeros(num_units, num_dims + 1)
    for index, start in enumerate(range(0, len(batch), chunk)):
        part = slice(start, start + chunk)
        rows = batch.rows[part]
        best, units = torch.mm(rows, weights, out=scores[: len(rows)]).max(1)
        torch.sub(batch.squares[part], best, alpha=2, out=distances[part])
        block_sums.index_add_(0, units, rows)
        if index % CHUNKS_PER_BLOCK == CHUNKS_PER_BLOCK - 1:
            sums += block_sums
            block_sums.zero_()
    sums += block_sums
    return sums[:, :-1], sums[:, -1].long(), distances.clamp_(min=0)


def lloyd_faiss(batch: Batch, centroids: Tensor, num_gpus: int, num_passes: int = 20) -> Tensor:
    """The centroids after `num_passes` of faiss's Lloyd, on `num_gpus` GPUs (0: on the CPU)."""
    import faiss

    num_units, num_dims = centroids.shape
    every_frame = {"min_points_per_centroid": 1, "max_points_per_centroid": len(batch)}
    kmeans = faiss.Kmeans(num_dims, num_units, niter=num_passes, gpu=num_gpus, **every_frame)
    kmeans.train(batch.rows[:, :-1].numpy(), init_centroids=centroids.numpy())
    return torch.from_numpy(kmeans.centroids)


def num_faiss_gpus() -> int:
    """GPUs that faiss sees; 0 with faiss-cpu, and where faiss is not installed."""
    try:
        import faiss
    except ModuleNotFoundError:
        return 0
    return int(faiss.get_num_gpus())
