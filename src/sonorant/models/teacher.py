"""The teacher: an exponential moving average of the student's context network, and the targets read from it.

pretraining.md §0 (data2vec, Baevski et al. 2022): layers and norm are averaged, the positional convolution is
copied, the stem and the projection are the student's own.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sonorant.config import TeacherConfig
from sonorant.data.frames import Ragged
from sonorant.models.encoder import Context, Hidden


class Teacher(nn.Module):
    """A float32 copy of the context network that follows the student and never receives a gradient."""

    def __init__(self, student: Context, config: TeacherConfig) -> None:
        super().__init__()
        self.config = config
        self.context = copy.deepcopy(student).float().requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Teacher:
        """Stays in evaluation mode: a teacher has no dropout."""
        del mode
        return super().train(False)

    def forward(self, z_FD: Tensor, frames: Ragged) -> Hidden:
        """Un-masked projected frames (F, D) to the teacher's hidden states, without gradient."""
        with torch.no_grad():
            hidden: Hidden = self.context(z_FD.detach().float(), frames)
        return hidden

    def decay(self, update: int) -> float:
        """λ after `update` updates: linear to its end over the ramp, then constant."""
        config = self.config
        done = min(1.0, update / config.ramp_updates) if config.ramp_updates else 1.0
        return config.start_decay + done * (config.end_decay - config.start_decay)

    @torch.no_grad()
    def follow(self, student: Context, update: int) -> None:
        """θ ← λθ + (1 − λ)·student, except the positional convolution, which is copied."""
        torch._foreach_copy_(list(self.context.position.parameters()), list(student.position.parameters()))
        for mine, theirs in ((self.context.layers, student.layers), (self.context.norm, student.norm)):
            torch._foreach_lerp_(list(mine.parameters()), list(theirs.parameters()), 1 - self.decay(update))


def averaged_targets(ffn: list[Tensor], frames: Ragged) -> Tensor:
    """Mean over layers of their instance-normalised feed-forward outputs: K × (F, D) to (F, D), float32."""
    return torch.stack([instance_norm(x.float(), frames) for x in ffn]).mean(0)


def instance_norm(x_FD: Tensor, frames: Ragged) -> Tensor:
    """Each channel of each utterance to mean 0 and (biased) variance 1 over its frames, eps 1e-5."""
    parts = [
        F.instance_norm(x_FD[rows].T[None])[0].T
        if rows.stop - rows.start > 1
        else torch.zeros_like(x_FD[rows])
        for rows in frames.slices()
    ]
    return torch.cat(parts)
