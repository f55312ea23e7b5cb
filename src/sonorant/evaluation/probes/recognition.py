"""Recognition from frozen states: phones by a linear CTC head, or characters, and so words, by a recurrent one.

SUPERB's PR and ASR (evaluation.md §3.1): CTC, the likeliest label of each frame, repeats and blanks dropped, by the
head that was best on dev. What is not SUPERB's: there is no label for the end of a sentence, no SpecAugment, batches
are counted in frames, and states may be standardised.

Shapes: L layers, T frames of an utterance, F frames of a batch, D dimensions, V tokens; label 0 is the blank, and token
v is label v + 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sonorant.evaluation.errors import error_rate
from sonorant.evaluation.probes.fitting import Budget, Progress, check_states, fit_head
from sonorant.evaluation.probes.heads import (
    LINEAR_DIM,
    RECURRENT_DIM,
    Head,
    LinearHead,
    RecurrentHead,
    States,
    joined,
)

BLANK = 0


@dataclass(frozen=True)
class Spoken:
    """An utterance's states (L, T, D) and its tokens in order: phones without silence, or characters."""

    states: States
    tokens: tuple[str, ...]

    def __post_init__(self) -> None:
        assert self.states.ndim == 3, "layers, frames, dimensions"


@dataclass(frozen=True)
class Recogniser:
    """A head, the tokens it knows, the update after which it was best on dev, and its error rate there."""

    head: Head
    tokens: tuple[str, ...]
    update: int
    dev_error: float

    def recognise(self, states: States) -> list[str]:
        """The tokens heard: the likeliest label of each frame, repeats dropped, then blanks."""
        return [self.tokens[label - 1] for label in decode(self.head, states)]

    def error(self, utterances: Sequence[Spoken]) -> float:
        """Its error rate in tokens; ValueError as `error_rate`."""
        heard = [self.recognise(utterance.states) for utterance in utterances]
        return error_rate([utterance.tokens for utterance in utterances], heard)


def fit_recogniser(
    train: Sequence[Spoken],
    dev: Sequence[Spoken],
    budget: Budget,
    *,
    is_recurrent: bool = False,
    report: Progress | None = None,
) -> Recogniser:
    """The head that reads these tokens best on dev, as `fit_head` fits it.

    Raises ValueError where there is no utterance, one has no token, more tokens than CTC can spell in its frames, or
    states that are of another shape or not finite.
    """
    for name, utterances in (("train", train), ("dev", dev)):
        check_utterances(name, utterances, train)
    for row, utterance in enumerate(train):
        needed, found = fewest_frames(utterance.tokens), utterance.states.shape[1]
        if needed > found:
            raise ValueError(
                f"probe: found {len(utterance.tokens)} tokens in the {found} frames of train utterance {row}, wanted "
                f"{needed} frames at least for CTC to spell them: leave it out"
            )
    tokens = tuple(sorted({token for utterance in train for token in utterance.tokens}))
    place = {token: label for label, token in enumerate(tokens, start=1)}
    labels = [torch.tensor([place[token] for token in utterance.tokens]) for utterance in train]
    num_layers, _, dim = train[0].states.shape

    def make() -> Head:
        if is_recurrent:
            return RecurrentHead(num_layers, dim, len(tokens) + 1, budget.hidden_dim or RECURRENT_DIM)
        return LinearHead(num_layers, dim, len(tokens) + 1, budget.hidden_dim or LINEAR_DIM)

    def loss_of(head: Head, rows: list[int]) -> Tensor:
        lengths = [train[row].states.shape[1] for row in rows]
        logits_FC = head(joined([train[row].states for row in rows]), lengths)
        return ctc_loss(logits_FC, lengths, [labels[row] for row in rows])

    def dev_error(head: Head) -> float:
        return Recogniser(head, tokens, 0, math.nan).error(dev)

    head, update, error = fit_head(make, [one.states for one in train], loss_of, dev_error, budget, report)
    return Recogniser(head, tokens, update, error)


def fewest_frames(tokens: Sequence[str]) -> int:
    """How many frames CTC needs to spell tokens: between two of the same there must be a blank."""
    return len(tokens) + sum(a == b for a, b in pairwise(tokens))


def check_utterances(name: str, utterances: Sequence[Spoken], like: Sequence[Spoken]) -> None:
    """ValueError where there are none, one has no token, or states that are of another shape than the first one's."""
    if not utterances:
        raise ValueError(f"probe: found no {name} utterance, wanted some: give a corpus with such labels in {name}")
    for row, utterance in enumerate(utterances):
        if not utterance.tokens:
            raise ValueError(f"probe: found no token in {name} utterance {row}, wanted one at least: leave it out")
        check_states(f"{name} utterance {row}", utterance.states, like[0].states)


def ctc_loss(logits_FC: Tensor, lengths: Sequence[int], labels: Sequence[Tensor]) -> Tensor:
    """Mean over utterances of -log p(labels) / their number; the utterances' frames lie one after another."""
    log_probs = torch.split(logits_FC.log_softmax(-1), list(lengths))
    counts = torch.tensor([len(sequence) for sequence in labels])
    return F.ctc_loss(pad_sequence(list(log_probs)), torch.cat(list(labels)), torch.tensor(lengths), counts, BLANK)


@torch.inference_mode()
def decode(head: Head, states: States) -> list[int]:
    """An utterance's labels: the likeliest of each frame, repeats dropped, then blanks."""
    likeliest = head(joined([states]), [states.shape[1]]).argmax(-1).unique_consecutive()
    found: list[int] = likeliest[likeliest != BLANK].tolist()
    return found
