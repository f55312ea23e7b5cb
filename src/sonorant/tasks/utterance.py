"""Two halves of an utterance know one another among all halves of the update (MGF-style: the sentence scale).

NT-Xent (Chen et al. 2020, SimCLR, eq. 1) over the whole update's utterances, whatever ranks and micro-batches they
were dealt to. Halves of one speaker's other utterances are no negatives, nor are, by default, those of another
source, whose channel alone would tell them apart (pretraining.md §3.3).

Shapes: B utterances of a part, R rows of the whole update (two an utterance, next to each other), D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sonorant.config import UtteranceConfig
from sonorant.tasks.task import NEVER, Monitored, Outcome, Per, Shares, View, Views, moments, precise, spread


def nt_xent(rows_RD: Tensor, is_negative_RR: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Mean over rows of -log softmax of its partner's score among partner and negatives; and how many win, a share.

    rows_RD have length one; rows 2i and 2i + 1 are partners. Scores are cosines / τ, float32.
    """
    rows_RD = precise(rows_RD)
    scores_RR = rows_RD @ rows_RD.T / temperature
    own_R = torch.arange(len(rows_RD), device=rows_RD.device)
    partner_R = own_R ^ 1
    is_negative_RR = is_negative_RR & (own_R[:, None] != own_R) & (partner_R[:, None] != own_R)
    is_allowed_RR = is_negative_RR | (partner_R[:, None] == own_R)
    scores_RR = scores_RR.masked_fill(~is_allowed_RR, NEVER)
    loss = F.cross_entropy(scores_RR, partner_R)
    wins = ((scores_RR.argmax(1) == partner_R) & is_negative_RR.any(1)).double().mean()
    return loss, wins


class Utterance(Monitored):
    """The mean frame of each half through one hidden layer, at length one."""

    per: ClassVar[Per] = "update"
    views: Mapping[View, int | None] = {"halves": None}

    def __init__(self, dim: int, config: UtteranceConfig) -> None:
        super().__init__()
        self.config = config
        self.head = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, config.dim))
        self.register_buffer("window", torch.zeros(3, config.dim, dtype=torch.float64))

    def share(self, views: Views) -> Shares:
        """Each half's embedding (2B, D), speaker and source (2B,)."""
        assert views.halves is not None
        assert views.half_frames is not None
        assert views.speakers is not None
        assert views.sources is not None
        pooled = torch.stack([views.halves.output[rows].float().mean(0) for rows in views.half_frames.slices()])
        rows_RD = F.normalize(self.head(pooled).float(), dim=1, eps=1e-8)
        return rows_RD, views.speakers.repeat_interleave(2), views.sources.repeat_interleave(2)

    def forward(self, views: Views, whole: Shares) -> Outcome:
        """The loss of the whole update."""
        del views
        rows_RD, speakers_R, sources_R = whole
        is_negative_RR = torch.ones(len(rows_RD), len(rows_RD), dtype=torch.bool, device=rows_RD.device)
        if not self.config.same_speaker_negatives:
            is_negative_RR &= speakers_R[:, None] != speakers_R
        if not self.config.other_source_negatives:
            is_negative_RR &= sources_R[:, None] == sources_R
        with torch.autocast(rows_RD.device.type, enabled=False):
            loss, wins = nt_xent(rows_RD, is_negative_RR, self.config.temperature)
        return Outcome(loss, {"accuracy": wins}, moments(rows_RD))

    def watch(self) -> dict[str, float]:
        """The spread of embeddings: 1/√D where they fill the sphere, zero where all agree."""
        return {"embedding_std": float(spread(self.window))}
