"""Distances between items, dynamic time warping over angles of frames, and the errors of cells read off them.

A block's frames meet in matrix products; what is warped, 32 pairs at a time, lies in the cache. Costs and lengths of
paths are carried forward together, so no path is walked back.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numba
import numpy as np
from numba.extending import overload
from numpy.typing import NDArray

from sonorant.evaluation.abx.cells import Block, Groups, Indices

Distance = Literal["angular", "identical"]
Floats = NDArray[np.floating[Any]]

TIE = 1e-7
"""Distances closer than this are equal: float64 resolves 7e-9 near zero, float32 6e-8 near one half."""
NUM_LANES = 32
"""Pairs warped at once. With 16, LLVM unrolls the lanes away and finds no vectors in what is left."""
TILE_FRAMES = 192
"""Frames of X in one product: few enough for the product to stay in the cache, enough to make it fast."""
MAX_SQUARE = 4_096
"""Items of a block of which all pairs are held at once: 64 MiB."""
DENSE = 0.5
"""Share of a block's ordered pairs that must be needed for it to be cheaper to make each unordered one."""


def stack(parts: list[NDArray[Any]], distance: Distance) -> NDArray[Any]:
    """All items' frames end to end, made ready for the distance."""
    shapes = {part.shape[1:] for part in parts}
    if len(shapes) > 1 or len(shapes.pop()) != (1 if distance == "angular" else 0):
        found = sorted({str(("T", *part.shape[1:])) for part in parts})
        wanted = "(T, D) with one D" if distance == "angular" else "(T,)"
        raise ValueError(f"abx: found features {found}, wanted {wanted} for {distance} distances: reshape")
    frames = np.concatenate(parts)
    if distance == "identical":
        return frames
    if frames.dtype != np.float64:
        frames = frames.astype(np.float32)
    if not np.isfinite(frames).all():
        raise ValueError("abx: found NaN or infinite features, wanted finite ones: find out what made them")
    return _to_sphere(frames)


def _to_sphere(frames: Floats) -> Floats:
    """Unit vectors, and a column that puts null vectors at 1 from all others and at 0 from each other."""
    peak = np.abs(frames).max(axis=1, keepdims=True, initial=0)
    is_null = peak[:, 0] == 0
    scaled = frames / np.where(peak == 0, 1, peak)  # squares of the raw values could over- or underflow
    sphere = np.empty((len(frames), frames.shape[1] + 1), frames.dtype)
    sphere[:, :-1] = scaled / np.where(is_null, 1, np.sqrt(np.square(scaled).sum(axis=1)))[:, None]
    # Products: 2^-80 between two others, vanishing; -4 and 2^84 with a null vector, beyond any cosine.
    sphere[:, -1] = np.where(is_null, -(2.0**42), 2.0**-40)
    return sphere


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return numba.njit(cache=True, fastmath={"contract"}, error_model="numpy", nogil=True)(function)  # type: ignore[no-any-return]


A0, A1, A2, A3 = (np.float32(a / math.pi) for a in (1.5707963050, -0.2145988016, 0.0889789874, -0.0501743046))
A4, A5, A6, A7 = (np.float32(a / math.pi) for a in (0.0308918810, -0.0170881256, 0.0066700901, -0.0012624911))
"""arccos x = √(1 - x) (A0 + A1 x + …) for 0 ≤ x, to 2e-8: Abramowitz and Stegun, 4.4.46; here over π."""
ZERO, ONE = np.float32(0), np.float32(1)


def _angle(cosine: float) -> float:
    """arccos over π; what rounding or a null vector leaves beyond ±1 is at ±1."""
    return math.acos(min(1.0, max(-1.0, cosine))) / math.pi


@overload(_angle, jit_options={"fastmath": {"contract"}, "error_model": "numpy"}, strict=False)  # type: ignore[untyped-decorator]
def _overload_angle(cosine: Any) -> Callable[[Any], Any]:
    if cosine != numba.types.float32:
        return lambda cosine: math.acos(min(1.0, max(-1.0, cosine))) / math.pi

    def angle(cosine: Any) -> Any:
        x = min(abs(cosine), ONE)
        series = A0 + x * (A1 + x * (A2 + x * (A3 + x * (A4 + x * (A5 + x * (A6 + x * A7))))))
        acute = np.sqrt(ONE - x) * series
        return acute if cosine >= ZERO else ONE - acute

    return angle


