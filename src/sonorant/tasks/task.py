"""What a task is: a head, a loss and the targets they need, pulling on the encoder with a weight.

A task says which views of the audio it reads; the engine computes each view once, however many tasks read it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor, nn

from sonorant.data.frames import Ragged
from sonorant.models.encoder import Hidden

View = Literal["masked", "teacher"]


@dataclass
class Views:
    """A batch as tasks see it: F frames of utterances end to end.

    mask (F,) is true where the masked view was masked; units (F,) are the offline units, if any; a view that
    no task with weight asked for is None.
    """

    frames: Ragged
    mask: Tensor
    units: Tensor | None = None
    masked: Hidden | None = None
    teacher: Hidden | None = None


@dataclass
class Outcome:
    """A task's loss, summed over masked frames, and sums to be logged as averages over them."""

    loss: Tensor
    sums: dict[str, Tensor] = field(default_factory=dict)


class Task(nn.Module, ABC):
    """The head and what is asked of it."""

    views: ClassVar[frozenset[View]]
    needs_units: ClassVar[bool] = False

    @abstractmethod
    def forward(self, views: Views) -> Outcome:
        """The loss on one batch."""
