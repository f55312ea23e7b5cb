"""Names from frozen states: whose voice an utterance is, which word, which emotion.

SUPERB's SID, KS and ER (Yang et al., Interspeech 2021): the layers' learned sum, a linear map, the mean over frames, a
linear map, cross-entropy, by the head that was best on dev.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sonorant.evaluation.probes.fitting import Budget, Progress, check_states, fit_head
from sonorant.evaluation.probes.heads import LINEAR_DIM, Head, NamingHead, States, joined


@dataclass(frozen=True)
class Named:
    """An utterance's states (L, T, D) and its name."""

    states: States
    name: str

    def __post_init__(self) -> None:
        assert self.states.ndim == 3, "layers, frames, dimensions"


@dataclass(frozen=True)
class Namer:
    """A head, the names it knows, the update after which it was best on dev, and the share it named wrongly there."""

    head: Head
    names: tuple[str, ...]
    update: int
    dev_error: float

    @torch.inference_mode()
    def name(self, states: States) -> str:
        """The likeliest name."""
        return self.names[int(self.head(joined([states]), [states.shape[1]])[0].argmax())]

    def error(self, utterances: Sequence[Named]) -> float:
        """The share that is named wrongly; a name that was never fitted counts as missed."""
        return sum(self.name(one.states) != one.name for one in utterances) / len(utterances)


def fit_namer(
    train: Sequence[Named], dev: Sequence[Named], budget: Budget, *, report: Progress | None = None
) -> Namer:
    """The head that names these utterances best on dev, as `fit_head` fits it.

    Raises ValueError where there is no utterance, fewer than two names, or states that are of another shape or not
    finite.
    """
    for where, utterances in (("train", train), ("dev", dev)):
        if not utterances:
            raise ValueError(f"probe: found no {where} utterance, wanted some: give a corpus with names in {where}")
        for row, utterance in enumerate(utterances):
            check_states(f"{where} utterance {row}", utterance.states, train[0].states)
    names = tuple(sorted({one.name for one in train}))
    if len(names) < 2:
        raise ValueError(f"probe: found the name {names[0]} alone in train, wanted two at least: leave this probe out")
    labels = torch.tensor([names.index(one.name) for one in train])
    num_layers, _, dim = train[0].states.shape

    def make() -> Head:
        return NamingHead(num_layers, dim, len(names), budget.hidden_dim or LINEAR_DIM)

    def loss_of(head: Head, rows: list[int]) -> Tensor:
        states = [train[row].states for row in rows]
        return F.cross_entropy(head(joined(states), [one.shape[1] for one in states]), labels[rows])

    def dev_error(head: Head) -> float:
        return Namer(head, names, 0, math.nan).error(dev)

    head, update, error = fit_head(make, [one.states for one in train], loss_of, dev_error, budget, report)
    return Namer(head, names, update, error)
