"""The stem and the positional convolutions: what torch's own convolutions give for each utterance alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sonorant.data.frames import STEM_KERNELS, STEM_STRIDES, Ragged, num_frames, pack_waves
from sonorant.models import stem as stem_module
from sonorant.models.positions import FEWEST_SPECTRAL_TAPS, WidePosition, convolve_over_time
from sonorant.models.stem import Stem
from tests.tiny import encoder_config, noise, shaken

LENGTHS = [9_999, 400, 719, 720, 5_000]
"""Samples: off the grid, and from one frame to the brink of the second."""
KINDS = [("group", False), ("layer", False), ("layer", True), ("group", True)]


def make_stem(norm: str, bias: bool = False, widths: Sequence[int] = (5, 4, 3, 4, 3, 4, 6), seed: int = 0) -> Stem:
    """Random, of different widths, in float64: what is compared is then the same up to 1e-12."""
    torch.manual_seed(seed)
    stem = Stem(widths, norm, bias).double()
    shaken(stem, seed, 0.2)
    return stem


def packed(lengths: Sequence[int]) -> Tensor:
    """Noise of so many samples each, of different loudness and offset, as float64."""
    waves = [(1 + seed) * noise(length, seed) + np.float32(seed) for seed, length in enumerate(lengths)]
    return torch.from_numpy(pack_waves(waves)).double()


def slow(stem: Stem, waves_N: Tensor, lengths: Sequence[int]) -> Tensor:
    """The stem from torch's convolutions and norms, one utterance at a time."""
    found, start = [], 0
    for length in lengths:
        x = waves_N[start : start + length][None, None]
        start += -(-length // 320) * 320
        for level, (weight, kernel, stride) in enumerate(zip(stem.weights, STEM_KERNELS, STEM_STRIDES, strict=True)):
            assert weight.shape[-1] == kernel
            x = F.conv1d(x, weight, stem.biases[level] if len(stem.biases) else None, stride)
            if level < len(stem.norms):
                norm = stem.norms[level]
                if stem.per_utterance:
                    x = F.group_norm(x, x.shape[1], norm.weight, norm.bias)
                else:
                    x = F.layer_norm(x.mT, x.shape[1:2], norm.weight, norm.bias).mT
            x = F.gelu(x)
        found.append(x[0].T)
    return torch.cat(found)


@pytest.mark.parametrize("chunk_frames", [1, 7, 4_096])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("norm", "bias"), KINDS)
def test_the_stem_and_its_gradient_are_those_of_torch(
    norm: str, bias: bool, checkpointing: bool, chunk_frames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stem_module, "CPU_CHUNK_FRAMES", chunk_frames)
    stem, waves = make_stem(norm, bias), packed(LENGTHS).requires_grad_()
    stem.checkpointing = checkpointing
    found, wanted = stem(waves, LENGTHS), slow(stem, waves, LENGTHS)
    torch.testing.assert_close(found, wanted, atol=1e-10, rtol=1e-9)
    with torch.no_grad():
        assert torch.equal(stem(waves, LENGTHS), found)
    towards = torch.randn_like(found)
    inputs = [waves, *stem.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad(found, inputs, towards), torch.autograd.grad(wanted, inputs, towards), strict=True
    ):
        # Float64 sums over about 2,000 rows; a group norm's own bias cancels, so both sides may be rounding alone.
        torch.testing.assert_close(ours, theirs, atol=1e-8, rtol=1e-7)


