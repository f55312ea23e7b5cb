"""How the heads are fitted: Adam for so many updates, and the one that was best on dev is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sonorant.evaluation.probes.heads import Head, States

Progress = Callable[[int, float], None]
"""Is told the update and the error on dev there."""


@dataclass(frozen=True)
class Budget:
    """How a head is fitted; `batch_frames` bounds what is computed at once, `hidden_dim` None is SUPERB's.

    `is_standardised` gives every dimension of every layer mean 0 and variance 1 over the training frames: the states of
    a pre-norm encoder hardly move beside their mean, and Adam is long in finding that. SUPERB leaves them as they are.
    """

    num_updates: int
    learning_rate: float
    batch_frames: int
    evaluate_every: int = 100
    hidden_dim: int | None = None
    is_standardised: bool = True
    seed: int = 0


def fit_head(
    make: Callable[[], Head],
    states: Sequence[States],
    loss_of: Callable[[Head, list[int]], Tensor],
    dev_error: Callable[[Head], float],
    budget: Budget,
    report: Progress | None = None,
) -> tuple[Head, int, float]:
    """Of the heads after every `evaluate_every` updates and after the last one, the first of lowest error on dev; the
    update after which it was so; and that error.

    `loss_of` is told which rows of `states` are in the batch. Gradients are clipped at norm 1; on a CPU the same seed
    and number of threads make the same bits, and nobody else's random numbers are taken.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(budget.seed)
        head = make().train()
        if budget.is_standardised:
            head.mix.standardise(states)
        optimizer = torch.optim.Adam(head.parameters(), lr=budget.learning_rate)
        rng = np.random.default_rng(budget.seed)
        batches = draw_batches([one.shape[1] for one in states], budget.batch_frames, rng)
        lowest, best, kept = math.inf, 0, head.state_dict()
        for update in range(1, budget.num_updates + 1):
            optimizer.zero_grad()
            torch.autograd.backward(loss_of(head, next(batches)))
            nn.utils.clip_grad_norm_(head.parameters(), 1.0)
            optimizer.step()
            if update % budget.evaluate_every == 0 or update == budget.num_updates:
                error = dev_error(head.eval())
                head.train()
                if error < lowest:
                    lowest, best = error, update
                    kept = {name: value.clone() for name, value in head.state_dict().items()}
                if report:
                    report(update, error)
        head.load_state_dict(kept)
    return head.eval(), best, lowest


def draw_batches(lengths: Sequence[int], batch_frames: int, rng: np.random.Generator) -> Iterator[list[int]]:
    """Rows of utterances without end, every epoch in another order: as many as have so many frames, or one."""
    while True:
        batch: list[int] = []
        for row in rng.permutation(len(lengths)).tolist():
            if batch and sum(lengths[one] for one in batch) + lengths[row] > batch_frames:
                yield batch
                batch = []
            batch.append(row)
        yield batch


def deal(labels: Sequence[str], num_folds: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """A fold for each row, (N,): the rows of one label, shuffled, go to the folds in turn."""
    names = np.asarray(labels)
    folds = np.zeros(len(names), np.int64)
    for name in sorted(set(labels)):
        rows = rng.permutation(np.flatnonzero(names == name))
        folds[rows] = np.arange(len(rows)) % num_folds
    return folds


def check_states(where: str, states: States, like: States) -> None:
    """ValueError where states are of another shape than others of the same encoder, or not finite."""
    num_layers, _, dim = like.shape
    if (states.shape[0], states.shape[2]) != (num_layers, dim):
        raise ValueError(
            f"probe: found states {states.shape} of {where}, wanted ({num_layers}, frames, {dim}): take all from one "
            "encoder"
        )
    if not np.isfinite(states).all():
        raise ValueError(
            f"probe: found states of {where} that are not finite, wanted finite ones: train the encoder with a lower "
            "learning rate"
        )
