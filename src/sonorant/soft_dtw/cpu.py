"""Soft-DTW compiled by numba: strips of 64 rows, one row a vector lane, each a column behind the one above.

At step t of a strip lane l is at column t - l. All that it reads was made a step before, so that the lanes of a step
are one vector operation after the other, with exp and log as polynomials. Pairs are shared out among as many threads
as torch has. What is held of a cell is two probabilities, those of coming from above and from the left; memory and
time of a band grow with its width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numba
import numpy as np
import torch
from numba.extending import overload
from numpy.typing import NDArray
from torch import Tensor

T = TypeVar("T")
Block = tuple[slice, slice]
"""Rows and columns of a matrix."""
NUM_LANES = 64
OUTSIDE = 1e20
"""How much more than its neighbours inside a cell is worth that no path may enter; far above any cost over γ."""
NEGLIGIBLE = 1e-30
"""An expected alignment below it is zero: products of smaller ones would be subnormal, which some machines crawl on."""


def forward(costs_BNM: Tensor, shapes: Sequence[tuple[int, int]], radius: int | None) -> tuple[Tensor, ...]:
    """Soft-DTW in units of γ from costs in units of γ: values (B,) in float64, and what `backward` needs.

    That is the band's width (-1: none) and each pair's probabilities, strip by strip.
    """
    width = -1 if radius is None else radius
    steps = [costs_BNM.new_empty(_measure(n, m, width)) for n, m in shapes]
    values = _share_out(lambda b: _forward(costs_BNM[b].numpy(), *shapes[b], width, steps[b].numpy()), len(shapes))
    return torch.tensor(values, dtype=torch.float64), torch.tensor(width), *steps


def backward(memory: Sequence[Tensor], shapes: Sequence[tuple[int, int]]) -> tuple[Tensor, list[list[Block]]]:
    """The expected alignments E (B, N, M), and the blocks of each outside of which they are zero."""
    width, *steps = memory
    flow_BNM = steps[0].new_zeros(len(shapes), *map(max, zip(*shapes, strict=True)))

    def work(b: int) -> list[Block]:
        n, m = shapes[b]
        columns = np.empty((-(-n // NUM_LANES), 2), np.int64)
        _backward(steps[b].numpy(), n, m, int(width), flow_BNM[b].numpy(), columns)
        rows = range(0, n, NUM_LANES)
        return [
            (slice(row, min(row + NUM_LANES, n)), slice(low, high))
            for row, (low, high) in zip(rows, columns.tolist(), strict=True)
        ]

    return flow_BNM, _share_out(work, len(shapes))


def _share_out(work: Callable[[int], T], count: int) -> list[T]:
    """What `work` makes of 0 … count - 1, on as many threads as torch may use.

    numba's own threads would not do: where they are OpenMP's, starting them changes the number that torch has.
    """
    num_threads = min(torch.get_num_threads(), count)
    if num_threads == 1:
        return [work(number) for number in range(count)]
    with ThreadPoolExecutor(num_threads) as pool:
        return list(pool.map(work, range(count)))


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """numba's `njit`, kept on disk where there is a place to write to: an installation may be read-only."""
    # Contracting a product and a sum into one operation is all that may be changed of the arithmetic.
    options = {"fastmath": {"contract"}, "error_model": "numpy", "nogil": True}
    try:
        return numba.njit(cache=True, **options)(function)  # type: ignore[no-any-return]
    except RuntimeError:  # numba's "no locator available"
        return numba.njit(**options)(function)  # type: ignore[no-any-return]


def _exp(x: float) -> float:
    """e^x for x ≤ 0."""
    return math.exp(x)


def _log(x: float) -> float:
    """log x for 1 ≤ x ≤ 3."""
    return math.log(x)


LOG2_E, LOG_2_HIGH, LOG_2_LOW = np.float32(1.4426950408889634), np.float32(0.693359375), np.float32(-2.12194440e-4)
ROUNDER = np.float32(1.5 * 2**23 + 127)
"""Added and taken away it rounds a small float32 to a whole k; the sum's lowest bits are k + 127, 2^k's exponent."""
LEAST = np.float32(-87)
E0, E2, E3, E4, E5, E6 = (np.float32(1 / math.factorial(n)) for n in (0, 2, 3, 4, 5, 6))
MIDDLE, LOG_MIDDLE = np.float32(math.sqrt(3)), np.float32(math.log(3) / 2)
L1, L3, L5, L7, L9, L11 = (np.float32(2 / n) for n in (1, 3, 5, 7, 9, 11))
ZERO = np.float32(0)


