"""Keep the stem's frames small: wav2vec 2.0's and HuBERT's penalty on their mean square."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from sonorant.tasks.task import Outcome, Per, Shares, Task, View, Views, precise


def mean_square(stem_FC: Tensor) -> Tensor:
    """Σ over frames of the mean square of their channels, float32."""
    return precise(stem_FC).square().mean(1).sum()


class Magnitude(Task):
    """No head: it reads the stem's frames before they are normed."""

    per: ClassVar[Per] = "frame"
    views: Mapping[View, int | None] = {}

    def forward(self, views: Views, whole: Shares) -> Outcome:
        """The mean square of all frames."""
        del whole
        return Outcome(mean_square(views.stem))
