"""What soft-DTW costs beside its peers, forward and backward from features, all interleaved in one run.

    OMP_NUM_THREADS=1 python benchmarks/soft_dtw.py                     # pysdtw, tslearn; on a GPU also the loop
    OMP_NUM_THREADS=1 python benchmarks/soft_dtw.py --device cuda --frames 4096 4096 --peers loop

Every peer is used as suits it best: pysdtw gets packed sequences and so the true lengths, tslearn, which knows none,
one pair after the other, and both only the matrix of distances that they make by themselves. `loop` is what one writes
first in torch: one anti-diagonal of R after the other on padded batches, differentiated by autograd. Medians are of the
process's CPU time on one thread or, on a GPU, of the wall time; the gradients are compared with ours in float64. The
last line is one JSON object; a ratio above 1 says that ours is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable

# Before numba is loaded: its own threads would be counted, and would change torch's.
os.environ.setdefault("NUMBA_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence, pad_sequence

from sonorant.soft_dtw import soft_dtw

Sequences = list[Tensor]
Method = Callable[[Sequences, Sequences, float], Tensor]


def make_pairs(count: int, shortest: int, longest: int, dim: int, seed: int) -> tuple[Sequences, Sequences]:
    """Pairs of smooth sequences of unit vectors, the second one a warped and noisy version of the first."""
    generator = torch.Generator().manual_seed(seed)
    xs, ys = [], []
    for n, m in torch.randint(shortest, longest + 1, (count, 2), generator=generator).tolist():
        course = torch.randn(1, dim, max(2, n // 8), generator=generator)
        for frames, found in ((n, xs), (m, ys)):
            z = F.interpolate(course, size=frames, mode="linear")[0].T
            found.append(F.normalize(z + 0.1 * torch.randn(z.shape, generator=generator), dim=1))
    return xs, ys


def ours(xs: Sequences, ys: Sequences, gamma: float) -> Tensor:
    return soft_dtw(xs, ys, gamma).sum()


def by_pysdtw(xs: Sequences, ys: Sequences, gamma: float) -> Tensor:
    import pysdtw

    measure = pysdtw.SoftDTW(gamma=gamma, use_cuda=xs[0].is_cuda)
    return measure(pack_sequence(xs, enforce_sorted=False), pack_sequence(ys, enforce_sorted=False)).sum()


def by_tslearn(xs: Sequences, ys: Sequences, gamma: float) -> Tensor:
    from tslearn.metrics import SoftDTWLossPyTorch

    measure = SoftDTWLossPyTorch(gamma=gamma)
    return torch.stack([measure(x[None], y[None])[0] for x, y in zip(xs, ys, strict=True)]).sum()


def by_loop(xs: Sequences, ys: Sequences, gamma: float) -> Tensor:
    """Padded, R of one anti-diagonal after the other, gradient by autograd."""
    x, y = pad_sequence(xs, batch_first=True), pad_sequence(ys, batch_first=True)
    size, n, m = len(x), x.shape[1], y.shape[1]
    costs = x.square().sum(2)[:, :, None] + y.square().sum(2)[:, None] - 2 * x @ y.mT
    rows = torch.arange(n, device=x.device)
    nothing = x.new_full((size, 1), 1e10)
    previous = x.new_full((size, n), 1e10)
    current, diagonals = previous, []
    for k in range(n + m - 1):
        columns = (k - rows).clamp(0, m - 1)
        cost = torch.where((k - rows >= 0) & (k - rows < m), costs[:, rows, columns], 1e10)
        slanted = torch.cat([nothing if k else torch.zeros_like(nothing), previous[:, :-1]], dim=1)
        above = torch.cat([nothing, current[:, :-1]], dim=1)
        best = -gamma * torch.stack([slanted, above, current]).div(-gamma).logsumexp(0)
        previous, current = current, (cost + best).clamp(max=1e10)
        diagonals.append(current)
    ends = [diagonals[len(a) + len(b) - 2][pair, len(a) - 1] for pair, (a, b) in enumerate(zip(xs, ys, strict=True))]
    return torch.stack(ends).sum()


PEERS: dict[str, Method] = {"pysdtw": by_pysdtw, "tslearn": by_tslearn, "loop": by_loop}


def differentiated(method: Method, xs: Sequences, ys: Sequences, gamma: float) -> tuple[float, Sequences]:
    """A value, and its gradients with respect to all sequences."""
    xs, ys = ([z.detach().requires_grad_() for z in sequences] for sequences in (xs, ys))
    value = method(xs, ys, gamma)
    return float(value.detach()), list(torch.autograd.grad(value, [*xs, *ys]))


def seconds_of(method: Method, xs: Sequences, ys: Sequences, gamma: float) -> float:
    """How long forward and backward take."""
    is_cuda = xs[0].is_cuda
    clock = time.perf_counter if is_cuda else time.process_time
    if is_cuda:
        torch.cuda.synchronize()
    start = clock()
    differentiated(method, xs, ys, gamma)
    if is_cuda:
        torch.cuda.synchronize()
    return clock() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--peers", nargs="*", choices=list(PEERS))
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--frames", type=int, nargs=2, default=(300, 700), metavar=("SHORTEST", "LONGEST"))
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--gamma", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    names = given.peers if given.peers is not None else list(PEERS) if given.device != "cpu" else ["pysdtw", "tslearn"]
    methods: dict[str, Method] = {"ours": ours, **{name: PEERS[name] for name in names}}
    xs, ys = make_pairs(given.pairs, *given.frames, given.dim, given.seed)
    exact_value, exact = differentiated(ours, [x.double() for x in xs], [y.double() for y in ys], given.gamma)
    xs, ys = ([z.to(given.device) for z in sequences] for sequences in (xs, ys))
    size = sum(float(gradient.abs().sum()) for gradient in exact)
    errors = {}
    for name, method in methods.items():  # also what compiles
        value, found = differentiated(method, xs, ys, given.gamma)
        gradients = zip(found, exact, strict=True)
        error = sum(float((gradient.cpu() - true).abs().sum()) for gradient, true in gradients) / size
        errors[name] = (abs(value - exact_value) / abs(exact_value), error)
    times: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(given.rounds):
        for name, method in methods.items():
            times[name].append(seconds_of(method, xs, ys, given.gamma))
    medians = {name: statistics.median(found) for name, found in times.items()}
    lengths = " ".join(f"{len(x)}×{len(y)}" for x, y in zip(xs, ys, strict=True))
    print(f"{given.device}, γ = {given.gamma:g}, {given.dim} dimensions, {lengths}")
    print(f"{'':10}{'ms':>10}{'ours is':>10}{'value off':>12}{'gradient off':>14}")
    for name, median in medians.items():
        off = "".join(f"{error:{width}.1e}" for error, width in zip(errors[name], (12, 14), strict=True))
        print(f"{name:10}{1e3 * median:10.1f}{median / medians['ours']:9.1f}x{off}")
    ratios = {name: round(medians[name] / medians["ours"], 2) for name in names}
    print(json.dumps({"benchmark": "soft_dtw", "ratios": ratios}))


if __name__ == "__main__":
    main()