@overload(_exp, jit_options={"fastmath": {"contract"}}, strict=False)  # type: ignore[untyped-decorator]
def _overload_exp(x: Any) -> Callable[[Any], Any]:
    if x != numba.types.float32:
        return lambda x: math.exp(x)

    def exp(x: Any) -> Any:
        # 2^k e^r with |r| ≤ log(2) / 2, where seven terms of the series leave 2e-7.
        bounded = max(x, LEAST)
        shifted = np.float32(bounded * LOG2_E + ROUNDER)
        whole = shifted - ROUNDER
        rest = (bounded - whole * LOG_2_HIGH) - whole * LOG_2_LOW
        series = E0 + rest * (E0 + rest * (E2 + rest * (E3 + rest * (E4 + rest * (E5 + rest * E6)))))
        power = np.int32(shifted.view(np.int32) << np.int32(23)).view(np.float32)
        return series * power if x > LEAST else ZERO

    return exp


@overload(_log, jit_options={"fastmath": {"contract"}}, strict=False)  # type: ignore[untyped-decorator]
def _overload_log(x: Any) -> Callable[[Any], Any]:
    if x != numba.types.float32:
        return lambda x: math.log(x)

    def log(x: Any) -> Any:
        # log √3 + 2 artanh((x - √3) / (x + √3)), the argument below 0.27: six terms leave 6e-9.
        z = (x - MIDDLE) / (x + MIDDLE)
        z2 = z * z
        return LOG_MIDDLE + z * (L1 + z2 * (L3 + z2 * (L5 + z2 * (L7 + z2 * (L9 + z2 * L11)))))

    return log


