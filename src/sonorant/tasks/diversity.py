"""Use all codes alike: high entropy of the quantiser's mean probabilities over a whole update (wav2vec 2.0, eq. 4)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from sonorant.tasks.task import Outcome, Per, Shares, Task, View, Views, precise


def unused_share(probabilities_GV: Tensor) -> Tensor:
    """(GV − Σ_g exp(H(p_g))) / GV of mean probabilities: 0 where all codes are used alike, near 1 where one is."""
    probabilities_GV = precise(probabilities_GV)
    entropy_G = -(probabilities_GV * torch.log(probabilities_GV + 1e-7)).sum(1)
    return 1 - entropy_G.exp().sum() / probabilities_GV.numel()


class Diversity(Task):
    """No head of its own: it pulls on the quantiser that `contrast` reads."""

    per: ClassVar[Per] = "update"
    views: Mapping[View, int | None] = {"quantised": None}

    def share(self, views: Views) -> Shares:
        """This part's sum of probabilities, (1, G, V), and its number of frames, (1,)."""
        assert views.quantised is not None
        probabilities_MGV = views.quantised.probabilities
        count = torch.full((1,), float(len(probabilities_MGV)), device=probabilities_MGV.device)
        return probabilities_MGV.sum(0, keepdim=True), count

    def forward(self, views: Views, whole: Shares) -> Outcome:
        """The share of codes that the mean over the whole update leaves unused."""
        del views
        sums_PGV, counts_P = whole
        mean_GV = sums_PGV.sum(0) / counts_P.sum()
        loss = unused_share(mean_GV)
        return Outcome(loss)
