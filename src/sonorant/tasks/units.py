"""Offline units: classify masked frames into k-means units (HuBERT, Hsu et al. 2021; MT4SSL's Off-TE)."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from sonorant.config import UnitsConfig
from sonorant.tasks.task import Outcome, Task, View, Views


def cross_entropy(logits_MV: Tensor, units_M: Tensor) -> Tensor:
    """-Σ log p(unit), in nats, float32."""
    return F.cross_entropy(logits_MV.float(), units_M, reduction="sum")


class Units(Task):
    """One linear head on the last layer: no cosine, no temperature (pretraining.md §2.1)."""

    views: ClassVar[frozenset[View]] = frozenset({"masked"})
    needs_units: ClassVar[bool] = True

    def __init__(self, dim: int, num_units: int, config: UnitsConfig) -> None:
        super().__init__()
        self.config = config
        self.head = nn.Linear(dim, num_units)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, views: Views) -> Outcome:
        """Cross-entropy on masked frames, plus `unmasked_weight` times that on the others."""
        assert views.masked is not None
        assert views.units is not None
        logits_MV, units_M = self.head(views.masked.output[views.mask]), views.units[views.mask]
        loss = cross_entropy(logits_MV, units_M)
        sums = {"cross_entropy": loss.detach(), "accuracy": (logits_MV.argmax(1) == units_M).sum()}
        if self.config.unmasked_weight:
            seen = self.head(views.masked.output[~views.mask])
            loss = loss + self.config.unmasked_weight * cross_entropy(seen, views.units[~views.mask])
        return Outcome(loss, sums)