@pytest.mark.parametrize(("norm", "bias"), KINDS)
def test_the_stem_passes_gradcheck(norm: str, bias: bool) -> None:
    lengths = [400, 730]
    stem, waves = make_stem(norm, bias, [2] * 7), packed(lengths).requires_grad_()
    names, parameters = zip(*stem.named_parameters(), strict=True)

    def run(waves_N: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(stem, dict(zip(names, values, strict=True)), (waves_N, lengths))

    assert torch.autograd.gradcheck(run, (waves, *parameters), fast_mode=True)


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(400, 4_000), min_size=1, max_size=5), norm=st.sampled_from(["group", "layer"]))
def test_any_lengths_give_what_each_gives_alone(lengths: list[int], norm: str) -> None:
    stem, waves = make_stem(norm), packed(lengths)
    with torch.no_grad():
        found, wanted = stem(waves, lengths), slow(stem, waves, lengths)
    assert len(found) == sum(num_frames(length) for length in lengths)
    torch.testing.assert_close(found, wanted, atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("chunk_frames", [1, 6, 7, 64])
@pytest.mark.parametrize(("norm", "bias"), KINDS)
def test_inference_by_pairs_gives_what_torch_does(
    norm: str, bias: bool, chunk_frames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stem_module, "CPU_CHUNK_FRAMES", chunk_frames)
    stem, waves = make_stem(norm, bias).eval(), packed(LENGTHS)
    wanted, trained = slow(stem, waves, LENGTHS).detach(), stem.train()(waves, LENGTHS).detach()
    stem.eval().arrange()
    with torch.inference_mode():
        found = stem(waves, LENGTHS)
    assert not torch.equal(found, trained)  # the other way was taken
    torch.testing.assert_close(found, wanted, atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("inference", [False, True])
def test_float32_is_as_good_as_torch_itself(inference: bool) -> None:
    stem, waves = make_stem("group", widths=[32] * 7).eval(), packed([40_000])
    exact = slow(stem, waves, [40_000])
    single = copy.deepcopy(stem).float()
    with torch.inference_mode(inference):
        error, their_error = (
            float((found.detach().double() - exact.detach()).abs().max())
            for found in (single(waves.float(), [40_000]), slow(single, waves.float(), [40_000]))
        )
    assert error < 2 * their_error + 1e-6


def test_what_lies_in_no_utterance_has_no_say() -> None:
    stem = make_stem("group")
    waves = packed([500, 500])
    with torch.no_grad():
        before = stem(waves, [500, 500])
        waves[500:640] = 1e6
        assert torch.equal(stem(waves, [500, 500]), before)


def test_a_frozen_stem_keeps_nothing() -> None:
    stem = make_stem("layer").requires_grad_(False)
    assert not stem(packed(LENGTHS), LENGTHS).requires_grad


def test_autocast_runs_in_its_type_as_well_as_torch_does() -> None:
    stem = make_stem("group", widths=[16] * 7).float()
    waves = torch.from_numpy(pack_waves([noise(length) for length in LENGTHS]))
    with torch.autocast("cpu", torch.bfloat16):
        found, theirs = stem(waves, LENGTHS), slow(stem, waves, LENGTHS)
    found.sum().backward()
    assert found.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in stem.parameters())
    exact = slow(stem, waves, LENGTHS)
    error, their_error = ((y.detach() - exact.detach()).square().mean() for y in (found, theirs))
    assert error < 2 * their_error


# --------------------------------------------------------------------------------------------------- positions


def slow_over_time(x_FD: Tensor, frames: Ragged, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
    """torch's convolution, one utterance at a time."""
    padding = weight.shape[-1] // 2
    return torch.cat(
        [
            F.conv1d(x_FD[rows].T[None], weight, bias, padding=padding, groups=groups)[0].T[: rows.stop - rows.start]
            for rows in frames.slices()
        ]
    )


@pytest.mark.parametrize("kernel", [1, 2, 3, 6, 7, 16, 19])
def test_convolution_over_time_keeps_lengths_and_does_not_mix(kernel: int) -> None:
    frames = Ragged((4, 1, 7, 70, 2))
    x = torch.randn(frames.total, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 2, kernel, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    found, wanted = (f(x, frames, weight, bias, 2) for f in (convolve_over_time, slow_over_time))
    torch.testing.assert_close(found, wanted)
    towards = torch.randn_like(found)
    for ours, theirs in zip(
        torch.autograd.grad(found, (x, weight, bias), towards),
        torch.autograd.grad(wanted, (x, weight, bias), towards),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
    assert torch.autograd.gradcheck(
        lambda *a: convolve_over_time(a[0], frames, a[1], a[2], 2), (x, weight, bias), fast_mode=True
    )


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=4),
    kernel=st.integers(FEWEST_SPECTRAL_TAPS, 140),
    groups=st.sampled_from([1, 2, 4]),
)
def test_spectra_convolve_as_torch_does(lengths: list[int], kernel: int, groups: int) -> None:
    frames = Ragged(tuple(lengths))
    generator = torch.Generator().manual_seed(kernel)
    x, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((frames.total, 4), (4, 4 // groups, kernel), (4,))
    )
    found, wanted = (f(x, frames, weight, bias, groups) for f in (convolve_over_time, slow_over_time))
    torch.testing.assert_close(found, wanted)


def make_position() -> tuple[WidePosition, Tensor, Ragged]:
    """A wide convolution and something to convolve."""
    torch.manual_seed(0)
    config = encoder_config(position_depth=1, position_kernel=32)
    frames = Ragged((40, 3))
    return WidePosition(config), torch.randn(frames.total, config.dim), frames


def test_a_wide_kernel_sees_no_neighbour() -> None:
    position, x, frames = make_position()
    with torch.no_grad():
        before = position(x, frames)
        x[40:] = torch.inf
        assert torch.equal(position(x, frames)[:40], before[:40])


@pytest.mark.parametrize("change", ["step", "load", "swap", "replace", "unseen", "type"])
def test_a_spectrum_is_used_while_the_weights_stay(change: str) -> None:
    position, x, frames = make_position()
    with torch.inference_mode():
        before = position(x, frames)
    with torch.no_grad():
        known = position._known
        assert torch.equal(position(x, frames), before)
        assert known is not None
        assert position._known is known
        other = 2 * torch.randn_like(position.weight)
        match change:
            case "step":
                position.weight.copy_(other)
            case "load":
                position.load_state_dict({**position.state_dict(), "weight": other})
            case "swap":
                position.weight.data = other
            case "replace":
                position.weight = torch.nn.Parameter(other)
            case "unseen":
                with torch.autograd._unsafe_preserve_version_counter(position.weight):
                    position.weight.copy_(other)
            case "type":
                position, x = position.double(), x.double()
        found = position(x, frames)
    assert position._known is not known
    # Float32 sums of 32 × 8 products; the way with a gradient knows no spectrum.
    torch.testing.assert_close(found, position(x, frames), atol=1e-5, rtol=1e-5)
    assert position._known is None
    assert change == "type" or not torch.allclose(found, before, atol=1e-2)


def test_a_spectrum_made_for_inference_stays_out_of_gradients() -> None:
    position, x, frames = make_position()
    with torch.inference_mode():
        position(x, frames)
    position(x, frames).sum().backward()
    assert position.weight.grad is not None
    position.requires_grad_(False)
    # A frozen kernel passes the gradient on.
    leaf = x.clone().requires_grad_()
    position(leaf, frames).sum().backward()
    assert leaf.grad is not None
    assert float(leaf.grad.abs().sum()) > 0


def test_a_copy_takes_no_spectrum_along() -> None:
    position, x, frames = make_position()
    with torch.inference_mode():
        found = position(x, frames)
        assert torch.equal(copy.deepcopy(position)(x, frames), found)
    assert copy.deepcopy(position)._known is None
    assert position._known is not None
