"""K-means against scikit-learn's MiniBatchKMeans, as fairseq calls it for HuBERT, and against faiss.

    python benchmarks/clustering.py        # MFCC of the sample speech, 500,000 × 39, 100 units
    python benchmarks/clustering.py --data mixture --rows 200000 --dims 768 --units 500 --peers faiss

Everything runs in one process, the contenders in turn, so that they share the machine's moods. A ratio is the CPU
time of a peer over the CPU time until ours has an equal or lower inertia over all rows; 0 if it never has.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SETS = ("speechocean", "timit_sample", "fsdd_digits")
PEERS = ("sklearn_minibatch", "faiss")


@dataclass(frozen=True)
class Run:
    """CPU and wall seconds of one fit, and the inertia per row it ended with.

    trace: for ours, (CPU seconds, inertia) after each pass over all rows.
    """

    cpu: float
    wall: float
    inertia: float
    trace: list[tuple[float, float]] = field(default_factory=list)

    def cpu_to(self, inertia: float) -> float | None:
        """CPU seconds until the inertia was at most so much; None if it never was."""
        return next((cpu for cpu, reached in self.trace if reached <= inertia), None)


def ours(rows: NDArray[np.float32], num_units: int, num_restarts: int, seed: int) -> Run:
    """sonorant.clustering, as the step `cluster` calls it."""
    from sonorant.clustering import Pass, fit_kmeans

    trace: list[tuple[float, float]] = []
    cpu, wall = time.process_time(), time.perf_counter()

    def note(done: Pass) -> None:
        if done.num_frames == len(rows):
            trace.append((time.process_time() - cpu, done.inertia))

    fit = fit_kmeans(rows, num_units, num_restarts=num_restarts, seed=seed, progress=note)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return Run(cpu, wall, inertia_of(rows, fit.codebook.centroids), trace)


def sklearn_minibatch(rows: NDArray[np.float32], num_units: int, seed: int) -> Run:
    """MiniBatchKMeans with the arguments of fairseq's examples/hubert/simple_kmeans."""
    from sklearn.cluster import MiniBatchKMeans

    cpu, wall = time.process_time(), time.perf_counter()
    kmeans = MiniBatchKMeans(
        num_units,
        init="k-means++",
        max_iter=100,
        batch_size=10_000,
        compute_labels=False,
        tol=0.0,
        max_no_improvement=100,
        init_size=None,
        n_init=20,
        reassignment_ratio=0.0,
        random_state=seed,
    ).fit(rows)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return Run(cpu, wall, inertia_of(rows, kmeans.cluster_centers_))


def faiss_lloyd(rows: NDArray[np.float32], num_units: int, seed: int) -> Run:
    """faiss: 20 iterations over all rows from a random start."""
    import faiss

    cpu, wall = time.process_time(), time.perf_counter()
    kmeans = faiss.Kmeans(rows.shape[1], num_units, niter=20, seed=seed, max_points_per_centroid=len(rows))
    kmeans.train(rows)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return Run(cpu, wall, inertia_of(rows, kmeans.centroids))


def inertia_of(rows: NDArray[np.float32], centroids: NDArray[np.float32]) -> float:
    """Mean squared distance of a row to its centroid: one judge for all, in float64."""
    import numpy as np
    import torch

    from sonorant.models.codebook import nearest

    centroids = np.ascontiguousarray(centroids, np.float32)
    total = 0.0
    for start in range(0, len(rows), 65_536):
        part = rows[start : start + 65_536]
        chosen = centroids[nearest(torch.from_numpy(part), torch.from_numpy(centroids)).numpy()]
        total += float(np.square(part - chosen, dtype=np.float64).sum())
    return total / len(rows)


