"""Where a frame stands, told by what surrounds it: convolutions over packed batches.

All but the narrowest kernels are applied by overlap-save: blocks of an utterance are transformed, multiplied by the
kernel's spectrum and transformed back.

Shapes: F frames, D model width, G groups, I channels in and O out of a group, K kernel taps, B blocks, S samples of a
block, W frequencies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sonorant.config import EncoderConfig
from sonorant.data.frames import Ragged

FEWEST_SPECTRAL_TAPS = 16
"""Kernels from here on are faster by way of their spectrum: measured (LOG.md)."""


class WidePosition(nn.Module):
    """Where a frame stands, told by what surrounds it: one wide weight-normalised convolution (HuBERT)."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.groups = config.position_groups
        shape = (config.dim, config.dim // config.position_groups, config.position_kernel)
        self.weight = nn.Parameter(
            nn.init.normal_(torch.empty(shape), std=2 / (config.position_kernel * config.dim) ** 0.5)
        )
        self.magnitude = nn.Parameter(self.weight.detach().norm(dim=(0, 1), keepdim=True))
        self.bias = nn.Parameter(torch.zeros(config.dim))
        self._known: Known | None = None

    def forward(self, x_FD: Tensor, frames: Ragged) -> Tensor:
        """(F, D) to (F, D); no utterance sees another."""
        parameters = (self.weight, self.magnitude)
        trained = torch.is_grad_enabled() and any(t.requires_grad for t in (x_FD, *parameters))
        kernel = self.weight.shape[-1]
        if trained or kernel < FEWEST_SPECTRAL_TAPS or any(parameter.is_inference() for parameter in parameters):
            self._known = None
            return F.gelu(convolve_over_time(x_FD, frames, self._normed(), self.bias, self.groups))
        x32_FD, blocks = x_FD.to(spectral_dtype(x_FD)), Blocks.of(frames, kernel)
        if self._known is None or not self._known.holds(parameters, x32_FD.dtype):
            # Made outside inference mode, so that it serves whatever mode comes next.
            with torch.inference_mode(False), torch.no_grad():
                weight = self._normed().to(x32_FD.dtype)
                self._known = Known.of(parameters, kernel_spectrum(weight, self.groups, blocks.size))
        with torch.autocast(x_FD.device.type, enabled=False):
            y_FD, _ = convolve_spectra(x32_FD, self._known.spectrum, blocks)
        return F.gelu(y_FD + self.bias).to(x_FD.dtype)

    def __getstate__(self) -> dict[str, Any]:
        """Without the spectrum: a copy makes its own."""
        return {**self.__dict__, "_known": None}

    def _normed(self) -> Tensor:
        scale: Tensor = self.magnitude / self.weight.norm(dim=(0, 1), keepdim=True)
        return self.weight * scale


@dataclass(frozen=True)
class Known:
    """A spectrum and the state of the parameters it was made from.

    Their memory is held, so that no other can take its address. `samples` are some of their numbers, for FSDP fills
    the same memory with new ones and counts no version: an update changes them all.
    """

    sources: tuple[Tensor, ...]
    versions: tuple[int, ...]
    samples: tuple[Tensor, ...]
    spectrum: Tensor

    @classmethod
    def of(cls, parameters: tuple[Tensor, ...], spectrum: Tensor) -> Known:
        """As they are now."""
        sources = tuple(parameter.detach() for parameter in parameters)
        versions = tuple(parameter._version for parameter in parameters)
        return cls(sources, versions, tuple(sample(parameter).clone() for parameter in sources), spectrum)

    def holds(self, parameters: tuple[Tensor, ...], dtype: torch.dtype) -> bool:
        """Whether the parameters are still the same and the spectrum is wanted in its type."""
        return self.spectrum.real.dtype == dtype and all(
            source.data_ptr() == now.data_ptr()
            and source.dtype == now.dtype
            and source.device == now.device
            and version == now._version
            and torch.equal(known, sample(now))
            for source, version, known, now in zip(self.sources, self.versions, self.samples, parameters, strict=True)
        )


def sample(parameter: Tensor) -> Tensor:
    """A view of the weights of a few output channels."""
    return parameter[:: 1 + len(parameter) // 16]


class StackedPosition(nn.Module):
    """The same from several narrow convolutions, each followed by a norm without parameters (data2vec)."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.groups = config.position_groups
        layers = [
            nn.Conv1d(config.dim, config.dim, config.position_kernel, groups=self.groups)
            for _ in range(config.position_depth)
        ]
        self.weights = nn.ParameterList(layer.weight for layer in layers)
        self.biases = nn.ParameterList(layer.bias for layer in layers)

    def forward(self, x_FD: Tensor, frames: Ragged) -> Tensor:
        """(F, D) to (F, D); no utterance sees another."""
        for weight, bias in zip(self.weights, self.biases, strict=True):
            x_FD = convolve_over_time(x_FD, frames, weight, bias, self.groups)
            x_FD = F.gelu(F.layer_norm(x_FD, x_FD.shape[-1:]))
        return x_FD


def convolve_over_time(x_FD: Tensor, frames: Ragged, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
    """Grouped convolution that keeps each utterance's length: (F, D) to (F, D)."""
    if weight.shape[-1] >= FEWEST_SPECTRAL_TAPS:
        dtype = spectral_dtype(x_FD)
        with torch.autocast(x_FD.device.type, enabled=False):
            y_FD: Tensor = SpectralConvolution.apply(  # type: ignore[no-untyped-call]
                x_FD.to(dtype), weight.to(dtype), Blocks.of(frames, weight.shape[-1]), groups
            )
            return (y_FD + bias).to(x_FD.dtype)
    # Utterances stand apart by half a kernel of zeros, which is the padding each would have had alone.
    gap = weight.shape[-1] // 2
    places = zip(frames.offsets, frames.lengths, strict=True)
    rows = np.concatenate([offset + gap * i + np.arange(length) for i, (offset, length) in enumerate(places)])
    index = torch.from_numpy(rows).to(x_FD.device)
    spaced = x_FD.new_zeros(frames.total + gap * (len(frames.lengths) - 1), x_FD.shape[1]).index_copy(0, index, x_FD)
    return F.conv1d(spaced.T[None], weight, bias, padding=gap, groups=groups)[0].T[index]


# ------------------------------------------------------------------------------------------------- overlap-save


@dataclass(frozen=True)
class Blocks:
    """How utterances are cut: each block belongs to one.

    size: rows of a block; inputs: for each, the frames it sees and where in it they lie; outputs: the frames it makes.
    """

    size: int
    inputs: list[tuple[slice, slice]]
    outputs: list[slice]

    @classmethod
    def of(cls, frames: Ragged, kernel: int) -> Blocks:
        """Blocks of two kernels, rounded up to a power of two: longer ones are fewer, but their spectra larger."""
        size = 1 << (2 * kernel - 1).bit_length()
        hop, before = size - kernel + 1, kernel // 2
        inputs, outputs = [], []
        for offset, length in zip(frames.offsets, frames.lengths, strict=True):
            for start in range(0, length, hop):
                first, stop = max(0, start - before), min(length, start - before + size)
                inside = first - (start - before)
                inputs.append((slice(offset + first, offset + stop), slice(inside, inside + stop - first)))
                outputs.append(slice(offset + start, offset + min(length, start + hop)))
        return cls(size, inputs, outputs)

    def cut(self, x_FD: Tensor) -> Tensor:
        """What each block sees, 0 beyond its utterance: (F, D) to (B, S, D)."""
        x_BSD = x_FD.new_zeros(len(self.inputs), self.size, x_FD.shape[1])
        for block_SD, (rows, places) in zip(x_BSD, self.inputs, strict=True):
            block_SD[places] = x_FD[rows]
        return x_BSD


def spectral_dtype(x: Tensor) -> torch.dtype:
    """What a transform takes: at least float32."""
    return torch.promote_types(x.dtype, torch.float32)


def kernel_spectrum(weight_DIK: Tensor, groups: int, size: int) -> Tensor:
    """Of a grouped convolution's weights: (W, G, I, O), complex."""
    weight_GIOK = weight_DIK.reshape(groups, -1, *weight_DIK.shape[1:]).transpose(1, 2)
    shape = (size // 2 + 1, *weight_GIOK.shape[:3])
    spectrum_WGIO = torch.empty(shape, dtype=weight_DIK.dtype.to_complex(), device=weight_DIK.device)
    # Group by group, so that what is turned around lies in the cache.
    for group, weight_IOK in enumerate(weight_GIOK):
        spectrum_WGIO[:, group] = torch.fft.rfft(weight_IOK, size).permute(2, 0, 1)
    return spectrum_WGIO


def by_group(spectra_BWD: Tensor, groups: int) -> Tensor:
    """(B, W, D) as a batch of matrices (W · G, B, I), a view."""
    count, num_frequencies, width = spectra_BWD.shape
    return spectra_BWD.reshape(count, num_frequencies * groups, width // groups).transpose(0, 1)


def from_groups(spectra: Tensor, size: int, groups: int) -> Tensor:
    """(W · G, B, O) back in time: (B, S, D)."""
    spectra_BWD = spectra.view(-1, groups, *spectra.shape[1:]).permute(2, 0, 1, 3).flatten(2)
    x_BSD: Tensor = torch.fft.irfft(spectra_BWD, size, dim=1)
    return x_BSD


def convolve_spectra(x_FD: Tensor, spectrum_WGIO: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """y[t] = Σ_k w[k] x[t + k - K // 2] within each utterance: (F, D), and the blocks' conjugate spectra."""
    groups = spectrum_WGIO.shape[1]
    x_spectra = by_group(torch.fft.rfft(blocks.cut(x_FD), dim=1).conj_physical_(), groups)
    # X · conj(W), and the conjugate is taken of whatever is small.
    y_spectra = (x_spectra @ spectrum_WGIO.flatten(0, 1)).conj_physical_()
    y_BSD = from_groups(y_spectra, blocks.size, groups)
    kept = [y_SD[: rows.stop - rows.start] for y_SD, rows in zip(y_BSD, blocks.outputs, strict=True)]
    return torch.cat(kept), x_spectra


class SpectralConvolution(torch.autograd.Function):
    """`convolve_spectra` with a gradient."""

    @staticmethod
    def forward(ctx: Any, x_FD: Tensor, weight_DIK: Tensor, blocks: Blocks, groups: int) -> Tensor:
        """(F, D) and (D, I, K) to (F, D)."""
        spectrum_WGIO = kernel_spectrum(weight_DIK, groups, blocks.size)
        y_FD, x_spectra = convolve_spectra(x_FD, spectrum_WGIO, blocks)
        ctx.save_for_backward(spectrum_WGIO, x_spectra)
        ctx.blocks, ctx.kernel = blocks, weight_DIK.shape[-1]
        return y_FD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_FD: Tensor) -> tuple[Tensor | None, ...]:
        """Of x, a convolution with the same kernel; of the kernel, the correlation of x and y."""
        spectrum_WGIO, x_spectra = ctx.saved_tensors
        blocks: Blocks = ctx.blocks
        groups = spectrum_WGIO.shape[1]
        gradient_BSD = gradient_FD.new_zeros(len(blocks.outputs), blocks.size, gradient_FD.shape[1])
        for block_SD, rows in zip(gradient_BSD, blocks.outputs, strict=True):
            block_SD[: rows.stop - rows.start] = gradient_FD[rows]
        y_spectra = by_group(torch.fft.rfft(gradient_BSD, dim=1), groups)
        x_gradient = weight_gradient = None
        if ctx.needs_input_grad[0]:
            x_BSD = from_groups(y_spectra @ spectrum_WGIO.flatten(0, 1).mT, blocks.size, groups)
            x_gradient = torch.zeros_like(gradient_FD)
            for block_SD, (rows, places) in zip(x_BSD, blocks.inputs, strict=True):
                x_gradient[rows] += block_SD[places]
        if ctx.needs_input_grad[1]:
            # conj(X) · Y is the spectrum of the kernel's gradient, backwards in time: conjugate it.
            x_WGBI, y_WGBO = (s.reshape(-1, groups, *s.shape[1:]) for s in (x_spectra, y_spectra))
            weight_GOIK = gradient_FD.new_empty(groups, *spectrum_WGIO.shape[:1:-1], ctx.kernel)
            for group, weight_OIK in enumerate(weight_GOIK):
                spectrum_OIW = (x_WGBI[:, group].mT @ y_WGBO[:, group]).conj_physical_().permute(2, 1, 0)
                weight_OIK.copy_(torch.fft.irfft(spectrum_OIW, blocks.size)[..., : ctx.kernel])
            weight_gradient = weight_GOIK.flatten(0, 1)
        return x_gradient, weight_gradient, None, None
