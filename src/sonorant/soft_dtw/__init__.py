"""Soft-DTW: how far apart two sequences are over all monotone alignments, with its gradient (Cuturi and Blondel, 2017).

    parts = z_FD.split(lengths)  # frames of several utterances end to end
    loss_B = soft_dtw_divergence(parts[0::2], parts[1::2], gamma=0.1)

    R[i, j] = C[i, j] + min^γ(R[i-1, j-1], R[i-1, j], R[i, j-1]),   min^γ(a) = -γ log Σ exp(-a / γ)

Two choices make it exact in float32. Only differences of neighbouring R are ever held, R[i, j] - R[i-1, j] and
R[i, j] - R[i, j-1]: R itself grows with the path and would lose the digits that γ asks for. And the gradient
E = ∂R[n, m]/∂C, the expected alignment, flows back by the probabilities of the three steps into a cell (Mensch and
Blondel, 2018), which sum to one, not by exponentials of differences of R.

`cpu` (numba), `gpu` (Triton) and `plain` (torch) compute the same; costs are given to them in units of γ.

Shape suffixes: B pairs, N and M frames of the longest first and second sequence, D features, F frames end to end.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["Backend", "soft_dtw", "soft_dtw_divergence", "soft_dtw_of_costs"]

Backend = Literal["auto", "cpu", "gpu", "plain"]
"""Which code computes: numba, Triton, torch; "auto" is the fastest that is installed for the tensors' device."""


def soft_dtw(
    xs: Sequence[Tensor], ys: Sequence[Tensor], gamma: float, *, radius: int | None = None, backend: Backend = "auto"
) -> Tensor:
    """Soft-DTW of pairs of sequences under the squared Euclidean distance: (B,).

    `xs` are B sequences (n, D) and `ys` their B partners (m, D), each as long as it is: there is no padding. `gamma`
    is the temperature of the minimum. With a `radius` a path stays within so many frames of the straight line between
    the corners, |i - j (n-1)/(m-1)| ≤ radius. It computes in float64 where all sequences are that, else in float32,
    under autocast too. Without numba, sequences on the CPU are left to torch.

    ValueError where `gamma` is not positive, a sequence has no frame, or a radius is too small to join the corners.
    """
    assert len(xs) == len(ys) > 0, f"found {len(xs)} and {len(ys)} sequences"
    assert all(z.ndim == 2 and z.shape[1] == xs[0].shape[1] for z in (*xs, *ys)), "wanted sequences (n, D) of one D"
    _check([(len(x), len(y)) for x, y in zip(xs, ys, strict=True)], gamma, radius)
    module = _module(backend, xs[0])
    values_B: Tensor = _OfFrames.apply(gamma, radius, module, *_raised([*xs, *ys]))  # type: ignore[no-untyped-call]
    return values_B


def soft_dtw_divergence(
    xs: Sequence[Tensor], ys: Sequence[Tensor], gamma: float, *, radius: int | None = None, backend: Backend = "auto"
) -> Tensor:
    """Soft-DTW of x and y less the mean of those of either with itself: (B,); 0 at x = y (Blondel et al., 2021).

    All three are one batch, and gradients run through all three. Arguments and errors are those of `soft_dtw`.
    """
    xs, ys = list(xs), list(ys)
    xy_B, xx_B, yy_B = soft_dtw(xs + xs + ys, ys + xs + ys, gamma, radius=radius, backend=backend).chunk(3)
    return xy_B - (xx_B + yy_B) / 2


def soft_dtw_of_costs(
    costs: Sequence[Tensor], gamma: float, *, radius: int | None = None, backend: Backend = "auto"
) -> Tensor:
    """Soft-DTW of pairs from any finite costs, B matrices (n, m): (B,). Otherwise as `soft_dtw`."""
    assert len(costs) > 0, "found no costs"
    assert all(c.ndim == 2 for c in costs), "wanted costs (n, m)"
    _check([(c.shape[0], c.shape[1]) for c in costs], gamma, radius)
    module = _module(backend, costs[0])
    values_B: Tensor = _OfCosts.apply(gamma, radius, module, *_raised(costs))  # type: ignore[no-untyped-call]
    return values_B


