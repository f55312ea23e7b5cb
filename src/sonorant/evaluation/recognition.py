"""Phone recognition from frozen states: how many of an utterance's phones a small CTC head reads off them.

SUPERB's probe (Yang et al., Interspeech 2021; evaluation.md §3.1): h = Σ_l softmax(w)_l · state_l, two linear maps with
nothing in between, CTC, the likeliest label of each frame, repeats and blanks dropped, by the head that was best on
dev. What is not SUPERB's: there is no label for the end of a sentence, batches are counted in frames, and states may be
standardised.

Shapes: L layers, T frames of an utterance, F frames of a batch, D dimensions, H hidden ones, V phones; label 0 is the
blank, and phone v is label v + 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from sonorant.evaluation.abx.items import SILENCE

States = NDArray[np.floating[Any]]
"""(L, T, D): what every layer makes of an utterance."""
HIDDEN_DIM = 256
BLANK = 0


@dataclass(frozen=True)
class Spoken:
    """An utterance's states (L, T, D) and its phones in order, of which silence is none."""

    states: States
    phones: tuple[str, ...]

    def __post_init__(self) -> None:
        assert self.states.ndim == 3, "layers, frames, dimensions"


class Head(nn.Module):
    """From layers' states, each dimension shifted and scaled, to logits of labels."""

    shift: Tensor
    scale: Tensor

    def __init__(self, num_layers: int, dim: int, num_phones: int) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.zeros(num_layers))
        self.register_buffer("shift", torch.zeros(num_layers, 1, dim))
        self.register_buffer("scale", torch.ones(num_layers, 1, dim))
        self.project = nn.Linear(dim, HIDDEN_DIM)
        self.read = nn.Linear(HIDDEN_DIM, num_phones + 1)

    def forward(self, states_LFD: Tensor) -> Tensor:
        """(F, V + 1)."""
        scaled_LFD = (states_LFD - self.shift) * self.scale
        h_FD = (self.mix.softmax(0) @ scaled_LFD.flatten(1)).view_as(scaled_LFD[0])
        logits: Tensor = self.read(self.project(h_FD))
        return logits


@dataclass(frozen=True)
class Recogniser:
    """A head, the phones it knows, the update after which it was best on dev, and its error rate there."""

    head: Head
    phones: tuple[str, ...]
    update: int
    dev_error: float

    @property
    def weights(self) -> NDArray[np.float32]:
        """How much it reads of each layer, (L,), in sum 1."""
        found: NDArray[np.float32] = self.head.mix.detach().softmax(0).numpy()
        return found

    def recognise(self, states: Sequence[States]) -> list[list[str]]:
        """The phones heard in each utterance: the likeliest label of each frame, repeats dropped, then blanks."""
        return [[self.phones[label - 1] for label in decode(self.head, utterance)] for utterance in states]

    def error(self, utterances: Sequence[Spoken]) -> float:
        """Its error rate; ValueError as `error_rate`."""
        heard = self.recognise([utterance.states for utterance in utterances])
        return error_rate([utterance.phones for utterance in utterances], heard)


def fit_recogniser(
    train: Sequence[Spoken],
    dev: Sequence[Spoken],
    *,
    num_updates: int,
    learning_rate: float,
    batch_frames: int,
    evaluate_every: int = 100,
    is_standardised: bool = True,
    seed: int = 0,
    report: Callable[[int, float], None] | None = None,
) -> Recogniser:
    """Of the heads after every `evaluate_every` updates and after the last one, the first of lowest error rate on dev.

    By Adam, gradients clipped at norm 1; on a CPU the same bits for the same seed and number of threads.
    `is_standardised` gives every dimension of every layer mean 0 and variance 1 over the training frames: the states of
    a pre-norm encoder hardly move beside their mean, and Adam is long in finding that. SUPERB leaves them as they are.
    `report` is told the update and the error rate. Raises ValueError where there is no utterance, one has no phone,
    more phones than CTC can spell in its frames, or states that are of another shape or not finite.
    """
    for name, utterances in (("train", train), ("dev", dev)):
        check_utterances(name, utterances, train)
    sequences = [without_silence(utterance.phones) for utterance in train]
    for row, (utterance, sequence) in enumerate(zip(train, sequences, strict=True)):
        # Between two of the same there must be a blank.
        needed, found = len(sequence) + sum(a == b for a, b in pairwise(sequence)), utterance.states.shape[1]
        if needed > found:
            raise ValueError(
                f"recognition: found {len(sequence)} phones in the {found} frames of train utterance {row}, wanted "
                f"{needed} frames at least for CTC to spell them: leave it out"
            )
    phones = tuple(sorted({phone for sequence in sequences for phone in sequence}))
    place = {phone: label for label, phone in enumerate(phones, start=1)}
    labels = [torch.tensor([place[phone] for phone in sequence]) for sequence in sequences]
    num_layers, _, dim = train[0].states.shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = Head(num_layers, dim, len(phones))
    if is_standardised:
        standardise(head, [utterance.states for utterance in train])
    optimizer = torch.optim.Adam(head.parameters(), lr=learning_rate)
    lengths = [utterance.states.shape[1] for utterance in train]
    batches = draw_batches(lengths, batch_frames, np.random.default_rng(seed))
    lowest, best, kept = math.inf, 0, head.state_dict()
    for update in range(1, num_updates + 1):
        rows = next(batches)
        optimizer.zero_grad()
        logits_FV = head(joined([train[row].states for row in rows]))
        loss = ctc_loss(logits_FV, [lengths[row] for row in rows], [labels[row] for row in rows])
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        if update % evaluate_every == 0 or update == num_updates:
            error = Recogniser(head, phones, update, math.nan).error(dev)
            if error < lowest:
                lowest, best = error, update
                kept = {name: value.clone() for name, value in head.state_dict().items()}
            if report:
                report(update, error)
    head.load_state_dict(kept)
    return Recogniser(head, phones, best, lowest)


