"""Where a frame stands, told by what surrounds it: convolutions over packed batches.

Shapes: F frames, D model width.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sonorant.config import EncoderConfig
from sonorant.data.frames import Ragged


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
