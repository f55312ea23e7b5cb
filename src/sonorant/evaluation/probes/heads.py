"""The heads of SUPERB's probes (Yang et al., Interspeech 2021; evaluation.md §3.1) on a learned sum of layers.

Shapes: L layers, T frames of an utterance, F frames of a batch, U utterances, D dimensions, H hidden ones, C outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence, unpack_sequence

States = NDArray[np.floating[Any]]
"""(L, T, D): what every layer makes of an utterance; it may lie on disk."""
LINEAR_DIM = 256
RECURRENT_DIM = 1024
DROPOUT = 0.2
"""Between the recurrent layers."""


class Mix(nn.Module):
    """h = Σ softmax(w)_l · state_l with w zero at first, each dimension of each layer shifted and scaled before."""

    shift: Tensor
    scale: Tensor

    def __init__(self, num_layers: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_layers))
        self.register_buffer("shift", torch.zeros(num_layers, 1, dim))
        self.register_buffer("scale", torch.ones(num_layers, 1, dim))

    def forward(self, states_LFD: Tensor) -> Tensor:
        """(F, D)."""
        scaled_LFD = (states_LFD - self.shift) * self.scale
        return (self.weight.softmax(0) @ scaled_LFD.flatten(1)).view_as(scaled_LFD[0])

    @property
    def shares(self) -> NDArray[np.float32]:
        """How much is read of each layer, (L,), in sum 1."""
        found: NDArray[np.float32] = self.weight.detach().softmax(0).numpy()
        return found

    @torch.no_grad()
    def standardise(self, states: Sequence[States]) -> None:
        """Shift and scale such that these states have mean 0 and variance 1; what never varies is only shifted."""
        count = sum(utterance.shape[1] for utterance in states)
        mean_LD = sum(utterance.sum(1, dtype=np.float64) for utterance in states) / count
        variance_LD = sum(np.square(utterance - mean_LD[:, None]).sum(1) for utterance in states) / count
        self.shift.copy_(torch.from_numpy(mean_LD)[:, None])
        self.scale.copy_(torch.from_numpy(np.where(variance_LD > 0, variance_LD, 1) ** -0.5)[:, None])


class LinearHead(nn.Module):
    """Two linear maps with nothing in between: a frame's phone."""

    def __init__(self, num_layers: int, dim: int, num_outputs: int, hidden_dim: int = LINEAR_DIM) -> None:
        super().__init__()
        self.mix = Mix(num_layers, dim)
        self.project = nn.Linear(dim, hidden_dim)
        self.read = nn.Linear(hidden_dim, num_outputs)

    def forward(self, states_LFD: Tensor, lengths: Sequence[int]) -> Tensor:
        """Logits (F, C) of utterances of so many frames, one after another."""
        del lengths
        logits: Tensor = self.read(self.project(self.mix(states_LFD)))
        return logits


class RecurrentHead(nn.Module):
    """A linear map, two LSTM layers in both directions, a linear map: characters, which take context to spell."""

    def __init__(self, num_layers: int, dim: int, num_outputs: int, hidden_dim: int = RECURRENT_DIM) -> None:
        super().__init__()
        self.mix = Mix(num_layers, dim)
        self.project = nn.Linear(dim, hidden_dim)
        self.recur = nn.LSTM(hidden_dim, hidden_dim, num_layers=2, bidirectional=True, dropout=DROPOUT)
        self.read = nn.Linear(2 * hidden_dim, num_outputs)

    def forward(self, states_LFD: Tensor, lengths: Sequence[int]) -> Tensor:
        """Logits (F, C) of utterances of so many frames, one after another; none hears another."""
        parts = torch.split(self.project(self.mix(states_LFD)), list(lengths))
        heard, _ = self.recur(pack_sequence(list(parts), enforce_sorted=False))
        logits: Tensor = self.read(torch.cat(unpack_sequence(heard)))
        return logits


class NamingHead(LinearHead):
    """The same maps with the mean over an utterance's frames between them: what all of it is."""

    def forward(self, states_LFD: Tensor, lengths: Sequence[int]) -> Tensor:
        """Logits (U, C) of utterances of so many frames, one after another."""
        parts = torch.split(self.project(self.mix(states_LFD)), list(lengths))
        logits: Tensor = self.read(torch.stack([part.mean(0) for part in parts]))
        return logits


Head = LinearHead | RecurrentHead | NamingHead


def joined(states: Sequence[States]) -> Tensor:
    """Utterances one after another, (L, F, D), in float32."""
    return torch.from_numpy(np.concatenate(states, axis=1).astype(np.float32, copy=False))
