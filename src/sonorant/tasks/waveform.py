"""Rebuild the waveform from the stem's un-masked frames (MGF-style, pretraining.md §3.2: the sample scale).

Shapes: F frames, T frames of one utterance, C stem channels, S samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sonorant.data.frames import HOP_SAMPLES, STEM_KERNELS, STEM_STRIDES, num_samples
from sonorant.tasks.task import Monitored, Outcome, Per, Shares, View, Views, moments, precise, spread


def absolute_error(predictions: Tensor, targets: Tensor) -> Tensor:
    """Σ |ŷ − y|, float32."""
    return (precise(predictions) - precise(targets)).abs().sum()


class Decoder(nn.Module):
    """The stem's mirror image: transposed convolutions from T frames back to the samples they were made from."""

    def __init__(self, stem_widths: Sequence[int], channels: int | None) -> None:
        super().__init__()
        widths = [*reversed(stem_widths), 1]
        if channels is not None:
            widths[1:-1] = [channels] * (len(widths) - 2)
        shapes = zip(widths, widths[1:], reversed(STEM_KERNELS), strict=False)
        # Kaiming's, by what a value is summed over: kernel / stride taps of every channel, where frames overlap.
        self.weights = nn.ParameterList(
            nn.init.normal_(torch.empty(shape), std=math.sqrt(2 * stride / (shape[0] * shape[2])))
            for shape, stride in zip(shapes, reversed(STEM_STRIDES), strict=True)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in widths[1:-1])

    def forward(self, stem_TC: Tensor) -> Tensor:
        """One utterance's frames (T, C) to its samples (S,), S the fewest that make T frames."""
        x_TC = stem_TC
        for index, (weight, stride) in enumerate(zip(self.weights, reversed(STEM_STRIDES), strict=True)):
            x_TC = F.conv_transpose1d(x_TC.T[None], weight, stride=stride)[0].T
            if index < len(self.norms):
                x_TC = F.gelu(self.norms[index](x_TC))
        return x_TC[:, 0]


class Waveform(Monitored):
    """A decoder trained by L1 on the samples that were heard."""

    per: ClassVar[Per] = "sample"
    views: Mapping[View, int | None] = {}

    def __init__(self, stem_widths: Sequence[int], channels: int | None) -> None:
        super().__init__()
        self.decoder = Decoder(stem_widths, channels)
        self.register_buffer("window", torch.zeros(3, 1, dtype=torch.float64))

    def forward(self, views: Views, whole: Shares) -> Outcome:
        """Absolute error over all samples that lie in some frame."""
        del whole
        rebuilt, heard, start = [], [], 0
        for rows, count in zip(views.frames.slices(), views.num_samples, strict=True):
            rebuilt.append(self.decoder(views.stem[rows]))
            heard.append(views.waves[start : start + num_samples(rows.stop - rows.start)])
            start += -(-count // HOP_SAMPLES) * HOP_SAMPLES
        predictions = torch.cat(rebuilt)
        loss = absolute_error(predictions, torch.cat(heard))
        return Outcome(loss, {}, moments(predictions[:, None]))

    def watch(self) -> dict[str, float]:
        """The spread of what was rebuilt; that of the target is one, and zero is silence."""
        return {"prediction_std": float(spread(self.window))}