def speech_rows(num_rows: int, num_dims: int, seed: int) -> NDArray[np.float32]:
    """MFCC of the sample speech at 100 Hz, repeated to `num_rows` with 5 % of each dimension's spread as noise."""
    import numpy as np

    from sonorant.data.audio import read_wave
    from sonorant.data.mfcc import NUM_DIMS, dense_mfcc

    if num_dims != NUM_DIMS:
        raise ValueError(f"--dims: found {num_dims} with --data speech, wanted {NUM_DIMS}: use --data mixture")
    beside = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"
    folder = Path(os.environ.get("SONORANT_SHARED_DATA", beside)).resolve()
    files = [path for name in SETS for path in sorted((folder / name).rglob("*.flac"))]
    if not files:
        raise ValueError(f"--data speech: found no audio in {folder}, wanted {', '.join(SETS)}: use --data mixture")
    frames = np.concatenate([dense_mfcc(read_wave(path)) for path in files])
    rng = np.random.default_rng(seed)
    chosen = frames[rng.permutation(np.arange(num_rows) % len(frames))]
    jitter = rng.standard_normal(chosen.shape, np.float32) * (0.05 * frames.std(0))
    return (chosen + jitter).astype(np.float32)


def mixture_rows(num_rows: int, num_dims: int, num_units: int, seed: int) -> NDArray[np.float32]:
    """Four overlapping Gaussians a unit, of different weights and widths."""
    import numpy as np

    rng = np.random.default_rng(seed)
    num_parts = 4 * num_units
    centres = rng.standard_normal((num_parts, num_dims), np.float32)
    widths = rng.uniform(0.5, 1.5, num_parts).astype(np.float32)
    parts = rng.choice(num_parts, num_rows, p=rng.dirichlet(np.ones(num_parts)))
    noise = rng.standard_normal((num_rows, num_dims), np.float32)
    return centres[parts] + widths[parts, None] * noise


def show(runs: dict[str, list[Run]], ratios: dict[str, list[float]]) -> None:
    """Medians over the rounds."""
    columns = f"{'CPU s':>8} {'wall s':>8} {'inertia':>10} {'ours: CPU s to it':>18} {'ratio':>8}"
    print(f"{'':>18} {columns}  (each round)")
    for name, rounds in runs.items():
        cpu, wall, inertia = (
            statistics.median(getattr(run, key) for run in rounds) for key in ("cpu", "wall", "inertia")
        )
        line = f"{name:>18} {cpu:8.2f} {wall:8.2f} {inertia:10.3f}"
        if name in ratios:
            reached = [mine.cpu_to(run.inertia) for mine, run in zip(runs["ours"], rounds, strict=True)]
            times = [cpu for cpu in reached if cpu is not None]
            shown = f"{statistics.median(times):.2f}" if len(times) == len(rounds) else "not always"
            each = ", ".join(f"{ratio:.1f}" for ratio in ratios[name])
            line += f" {shown:>18} {statistics.median(ratios[name]):8.2f}  ({each})"
        print(line)


def main() -> None:
    """Run all contenders in turn and print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", choices=("speech", "mixture"), default="speech")
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--dims", type=int, default=39)
    parser.add_argument("--units", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--restarts", type=int, default=3, help="ours; params.yaml's default")
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "1")))
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = str(options.threads)

    import torch

    torch.set_num_threads(options.threads)
    try:
        if options.data == "speech":
            rows = speech_rows(options.rows, options.dims, options.seed)
        else:
            rows = mixture_rows(options.rows, options.dims, options.units, options.seed)
    except ValueError as error:
        parser.error(str(error))
    print(
        f"{options.data}: {len(rows):,} × {rows.shape[1]}, {options.units} units, {options.rounds} rounds, "
        f"{options.threads} thread(s); medians",
        flush=True,
    )
    fits: dict[str, Callable[[int], Run]] = {
        "ours": lambda seed: ours(rows, options.units, options.restarts, seed),
        "sklearn_minibatch": lambda seed: sklearn_minibatch(rows, options.units, seed),
        "faiss": lambda seed: faiss_lloyd(rows, options.units, seed),
    }
    names = ["ours", *options.peers]
    runs: dict[str, list[Run]] = {name: [] for name in names}
    for seed in range(options.seed, options.seed + options.rounds):
        for name in names:
            runs[name].append(fits[name](seed))
    ratios: dict[str, list[float]] = {}
    for name in options.peers:
        pairs = [(run.cpu, mine.cpu_to(run.inertia)) for mine, run in zip(runs["ours"], runs[name], strict=True)]
        ratios[name] = [theirs / reached if reached else 0.0 for theirs, reached in pairs]
    show(runs, ratios)
    medians = {name: round(statistics.median(values), 2) for name, values in ratios.items()}
    print(json.dumps({"benchmark": "clustering", "ratios": medians}))


if __name__ == "__main__":
    main()