@_compiled
def _warp(
    products: Floats,
    is_cosine: bool,
    rows: Indices,
    starts: Indices,
    lengths: Indices,
    order: Indices,
    is_square: bool,
    there: Floats,
    back: Floats,
) -> None:
    """DTW cost over path length of each row's item with each column's, and of the columns' with the rows'.

    Row item i is products[rows[i]:rows[i + 1]], column item j is products[:, starts[j]:starts[j] + lengths[j]]; `order`
    lists the columns by length. `there` (I, J) takes item i to item j, `back` item j to item i: of paths that cost the
    same both prefer the diagonal, then the one goes left where the other goes up. With `is_square` the first columns
    are the rows, and what is left of the diagonal is not made.
    """
    number = products.dtype.type
    zero, one, infinite = number(0), number(1), number(np.inf)
    size = lengths[order[-1]] * NUM_LANES
    near = np.zeros(size, products.dtype)  # a frame's distances to the lanes' frames
    cost, steps, turned = np.empty(size, products.dtype), np.empty(size, products.dtype), np.empty(size, products.dtype)
    left, left_steps, left_turned = (
        np.empty(NUM_LANES, near.dtype),
        np.empty(NUM_LANES, near.dtype),
        np.empty(NUM_LANES, near.dtype),
    )
    slant, slant_steps, slant_turned = (
        np.empty(NUM_LANES, near.dtype),
        np.empty(NUM_LANES, near.dtype),
        np.empty(NUM_LANES, near.dtype),
    )
    lanes = np.empty(NUM_LANES, np.int64)
    for i in range(len(rows) - 1):
        place = 0
        while place < len(order):
            num_lanes = 0
            while place < len(order) and num_lanes < NUM_LANES:
                if not is_square or order[place] > i:
                    lanes[num_lanes] = order[place]
                    num_lanes += 1
                place += 1
            if num_lanes == 0:
                break
            width = lengths[lanes[num_lanes - 1]]
            for q in range(width * NUM_LANES):
                cost[q], steps[q], turned[q] = infinite, zero, zero
            corner = zero
            for row in range(rows[i], rows[i + 1]):
                for k in range(num_lanes):
                    first = starts[lanes[k]]
                    for c in range(lengths[lanes[k]]):
                        near[c * NUM_LANES + k] = products[row, first + c]
                if is_cosine:
                    for q in range(width * NUM_LANES):
                        near[q] = _angle(near[q])
                for k in range(NUM_LANES):
                    left[k], left_steps[k], left_turned[k] = infinite, zero, zero
                    slant[k], slant_steps[k], slant_turned[k] = corner, zero, zero
                corner = infinite
                for c in range(width):
                    q = c * NUM_LANES
                    for k in range(NUM_LANES):
                        over, over_steps, over_turned = cost[q + k], steps[q + k], turned[q + k]
                        behind, diagonal = left[k], slant[k]
                        step = over_steps if over < behind else left_steps[k]
                        turn = left_turned[k] if behind < over else over_turned
                        best = min(behind, over)
                        step = (slant_steps[k] if diagonal <= best else step) + one
                        turn = (slant_turned[k] if diagonal <= best else turn) + one
                        best = min(diagonal, best) + near[q + k]
                        slant[k], slant_steps[k], slant_turned[k] = over, over_steps, over_turned
                        left[k], left_steps[k], left_turned[k] = best, step, turn
                        cost[q + k], steps[q + k], turned[q + k] = best, step, turn
            for k in range(num_lanes):
                q = (lengths[lanes[k]] - 1) * NUM_LANES + k
                there[i, lanes[k]] = cost[q] / steps[q]
                back[i, lanes[k]] = cost[q] / turned[q]