@_compiled
def _columns(i: int, n: int, m: int, width: int) -> tuple[int, int]:
    """First column of row i that is inside, and one past its last: |i (m-1) - j (n-1)| ≤ width (m-1)."""
    if width < 0 or n == 1 or m == 1:
        return 0, m
    return max(0, -(((width - i) * (m - 1)) // (n - 1))), min(m, ((i + width) * (m - 1)) // (n - 1) + 1)


@_compiled
def _steps(first: int, n: int, m: int, width: int) -> tuple[int, int]:
    """First step of the strip whose first row is `first`, and how many there are."""
    last = min(first + NUM_LANES, n) - 1
    start = _columns(first, n, m, width)[0]
    return start, _columns(last, n, m, width)[1] + last - first - start


@_compiled
def _measure(n: int, m: int, width: int) -> int:
    """How many probabilities a pair has."""
    total = 0
    for first in range(0, n, NUM_LANES):
        total += _steps(first, n, m, width)[1]
    return total * 2 * NUM_LANES


@_compiled
def _forward(costs: NDArray[Any], n: int, m: int, width: int, steps: NDArray[Any]) -> float:
    """Write a pair's probabilities and return its value."""
    number = costs.dtype.type
    outside, zero, one = number(OUTSIDE), number(0), number(1)
    edge = np.full(m + NUM_LANES, outside)  # differences along the last row of the strip above
    before, after = np.empty(NUM_LANES + 1, costs.dtype), np.empty(NUM_LANES + 1, costs.dtype)
    rise = np.empty(NUM_LANES, costs.dtype)
    opens, closes = np.zeros(NUM_LANES, np.int32), np.zeros(NUM_LANES, np.int32)
    skewed = np.zeros((m + NUM_LANES, NUM_LANES), costs.dtype)
    value, end = 0.0, 0
    for first in range(0, n, NUM_LANES):
        start, num_steps = _steps(first, n, m, width)
        above = steps[end : end + num_steps * NUM_LANES].reshape(num_steps, NUM_LANES)
        end += num_steps * NUM_LANES
        left = steps[end : end + num_steps * NUM_LANES].reshape(num_steps, NUM_LANES)
        end += num_steps * NUM_LANES
        for lane in range(NUM_LANES):
            opens[lane] = closes[lane] = 0
            if first + lane < n:
                low, high = _columns(first + lane, n, m, width)
                opens[lane], closes[lane] = low + lane, high + lane
                for j in range(low, high):
                    skewed[j + lane - start, lane] = costs[first + lane, j]
        before[:] = outside
        rise[:] = outside
        for step in range(num_steps):
            t = np.int32(start + step)
            before[0] = edge[t]
            for lane in range(NUM_LANES):
                # R[i-1, j] and R[i, j-1], both less R[i-1, j-1].
                over, behind = before[lane], rise[lane]
                least = min(min(over, behind), zero)
                from_above, from_left = _exp(least - over), _exp(least - behind)
                total = from_above + from_left + _exp(least)
                share = one / total
                above[step, lane], left[step, lane] = from_above * share, from_left * share
                cost = skewed[step, lane] - _log(total)
                inside = (opens[lane] <= t) & (t < closes[lane])
                rise[lane] = cost + (least - over) if inside else outside
                after[lane + 1] = cost + (least - behind) if inside else outside
            if t >= NUM_LANES - 1:
                edge[t - NUM_LANES + 1] = after[NUM_LANES]
            # A value is the sum of differences along any staircase inside: here the one nearest to the straight line.
            k = first + t
            if k == 0:
                value += costs[0, 0]
            elif k < n + m - 1:
                here = (2 * k * (n - 1) + n + m - 2) // (2 * (n + m - 2))
                previous = (2 * (k - 1) * (n - 1) + n + m - 2) // (2 * (n + m - 2))
                if first <= here < first + NUM_LANES:
                    value += rise[here - first] if here > previous else after[here - first + 1]
            before, after = after, before
    return value


@_compiled
def _backward(steps: NDArray[Any], n: int, m: int, width: int, flow: NDArray[Any], columns: NDArray[np.int64]) -> None:
    """Write a pair's expected alignment where it is not zero, and in which columns of each strip that is.

    An alignment is narrow: where nothing flows in and the last two steps were empty, a strip is done.
    """
    number = steps.dtype.type
    zero, one, negligible = number(0), number(1), number(NEGLIGIBLE)
    inflow = np.zeros(m + NUM_LANES, steps.dtype)  # from the first row of the strip below
    outflow = np.zeros(m + NUM_LANES, steps.dtype)
    before, after = np.empty(NUM_LANES + 1, steps.dtype), np.empty(NUM_LANES + 1, steps.dtype)
    across, aslant = np.empty(NUM_LANES, steps.dtype), np.empty(NUM_LANES, steps.dtype)
    skewed = np.empty((m + NUM_LANES, NUM_LANES), steps.dtype)
    end = len(steps)
    for strip in range(len(columns) - 1, -1, -1):
        first = strip * NUM_LANES
        start, num_steps = _steps(first, n, m, width)
        end -= num_steps * NUM_LANES
        left = steps[end : end + num_steps * NUM_LANES].reshape(num_steps, NUM_LANES)
        end -= num_steps * NUM_LANES
        above = steps[end : end + num_steps * NUM_LANES].reshape(num_steps, NUM_LANES)
        before[:] = zero
        across[:] = zero
        aslant[:] = zero
        if strip == len(columns) - 1:
            step, inflow_starts = num_steps - 1, m
            across[n - 1 - first] = one
        else:
            filled = np.nonzero(inflow)[0]
            if not len(filled):  # only after costs that are not finite
                columns[: strip + 1] = 0
                return
            step, inflow_starts = min(num_steps - 1, filled[-1] + NUM_LANES - 1 - start), filled[0]
        begins = ends = step
        num_empty = 0
        while step >= 0 and (num_empty < 2 or start + step - NUM_LANES + 1 >= inflow_starts):
            t = start + step
            before[NUM_LANES] = inflow[t - NUM_LANES + 1] if t >= NUM_LANES - 1 else zero
            num_filled = 0
            for lane in range(NUM_LANES):
                here = before[lane + 1] + across[lane]
                here = here if here > negligible else zero
                num_filled += here > zero
                skewed[step, lane] = here
                up, back = here * above[step, lane], here * left[step, lane]
                after[lane] = up + aslant[lane]
                across[lane] = back
                aslant[lane] = max(here - up - back, zero)
            num_empty = 0 if num_filled else num_empty + 1
            outflow[t] = after[0]
            before, after = after, before
            begins = step
            step -= 1
        if start + begins:
            outflow[start + begins - 1] = aslant[0]
        columns[strip, 0], columns[strip, 1] = m, 0
        for lane in range(min(NUM_LANES, n - first)):
            low, high = _columns(first + lane, n, m, width)
            low, high = max(low, start + begins - lane), min(high, start + ends + 1 - lane)
            for j in range(low, high):
                here = skewed[j + lane - start, lane]
                flow[first + lane, j] = here
                if here > zero:
                    columns[strip, 0] = min(columns[strip, 0], j)
                    columns[strip, 1] = max(columns[strip, 1], j + 1)
        inflow, outflow = outflow, inflow
        outflow[:] = zero
