"""The encoder's parts, all of them on packed batches: utterances lie end to end, no frame is padding.

Shapes: N samples or rows of a packed buffer, F frames, C stem channels, O output channels, D model width,
H heads, E width of a head, K kernel taps.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sonorant.config import EncoderConfig
from sonorant.data.frames import HOP_SAMPLES, STEM_KERNELS, STEM_STRIDES, Ragged


class Stem(nn.Module):
    """Seven unpadded convolutions from samples to frames, as matrix products on channels-last buffers.

    One pass over the packed buffer serves all utterances: a frame that would straddle two of them is computed
    and dropped, and no statistic mixes them.
    """

    def __init__(self, widths: Sequence[int], norm: str) -> None:
        super().__init__()
        shapes = zip(widths, (1, *widths), STEM_KERNELS, strict=False)
        self.weights = nn.ParameterList(nn.init.kaiming_normal_(torch.empty(shape)) for shape in shapes)
        self.per_utterance = norm == "group"
        normed = widths[:1] if self.per_utterance else widths
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in normed)

    def forward(self, waves_N: Tensor, num_samples: Sequence[int]) -> Tensor:
        """Packed waves (N,) of utterances with so many samples each, to (F, C)."""
        x_NC = waves_N[:, None]
        starts = np.cumsum([0, *(-(-n // HOP_SAMPLES) for n in num_samples)])[:-1]
        for index, (weight, kernel, stride) in enumerate(
            zip(self.weights, STEM_KERNELS, STEM_STRIDES, strict=True)
        ):
            x_NC = strided_convolution(x_NC, weight, stride)
            if index < len(self.norms):
                norm = self.norms[index]
                if self.per_utterance:
                    rows = [
                        slice(
                            s * HOP_SAMPLES // stride, s * HOP_SAMPLES // stride + (n - kernel) // stride + 1
                        )
                        for s, n in zip(starts.tolist(), num_samples, strict=True)
                    ]
                    x_NC = normalise_over_time(x_NC, rows, norm)
                else:
                    x_NC = norm(x_NC)
            x_NC = F.gelu(x_NC)
        frames = Ragged.of_samples(num_samples)
        kept = np.concatenate([s + np.arange(n) for s, n in zip(starts, frames.lengths, strict=True)])
        return x_NC[torch.from_numpy(kept).to(x_NC.device)]


def strided_convolution(x_NC: Tensor, weight_OCK: Tensor, stride: int) -> Tensor:
    """Unpadded convolution over rows, for kernels of up to two strides: (N, C) to ((N - K) // stride + 1, O).

    The first `stride` taps of every window are one contiguous view and the rest another: nothing is unfolded.
    """
    channels_out, channels, kernel = weight_OCK.shape
    rows = (len(x_NC) - kernel) // stride + 1
    taps_KC_O = weight_OCK.permute(2, 1, 0).reshape(kernel * channels, channels_out)
    head = x_NC[: rows * stride].reshape(rows, stride * channels) @ taps_KC_O[: stride * channels]
    if kernel == stride:
        return head
    tail = kernel - stride
    rest = x_NC[stride : stride + (rows - 1) * stride + tail]
    rest = (
        F.pad(rest, (0, 0, 0, stride - tail)).view(rows, stride, channels)[:, :tail].flatten(1)
        if tail > 1
        else rest[::stride]
    )
    return torch.addmm(head, rest, taps_KC_O[stride * channels :])


def normalise_over_time(x_NC: Tensor, rows: Sequence[slice], norm: nn.Module) -> Tensor:
    """Each channel of each utterance to mean 0, variance 1 over its rows, then the norm's scale and shift.

    Rows that belong to no utterance pass through: they are dropped at the stem's end.
    """
    assert isinstance(norm, nn.LayerNorm)
    parts, end = [], 0
    for row in rows:
        part = x_NC[row].float()
        variance, mean = torch.var_mean(part, dim=0, correction=0)
        scale = norm.weight * torch.rsqrt(variance + norm.eps)
        parts += [x_NC[end : row.start], torch.addcmul(norm.bias - mean * scale, part, scale).to(x_NC.dtype)]
        end = row.stop
    return torch.cat([*parts, x_NC[end:]])


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

    def forward(self, x_FD: Tensor, frames: Ragged) -> Tensor:
        """(F, D) to (F, D); no utterance sees another."""
        weight = self.weight * (self.magnitude / self.weight.norm(dim=(0, 1), keepdim=True))
        return F.gelu(convolve_over_time(x_FD, frames, weight, self.bias, self.groups))


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
    # Utterances stand apart by half a kernel of zeros, which is the padding each would have had alone.
    gap = weight.shape[-1] // 2
    places = zip(frames.offsets, frames.lengths, strict=True)
    rows = np.concatenate([offset + gap * i + np.arange(length) for i, (offset, length) in enumerate(places)])
    index = torch.from_numpy(rows).to(x_FD.device)
    spaced = x_FD.new_zeros(frames.total + gap * (len(frames.lengths) - 1), x_FD.shape[1]).index_copy(
        0, index, x_FD
    )
    return F.conv1d(spaced.T[None], weight, bias, padding=gap, groups=groups)[0].T[index]


class Layer(nn.Module):
    """One transformer layer, normalised before (`pre_norm`) or after its two blocks."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.num_heads, self.pre_norm = config.num_heads, config.pre_norm
        self.dropout, self.attention_dropout, self.ffn_dropout = (
            config.dropout,
            config.attention_dropout,
            config.ffn_dropout,
        )
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.attention_out = nn.Linear(config.dim, config.dim)
        self.attention_norm = nn.LayerNorm(config.dim)
        self.ffn_in = nn.Linear(config.dim, config.ffn_dim)
        self.ffn_out = nn.Linear(config.ffn_dim, config.dim)
        self.ffn_norm = nn.LayerNorm(config.dim)
        for linear in (self.qkv, self.attention_out, self.ffn_in, self.ffn_out):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, x_FD: Tensor, frames: Ragged) -> tuple[Tensor, Tensor]:
        """(F, D) to (F, D), and the second feed-forward product: what teachers are read from."""
        x_FD = x_FD + self._drop(self._attend(self.attention_norm(x_FD) if self.pre_norm else x_FD, frames))
        if not self.pre_norm:
            x_FD = self.attention_norm(x_FD)
        hidden = F.gelu(self.ffn_in(self.ffn_norm(x_FD) if self.pre_norm else x_FD))
        ffn_FD = self.ffn_out(F.dropout(hidden, self.ffn_dropout, self.training))
        x_FD = x_FD + self._drop(ffn_FD)
        return x_FD if self.pre_norm else self.ffn_norm(x_FD), ffn_FD

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)

    def _attend(self, x_FD: Tensor, frames: Ragged) -> Tensor:
        width = x_FD.shape[1]
        qkv_F3HE = self.qkv(x_FD).view(frames.total, 3, self.num_heads, width // self.num_heads)
        dropout = self.attention_dropout if self.training else 0.0

        def attend(qkv: Tensor, batch: int) -> Tensor:
            q, k, v = qkv.view(batch, -1, *qkv.shape[1:]).permute(2, 0, 3, 1, 4)
            return (
                F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
                .transpose(1, 2)
                .reshape(len(qkv), width)
            )

        if frames.is_uniform:
            mixed_FD = attend(qkv_F3HE, len(frames.lengths))
        else:
            mixed_FD = torch.cat([attend(qkv_F3HE[rows], 1) for rows in frames.slices()])
        mixed: Tensor = self.attention_out(mixed_FD)
        return mixed
