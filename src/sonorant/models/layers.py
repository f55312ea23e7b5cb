"""The transformer layer on packed batches: utterances lie end to end, no frame is padding.

Shapes: F frames, D model width, H heads, E width of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
