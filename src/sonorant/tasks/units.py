"""Offline units: classify masked frames into k-means units (HuBERT, Hsu et al. 2021; MT4SSL's Off-TE)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sonorant.config import UnitsConfig
from sonorant.tasks.task import Monitored, Outcome, Shares, View, Views, perplexity, precise


def cross_entropy(logits_MV: Tensor, units_M: Tensor) -> Tensor:
    """-Σ log p(unit), in nats, float32."""
    return F.cross_entropy(precise(logits_MV), units_M, reduction="sum")


def cosine_logits(projected_ME: Tensor, embeddings_VE: Tensor, temperature: float) -> Tensor:
    """cos(frame, unit's embedding) / τ as one matrix product, (M, V) float32 (HuBERT, eq. 3)."""
    with torch.autocast(projected_ME.device.type, enabled=False):
        frames, units = (F.normalize(precise(x), dim=1, eps=1e-8) for x in (projected_ME, embeddings_VE))
        return frames @ units.T / temperature


class Units(Monitored):
    """A head on the last layer: linear (pretraining.md §2.1), or HuBERT's cosine to one embedding a unit."""

    views: Mapping[View, int | None] = {"masked": None}
    needs_units: ClassVar[bool] = True

    def __init__(self, dim: int, num_units: int, config: UnitsConfig) -> None:
        super().__init__()
        self.config = config
        self.head = nn.Linear(dim, config.cosine_dim or num_units)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        self.embeddings = nn.Parameter(torch.rand(num_units, config.cosine_dim)) if config.cosine_dim else None
        self.num_units = num_units
        self.register_buffer("window", torch.zeros(num_units, dtype=torch.float64))

    def logits(self, frames_MD: Tensor) -> Tensor:
        """Of every unit, (M, V)."""
        out: Tensor = self.head(frames_MD)
        return out if self.embeddings is None else cosine_logits(out, self.embeddings, self.config.temperature)

    def forward(self, views: Views, whole: Shares) -> Outcome:
        """Cross-entropy on masked frames, plus `unmasked_weight` times that on the others."""
        del whole
        assert views.masked is not None
        assert views.units is not None
        logits_MV, units_M = self.logits(views.masked.output[views.mask]), views.units[views.mask]
        loss = cross_entropy(logits_MV, units_M)
        guesses_M = logits_MV.argmax(1)
        sums = {"cross_entropy": loss.detach(), "accuracy": (guesses_M == units_M).sum()}
        if self.config.unmasked_weight:
            seen = self.logits(views.masked.output[~views.mask])
            loss = loss + self.config.unmasked_weight * cross_entropy(seen, views.units[~views.mask])
        return Outcome(loss, sums, torch.bincount(guesses_M, minlength=self.num_units).double())

    def watch(self) -> dict[str, float]:
        """How many units the guesses are spread over: one, where it has collapsed."""
        return {"prediction_perplexity": float(perplexity(self.window))}
