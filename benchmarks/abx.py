"""What ABX costs beside the public tools: the same cells on the same frames, all interleaved in one run.

    OMP_NUM_THREADS=1 python benchmarks/abx.py                     # ours and libri-light's way
    pip download torchdtw --no-deps --only-binary :all: --python-version 3.13 -d build/torchdtw
    OMP_NUM_THREADS=1 python benchmarks/abx.py --torchdtw build/torchdtw/*.whl

`libri_light` compares each cell's padded items by broadcast products, as that program does, and warps pair by pair with
a walk back along the path; its warping is compiled here too. It has a share of the cells, and its time is multiplied.
`torchdtw` is what fastabx 0.9 does with that library: cells of the same X and A in one padded product, arccos, one call
for all pairs. It wants Python 3.12; its compiled library loads under 3.11 too. Items are random walks off their phone's
place; they are in contexts, as triphones are, or with --context any all in one. Medians are of the process's CPU time
on one thread; cells a second are ours. The last line is one JSON object; a ratio above 1 says that ours is faster, and
a peer's own is the lower one of the first dimension.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

if TYPE_CHECKING:
    from sonorant.evaluation.abx.cells import Block, Groups

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

Frames = NDArray[np.float32]
Indices = NDArray[np.int64]
Peer = Callable[["Task"], NDArray[np.float64]]
GATHERED_ROWS = 8_192
"""Items that fastabx gathers and pads at once."""


class Task:
    """The cells of one score and the frames (F, D + 1) of its items, unit vectors."""

    def __init__(self, blocks: list[Block], groups: Groups, frames: Frames, offsets: Indices) -> None:
        self.blocks, self.groups, self.frames, self.offsets = blocks, groups, frames, offsets
        self.cells: Indices = np.concatenate([block.cells for block in blocks])

    def items(self, group: int) -> Indices:
        """The items of a group."""
        return np.arange(self.groups.start[group], self.groups.stop[group])

    def padded(self, items: Indices) -> tuple[torch.Tensor, torch.Tensor]:
        """Items (I, T, D + 1), zeros behind the shorter ones, and their lengths."""
        lengths = self.offsets[items + 1] - self.offsets[items]
        steps = np.arange(lengths.max())
        inside = steps < lengths[:, None]
        rows = np.where(inside, self.offsets[items, None] + steps, 0)
        frames = torch.from_numpy(self.frames).index_select(0, torch.from_numpy(rows.reshape(-1)))
        frames = frames.view(*rows.shape, -1).mul_(torch.from_numpy(inside)[..., None])
        return frames, torch.from_numpy(lengths)


def main() -> None:
    """Print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--torchdtw", type=Path, help="its wheel")
    parser.add_argument("--dims", type=int, nargs="+", default=[768, 256])
    parser.add_argument("--context", choices=["in", "any"], default="in")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--share", type=int, default=50, help="libri-light's way scores one cell in so many")
    given = parser.parse_args()
    torch.set_num_threads(1)
    peers: dict[str, Peer] = {"ours": ours, "libri_light": lambda task: libri_light(task, given.share)}
    if given.torchdtw:
        load_torchdtw(given.torchdtw)
        peers["torchdtw"] = fastabx
    print(f"{'':30} {'cells':>7} {'cells/s':>9} " + " ".join(f"{name:>12}" for name in peers) + "   largest difference")
    ratios: dict[str, float] = {}
    for dim in given.dims:
        for speaker in ("within", "across"):
            task = make_task(speaker, given.context, dim)
            seconds, gap = compare(peers, task, given.repeats, given.share)
            rate = len(task.cells) / seconds["ours"]
            shown = " ".join(f"{1000 * value:9.1f} ms" for value in seconds.values())
            print(
                f"{speaker}, {given.context} context, {dim} dim.".ljust(30),
                f"{len(task.cells):7} {rate:9.0f} {shown}   {gap:.1e}",
            )
            ratios |= {
                f"{name}_{speaker}_{dim}": round(value / seconds["ours"], 2)
                for name, value in seconds.items()
                if name != "ours"
            }
    # One figure a peer: the lower one of the first dimension.
    lowest = {
        name: min(ratios[f"{name}_{speaker}_{given.dims[0]}"] for speaker in ("within", "across"))
        for name in peers
        if name != "ours"
    }
    print(json.dumps({"benchmark": "abx", "ratios": {**lowest, **ratios}}))


def make_task(speaker: str, context: str, dim: int) -> Task:
    """About 5,200 items of 12 speakers: 20 contexts of 4 phones, or one of 39; five X speakers a cell across."""
    from sonorant.evaluation.abx.cells import across_blocks, group_items, within_blocks
    from sonorant.evaluation.abx.distances import stack
    from sonorant.evaluation.abx.items import Item

    rng = np.random.default_rng(0)
    num_contexts, num_phones = (20, 4) if context == "in" else (1, 39)
    phones = rng.normal(size=(num_phones, dim)).astype(np.float32)
    tokens: dict[str, Frames] = {}
    spans = []
    for number in range(5_249):
        where, phone, who = rng.integers(num_contexts), rng.integers(num_phones), rng.integers(12)
        file, length = f"f{number:04}", int(rng.integers(6, 23))
        noise = rng.normal(size=(length, dim)).astype(np.float32).cumsum(axis=0) * np.float32(length**-0.5)
        tokens[file] = phones[phone] + 12 * noise
        item = Item(file, 0.0, length / 50, f"p{phone:02}", f"c{where:02}", "+", f"s{who:02}")
        spans.append((item, 0, length))
    spans, groups = group_items(sorted(spans), "in", 10, rng)
    blocks = within_blocks(groups) if speaker == "within" else across_blocks(groups, 5, rng)
    frames = stack([tokens[item.file] for item, _, _ in spans], "angular")
    offsets = np.cumsum([0, *(stop - first for _, first, stop in spans)], dtype=np.int64)
    return Task(blocks, groups, frames, offsets)


