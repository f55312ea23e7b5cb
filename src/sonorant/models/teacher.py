"""The teacher: an exponential moving average of the student's context network, and the targets read from it.

pretraining.md §0 (data2vec, Baevski et al. 2022): layers and norm are averaged, the positional convolution is
copied, the stem and the projection are the student's own, unless they are to be frozen as a copy.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, nn

from sonorant.config import StemConfig, TeacherConfig
from sonorant.data.frames import Ragged
from sonorant.models.encoder import Encoder, Hidden


class Teacher(nn.Module):
    """A float32 copy of the context network that follows the student and never receives a gradient."""

    def __init__(self, student: Encoder, config: TeacherConfig, stem: StemConfig | None = None) -> None:
        super().__init__()
        self.config, self.stem = config, stem or StemConfig()
        self.without_gradient: Callable[[], AbstractContextManager[None]] = torch.inference_mode
        self.context = copy.deepcopy(student.context).float().requires_grad_(False).eval()
        self.layers = config.targets(len(student.context.layers))
        self.front: nn.ModuleList | None = None
        if self.stem.freeze == "copy":
            front = nn.ModuleList(front_of(student))
            self.front = copy.deepcopy(front).float().requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Teacher:
        """Stays in evaluation mode: a teacher has no dropout."""
        del mode
        return super().train(False)

    def forward(self, z_FD: Tensor, frames: Ragged) -> Hidden:
        """Un-masked projected frames (F, D) to the hidden states up to the last layer that is read, no gradient."""
        with self.without_gradient():
            hidden: Hidden = self.context(z_FD.float(), frames, max(self.layers))
        return hidden

    def targets(self, z_FD: Tensor, frames: Ragged, mask: Tensor) -> Tensor:
        """What is read at masked frames: instance-normalised feed-forward outputs of each layer, (K, M, D) float32."""
        ffn = self(z_FD, frames).ffn
        with self.without_gradient():
            return torch.stack([instance_norm(ffn[layer - 1].float(), frames)[mask] for layer in self.layers])

    @torch.no_grad()
    def project(self, waves_N: Tensor, num_samples: Sequence[int]) -> Tensor:
        """Packed waves (N,) to projected frames (F, D) by the frozen copy of stem and projection."""
        assert self.front is not None
        stem, norm, projection = self.front
        z_FD: Tensor = projection(norm(stem(waves_N, num_samples)))
        return z_FD

    def decay(self, update: int) -> float:
        """λ after `update` updates: linear to its end over the ramp, then constant, and 1 once it stands still."""
        config = self.config
        if config.freeze_at is not None and update > config.freeze_at:
            return 1.0
        done = min(1.0, update / config.ramp_updates) if config.ramp_updates else 1.0
        return config.start_decay + done * (config.end_decay - config.start_decay)

    def take_over(self, student: Encoder, num_updates: int) -> None:
        """Put itself in the student's place, after so many updates, so that it is an encoder as any other."""
        student.context = self.context
        if self.front is not None and self.stem.freeze_at is not None and num_updates > self.stem.freeze_at:
            student.stem, student.stem_norm, student.projection = cast(Any, self.front)

    @torch.no_grad()
    def follow(self, student: Encoder, update: int) -> None:
        """θ ← λθ + (1 − λ)·student, except the positional convolution, which is copied."""
        if self.front is not None and update == self.stem.freeze_at:
            theirs: list[Tensor] = [parameter for part in front_of(student) for parameter in part.parameters()]
            torch._foreach_lerp_(list[Tensor](self.front.parameters()), theirs, 1.0)
        decay = self.decay(update)
        if decay == 1.0:
            return
        names = [name for name, _ in self.context.named_parameters()]
        for copied in (True, False):
            chosen = [name for name in names if name.startswith("position.") == copied]
            mine: list[Tensor] = [self.context.get_parameter(name) for name in chosen]
            others: list[Tensor] = [student.context.get_parameter(name) for name in chosen]
            # A whole step towards the student is the student, bit for bit.
            torch._foreach_lerp_(mine, others, 1.0 if copied else 1 - decay)


def front_of(encoder: Encoder) -> list[nn.Module]:
    """What comes before the context network: stem, its norm and the projection."""
    return [encoder.stem, encoder.stem_norm, encoder.projection]


def instance_norm(x_FD: Tensor, frames: Ragged) -> Tensor:
    """Each channel of each utterance to mean 0 and (biased) variance 1 over its frames, eps 1e-5."""
    parts = []
    for rows in frames.slices():
        variance, mean = torch.var_mean(x_FD[rows], dim=0, correction=0)
        parts.append((x_FD[rows] - mean) * torch.rsqrt(variance + 1e-5))
    return torch.cat(parts)
