"""What a page shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sonorant.evaluation.abx.items import Segment
from sonorant.evaluation.measures import System
from sonorant.evaluation.units import Joint


@dataclass(frozen=True)
class Example:
    """An utterance to draw: wave (S,) at 16 kHz, units (T,)."""

    id: str
    wave: NDArray[np.float32]
    units: NDArray[np.int64]
    phones: Sequence[Segment] | None = None
    text: str | None = None


@dataclass(frozen=True)
class Shown:
    """An image that was searched, and its place from 1 on; picture: PNG, None where there is nothing to see."""

    name: str
    text: str | None
    picture: bytes | None
    place: int
    score: float
    mark: Literal["right", "same words", ""]


@dataclass(frozen=True)
class Search:
    """An utterance, the images that it found first, and its own image, which may be none of these."""

    id: str
    text: str | None
    wave: NDArray[np.float32]
    found: Sequence[Shown]
    own: Shown
    num_images: int


@dataclass(frozen=True)
class Report:
    """All that the page shows. The first system is the model."""

    title: str
    systems: Sequence[System]
    notes: Sequence[str] = ()
    journal: Sequence[Mapping[str, Any]] = ()
    joint: Joint | None = None
    examples: Sequence[Example] = ()
    searches: Sequence[Search] = ()
    corpus: Sequence[Mapping[str, str | int | float]] = ()
    """Rows of the corpus table, all with the same keys."""
    refused: Mapping[str, int] = field(default_factory=dict)
    """Rows that were left out of the corpus, by reason."""
    durations: Sequence[float] = ()
    """Seconds of each evaluated utterance."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
