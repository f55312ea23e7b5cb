"""Tell a masked frame's target from those of other masked frames of its utterance (wav2vec 2.0, Baevski et al. 2020).

Negatives come from the same utterance, so neither speaker nor channel gives them away (pretraining.md §3.3).

Shapes: M masked frames, N negatives, D width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sonorant.config import ContrastConfig
from sonorant.tasks.task import NEVER, Monitored, Outcome, Shares, View, Views, moments, perplexity, precise, spread


def draw_negatives(uniform_MN: Tensor, positions_M: Tensor, min_distance: int) -> tuple[Tensor, Tensor]:
    """Which masked frames of one utterance are negatives of which, (M, N), and whether there are any, (M,).

    positions_M are the masked frames' places, rising. Drawn with replacement from all that lie at least
    `min_distance` frames away.
    """
    first_M = torch.searchsorted(positions_M, positions_M - min_distance + 1)
    near_M = torch.searchsorted(positions_M, positions_M + min_distance) - first_M
    room_M = len(positions_M) - near_M
    drawn_MN = (uniform_MN * room_M[:, None]).long()
    drawn_MN = drawn_MN + near_M[:, None] * (drawn_MN >= first_M[:, None])
    return drawn_MN.clamp(max=len(positions_M) - 1), room_M > 0


def info_nce(scores_ML: Tensor, is_allowed_ML: Tensor) -> Tensor:
    """-Σ log softmax(scores)[0] among those allowed; the first is the true one's, (M, 1 + N), float32."""
    scores_ML = precise(scores_ML).masked_fill(~is_allowed_ML, NEVER)
    return -scores_ML.log_softmax(1)[:, 0].sum()


class Contrast(Monitored):
    """Two projections, of the last masked layer and of the targets, compared by cosine."""

    def __init__(self, dim: int, num_target_dims: int, num_codes: tuple[int, int], config: ContrastConfig) -> None:
        """Targets of `num_target_dims`; codes in groups, (G, V), where the targets are quantised."""
        super().__init__()
        self.config = config
        self.is_quantised = config.targets == "quantised"
        self.views: Mapping[View, int | None] = {"masked": None, **({"quantised": None} if self.is_quantised else {})}
        self.predict = nn.Linear(dim, config.dim)
        self.project = nn.Linear(num_target_dims, config.dim)
        self.num_codes = num_codes[1]
        shape = num_codes if self.is_quantised else (3, config.dim)
        self.register_buffer("window", torch.zeros(shape, dtype=torch.float64))

    def forward(self, views: Views, whole: Shares) -> Outcome:
        """Cross-entropy of the true target among the negatives; those equal to the true one do not count."""
        del whole
        assert views.masked is not None
        predicted_MD = self.predict(views.masked.output[views.mask])
        if self.is_quantised:
            assert views.quantised is not None
            targets_MD, codes_MG = self.project(views.quantised.vectors), views.quantised.codes
            counts = [torch.bincount(codes_M, minlength=self.num_codes) for codes_M in codes_MG.unbind(1)]
            statistics = torch.stack(counts).double()
        else:
            targets_MD, codes_MG = self.project(views.z[views.mask].detach()), None
            statistics = moments(targets_MD)
        uniform_MN = views.uniform(1, self.config.num_negatives)
        loss, right = predicted_MD.new_zeros((), dtype=torch.float32), torch.zeros((), device=predicted_MD.device)
        with torch.autocast(predicted_MD.device.type, enabled=False):
            predicted_MD, targets_MD = (F.normalize(x.float(), dim=1, eps=1e-8) for x in (predicted_MD, targets_MD))
            for frames, rows in zip(views.frames.slices(), views.masked_frames.slices(), strict=True):
                positions_M = views.mask[frames].nonzero()[:, 0]
                negatives_MN, has_any_M = draw_negatives(uniform_MN[rows], positions_M, self.config.min_distance)
                own_M = torch.arange(len(positions_M), device=positions_M.device)
                chosen_ML = torch.cat([own_M[:, None], negatives_MN], dim=1)
                # One product of all with all, of which the drawn are read: no negative is copied.
                scores_MM = predicted_MD[rows] @ targets_MD[rows].T / self.config.temperature
                is_other_MN = has_any_M[:, None] & (negatives_MN != own_M[:, None])
                if codes_MG is not None:
                    codes = codes_MG[rows]
                    is_other_MN = is_other_MN & (codes[negatives_MN] != codes[:, None]).any(2)
                is_allowed_ML = F.pad(is_other_MN, (1, 0), value=True)
                scores_ML = scores_MM.gather(1, chosen_ML)
                loss = loss + info_nce(scores_ML, is_allowed_ML)
                best_M = scores_ML.masked_fill(~is_allowed_ML, NEVER).argmax(1)
                right = right + ((best_M == 0) & is_other_MN.any(1)).sum()
        return Outcome(loss, {"accuracy": right}, statistics)

    def watch(self) -> dict[str, float]:
        """Over how many codes the quantiser's choices are spread, mean over groups; else the targets' spread."""
        if not self.is_quantised:
            return {"target_std": float(spread(self.window))}
        return {
            "perplexity": float(perplexity(self.window).mean()),
            "active_codes": float((self.window > 0).sum(1).double().mean()),
        }
