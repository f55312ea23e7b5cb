"""An encoder that hears in bfloat16 on a CPU: a third of the digits, twice the products a second where it has them.

Matrix products take bfloat16 and sum in float32: those of the stem, with what lies between its convolutions, those of
the layers and attention's, with its scores. The first convolution, the projection, the positional convolution and the
states from layer to layer stay float32. On a CPU without the instructions it hears the same, only slowly.

Shapes: F frames, T frames of one utterance, Q queries at a time, B utterances, H heads, E width of a head.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sonorant.models.encoder import Encoder
from sonorant.models.layers import Layer

TOLERANCES = {"bfloat16": 0.02}
"""By precision, how far hidden states are from float32's at most, in relative L2. A rounding to bfloat16 is 0.1 to
0.2 % off, and a frame goes through some forty: random weights make up to 1.4 % of it, trained ones 0.2 % (LOG.md)."""
QUERIES = 256
"""So many queries at a time, for their scores take room; fewer are slower, more no faster: measured (LOG.md)."""


def at_precision(encoder: Encoder, precision: str) -> Encoder:
    """An encoder for inference with the same weights at a precision; in float32 the very same.

    Raises ValueError at an unknown name.
    """
    if precision == "float32":
        return encoder
    if precision not in TOLERANCES:
        wanted = " or ".join(["float32", *TOLERANCES])
        raise ValueError(f"precision: found {precision!r}, wanted {wanted}: choose one of them")
    return in_bfloat16(encoder)


def in_bfloat16(encoder: Encoder) -> Encoder:
    """A copy whose matrix products take bfloat16, but for the first and the last of the stem, which are small."""
    reduced = copy.deepcopy(encoder).requires_grad_(False)
    stem = reduced.stem
    for weight in [*stem.weights][1:]:
        weight.data = weight.data.bfloat16()
    stem.arrange()
    for bias in [*stem.biases][1:]:
        bias.data = bias.data.bfloat16()
    for layer in reduced.context.layers:
        assert isinstance(layer, Layer)
        layer.mix = mix
        for name in ("qkv", "attention_out", "ffn_in", "ffn_out"):
            setattr(layer, name, HalfLinear(getattr(layer, name)))
    return reduced


class HalfLinear(nn.Module):
    """A linear map of a bfloat16 copy of what it gets."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.bfloat16(), requires_grad=False)
        self.bias = nn.Parameter(linear.bias.bfloat16(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(…, I) to (…, O)."""
        return F.linear(x.bfloat16(), self.weight, self.bias)


def mix(q_BHTE: Tensor, k_BHTE: Tensor, v_BHTE: Tensor, mask_BHTT: Tensor | None, dropout: float) -> Tensor:
    """Scaled dot-product attention, (B, H, T, E), as matrix products: torch's fused one makes them in float32."""
    assert dropout == 0
    mixed_BHTE = torch.empty_like(q_BHTE)
    scale = q_BHTE.shape[-1] ** -0.5
    for index, (q_HTE, k_HTE, v_HTE) in enumerate(zip(q_BHTE, k_BHTE, v_BHTE, strict=True)):
        for start in range(0, q_HTE.shape[1], QUERIES):
            rows = slice(start, start + QUERIES)
            bias = q_HTE.new_zeros(1, 1, 1) if mask_BHTT is None else mask_BHTT[index, :, rows]
            scores_HQT = torch.baddbmm(bias, q_HTE[:, rows], k_HTE.mT, alpha=scale)
            mixed_BHTE[index, :, rows] = torch.bmm(scores_HQT.softmax(-1), v_HTE)
    return mixed_BHTE
