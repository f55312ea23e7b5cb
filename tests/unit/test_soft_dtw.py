"""Soft-DTW and its gradient: all paths, all cells, other libraries, every backend, long and short, narrow and wide."""

from __future__ import annotations

import importlib
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numba
import pysdtw
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence
from tslearn.metrics import SoftDTWLossPyTorch

from sonorant.soft_dtw import Backend, _module, cpu, soft_dtw, soft_dtw_divergence, soft_dtw_of_costs
from tests.references import soft_dtw as slow

BACKENDS: tuple[Backend, ...] = ("cpu", "plain")
SHAPES = [(7, 5), (66, 70), (1, 1), (1, 4), (130, 3), (9, 9), (64, 65), (3, 140)]
"""With sequences of one frame, and of one more or less than strips have rows."""


def make(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal values."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make_smooth(n: int, m: int, dim: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Unit vectors on a smooth course, and those of a warped and noisy version of it, in float64."""
    course = make(1, dim, max(2, n // 8), seed=seed)
    found = []
    for number, frames in enumerate((n, m)):
        z = torch.nn.functional.interpolate(course, size=frames, mode="linear")[0].T
        found.append(torch.nn.functional.normalize(z + 0.1 * make(frames, dim, seed=seed + 1 + number), dim=1))
    return found[0], found[1]


def differentiated(value_B: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Gradients of a sum in which each pair has a weight of its own."""
    return list(torch.autograd.grad((value_B * torch.arange(1, len(value_B) + 1).to(value_B)).sum(), inputs))


def leaves(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


@pytest.fixture
def threads() -> Iterator[None]:
    """Libraries that start numba's threads change the number that torch has: it is set back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------------------ exactness


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(1, 5), m=st.integers(1, 5), gamma=st.sampled_from([0.001, 0.1, 1.0, 10.0]), seed=st.integers(0, 99)
)
def test_a_value_is_of_all_paths(backend: Backend, n: int, m: int, gamma: float, seed: int) -> None:
    costs = make(n, m, seed=seed).requires_grad_()  # of either sign
    value, expected = slow.by_paths(costs.tolist(), gamma)
    found = soft_dtw_of_costs([costs], gamma, backend=backend)
    torch.testing.assert_close(found, torch.tensor([value], dtype=torch.float64))
    (gradient,) = torch.autograd.grad(found.sum(), costs)
    torch.testing.assert_close(gradient, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gamma", [0.001, 0.01, 0.1, 1.0, 10.0])
def test_ragged_pairs_against_the_recursion(backend: Backend, gamma: float) -> None:
    costs = leaves([make(n, m, seed=n).square() for n, m in SHAPES])
    values = soft_dtw_of_costs(costs, gamma, backend=backend)
    for number, (gradient, cost) in enumerate(zip(differentiated(values, costs), costs, strict=True)):
        value, expected = slow.by_cells(cost.tolist(), gamma)
        torch.testing.assert_close(values[number], torch.tensor(value, dtype=torch.float64))
        # The oracle's own recursion loses seven digits of sixteen at the lowest γ.
        wanted = (number + 1) * torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(gradient, wanted, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("radius", [1, 2, 5])
def test_a_band_is_as_if_all_else_were_forbidden(backend: Backend, radius: int) -> None:
    shapes = [(n, m) for n, m in ((5, 5), (4, 5), (5, 3), (70, 75), (140, 141), (150, 80)) if n - 1 <= radius * (m - 1)]
    costs = leaves([make(n, m, seed=n).square() for n, m in shapes])
    values = soft_dtw_of_costs(costs, 0.1, radius=radius, backend=backend)
    for number, (gradient, cost) in enumerate(zip(differentiated(values, costs), costs, strict=True)):
        oracle = slow.by_paths if len(cost) < 6 else slow.by_cells
        value, expected = oracle(cost.tolist(), 0.1, radius)
        torch.testing.assert_close(values[number], torch.tensor(value, dtype=torch.float64))
        torch.testing.assert_close(gradient, (number + 1) * torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_band_of_all_frames_is_none(backend: Backend) -> None:
    costs = [make(n, m, seed=n).square() for n, m in SHAPES]
    wide = soft_dtw_of_costs(costs, 0.1, radius=1000, backend=backend)
    assert torch.equal(wide, soft_dtw_of_costs(costs, 0.1, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_softness_it_is_dtw(backend: Backend) -> None:
    costs = [make(n, m, seed=m).square() for n, m in SHAPES]
    hard = torch.tensor([slow.by_cells(cost.tolist(), 0)[0] for cost in costs], dtype=torch.float64)
    found = soft_dtw_of_costs(costs, 1e-6, backend=backend)
    # At most γ log 3 a step is gained by softness.
    assert ((hard - found) <= 1e-6 * math.log(3) * 300).all()
    assert (found <= hard + 1e-12).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_distances_and_their_gradients_are_those_of_autograd(backend: Backend) -> None:
    xs, ys = (leaves([make(shape[side], 3, seed=side) for shape in SHAPES]) for side in (0, 1))
    whole = [(x[:, None] - y[None]).square().sum(2) for x, y in zip(xs, ys, strict=True)]
    wanted = soft_dtw_of_costs(whole, 0.1, backend=backend)
    found = soft_dtw(xs, ys, 0.1, backend=backend)
    torch.testing.assert_close(found, wanted)
    for one, other in zip(differentiated(found, xs + ys), differentiated(wanted, xs + ys), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("radius", [None, 2])
def test_gradients_are_those_of_small_steps(backend: Backend, radius: int | None) -> None:
    xs, ys = leaves([make(n, 2, seed=n) for n in (5, 3)]), leaves([make(m, 2, seed=m) for m in (4, 6)])

    def divergence(*frames: Tensor) -> Tensor:
        return soft_dtw_divergence(frames[:2], frames[2:], 0.5, radius=radius, backend=backend)

    assert torch.autograd.gradcheck(divergence, (*xs, *ys))


# ------------------------------------------------------------------------------------------------------ precision


@pytest.mark.parametrize(("n", "m", "gamma"), [(1500, 1350, 0.01), (750, 675, 0.1), (4000, 4000, 0.1)])
def test_float32_keeps_five_digits_of_the_gradient(n: int, m: int, gamma: float) -> None:
    x, y = make_smooth(n, m, 16)
    exact = soft_dtw([x], [y], gamma)
    true_costs = (2 - 2 * x @ y.T).clamp(min=0).requires_grad_()
    costs = true_costs.detach().float().requires_grad_()
    value = soft_dtw_of_costs([costs], gamma)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=0)
    # The same costs, rounded: what is measured is the recursion, not the rounding of what it is given.
    wanted = torch.autograd.grad(soft_dtw_of_costs([costs.double()], gamma).sum(), costs)[0]
    (found,) = torch.autograd.grad(value.sum(), costs)
    assert float((found - wanted).abs().sum() / wanted.abs().sum()) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_is_float64_rounded(backend: Backend) -> None:
    costs = [make(n, m, seed=n).square() for n, m in SHAPES]
    for gamma in (0.001, 0.1, 10.0):
        single, double = leaves([c.float() for c in costs]), leaves([c.float().double() for c in costs])
        found, wanted = (soft_dtw_of_costs(c, gamma, backend=backend) for c in (single, double))
        # Up to 142 logs, each off by 1e-7 γ, in a sum that may be near zero.
        torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-5 * (1 + gamma))
        for one, other in zip(differentiated(found, single), differentiated(wanted, double), strict=True):
            # A cost of 10 has steps of 1e-6, a thousandth of the lowest γ.
            torch.testing.assert_close(one.double(), other, rtol=0, atol=2e-3 if gamma < 0.01 else 1e-4)


def test_flow_is_conserved_over_1025_and_4000_frames() -> None:
    """Every path crosses every row and column: sums of E are at least one, and E is one at both corners."""
    for n, m in ((1025, 1025), (4000, 1300)):
        costs = make(n, m, dtype=torch.float32).square().requires_grad_()
        (flow,) = torch.autograd.grad(soft_dtw_of_costs([costs], 0.1).sum(), costs)
        assert flow.sum(0).min() > 1 - 1e-4
        assert flow.sum(1).min() > 1 - 1e-4
        assert float(flow.max()) < 1 + 1e-4
        torch.testing.assert_close(flow[0, 0], torch.tensor(1.0), rtol=0, atol=1e-4)


def test_the_two_backends_agree_in_the_long_run() -> None:
    costs = leaves([make(1100, 300, dtype=torch.float32).square(), make(200, 1025, dtype=torch.float32).square()])
    found, wanted = (soft_dtw_of_costs(costs, 0.1, backend=backend) for backend in BACKENDS)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    for one, other in zip(differentiated(found, costs), differentiated(wanted, costs), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_lower_it(backend: Backend) -> None:
    xs, ys = leaves([make(30, 8, dtype=torch.float32)]), leaves([make(25, 8, seed=1, dtype=torch.float32)])
    wanted = soft_dtw_divergence(xs, ys, 0.1, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        found = soft_dtw_divergence(xs, ys, 0.1, backend=backend)
        gradients = differentiated(found, xs + ys)
    assert torch.equal(found, wanted)
    assert all(map(torch.equal, gradients, differentiated(wanted, xs + ys)))


def test_half_precision_is_raised_and_given_back() -> None:
    x, y = leaves([make(30, 8).bfloat16(), make(25, 8, seed=1).bfloat16()])
    value = soft_dtw([x], [y], 0.1)
    assert torch.equal(value, soft_dtw([x.float()], [y.float()], 0.1))
    assert [gradient.dtype for gradient in differentiated(value, [x, y])] == [torch.bfloat16] * 2


# ---------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_is_its_pairs_whatever_lies_around_them(backend: Backend) -> None:
    """Alone, in any order, and out of buffers full of NaN: the very same bits."""
    xs = [make(n, 8, seed=n, dtype=torch.float32) for n in (33, 1, 130, 64)]
    ys = [make(m, 8, seed=m, dtype=torch.float32) for m in (40, 5, 90, 1)]
    buffers = [torch.full((len(z) + 7, 8), torch.nan) for z in xs + ys]
    for buffer, z in zip(buffers, xs + ys, strict=True):
        buffer[: len(z)] = z
    inside = [buffer[: len(z)] for buffer, z in zip(buffers, xs + ys, strict=True)]
    orders: dict[str, tuple[list[Tensor], list[Tensor]]] = {
        "alone": (xs, ys), "together": (xs, ys), "backwards": (xs[::-1], ys[::-1]), "padded": (inside[:4], inside[4:])
    }  # fmt: skip
    found = {}
    for name, (first, second) in orders.items():
        first, second = leaves(first), leaves(second)
        if name == "alone":
            values = torch.cat([soft_dtw([x], [y], 0.1, backend=backend) for x, y in zip(first, second, strict=True)])
        else:
            values = soft_dtw(first, second, 0.1, backend=backend)
        gradients = list(torch.autograd.grad(values.sum(), first + second))
        if name == "backwards":
            values, gradients = values.flip(0), gradients[3::-1] + gradients[:3:-1]
        found[name] = [values, *gradients]
    for name in ("together", "backwards", "padded"):
        assert all(map(torch.equal, found[name], found["alone"])), name


def test_padded_costs_are_sliced_costs() -> None:
    padded = torch.full((2, 80, 90), torch.nan)
    padded[0, :70, :66], padded[1, :80, :1] = make(70, 66).square().float(), make(80, 1).square().float()
    views, copies = [padded[0, :70, :66], padded[1, :80, :1]], leaves([padded[0, :70, :66], padded[1, :80, :1]])
    assert torch.equal(soft_dtw_of_costs(views, 0.1), soft_dtw_of_costs(copies, 0.1))


@pytest.mark.usefixtures("threads")
def test_threads_change_nothing() -> None:
    xs, ys = zip(*(make_smooth(n, m, 8) for n, m in ((90, 80), (70, 100), (64, 64))), strict=True)
    found = []
    for num_threads in (1, 3):
        torch.set_num_threads(num_threads)
        found.append(soft_dtw(xs, ys, 0.1, backend="cpu"))
        assert torch.get_num_threads() == num_threads
    assert torch.equal(*found)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_that_is_given_or_kept_is_changed(backend: Backend) -> None:
    (costs,) = leaves([make(70, 66).square()])
    before = costs.detach().clone()
    value = soft_dtw_of_costs([costs], 0.1, backend=backend)
    first, second = (torch.autograd.grad(value.sum(), costs, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(costs.detach(), before)


def test_a_partner_without_gradient_gets_none_and_changes_nothing() -> None:
    xs, ys = leaves([make(70, 4), make(1, 4)]), leaves([make(66, 4, seed=1), make(3, 4, seed=1)])
    wanted = differentiated(soft_dtw(xs, ys, 0.1), xs)
    frozen = [y.detach() for y in ys]
    assert all(map(torch.equal, differentiated(soft_dtw(xs, frozen, 0.1), xs), wanted))
    assert not soft_dtw(frozen, frozen, 0.1).requires_grad


# ------------------------------------------------------------------------------------------------- divergence


@settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 20), m=st.integers(1, 20), gamma=st.sampled_from([0.01, 0.1, 1.0]), seed=st.integers(0, 99))
def test_a_divergence_is_never_negative(n: int, m: int, gamma: float, seed: int) -> None:
    xs, ys = [make(n, 3, seed=seed)], [make(m, 3, seed=seed + 1)]
    xy, xx, yy = (soft_dtw(a, b, gamma) for a, b in ((xs, ys), (xs, xs), (ys, ys)))
    found = soft_dtw_divergence(xs, ys, gamma)
    torch.testing.assert_close(found, xy - xx / 2 - yy / 2)
    assert float(found) > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_of_a_sequence_with_itself_it_is_zero_and_so_is_its_gradient(backend: Backend) -> None:
    xs, ys = leaves([make(50, 4, dtype=torch.float32)]), leaves([make(50, 4, dtype=torch.float32)])
    value = soft_dtw_divergence(xs, ys, 0.1, backend=backend)
    assert value.tolist() == [0]
    assert soft_dtw(xs, ys, 0.1, backend=backend).tolist() < [0]
    for gradient in differentiated(value, xs + ys):
        assert float(gradient.abs().max()) < 1e-4  # E against itself turned round, both to six digits


# --------------------------------------------------------------------------------------------------- libraries


@pytest.mark.usefixtures("threads")
def test_values_and_gradients_are_those_of_pysdtw() -> None:
    """Through its packed sequences; its own recursion costs it digits, in float64 too few to matter."""
    xs, ys = leaves([make(n, 4, seed=n) for n in (30, 20, 8)]), leaves([make(m, 4, seed=m) for m in (25, 28, 8)])
    theirs = pysdtw.SoftDTW(gamma=0.1, use_cuda=False)(
        pack_sequence(xs, enforce_sorted=False), pack_sequence(ys, enforce_sorted=False)
    )
    found = soft_dtw(xs, ys, 0.1)
    torch.testing.assert_close(found, theirs, rtol=1e-6, atol=0)  # it keeps R in float32
    for one, other in zip(differentiated(found, xs + ys), differentiated(theirs, xs + ys), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3)


@pytest.mark.usefixtures("threads")
def test_values_and_gradients_are_those_of_tslearn() -> None:
    (x, y) = leaves([make(2, 30, 4), make(2, 25, 4, seed=1)])
    theirs = SoftDTWLossPyTorch(gamma=0.1)(x, y)
    found = soft_dtw(list(x), list(y), 0.1)
    torch.testing.assert_close(found, theirs, rtol=1e-6, atol=0)
    for one, other in zip(differentiated(found, [x, y]), differentiated(theirs, [x, y]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("frame", [0, 100, 199])
def test_what_is_not_finite_shows_in_its_own_pair_alone(backend: Backend, bad: float, frame: int) -> None:
    xs, ys = leaves([make(200, 4), make(150, 4)]), leaves([make(190, 4, seed=1), make(150, 4, seed=1)])
    wanted = soft_dtw(xs[1:], ys[1:], 0.1, backend=backend)
    with torch.no_grad():
        xs[0][frame] = bad
    found = soft_dtw(xs, ys, 0.1, backend=backend)
    assert found.isfinite().tolist() == [False, True]
    gradients = differentiated(found, xs + ys)
    assert torch.equal(found[1:], wanted)
    assert torch.equal(gradients[1], 2 * torch.autograd.grad(wanted.sum(), xs[1])[0])


# ------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("gamma", [0.0, -0.1, math.inf, math.nan])
def test_a_temperature_that_is_none_is_refused(gamma: float) -> None:
    with pytest.raises(ValueError, match=r"found gamma .*, wanted a positive number"):
        soft_dtw([make(3, 2)], [make(3, 2)], gamma)


def test_a_sequence_without_frames_is_refused() -> None:
    with pytest.raises(ValueError, match="found sequences of 0 and 3 frames, wanted at least 1"):
        soft_dtw([make(0, 2)], [make(3, 2)], 0.1)


@pytest.mark.parametrize(("n", "m", "least"), [(9, 9, 1), (9, 5, 2), (10, 5, 3), (5, 9, 1), (4, 1, 3), (1, 4, 1)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_band_that_misses_a_corner_is_refused(n: int, m: int, least: int, backend: Backend) -> None:
    costs = make(n, m).square()
    with pytest.raises(ValueError, match=f"found radius {least - 1} .*wanted at least their slope, {least},"):
        soft_dtw_of_costs([costs], 0.1, radius=least - 1, backend=backend)
    value, _ = slow.by_cells(costs.tolist(), 0.1, least)
    found = soft_dtw_of_costs([costs], 0.1, radius=least, backend=backend)
    torch.testing.assert_close(found, torch.tensor([value], dtype=torch.float64))


# ------------------------------------------------------------------------------------------------------ backends


def test_the_cpu_is_left_to_torch_where_numba_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _module("auto", torch.zeros(1)).__name__ == "sonorant.soft_dtw.cpu"
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert _module("auto", torch.zeros(1)).__name__ == "sonorant.soft_dtw.plain"


def test_what_cannot_be_kept_on_disk_is_compiled_all_the_same() -> None:
    """As in a read-only installation: numba finds no place for what comes from no file."""
    namespace: dict[str, Any] = {}
    exec("def double(x):\n    return 2 * x", namespace)
    with pytest.raises(RuntimeError, match="no locator available"):
        numba.njit(cache=True)(namespace["double"])
    assert cpu._compiled(namespace["double"])(4) == 8


INTERPRETED = """
import torch
from sonorant.soft_dtw import soft_dtw_of_costs

torch.manual_seed(0)
costs = [torch.rand(n, m, requires_grad=True) for n, m in ((7, 5), (36, 9), (1, 1), (1, 4), (4, 2))]
weights = torch.arange(1.0, 6.0)
for radius in (None, 5):
    found = []
    for backend in ("gpu", "plain"):
        values = soft_dtw_of_costs(costs, 0.1, radius=radius, backend=backend)
        found.append([values, *torch.autograd.grad((values * weights).sum(), costs)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-5)
"""


def test_triton_computes_what_torch_does() -> None:
    """In its interpreter, and so in another process: it leaves `triton.language` changed."""
    run = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env={**os.environ, "TRITON_INTERPRET": "1"}, timeout=120, check=False
    )
    assert run.returncode == 0


def test_triton_compiles_its_kernels_for_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """To a binary for compute capability 9.0: what an interpreter accepts a compiler may not."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # that it does compile
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    gpu = importlib.import_module("sonorant.soft_dtw.gpu")
    floats = ("costs", "above", "left", "scratch", "flow")
    types = {**dict.fromkeys(floats, "*fp32"), "shapes": "*i32", "values": "*fp64", "BLOCK": "constexpr"}
    for kernel in (gpu._forward, gpu._backward):
        signature = {name: types.get(name, "i32") for name in kernel.arg_names}
        source = ASTSource(kernel, signature, constexprs={"BLOCK": 1024})
        found = compile_kernel(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 16})
        assert "bar.sync" in found.asm["ptx"]
        assert found.asm["cubin"]
