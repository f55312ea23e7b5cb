"""Online targets: regress the teacher's averaged top layers at masked frames (data2vec; MT4SSL's On-TE)."""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor, nn

from sonorant.config import TeacherConfig
from sonorant.models.teacher import averaged_targets
from sonorant.tasks.task import Outcome, Task, View, Views


def squared_error(predictions_MD: Tensor, targets_MD: Tensor) -> Tensor:
    """Σ ‖ŷ − y‖² / √D over frames, float32 (pretraining.md §2.1)."""
    return (predictions_MD.float() - targets_MD).square().sum() / math.sqrt(predictions_MD.shape[1])


def spread(x_MD: Tensor) -> Tensor:
    """√(variance over frames + 1e-6), averaged over dimensions: near zero when all frames agree."""
    return (x_MD.float().var(0, correction=0) + 1e-6).sqrt().mean()


class Regression(Task):
    """One linear head on the last layer, trained by squared error."""

    views: ClassVar[frozenset[View]] = frozenset({"masked", "teacher"})

    def __init__(self, dim: int, config: TeacherConfig) -> None:
        super().__init__()
        self.num_layers = config.num_layers
        self.head = nn.Linear(dim, dim)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, views: Views) -> Outcome:
        """Squared error on masked frames; logs the spread of both sides, which collapse drives to zero."""
        assert views.masked is not None
        assert views.teacher is not None
        targets = averaged_targets(views.teacher.ffn[-self.num_layers :], views.frames)[views.mask]
        predictions = self.head(views.masked.output[views.mask])
        loss = squared_error(predictions, targets)
        count = len(targets)
        sums = {
            "squared_error": loss.detach(),
            "target_std": spread(targets) * count,
            "prediction_std": spread(predictions.detach()) * count,
        }
        return Outcome(loss, sums)
