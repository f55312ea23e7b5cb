"""Speech and images know what belongs together among all pairs of the update (grounding.md §1.2).

Masked-margin softmax (Ilharco et al. 2019) and InfoNCE in one: the first has dot products and a margin, the second
cosines and a temperature. Other captions of the same image are told from nothing.

Shapes: P pairs of the whole update, Q of former updates in the queue, E width of the common space.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sonorant.config import GroundingConfig
from sonorant.tasks.task import NEVER, Monitored, Outcome, Per, Shares, View, Views, moments, precise, spread

MAX_SCALE = 100.0
"""Of the cosine, as in CLIP (Radford et al. 2021)."""


def matching_loss(
    spoken_PE: Tensor,
    seen_PE: Tensor,
    ids_P: Tensor,
    queued: tuple[Tensor, Tensor, Tensor],
    scale: Tensor,
    margin: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean over pairs of -log softmax of their score among their utterance's and among their image's, added; and the
    shares of utterances and of images that score highest with their own.

    Scores are scale · v·a, less the margin δ for what belongs together; where two pairs have the same image neither is
    the other's negative. queued are (spoken, seen, ids) of more pairs to be told from.
    """
    spoken_PE, seen_PE = precise(spoken_PE), precise(seen_PE)
    more_spoken, more_seen, more_ids = queued
    num_pairs = len(spoken_PE)
    own_P = torch.arange(num_pairs, device=ids_P.device)
    losses, wins = [], []
    for one, others in ((spoken_PE, (seen_PE, more_seen)), (seen_PE, (spoken_PE, more_spoken))):
        scores = scale * (one @ torch.cat([part.to(one.dtype) for part in others]).T)
        is_same = ids_P[:, None] == torch.cat([ids_P, more_ids])
        is_same[own_P, own_P] = False
        scores = scores.masked_fill(is_same, NEVER)
        wins.append((scores.argmax(1) == own_P).double().mean())
        is_own = torch.eye(*scores.shape, dtype=scores.dtype, device=scores.device)
        scores = scores - margin * is_own
        losses.append(F.cross_entropy(scores, own_P))
    return losses[0] + losses[1], wins[0], wins[1]


class Grounding(Monitored):
    """Both directions over the whole update's pairs, whatever ranks and micro-batches they were dealt to."""

    per: ClassVar[Per] = "update"
    views: Mapping[View, int | None] = {"spoken": None}
    queue: Tensor
    queue_ids: Tensor

    def __init__(self, config: GroundingConfig) -> None:
        super().__init__()
        self.config = config
        is_cosine = config.similarity == "cosine"
        self.log_scale = nn.Parameter(torch.tensor(-math.log(config.temperature))) if is_cosine else None
        size, dim = config.queue_size, config.dim
        self.register_buffer("window", torch.zeros(3, dim, dtype=torch.float64))
        self.register_buffer("queue", torch.zeros(size, 2, dim))
        self.register_buffer("queue_ids", torch.full((size,), -1))

    def share(self, views: Views) -> Shares:
        """Utterances and images (P, E) in their common space, the images' numbers, the utterances' seeds and the scale
        (P,)."""
        assert views.spoken is not None
        assert views.seen is not None
        assert views.image_ids is not None
        assert views.pair_seeds is not None
        scale = torch.ones((), device=views.spoken.device)
        if self.log_scale is not None:
            scale = self.log_scale.exp()
        # The scale is everyone's: each pair brings its part of it, and so its part of the gradient.
        return views.spoken, views.seen, views.image_ids, views.pair_seeds, scale.expand(len(views.spoken))

    def forward(self, views: Views, whole: Shares) -> Outcome:
        """The loss of the whole update; zero where it has no pair."""
        del views
        spoken_PE, seen_PE, ids_P, seeds_P, scale_P = whole
        is_filled = self.queue_ids >= 0
        queued = (self.queue[is_filled, 0], self.queue[is_filled, 1], self.queue_ids[is_filled])
        if len(ids_P):
            with torch.autocast(spoken_PE.device.type, enabled=False):
                scale = scale_P.mean()
                loss, found, heard = matching_loss(spoken_PE, seen_PE, ids_P, queued, scale, self.config.margin)
        else:
            loss = spoken_PE.sum() + seen_PE.sum() + scale_P.sum()
            found = heard = scale = loss.detach()
        sums = {"speech_to_image": found, "image_to_speech": heard, "scale": scale.detach()}
        # However the update was divided, the same pairs come into the queue.
        order = seeds_P.argsort()
        return Outcome(loss, sums, self.taken(spoken_PE.detach()[order], seen_PE.detach()[order], ids_P[order]))

    def taken(self, spoken_PE: Tensor, seen_PE: Tensor, ids_P: Tensor) -> Tensor:
        """What is watched of the update's pairs, and what of them the queue will hold, (·,) float64."""
        latest = slice(max(0, len(ids_P) - len(self.queue)), len(ids_P) if len(self.queue) else 0)
        rows = torch.cat([torch.stack([spoken_PE, seen_PE], 1)[latest].flatten(1).double(), ids_P[latest, None]], dim=1)
        return torch.cat([moments(spoken_PE).flatten(), rows.flatten()])

    def settle(self, statistics: Tensor, update: int) -> None:
        """Watch the utterances, hold the scale down, and let the pairs take the place of the queue's oldest."""
        watched, rows = statistics[: self.window.numel()], statistics[self.window.numel() :]
        super().settle(watched.view_as(self.window), update)
        if self.log_scale is not None:
            # Not in the loss, where it would have no gradient left to come back by.
            self.log_scale.clamp_(max=math.log(MAX_SCALE))
        if len(self.queue):
            table = rows.view(-1, self.queue[0].numel() + 1)
            fresh, ids = table[:, :-1].view(-1, *self.queue.shape[1:]), table[:, -1].round().long()
            self.queue.copy_(torch.cat([self.queue, fresh.to(self.queue.dtype)])[len(ids) :])
            self.queue_ids.copy_(torch.cat([self.queue_ids, ids])[len(ids) :])

    def watch(self) -> dict[str, float]:
        """The spread of utterances: 1/√E where cosines fill the sphere, zero where all agree."""
        return {"embedding_std": float(spread(self.window))}
