"""The transformer layer on packed batches: utterances lie end to end, no frame is padding.

Shapes: F frames, T frames of one utterance, B utterances, D model width, H heads, E width of a head, N bucketed
distances.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from sonorant.config import EncoderConfig
from sonorant.data.frames import Ragged


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
        self.mix: Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor] = F.scaled_dot_product_attention
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.attention_out = nn.Linear(config.dim, config.dim)
        self.attention_norm = nn.LayerNorm(config.dim)
        self.ffn_in = nn.Linear(config.dim, config.ffn_dim)
        self.ffn_out = nn.Linear(config.ffn_dim, config.dim)
        self.ffn_norm = nn.LayerNorm(config.dim)
        if config.relative_buckets:
            self.gate = nn.Linear(config.dim // config.num_heads, 8)
            self.gate_scale = nn.Parameter(torch.ones(1, config.num_heads, 1, 1))
            nn.init.normal_(self.gate.weight, std=0.02)
            nn.init.zeros_(self.gate.bias)
        for linear in (self.qkv, self.attention_out, self.ffn_in, self.ffn_out):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, x_FD: Tensor, frames: Ragged, bias_HN: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(F, D) to (F, D), and the second feed-forward product: what teachers are read from.

        `bias_HN` is `RelativeBias`'s, where the encoder has one.
        """
        heard_FD = self.attention_norm(x_FD) if self.pre_norm else x_FD
        x_FD = x_FD + self._drop(self._attend(heard_FD, frames, bias_HN))
        if not self.pre_norm:
            x_FD = self.attention_norm(x_FD)
        hidden = F.gelu(self.ffn_in(self.ffn_norm(x_FD) if self.pre_norm else x_FD))
        ffn_FD = self.ffn_out(F.dropout(hidden, self.ffn_dropout, self.training))
        x_FD = x_FD + self._drop(ffn_FD)
        return x_FD if self.pre_norm else self.ffn_norm(x_FD), ffn_FD

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)

    def _attend(self, x_FD: Tensor, frames: Ragged, bias_HN: Tensor | None) -> Tensor:
        width = x_FD.shape[1]
        qkv_F3HE = self.qkv(x_FD).view(frames.total, 3, self.num_heads, width // self.num_heads)
        gates_FH = None if bias_HN is None else self._gates(x_FD)
        dropout = self.attention_dropout if self.training else 0.0

        def attend(rows: slice, batch: int) -> Tensor:
            q, k, v = qkv_F3HE[rows].view(batch, -1, 3, self.num_heads, width // self.num_heads).permute(2, 0, 3, 1, 4)
            mask = None
            if bias_HN is not None and gates_FH is not None:
                gate_BHT1 = gates_FH[rows].view(batch, -1, self.num_heads, 1).transpose(1, 2)
                mask = (gate_BHT1 * toeplitz(bias_HN, q.shape[2])).to(q.dtype)
                k, v = k.flip(2), v.flip(2)
            mixed = self.mix(q, k, v, mask, dropout)
            return mixed.transpose(1, 2).reshape(-1, width)

        if self.mix is F.scaled_dot_product_attention and bias_HN is None and is_fused(qkv_F3HE, dropout):
            q_FHE, k_FHE, v_FHE = qkv_F3HE.unbind(1)
            edges, longest = edges_of(frames.lengths, qkv_F3HE.device), max(frames.lengths)
            mixed_FHE = varlen_attn(q_FHE, k_FHE, v_FHE, edges, edges, longest, longest)
            assert isinstance(mixed_FHE, Tensor)
            mixed_FD = mixed_FHE.flatten(1)
        elif frames.is_uniform:
            mixed_FD = attend(slice(None), len(frames.lengths))
        else:
            mixed_FD = torch.cat([attend(rows, 1) for rows in frames.slices()])
        mixed: Tensor = self.attention_out(mixed_FD)
        return mixed

    def _gates(self, x_FD: Tensor) -> Tensor:
        """How much each frame's heads (F, H) heed distance: WavLM's gated bias, Chen et al. 2022."""
        # The published parameters make 2 × 4 numbers of which each four are summed: the sum of their weights does too.
        weight, bias = self.gate.weight.view(2, 4, -1).sum(1), self.gate.bias.view(2, 4).sum(1)
        x_FHE = x_FD.view(len(x_FD), self.num_heads, -1)
        update_FH, reset_FH = F.linear(x_FHE, weight, bias).sigmoid().unbind(-1)
        gates_FH: Tensor = update_FH * (reset_FH * self.gate_scale.view(-1) - 1) + 2
        return gates_FH


def is_fused(qkv: Tensor, dropout: float) -> bool:
    """Whether flash attention can go through packed utterances by itself: one kernel for all of them."""
    if not qkv.is_cuda or qkv.dtype not in (torch.bfloat16, torch.float16) or dropout:
        return False
    width = qkv.shape[-1]
    return width % 8 == 0 and width <= 256 and torch.cuda.get_device_capability(qkv.device) >= (8, 0)


@lru_cache(maxsize=8)
def edges_of(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each utterance begins and where the last one ends, (U + 1,), kept for the layers that follow."""
    with torch.inference_mode(False):  # what is made in that mode could not be kept for a gradient later
        return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)


class RelativeBias(nn.Module):
    """What every head makes of the distance between two frames (WavLM): shared by the layers, which gate it."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.num_buckets, self.max_distance = config.relative_buckets, config.relative_max_distance
        self.weight = nn.Parameter(nn.init.normal_(torch.empty(self.num_buckets, config.num_heads), std=0.02))

    def forward(self, longest: int) -> Tensor:
        """The biases (H, 2T - 1) of distances T - 1 down to 1 - T, key minus query, for utterances of up to T frames.

        They are falling because keys are read backwards, for which see `toeplitz`.
        """
        distances = torch.arange(longest - 1, -longest, -1, device=self.weight.device)
        return self.weight[bucket_of(distances, self.num_buckets, self.max_distance)].T


def bucket_of(distances: Tensor, num_buckets: int, max_distance: int) -> Tensor:
    """Half of the buckets for each sign, half of those for one distance each, the rest growing logarithmically (T5)."""
    half = num_buckets // 2
    exact = half // 2
    size = distances.abs()
    growth = torch.log(size.float() / exact) / math.log(max_distance / exact) * (half - exact)
    far = (exact + growth).clamp(max=half - 1)
    return torch.where(size < exact, size, far.long()) + half * (distances > 0)


def toeplitz(bias_HN: Tensor, length: int) -> Tensor:
    """The bias (H, T, T) of every query and every key, the keys in reverse order, from those of all distances.

    In that order each query's row is the last one's moved on by one distance: a view, so that no table of all pairs is
    looked up or kept.
    """
    longest = (bias_HN.shape[1] + 1) // 2
    return bias_HN[:, longest - length : longest + length - 1].unfold(1, length, 1)