@_compiled
def _count(
    distances: Floats,
    rows: Indices,
    columns: Indices,
    bounds: Indices,
    weights: NDArray[np.float64],
    tie: float,
    errors: NDArray[np.float64],
    influence: NDArray[np.float64],
) -> None:
    """The errors of cells (C,), and what each item adds to `influence`.

    distances (I, J) are from the items numbered rows (I,) to those numbered columns (J,); bounds (C, 6) are the first
    and one past the last row of X, column of A and column of B. No item is compared with itself.
    """
    widest = 0
    for cell in range(len(bounds)):
        for side in (0, 2, 4):
            widest = max(widest, bounds[cell, side + 1] - bounds[cell, side])
    of_x, of_a, of_b = np.empty(widest), np.empty(widest), np.empty(widest)
    for cell in range(len(bounds)):
        x_start, x_stop, a_start, a_stop, b_start, b_stop = bounds[cell]
        num_x, num_a, num_b = x_stop - x_start, a_stop - a_start, b_stop - b_start
        is_same = 1 if rows[x_start] == columns[a_start] else 0
        of_x[:num_x], of_a[:num_a], of_b[:num_b] = 0.0, 0.0, 0.0
        wrong = 0.0
        for x in range(num_x):
            for a in range(num_a):
                if is_same and a == x:
                    continue
                to_a = distances[x_start + x, a_start + a]
                here = 0.0
                for b in range(num_b):
                    gap = distances[x_start + x, b_start + b] - to_a
                    outcome = (0.5 if gap <= tie else 0.0) + (0.5 if gap < -tie else 0.0)
                    of_b[b] += outcome
                    here += outcome
                of_x[x] += here
                of_a[a] += here
                wrong += here
        total = num_b * num_a * (num_x - is_same)
        error = wrong / total
        errors[cell] = error
        share = weights[cell] / total
        for x in range(num_x):
            influence[rows[x_start + x]] += share * (of_x[x] - error * num_b * (num_a - is_same))
        for a in range(num_a):
            influence[columns[a_start + a]] += share * (of_a[a] - error * num_b * (num_x - is_same))
        for b in range(num_b):
            influence[columns[b_start + b]] += share * (of_b[b] - error * num_a * (num_x - is_same))


