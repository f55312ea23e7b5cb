"""Soft-DTW in plain torch, one anti-diagonal after the other: for any device, and what the other two are held to.

Shape suffixes: B pairs, N and M frames of the longest first and second sequence, K = N + M - 1 anti-diagonals. Cell
(i, j) lies at [k = i + j, i] of an array by diagonals.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

OUTSIDE = 1e20
"""How much more than its neighbours inside a cell is worth that no path may enter; far above any cost over γ."""


def forward(costs_BNM: Tensor, shapes: Sequence[tuple[int, int]], radius: int | None) -> tuple[Tensor, Tensor]:
    """Soft-DTW in units of γ from costs in units of γ: values (B,) in float64, and what `backward` needs.

    That is the probabilities of a path into a cell to come from above and from the left, (K, B, N, 2).
    """
    inside_KBN, down_KB, row_KB = _geometry(shapes, costs_BNM, radius)
    last_B = torch.tensor([n + m - 2 for n, m in shapes], device=costs_BNM.device)
    costs_KBN = torch.where(inside_KBN, _by_diagonals(costs_BNM), 0)
    steps_KBN2 = costs_BNM.new_empty(*costs_KBN.shape, 2)
    outside = costs_BNM.new_full((), OUTSIDE)
    up_BN = left_BN = outside.expand(costs_KBN.shape[1:])
    zero = torch.zeros_like(outside)
    parts = [costs_KBN[0, :, 0]]
    for k, costs_BN in enumerate(costs_KBN):
        # The differences of the cells above (R[i-1, j] - R[i-1, j-1]) and to the left (R[i, j-1] - R[i-1, j-1]).
        above_BN = F.pad(left_BN[:, :-1], (1, 0), value=OUTSIDE)
        least_BN = torch.minimum(torch.minimum(above_BN, up_BN), zero)
        from_above_BN, from_left_BN = (least_BN - above_BN).exp(), (least_BN - up_BN).exp()
        sum_BN = least_BN.exp() + from_above_BN + from_left_BN
        torch.stack([from_above_BN / sum_BN, from_left_BN / sum_BN], dim=-1, out=steps_KBN2[k])
        costs_BN = costs_BN - sum_BN.log()
        left_BN, up_BN = (
            torch.where(inside_KBN[k], costs_BN + (least_BN - up_BN), outside),
            torch.where(inside_KBN[k], costs_BN + (least_BN - above_BN), outside),
        )
        if k:
            # A value is the sum of differences along any staircase inside: here the one nearest to the straight line.
            step_B = torch.where(down_KB[k, :, None], up_BN, left_BN).gather(1, row_KB[k, :, None])[:, 0]
            parts.append(torch.where(k <= last_B, step_B, 0))
    # Not every device has float64.
    return torch.stack(parts).cpu().double().sum(0), steps_KBN2


def backward(
    memory: Sequence[Tensor], shapes: Sequence[tuple[int, int]]
) -> tuple[Tensor, list[list[tuple[slice, slice]]]]:
    """The expected alignments E (B, N, M), and the blocks of each outside of which they are zero: all its cells."""
    (steps_KBN2,) = memory
    num_diagonals, size, num_rows, _ = steps_KBN2.shape
    flow_KBN = steps_KBN2.new_zeros(num_diagonals + 2, size, num_rows + 1)
    for b, (n, m) in enumerate(shapes):
        flow_KBN[n + m - 2, b, n - 1] = 1
    above_KBN, left_KBN = steps_KBN2.unbind(-1)
    # From above, left and the diagonal they sum to one.
    diagonal_KBN = (1 - above_KBN - left_KBN).clamp_(min=0)
    for k in range(num_diagonals - 2, -1, -1):
        flow_BN = flow_KBN[k, :, :-1]
        flow_BN += left_KBN[k + 1] * flow_KBN[k + 1, :, :-1]
        flow_BN[:, :-1] += above_KBN[k + 1, :, 1:] * flow_KBN[k + 1, :, 1:-1]
        if k + 2 < num_diagonals:
            flow_BN[:, :-1] += diagonal_KBN[k + 2, :, 1:] * flow_KBN[k + 2, :, 1:-1]
    return _by_rows(flow_KBN[:num_diagonals, :, :-1]), [[(slice(n), slice(m))] for n, m in shapes]


def _geometry(shapes: Sequence[tuple[int, int]], like_BNM: Tensor, radius: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Which cells are inside (K, B, N); each diagonal's cell of the staircase: reached from above? its row (K, B)."""
    _, num_rows, num_columns = like_BNM.shape
    n_B, m_B = torch.tensor(shapes, device=like_BNM.device).unbind(1)
    k_K = torch.arange(num_rows + num_columns - 1, device=like_BNM.device)
    i_N = torch.arange(num_rows, device=like_BNM.device)
    j_KBN = (k_K[:, None] - i_N)[:, None]
    n_B1, m_B1 = n_B[:, None], m_B[:, None]
    inside_KBN = (j_KBN >= 0) & (j_KBN < m_B1) & (i_N < n_B1)
    if radius is not None:
        # In whole numbers: |i - j (n-1)/(m-1)| ≤ radius.
        inside_KBN &= (i_N * (m_B1 - 1) - j_KBN * (n_B1 - 1)).abs() <= radius * (m_B1 - 1).clamp(min=1)
    last_B = n_B + m_B - 2
    row_KB = (2 * k_K[:, None] * (n_B - 1) + last_B) // (2 * last_B).clamp(min=1)
    down_KB = row_KB > row_KB.roll(1, 0)
    return inside_KBN, down_KB, row_KB.clamp(max=num_rows - 1)


def _by_diagonals(x_BNM: Tensor) -> Tensor:
    """(B, N, M) to (K, B, N); what lies on no row is 0."""
    size, num_rows, num_columns = x_BNM.shape
    num_diagonals = num_rows + num_columns - 1
    flat = F.pad(x_BNM, (0, num_rows)).flatten(1)[:, : num_rows * num_diagonals]
    return flat.reshape(size, num_rows, num_diagonals).permute(2, 0, 1).contiguous()


def _by_rows(x_KBN: Tensor) -> Tensor:
    """(K, B, N) to (B, N, M): what `_by_diagonals` turned round."""
    num_diagonals, size, num_rows = x_KBN.shape
    flat = F.pad(x_KBN.permute(1, 2, 0).flatten(1), (0, num_rows))
    return flat.reshape(size, num_rows, num_diagonals + 1)[:, :, : num_diagonals - num_rows + 1]