def error_rate(references: Sequence[Sequence[str]], hypotheses: Sequence[Sequence[str]]) -> float:
    """Edits over reference tokens, both summed over utterances; silence counts on neither side.

    Raises ValueError where there are not as many of both, or a reference has no token: nothing can be said of it.
    """
    from jiwer import process_words

    if not references or len(references) != len(hypotheses):
        found = f"{len(references)} references and {len(hypotheses)} hypotheses"
        raise ValueError(f"error rate: found {found}, wanted as many, and some: give one of each an utterance")
    numbers: dict[str, str] = {}

    def line(sequence: Sequence[str]) -> str:
        # Numbers in place of names: jiwer splits at spaces, and a name may hold some.
        return " ".join(numbers.setdefault(token, str(len(numbers))) for token in without_silence(sequence))

    wanted, heard = [line(sequence) for sequence in references], [line(sequence) for sequence in hypotheses]
    if "" in wanted:
        row = wanted.index("")
        raise ValueError(f"error rate: found no token in reference {row}, wanted one at least: leave it out")
    return float(process_words(wanted, heard).wer)


def without_silence(phones: Sequence[str]) -> list[str]:
    """What is said."""
    return [phone for phone in phones if phone != SILENCE]


def check_utterances(name: str, utterances: Sequence[Spoken], like: Sequence[Spoken]) -> None:
    """ValueError where there are none, one has no phone, or states that are of another shape than the first one's."""
    if not utterances:
        raise ValueError(f"recognition: found no {name} utterance, wanted some: give a corpus with phones in {name}")
    num_layers, _, dim = like[0].states.shape
    for row, utterance in enumerate(utterances):
        where, shape = f"{name} utterance {row}", utterance.states.shape
        if not without_silence(utterance.phones):
            raise ValueError(f"recognition: found no phone in {where}, wanted one at least: leave it out")
        if (shape[0], shape[2]) != (num_layers, dim):
            raise ValueError(
                f"recognition: found states {shape} of {where}, wanted ({num_layers}, frames, {dim}): take all from "
                "one encoder"
            )
        if not np.isfinite(utterance.states).all():
            raise ValueError(
                f"recognition: found states of {where} that are not finite, wanted finite ones: train the encoder "
                "with a lower learning rate"
            )


def ctc_loss(logits_FV: Tensor, lengths: Sequence[int], labels: Sequence[Tensor]) -> Tensor:
    """Mean over utterances of -log p(labels) / their number; the utterances' frames lie one after another."""
    log_probs = torch.split(logits_FV.log_softmax(-1), list(lengths))
    counts = torch.tensor([len(sequence) for sequence in labels])
    return F.ctc_loss(pad_sequence(list(log_probs)), torch.cat(list(labels)), torch.tensor(lengths), counts, BLANK)


@torch.inference_mode()
def decode(head: Head, states: States) -> list[int]:
    """An utterance's labels: the likeliest of each frame, repeats dropped, then blanks."""
    likeliest = head(joined([states])).argmax(-1).unique_consecutive()
    found: list[int] = likeliest[likeliest != BLANK].tolist()
    return found


def joined(states: Sequence[States]) -> Tensor:
    """Utterances one after another, (L, F, D), in float32."""
    return torch.from_numpy(np.concatenate(states, axis=1).astype(np.float32, copy=False))


def standardise(head: Head, states: Sequence[States]) -> None:
    """Shift and scale such that these states have mean 0 and variance 1; what never varies is only shifted."""
    count = sum(utterance.shape[1] for utterance in states)
    mean_LD = sum(utterance.sum(1, dtype=np.float64) for utterance in states) / count
    variance_LD = sum(np.square(utterance - mean_LD[:, None]).sum(1) for utterance in states) / count
    head.shift.copy_(torch.from_numpy(mean_LD)[:, None])
    head.scale.copy_(torch.from_numpy(np.where(variance_LD > 0, variance_LD, 1) ** -0.5)[:, None])


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
