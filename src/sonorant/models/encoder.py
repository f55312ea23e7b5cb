"""The shared speech encoder: waveform → stem → projection → positional convolution → transformer layers.

It works on packed batches, utterances end to end without padding, so an utterance's result does not depend on
what else is in the batch. Layer numbering is transformers': 0 is what enters the first layer, l what leaves the
l-th, before any final norm.

Shapes: N samples of a packed buffer, F frames, C stem channels, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sonorant.config import EncoderConfig
from sonorant.data.frames import STEM_KERNELS, STEM_STRIDES, Ragged
from sonorant.models.layers import Layer, RelativeBias
from sonorant.models.positions import StackedPosition, WidePosition
from sonorant.models.stem import FirstMoments, Stem


@dataclass
class Hidden:
    """What a pass through the context network leaves, each (F, D).

    states: the L + 1 hidden states; ffn: the L feed-forward outputs before their residual sum; output: what
    heads read, the last state, with pre-norm after the final norm.
    """

    states: list[Tensor]
    ffn: list[Tensor]
    output: Tensor


class Context(nn.Module):
    """The part that sees all of an utterance; the teacher is an averaged copy of it."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.pre_norm, self.dropout, self.layer_drop = config.pre_norm, config.dropout, config.layer_drop
        self.position = WidePosition(config) if config.position_depth == 1 else StackedPosition(config)
        self.norm = nn.LayerNorm(config.dim)
        self.relative = RelativeBias(config) if config.relative_buckets else None
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.checkpointing = False
        """Whether training computes every layer twice rather than keep what is inside."""
        self.num_frozen: int | None = None
        """So many layers stand still, the lowest, and all that they read; None: nothing does."""

    def train(self, mode: bool = True) -> Context:
        """What stands still stays in evaluation mode: it has no dropout."""
        super().train(mode)
        for layer in self.layers[: self.num_frozen or 0]:
            layer.eval()
        return self

    def forward(self, z_FD: Tensor, frames: Ragged, last: int | None = None) -> Hidden:
        """Projected frames (F, D) to the hidden states up to layer `last` (default: all)."""
        is_still = self.num_frozen is not None
        with torch.set_grad_enabled(torch.is_grad_enabled() and not is_still):
            x_FD = z_FD + self.position(z_FD, frames)
            if not self.pre_norm:
                x_FD = self.norm(x_FD)
            x_FD = F.dropout(x_FD, self.dropout, self.training and not is_still)
        return self.climb(x_FD, frames, 0, last)

    def climb(self, x_FD: Tensor, frames: Ragged, first: int, last: int | None = None) -> Hidden:
        """From layer `first`, whose states are x (F, D), to `last`: the states begin with x."""
        bias_HN = None if self.relative is None else self.relative(max(frames.lengths))
        states, ffn = [x_FD], list[Tensor]()
        for layer in self.layers[first:last]:
            dropped = layer.training and self.layer_drop > 0 and float(torch.rand(())) < self.layer_drop
            if dropped:
                ffn_FD = x_FD
            elif self.checkpointing and layer.training and torch.is_grad_enabled():
                x_FD, ffn_FD = checkpoint(layer, x_FD, frames, bias_HN, use_reentrant=False)
            else:
                is_still = first + len(ffn) < (self.num_frozen or 0)
                with torch.set_grad_enabled(torch.is_grad_enabled() and not is_still):
                    x_FD, ffn_FD = layer(x_FD, frames, bias_HN)
            states.append(x_FD)
            ffn.append(ffn_FD)
        return Hidden(states, ffn, self.norm(x_FD) if self.pre_norm else x_FD)


class Encoder(nn.Module):
    """Stem, projection, mask embedding and context network."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = Stem(config.stem_widths, config.stem_norm, config.stem_bias)
        self.stem_norm = nn.LayerNorm(config.stem_widths[-1]) if config.projection_norm else nn.Identity()
        self.projection = nn.Linear(config.stem_widths[-1], config.dim)
        nn.init.normal_(self.projection.weight, std=0.02)
        nn.init.zeros_(self.projection.bias)
        self.mask_embedding = nn.Parameter(torch.rand(config.dim))
        self.context = Context(config)

    @property
    def checkpointing(self) -> bool:
        """Whether training spends a second forward pass rather than memory; not part of what is made."""
        return self.context.checkpointing

    @checkpointing.setter
    def checkpointing(self, wanted: bool) -> None:
        self.context.checkpointing = self.stem.checkpointing = wanted

    def freeze_below(self, num_layers: int) -> None:
        """Let only so many layers move, the topmost: all other parameters take no gradient and no update."""
        context = self.context
        context.num_frozen = len(context.layers) - num_layers
        self.requires_grad_(False)
        for layer in context.layers[context.num_frozen :]:
            layer.requires_grad_(True)
        self.train(self.training)

    @property
    def is_front_frozen(self) -> bool:
        """Whether what lies below the layers stands still."""
        return self.context.num_frozen is not None

    def project(
        self, waves_N: Tensor, num_samples: Sequence[int], moments: Sequence[FirstMoments | None] | None = None
    ) -> Tensor:
        """Packed waves (N,) to projected frames z (F, D), before any masking."""
        z_FD: Tensor = self.projection(self.stem_norm(self.stem(waves_N, num_samples, moments)))
        return z_FD

    def mask(self, z_FD: Tensor, mask_F: Tensor) -> Tensor:
        """z with the mask embedding where `mask_F` is true."""
        return torch.where(mask_F[:, None], self.mask_embedding.to(z_FD.dtype), z_FD)

    def forward(
        self,
        waves_N: Tensor,
        num_samples: Sequence[int],
        last: int | None = None,
        moments: Sequence[FirstMoments | None] | None = None,
    ) -> Hidden:
        """The clean view: packed waves (N,) to hidden states.

        A stem's norm over time goes by each utterance's own moments, or by those given for it.
        """
        hidden: Hidden = self.context(
            self.project(waves_N, num_samples, moments), Ragged.of_samples(num_samples), last
        )
        return hidden


def num_operations(config: EncoderConfig, num_frames: int, last: int) -> float:
    """Floating-point operations, two a product, that take an utterance of so many frames to layer `last`.

    The matrix products alone: of the stem, the projection, and each layer's linear maps and attention.
    """
    widths, rates = config.stem_widths, [1.0]
    for stride in reversed(STEM_STRIDES[1:]):
        rates.insert(0, rates[0] * stride)
    products = zip(rates, STEM_KERNELS, (1, *widths), widths, strict=False)
    stem = sum(rate * kernel * before * after for rate, kernel, before, after in products)
    layer = 4 * config.dim**2 + 2 * config.dim * config.ffn_dim + 2 * config.dim * num_frames
    return 2.0 * num_frames * (stem + widths[-1] * config.dim + last * layer)
