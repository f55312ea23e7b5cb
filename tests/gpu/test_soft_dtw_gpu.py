"""Soft-DTW on a real GPU: Triton's kernels against float64 on the CPU, up to 4,096 frames."""

from __future__ import annotations

import pytest
import torch

from sonorant.soft_dtw import soft_dtw_divergence

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("shapes", [[(7, 5), (1, 1), (1, 9), (130, 64)], [(1025, 900), (300, 1500)], [(4096, 4096)]])
@pytest.mark.parametrize("radius", [None, 40])
@pytest.mark.parametrize("allow_tf32", [False, True])
def test_values_and_gradients_are_those_of_the_cpu(
    shapes: list[tuple[int, int]], radius: int | None, allow_tf32: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    frames = [
        torch.nn.functional.normalize(torch.randn(shape[side], 16, generator=generator).cumsum(0), dim=1)
        for side in (0, 1)
        for shape in shapes
    ]
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if allow_tf32 else "highest")
    try:
        found = {}
        for device, dtype in (("cuda", torch.float32), ("cpu", torch.float64)):
            leaves = [z.to(device, dtype).requires_grad_() for z in frames]
            value_B = soft_dtw_divergence(leaves[: len(shapes)], leaves[len(shapes) :], 0.1, radius=radius)
            gradients = torch.autograd.grad(value_B.sum(), leaves)
            found[device] = [value_B.detach().cpu().double(), torch.cat([g.cpu().double() for g in gradients])]
    finally:
        torch.set_float32_matmul_precision(precision)
    # Distances in float32 are off by 2e-7 each, and a path has as many as both sequences have frames.
    torch.testing.assert_close(found["cuda"][0], found["cpu"][0], rtol=1e-6, atol=1e-3)
    error = (found["cuda"][1] - found["cpu"][1]).abs().sum() / found["cpu"][1].abs().sum()
    assert float(error) < 1e-4
