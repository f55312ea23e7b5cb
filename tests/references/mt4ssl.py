"""MT4SSL's whole loss once more, from pretraining.md §2 alone, on the plain network of §0."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tests.references.network import Parameters, Shape, linear, project, student, teacher


def mt4ssl_loss(
    parameters: Parameters,
    waves: Sequence[Tensor],
    masks: Sequence[Tensor],
    units: Sequence[Tensor],
    shape: Shape,
    num_targets: int,
) -> Tensor:
    """(1 / M) [Σ CE + (1 / √D) Σ ‖ŷ − y‖²] over the M masked frames of all utterances."""
    total, masked_frames = torch.zeros((), dtype=torch.float64), 0
    for wave, mask, labels in zip(waves, masks, units, strict=True):
        z = project(wave, parameters)
        heard = student(z, mask, parameters, shape)
        target = torch.zeros_like(z)
        for layer in teacher(z, parameters, shape)[-num_targets:]:
            target = target + layer / num_targets
        for t in mask.nonzero()[:, 0].tolist():
            logits = linear(heard[t], parameters, "tasks.units.head")
            total = total + torch.log(torch.exp(logits).sum()) - logits[labels[t]]
            predicted = linear(heard[t], parameters, "tasks.teacher.head")
            total = total + (predicted - target[t]).pow(2).sum() / math.sqrt(len(predicted))
            masked_frames += 1
    return total / masked_frames
