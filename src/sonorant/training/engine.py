"""Views → tasks → loss: the one sentence that every recipe is.

The stem runs once per batch, each view once, however many tasks read it; a task of weight zero does not run,
and a view that only such tasks read is not computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from sonorant.data.batching import Batch
from sonorant.data.frames import Ragged
from sonorant.models.encoder import Encoder
from sonorant.models.teacher import Teacher
from sonorant.tasks.task import Task, Views


class Engine(nn.Module):
    """The shared encoder, its teacher where a task wants one, and the tasks."""

    def __init__(self, encoder: Encoder, tasks: Mapping[str, Task], teacher: Teacher | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.tasks = nn.ModuleDict(dict(tasks))
        self.teacher = teacher

    def forward(self, batch: Batch, weights: Mapping[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        """Σ weight · loss, each loss a sum over masked frames, and the sums that tasks log, as `task/sum`."""
        tasks: dict[str, Task] = {name: cast(Task, self.tasks[name]) for name, weight in weights.items() if weight}
        wanted = frozenset[str]().union(*(task.views for task in tasks.values()))
        z_FD = self.encoder.project(batch.waves, batch.num_samples)
        views = Views(Ragged.of_samples(batch.num_samples), batch.mask, batch.units)
        if "masked" in wanted:
            views.masked = self.encoder.context(self.encoder.mask(z_FD, batch.mask), views.frames)
        if "teacher" in wanted:
            assert self.teacher is not None
            with torch.autocast(z_FD.device.type, enabled=False):
                views.teacher = self.teacher(z_FD, views.frames)
        outcomes = {name: task(views) for name, task in tasks.items()}
        loss = torch.stack([weights[name] * outcome.loss for name, outcome in outcomes.items()]).sum()
        sums = {
            f"{name}/{key}": value
            for name, outcome in outcomes.items()
            for key, value in outcome.sums.items()
        }
        return loss, {"loss": loss.detach(), **sums}

    def after_update(self, update: int) -> None:
        """What follows an optimizer step: the teacher follows the student."""
        if self.teacher is not None:
            self.teacher.follow(self.encoder.context, update)