def _check(shapes: Sequence[tuple[int, int]], gamma: float, radius: int | None) -> None:
    """ValueError where soft-DTW of pairs of so many frames is not defined."""
    if not (math.isfinite(gamma) and gamma > 0):
        raise ValueError(f"soft-DTW: found gamma {gamma}, wanted a positive number: 0.1 suits unit vectors")
    for n, m in shapes:
        if n < 1 or m < 1:
            raise ValueError(f"soft-DTW: found sequences of {n} and {m} frames, wanted at least 1: leave them out")
        slope = max(1, -(-(n - 1) // max(m - 1, 1)))
        if radius is not None and radius < slope:
            raise ValueError(
                f"soft-DTW: found radius {radius} for sequences of {n} and {m} frames, wanted at least their slope, "
                f"{slope}, for a path to reach both corners: widen it"
            )


def _raised(tensors: Sequence[Tensor]) -> list[Tensor]:
    """All in float64 where all are, else in float32."""
    dtype = torch.float64 if all(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    return [tensor.to(dtype) for tensor in tensors]


def _module(backend: Backend, like: Tensor) -> ModuleType:
    """The module that computes where `like` lies."""
    if backend == "auto":
        device = like.device.type
        backend = "plain"
        if device == "cpu" and importlib.util.find_spec("numba"):
            backend = "cpu"
        elif device == "cuda" and importlib.util.find_spec("triton"):
            backend = "gpu"
    return importlib.import_module(f"{__name__}.{backend}")


@contextlib.contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Matrix products in full float32, whatever autocast and TF32 are set to: distances are differences."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


class _OfCosts(torch.autograd.Function):
    """From costs to values."""

    @staticmethod
    def forward(ctx: Any, gamma: float, radius: int | None, module: ModuleType, *costs: Tensor) -> Tensor:
        ctx.module, ctx.shapes = module, [tuple(cost.shape) for cost in costs]
        costs_BNM = costs[0].new_empty(len(costs), *map(max, zip(*ctx.shapes, strict=True)))
        for b, cost_NM in enumerate(costs):
            torch.div(cost_NM, gamma, out=costs_BNM[b, : len(cost_NM), : cost_NM.shape[1]])
        values_B, *memory = module.forward(costs_BNM, ctx.shapes, radius)
        ctx.save_for_backward(*memory)
        result_B: Tensor = (values_B * gamma).to(costs_BNM)
        return result_B

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_B,) = gradients
        flow_BNM, _ = ctx.module.backward(ctx.saved_tensors, ctx.shapes)
        flows = [gradient_B[b] * flow_BNM[b, :n, :m] for b, (n, m) in enumerate(ctx.shapes)]
        return None, None, None, *flows


class _OfFrames(torch.autograd.Function):
    """From sequences, all first ones and then all second ones, to values."""

    @staticmethod
    def forward(ctx: Any, gamma: float, radius: int | None, module: ModuleType, *frames: Tensor) -> Tensor:
        xs, ys = frames[: len(frames) // 2], frames[len(frames) // 2 :]
        ctx.module, ctx.shapes = module, [(len(x), len(y)) for x, y in zip(xs, ys, strict=True)]
        costs_BNM = xs[0].new_empty(len(xs), *map(max, zip(*ctx.shapes, strict=True)))
        with _full_precision(costs_BNM.device):
            for b, (n, m) in enumerate(ctx.shapes):
                _write_distances(xs[b], ys[b], gamma, costs_BNM[b, :n, :m])
        values_B, *memory = module.forward(costs_BNM, ctx.shapes, radius)
        ctx.save_for_backward(*frames, *memory)
        result_B: Tensor = (values_B * gamma).to(costs_BNM)
        return result_B

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_B,) = gradients
        size = len(ctx.shapes)
        frames, memory = ctx.saved_tensors[: 2 * size], ctx.saved_tensors[2 * size :]
        flow_BNM, blocks = ctx.module.backward(memory, ctx.shapes)
        results = [torch.zeros_like(z) if ctx.needs_input_grad[3 + k] else None for k, z in enumerate(frames)]
        with _full_precision(flow_BNM.device):
            for b, pair in enumerate(blocks):
                for rows, columns in pair:
                    flow_NM = flow_BNM[b, rows, columns]
                    for own, here, other, there, flow in (
                        (b, rows, size + b, columns, flow_NM),
                        (size + b, columns, b, rows, flow_NM.T),
                    ):
                        if (result := results[own]) is not None:
                            _pull(flow, frames[own][here], frames[other][there], result[here])
        for number, result in enumerate(results):
            if result is not None:
                result *= 2 * gradient_B[number % size]
        return None, None, None, *results


def _write_distances(x_ND: Tensor, y_MD: Tensor, gamma: float, out_NM: Tensor) -> None:
    """Squared Euclidean distances over γ: |x|² + |y|² - 2 x·y."""
    xx_N1, yy_M = x_ND.square().sum(1, keepdim=True), y_MD.square().sum(1)
    torch.addmm(yy_M, x_ND, y_MD.T, beta=1 / gamma, alpha=-2 / gamma, out=out_NM)
    out_NM.add_(xx_N1, alpha=1 / gamma).clamp_(min=0)


def _pull(flow_NM: Tensor, x_ND: Tensor, y_MD: Tensor, out_ND: Tensor) -> None:
    """Add Σ_j E_ij (x_i - y_j), half of the gradient with respect to x."""
    out_ND.addcmul_(flow_NM.sum(1, keepdim=True), x_ND).addmm_(flow_NM, y_MD, alpha=-1)
