"""The stem: seven unpadded convolutions from samples to frames, on packed batches without padding.

Shapes: N samples or rows of a packed buffer, F frames, C stem channels, O output channels, K kernel taps.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sonorant.data.frames import HOP_SAMPLES, STEM_KERNELS, STEM_STRIDES, Ragged


class Stem(nn.Module):
    """Seven unpadded convolutions from samples to frames, as matrix products on channels-last buffers.

    One pass over the packed buffer serves all utterances: a frame that would straddle two of them is computed
    and dropped, and no statistic mixes them.
    """

    def __init__(self, widths: Sequence[int], norm: str, bias: bool = False) -> None:
        super().__init__()
        shapes = zip(widths, (1, *widths), STEM_KERNELS, strict=False)
        self.weights = nn.ParameterList(nn.init.kaiming_normal_(torch.empty(shape)) for shape in shapes)
        self.biases = nn.ParameterList(torch.zeros(width) for width in widths if bias)
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
            if len(self.biases):
                x_NC = x_NC + self.biases[index]
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