def score_blocks(
    blocks: list[Block],
    weights: NDArray[np.float64],
    groups: Groups,
    frames: NDArray[Any],
    offsets: Indices,
    distance: Distance,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The error of every cell, (C,), and the influence of every item on the whole.

    `offsets` says where each item's frames begin. An item's influence is the derivative of the weighted sum of all
    errors by the item's own weight, if items could be there more than once: of first order, what one more would change.
    """
    errors, influence = np.empty(len(weights)), np.zeros(len(offsets) - 1)
    done = 0
    for block in blocks:
        own = slice(done, done + len(block.cells))
        done = own.stop
        for chosen, distances, rows, columns in _distances(block, groups, frames, offsets, distance):
            cells = block.cells[chosen]
            # Where an item is among the rows, and among the columns.
            row_of, column_of = rows[0], np.empty(groups.stop[block.stop - 1] - groups.start[block.first], np.int64)
            base = groups.start[block.first]
            column_of[columns - base] = np.arange(len(columns))
            a, b, x = cells.T
            starts = [groups.start[x] - row_of, column_of[groups.start[a] - base], column_of[groups.start[b] - base]]
            sizes = [groups.stop[g] - groups.start[g] for g in (x, a, b)]
            bounds = np.stack([part for s, n in zip(starts, sizes, strict=True) for part in (s, s + n)], axis=1)
            part = np.empty(len(cells))
            _count(distances, rows, columns, bounds, weights[own][chosen], TIE, part, influence)
            errors[own][chosen] = part
    return errors, influence


Part = tuple[Any, Floats, Indices, Indices]
"""Cells of a block, and the distances (I, J) that they need, from the items I to the items J."""


def _distances(
    block: Block, groups: Groups, frames: NDArray[Any], offsets: Indices, distance: Distance
) -> Iterator[Part]:
    """The block's distances: all pairs at once where most are needed, else those of one X group after the other."""
    sizes = groups.stop - groups.start
    first, stop = groups.start[block.first], groups.stop[block.stop - 1]
    a, b, x = block.cells.T
    needed = np.zeros((block.stop - block.first, block.stop - block.first), np.bool_)
    needed[x - block.first, a - block.first] = True
    needed[x - block.first, b - block.first] = True
    own = sizes[block.first : block.stop]
    num_needed = int(own @ needed @ own)
    few = offsets[stop] - offsets[first] <= 2 * TILE_FRAMES
    if few or (num_needed >= DENSE * (stop - first) ** 2 and stop - first <= MAX_SQUARE):
        items = np.arange(first, stop)
        yield slice(None), _all_pairs(first, stop, frames, offsets, distance), items, items
        return
    order = np.argsort(x, kind="stable")
    edges = np.flatnonzero(np.diff(x[order], prepend=-1, append=-1))
    for start, end in itertools.pairwise(edges):
        chosen = order[start:end]
        group = x[chosen[0]]
        columns = np.concatenate(
            [
                np.arange(groups.start[other], groups.stop[other])
                for other in np.flatnonzero(needed[group - block.first]) + block.first
            ]
        )
        rows = np.arange(groups.start[group], groups.stop[group])
        yield chosen, _to_others(rows, columns, frames, offsets, distance), rows, columns


def _all_pairs(first: int, stop: int, frames: NDArray[Any], offsets: Indices, distance: Distance) -> Floats:
    """Distances (I, I) between the items first:stop, each pair warped once."""
    bounds = offsets[first : stop + 1]
    lengths = np.diff(bounds)
    found = np.zeros((stop - first, stop - first), _precision(frames, distance))
    turned = np.zeros_like(found)
    for place, end in _tiles(bounds):
        start = bounds[place]
        products = _products(frames[start : bounds[end]], frames[start : bounds[-1]], distance)
        order = np.argsort(lengths[place:], kind="stable")
        _warp(
            products,
            distance == "angular",
            bounds[place : end + 1] - start,
            bounds[place:-1] - start,
            lengths[place:],
            order,
            True,
            found[place:end, place:],
            turned[place:end, place:],
        )
    return found + turned.T


def _to_others(rows: Indices, columns: Indices, frames: NDArray[Any], offsets: Indices, distance: Distance) -> Floats:
    """Distances (I, J) from consecutive items to any others."""
    lengths = offsets[columns + 1] - offsets[columns]
    begins = np.cumsum(lengths) - lengths
    gathered = frames[np.repeat(offsets[columns] - begins, lengths) + np.arange(lengths.sum())]
    order = np.argsort(lengths, kind="stable")
    found = np.empty((len(rows), len(columns)), _precision(frames, distance))
    turned = np.empty_like(found)
    for place, end in _tiles(offsets[rows[0] : rows[-1] + 2]):
        bounds = offsets[rows[0] + place : rows[0] + end + 1]
        products = _products(frames[bounds[0] : bounds[-1]], gathered, distance)
        is_cosine = distance == "angular"
        _warp(
            products, is_cosine, bounds - bounds[0], begins, lengths, order, False, found[place:end], turned[place:end]
        )
    return found


def _tiles(bounds: Indices) -> Iterator[tuple[int, int]]:
    """(first, stop) of items in turn, as many as have TILE_FRAMES frames together, or one."""
    place = 0
    while place < len(bounds) - 1:
        end = max(place + 1, int(np.searchsorted(bounds, bounds[place] + TILE_FRAMES, side="right")) - 1)
        yield place, end
        place = end


def _precision(frames: NDArray[Any], distance: Distance) -> np.dtype[Any]:
    """What distances are computed in."""
    return frames.dtype if distance == "angular" else np.dtype(np.float32)


def _products(x: NDArray[Any], y: NDArray[Any], distance: Distance) -> Floats:
    """Cosines, or 0 where two units are the same, else 1: (N, D), (M, D) to (N, M)."""
    if distance == "angular":
        cosines: Floats = x @ y.T
        return cosines
    different: Floats = (x[:, None] != y[None, :]).astype(np.float32)
    return different
