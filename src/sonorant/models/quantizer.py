"""The Gumbel product quantiser of wav2vec 2.0 (Baevski et al. 2020, §2): a code from each of several groups.

Shapes: M frames, C features, G groups, V codes a group, D width of all groups together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sonorant.config import QuantiserConfig


@dataclass
class Quantised:
    """vectors (M, D) of the chosen codes, codes (M, G) and the probabilities (M, G, V) without noise, float32."""

    vectors: Tensor
    codes: Tensor
    probabilities: Tensor


class Quantizer(nn.Module):
    """Chooses by argmax of logits plus Gumbel noise; gradients are those of the softmax at a temperature."""

    def __init__(self, num_features: int, config: QuantiserConfig) -> None:
        super().__init__()
        self.config = config
        self.logits = nn.Linear(num_features, config.num_groups * config.num_codes)
        nn.init.normal_(self.logits.weight)
        nn.init.zeros_(self.logits.bias)
        shape = (config.num_groups, config.num_codes, config.dim // config.num_groups)
        self.codewords = nn.Parameter(torch.rand(shape))

    def temperature(self, update: int) -> float:
        """τ of the update with this index from 0: annealed by a factor each, down to its end."""
        config = self.config
        return max(config.start_temperature * config.temperature_decay**update, config.end_temperature)

    def forward(self, features_MC: Tensor, uniform_ME: Tensor | None, temperature: float) -> Quantised:
        """Quantise frames (M, C); `uniform_ME` in [0, 1) makes the noise, (M, G · V), None for none."""
        with torch.autocast(features_MC.device.type, enabled=False):
            logits_MGV = self.logits(features_MC.float()).unflatten(1, self.codewords.shape[:2])
            noisy = logits_MGV if uniform_ME is None else logits_MGV + gumbel(uniform_ME).view_as(logits_MGV)
            chosen_MGV, codes_MG = straight_through(noisy, temperature)
            vectors_MD = torch.einsum("mgv,gvd->mgd", chosen_MGV, self.codewords.float()).flatten(1)
            return Quantised(vectors_MD, codes_MG, logits_MGV.softmax(-1))


def gumbel(uniform: Tensor) -> Tensor:
    """Standard Gumbel noise, -log(-log u), from uniform numbers in [0, 1), kept finite at both ends."""
    tiny = torch.finfo(uniform.dtype).tiny
    exponential = (-torch.log(uniform.clamp(min=tiny))).clamp(min=tiny)
    return -torch.log(exponential)


def straight_through(logits_MGV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """One-hot argmax, whose gradient is that of softmax(logits / τ), and the index of it: (M, G, V), (M, G)."""
    soft = (logits_MGV / temperature).softmax(-1)
    codes_MG = soft.argmax(-1)
    hard = F.one_hot(codes_MG, logits_MGV.shape[-1]).to(soft.dtype)
    return hard - soft.detach() + soft, codes_MG