def compare(peers: dict[str, Peer], task: Task, repeats: int, share: int) -> tuple[dict[str, float], float]:
    """Median seconds of each, and by how much the mean error of their cells differs at most."""
    found: dict[str, NDArray[np.float64]] = {name: peer(task) for name, peer in peers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    for _ in range(repeats):
        for name, peer in peers.items():
            start = time.process_time()
            peer(task)
            seconds[name].append(time.process_time() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    medians["libri_light"] *= len(task.cells) / len(task.cells[::share])
    gaps = [abs(found["ours"][::share].mean() - found["libri_light"].mean())]
    if "torchdtw" in found:
        gaps.append(abs(found["ours"].mean() - found["torchdtw"].mean()))
    return medians, float(max(gaps))


def ours(task: Task) -> NDArray[np.float64]:
    """The errors of all cells, (C,)."""
    from sonorant.evaluation.abx.distances import score_blocks

    weights = np.ones(len(task.cells))
    return score_blocks(task.blocks, weights, task.groups, task.frames, task.offsets, "angular")[0]


def libri_light(task: Task, share: int) -> NDArray[np.float64]:
    """The errors of one cell in `share`."""
    from tests.references.libri_light import cell_error

    errors = []
    for a, b, x in task.cells[::share]:
        sides = [[part.numpy() for part in task.padded(task.items(group))] for group in (a, b, x)]
        errors.append(cell_error(*sides, is_same=bool(a == x)))
    return np.array(errors)


def load_torchdtw(wheel: Path) -> None:
    """Make torch.ops.torchdtw known."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        torch.ops.load_library(archive.extract("torchdtw/_C.abi3.so", folder))


def fastabx(task: Task) -> NDArray[np.float64]:
    """The errors of all cells, (C,): those of one X and A together, many such groups gathered and padded at once."""
    by_sides: dict[tuple[int, int], list[int]] = {}
    for cell, (a, _, x) in enumerate(task.cells.tolist()):
        by_sides.setdefault((x, a), []).append(cell)
    lengths = np.diff(task.offsets)
    plans = []
    for (x, a), cells in by_sides.items():
        parts = [task.items(a), *(task.items(b) for b in task.cells[cells, 1])]
        if x != a:
            parts.insert(0, task.items(x))
        items = np.concatenate(parts)
        plans.append((int(lengths[items].max()), x == a, cells, [len(part) for part in parts], items))
    plans.sort(key=lambda plan: plan[0])
    errors = np.empty(len(task.cells))
    chunk: list[Any] = []
    size = 0
    for plan in plans:
        if chunk and size + len(plan[-1]) > GATHERED_ROWS:
            score_chunk(task, chunk, errors)
            chunk, size = [], 0
        chunk.append(plan)
        size += len(plan[-1])
    score_chunk(task, chunk, errors)
    return errors


def score_chunk(task: Task, chunk: list[Any], errors: NDArray[np.float64]) -> None:
    """Write the errors of some groups of cells."""
    frames, lengths = task.padded(np.concatenate([plan[-1] for plan in chunk]))
    place = 0
    for _, is_same, cells, sizes, items in chunk:
        own, own_lengths = frames[place : place + len(items)], lengths[place : place + len(items)]
        place += len(items)
        num_x = sizes[0]
        targets, target_lengths = (own, own_lengths) if is_same else (own[num_x:], own_lengths[num_x:])
        rest = sizes if is_same else sizes[1:]
        x, x_lengths = own[:num_x], own_lengths[:num_x]
        products = torch.mm(x.flatten(0, 1), targets.flatten(0, 1).T)
        products = products.view(num_x, x.shape[1], len(targets), targets.shape[1]).transpose(1, 2)
        angles = products.clamp(-1, 1).acos() / torch.pi
        found = torch.ops.torchdtw.dtw_batch.default(angles, x_lengths, target_lengths, False)
        num_a = rest[0]
        to_a = found[:, :num_a]
        if is_same:
            to_a.fill_diagonal_(float("inf"))
        right = 0.5 * (num_x * num_a - torch.sign(to_a[:, :, None] - found[:, None, num_a:]).sum(dim=(0, 1)))
        pairs = num_x * (num_a - 1 if is_same else num_a)
        for cell, part in zip(cells, right.split(rest[1:]), strict=True):
            errors[cell] = 1 - float(part.sum()) / (pairs * len(part))


if __name__ == "__main__":
    main()
