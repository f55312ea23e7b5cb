"""Online targets: regress the teacher's averaged top layers at masked frames (data2vec; MT4SSL's On-TE)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sonorant.tasks.task import Monitored, Outcome, Shares, View, Views, moments, precise, spread


def squared_error(predictions_MD: Tensor, targets_MD: Tensor) -> Tensor:
    """Σ ‖ŷ − y‖² / √D over frames, float32 (pretraining.md §2.1)."""
    return (precise(predictions_MD) - targets_MD).square().sum() / math.sqrt(predictions_MD.shape[1])


class Regression(Monitored):
    """One linear head on the last layer, trained by squared error."""

    views: Mapping[View, int | None] = {"masked": None, "teacher": None}

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.head = nn.Linear(dim, dim)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("window", torch.zeros(2, 3, dim, dtype=torch.float64))

    def forward(self, views: Views, whole: Shares) -> Outcome:
        """Squared error on masked frames, against the mean of the target layers."""
        del whole
        assert views.masked is not None
        assert views.targets is not None
        targets_MD = views.targets.mean(0)
        predictions_MD = self.head(views.masked.output[views.mask])
        loss = squared_error(predictions_MD, targets_MD)
        statistics = torch.stack([moments(targets_MD), moments(predictions_MD)])
        return Outcome(loss, {}, statistics)

    def watch(self) -> dict[str, float]:
        """The spread of both sides, which collapse drives to zero."""
        return {
            f"{side}_std": float(spread(moments_3D))
            for side, moments_3D in zip(("target", "prediction"), self.window, strict=True)
        }
