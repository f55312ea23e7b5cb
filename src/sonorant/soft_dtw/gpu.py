# mypy: disallow_untyped_defs=False, disallow_incomplete_defs=False, disallow_untyped_decorators=False
"""Soft-DTW in Triton: one program a pair walks over its anti-diagonals, a block of rows at a time, of any length.

What a diagonal needs of those next to it goes through a small scratch in global memory, with a barrier after each.
Kernels carry no types, for Triton reads annotations as its own, and count with `while`, for its interpreter has no
`range` to a number that was loaded.

Shape suffixes: B pairs, N and M frames of the longest first and second sequence, K = N + M - 1 anti-diagonals. Cell
(i, j) lies at [k = i + j, i] of an array by diagonals.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

OUTSIDE = tl.constexpr(1e20)
"""How much more than its neighbours inside a cell is worth that no path may enter; far above any cost over γ."""
MOST_ROWS = 1024
"""Of a block."""


def forward(costs_BNM: Tensor, shapes: Sequence[tuple[int, int]], radius: int | None) -> tuple[Tensor, ...]:
    """Soft-DTW in units of γ from costs in units of γ: values (B,) in float64, and what `backward` needs.

    That is the probabilities of a path into a cell to come from above and from the left, (2, B, K, N), and the width
    of the band.
    """
    size, num_rows, num_columns = costs_BNM.shape
    width = num_rows if radius is None else min(radius, num_rows)
    shapes_B2 = torch.tensor(shapes, dtype=torch.int32, device=costs_BNM.device)
    steps_2BKN = costs_BNM.new_empty(2, size, num_rows + num_columns - 1, num_rows)
    scratch = costs_BNM.new_empty(size, 2, 2, num_rows)
    values_B = costs_BNM.new_empty(size, dtype=torch.float64)
    _forward[(size,)](
        costs_BNM, shapes_B2, width, *steps_2BKN, scratch, values_B, num_rows, num_columns, **_block(num_rows)
    )
    return values_B, steps_2BKN, torch.tensor(width)


def backward(
    memory: Sequence[Tensor], shapes: Sequence[tuple[int, int]]
) -> tuple[Tensor, list[list[tuple[slice, slice]]]]:
    """The expected alignments E (B, N, M), and the blocks of each outside of which they are zero: all its cells."""
    steps_2BKN, width = memory
    shapes_B2 = torch.tensor(shapes, dtype=torch.int32, device=steps_2BKN.device)
    _, size, num_diagonals, num_rows = steps_2BKN.shape
    num_columns = num_diagonals - num_rows + 1
    flow_BNM = steps_2BKN.new_zeros(size, num_rows, num_columns)
    scratch = steps_2BKN.new_empty(size, 3, num_rows)
    _backward[(size,)](*steps_2BKN, shapes_B2, int(width), scratch, flow_BNM, num_rows, num_columns, **_block(num_rows))
    return flow_BNM, [[(slice(n), slice(m))] for n, m in shapes]


def _block(num_rows: int) -> dict[str, int]:
    """How many rows a program takes at a time, and how many warps it has."""
    rows = min(MOST_ROWS, max(32, triton.next_power_of_2(num_rows)))
    return {"BLOCK": rows, "num_warps": max(1, rows // 64)}


@triton.jit
def _is_inside(i, j, n, m, width):
    """Whether a cell is of the matrix and of the band, |i (m-1) - j (n-1)| ≤ width (m-1)."""
    off = tl.abs(i * (m - 1) - j * (n - 1))
    return (i >= 0) & (i < n) & (j >= 0) & (j < m) & (off <= width * tl.maximum(m - 1, 1))


@triton.jit
def _rows(k, n, m, width):
    """First row of a diagonal that may be inside, and one past its last."""
    span = tl.maximum(n + m - 2, 1)
    reach = width * tl.maximum(m - 1, 1)
    low = (tl.maximum(k * (n - 1) - reach, 0) + span - 1) // span
    high = (k * (n - 1) + reach) // span
    return tl.maximum(low, k - m + 1), tl.minimum(tl.minimum(high, k), n - 1) + 1


@triton.jit
def _forward(
    costs, shapes, width, above, left, scratch, values, N, M,
    BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    n, m = tl.load(shapes + 2 * b), tl.load(shapes + 2 * b + 1)
    costs += b * N * M
    above += b * (N + M - 1) * N
    left += b * (N + M - 1) * N
    scratch += b * 4 * N
    lanes = tl.arange(0, BLOCK)
    value = tl.zeros([BLOCK], tl.float64)
    k = 0
    while k < n + m - 1:
        # The cell of the staircase nearest to the straight line: the sum of differences along it is the value.
        span = tl.maximum(n + m - 2, 1)
        here = (2 * k * (n - 1) + span) // (2 * span)
        is_down = here > (2 * (k - 1) * (n - 1) + span) // (2 * span)
        now, then = scratch + (k % 2) * 2 * N, scratch + ((k + 1) % 2) * 2 * N
        start, last = _rows(k, n, m, width)
        while start < last:
            i = start + lanes
            j = k - i
            inside = _is_inside(i, j, n, m, width) & (i < last)
            over = tl.load(then + N + i - 1, mask=inside & _is_inside(i - 1, j, n, m, width), other=OUTSIDE)
            behind = tl.load(then + i, mask=inside & _is_inside(i, j - 1, n, m, width), other=OUTSIDE)
            cost = tl.load(costs + i * M + j, mask=inside, other=0)
            least = tl.minimum(tl.minimum(over, behind), 0)
            from_above, from_left = tl.exp(least - over), tl.exp(least - behind)
            total = from_above + from_left + tl.exp(least)
            tl.store(above + k * N + i, from_above / total, mask=inside)
            tl.store(left + k * N + i, from_left / total, mask=inside)
            rise = cost - tl.log(total) + (least - over)
            run = cost - tl.log(total) + (least - behind)
            tl.store(now + i, rise, mask=inside)
            tl.store(now + N + i, run, mask=inside)
            step = tl.where(k == 0, cost, tl.where(is_down, rise, run))
            value += tl.where(inside & (i == here), step, 0).to(tl.float64)
            start += BLOCK
        tl.debug_barrier()
        k += 1
    tl.store(values + b, tl.sum(value, 0))


@triton.jit
def _backward(above, left, shapes, width, scratch, flow, N, M, BLOCK: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    n, m = tl.load(shapes + 2 * b), tl.load(shapes + 2 * b + 1)
    above += b * (N + M - 1) * N
    left += b * (N + M - 1) * N
    scratch += b * 3 * N
    flow += b * N * M
    lanes = tl.arange(0, BLOCK)
    k = n + m - 2
    while k >= 0:
        start, last = _rows(k, n, m, width)
        while start < last:
            i = start + lanes
            j = k - i
            inside = _is_inside(i, j, n, m, width) & (i < last)
            is_below = inside & _is_inside(i + 1, j, n, m, width)
            is_right = inside & _is_inside(i, j + 1, n, m, width)
            is_aslant = inside & _is_inside(i + 1, j + 1, n, m, width)
            next_one, next_two = scratch + ((k + 1) % 3) * N, scratch + ((k + 2) % 3) * N
            below = tl.load(next_one + i + 1, mask=is_below, other=0)
            below *= tl.load(above + (k + 1) * N + i + 1, mask=is_below, other=0)
            right = tl.load(next_one + i, mask=is_right, other=0)
            right *= tl.load(left + (k + 1) * N + i, mask=is_right, other=0)
            # The three probabilities of a cell sum to one.
            share = 1 - tl.load(above + (k + 2) * N + i + 1, mask=is_aslant, other=1)
            share -= tl.load(left + (k + 2) * N + i + 1, mask=is_aslant, other=0)
            aslant = tl.load(next_two + i + 1, mask=is_aslant, other=0) * tl.maximum(share, 0)
            here = tl.where(k == n + m - 2, 1.0, below + right + aslant)
            tl.store(scratch + (k % 3) * N + i, here, mask=inside)
            tl.store(flow + i * M + j, here, mask=inside)
            start += BLOCK
        tl.debug_barrier()
        k -= 1
