"""What a task is: a head, a loss and the targets they need, pulling on the encoder with a weight.

A task says which views of the audio it reads and how deep; the engine computes each view once, however many tasks
read it. A task never changes itself in its forward pass: what an update must add up over its parts and ranks it
returns as statistics and gets back, summed, when the update is done.

Shapes: F frames, M masked frames, B utterances, S samples, D width, K codebooks, V codes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from sonorant.data.frames import Ragged
from sonorant.models.encoder import Hidden
from sonorant.models.quantizer import Quantised

View = Literal["masked", "clean", "halves", "twins", "spoken", "teacher", "quantised"]
Per = Literal["masked", "frame", "sample", "utterance", "update"]
Front = tuple[Tensor, Tensor, Tensor]
"""The stem's frames, the same normed, and projected."""
Shares = tuple[Tensor, ...]
"""What a part of an update lets the whole update know: tensors with one first dimension."""
NEVER = -1e4
"""A logit that takes no part: finite, because -inf minus -inf is not a number; e^-10000 is 0 in float32."""


@dataclass
class Views:
    """A part of an update as tasks see it: F frames of utterances end to end.

    mask (F,) is true where the masked view was masked. units (F,) are the offline units, if any; speakers and
    sources (B,) number who speaks and in which corpus; seeds has one number an utterance, the same however the
    update was divided. stem (F, C) are the stem's frames, features the same normed, z (F, D) projected: none of them
    masked, and made when the first of them is read. A view that no task with weight asked for is None:

    masked, clean: the context network's states with and without masks; halves: those of each utterance's two
    halves, one after the other; twins: those of each utterance and its perturbed copy, likewise, in either order;
    anchors: what the encoder as it was makes of the twins; spoken, seen (P, E): the P utterances that have an image,
    and the images, in one space; image_ids (P,) number the images, pair_seeds (P,) are those utterances' seeds;
    targets (K, M, D): the teacher's; quantised: the un-masked features at masked frames.
    """

    frames: Ragged
    mask: Tensor
    waves: Tensor
    num_samples: tuple[int, ...]
    seeds: tuple[int, ...]
    listen: Callable[[], Front]
    units: Tensor | None = None
    speakers: Tensor | None = None
    sources: Tensor | None = None
    masked: Hidden | None = None
    clean: Hidden | None = None
    halves: Hidden | None = None
    half_frames: Ragged | None = None
    twins: Hidden | None = None
    twin_frames: Ragged | None = None
    anchors: Hidden | None = None
    spoken: Tensor | None = None
    seen: Tensor | None = None
    image_ids: Tensor | None = None
    pair_seeds: Tensor | None = None
    targets: Tensor | None = None
    quantised: Quantised | None = None

    @cached_property
    def front(self) -> Front:
        """Of the update's waves, computed once."""
        return self.listen()

    @property
    def stem(self) -> Tensor:
        """The stem's frames (F, C)."""
        return self.front[0]

    @property
    def features(self) -> Tensor:
        """The stem's frames normed (F, C)."""
        return self.front[1]

    @property
    def z(self) -> Tensor:
        """The projected frames (F, D)."""
        return self.front[2]

    @cached_property
    def masked_frames(self) -> Ragged:
        """How many frames of each utterance are masked."""
        return Ragged(tuple(int(n) for n in torch.stack([self.mask[rows].sum() for rows in self.frames.slices()])))

    def uniform(self, purpose: int, width: int) -> Tensor:
        """Random numbers in [0, 1) for every masked frame, (M, width), the same however the update was divided."""
        return torch.cat(list(self._uniform_rows(purpose, width)))

    def _uniform_rows(self, purpose: int, width: int) -> Iterator[Tensor]:
        device = self.mask.device
        for seed, count in zip(self.seeds, self.masked_frames.lengths, strict=True):
            generator = torch.Generator(device).manual_seed(seed + purpose)
            yield torch.rand(count, width, generator=generator, device=device)


@dataclass
class Outcome:
    """What a task makes of one part of an update.

    loss: a sum over what `per` counts; sums: to be logged as averages over the same; statistics: whatever must be
    added up over the parts of the update; times: how many parts have computed all this, each as a whole.
    """

    loss: Tensor
    sums: dict[str, Tensor] = field(default_factory=dict)
    statistics: Tensor | None = None
    times: int = 1


class Task(nn.Module, ABC):
    """The head and what is asked of it.

    `per` says what the loss is a sum over: masked frames, frames, samples or utterances of all ranks, or nothing,
    where every part of the update computes the whole update's loss. `views` maps each view that is read to the
    deepest layer read of it, None for all.
    """

    per: ClassVar[Per] = "masked"
    needs_units: ClassVar[bool] = False
    views: Mapping[View, int | None]

    @abstractmethod
    def forward(self, views: Views, whole: Shares) -> Outcome:
        """The loss on one part of an update, given the shares of all parts end to end."""

    def share(self, views: Views) -> Shares:
        """What the whole update must know of this part; nothing, if the loss is a sum over frames."""
        del views
        return ()

    def settle(self, statistics: Tensor, update: int) -> None:
        """Take in the sums over one update, its optimizer step made, `update` updates done."""

    def monitor(self) -> dict[str, float]:
        """Numbers on everything settled since the last call, which begins anew."""
        return {}


class Monitored(Task, ABC):
    """A task that watches what its statistics add up to between two entries of the journal.

    The window is part of the checkpoint, so that an interrupted run logs what an undisturbed one does.
    """

    window: Tensor

    def settle(self, statistics: Tensor, update: int) -> None:
        """Add the update's sums to the window."""
        del update
        self.window += statistics

    def monitor(self) -> dict[str, float]:
        """What the window shows; then it is emptied."""
        numbers = self.watch() if self.window.any() else {}
        self.window.zero_()
        return numbers

    @abstractmethod
    def watch(self) -> dict[str, float]:
        """Numbers on a window that is not empty."""


def precise(x: Tensor) -> Tensor:
    """At least float32: what is lower is raised, float64 stays, so that `gradcheck` can look at a loss."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def moments(x_MD: Tensor) -> Tensor:
    """Count, sum and sum of squares of each dimension, (3, D) float64: spreads add up where they are sums."""
    x_MD = x_MD.detach().double()
    return torch.stack([x_MD.new_full(x_MD.shape[1:], len(x_MD)), x_MD.sum(0), x_MD.square().sum(0)])


def spread(moments_3D: Tensor) -> Tensor:
    """√(variance over frames + 1e-6), averaged over dimensions: near zero when all frames agree."""
    count, total, squares = moments_3D
    variance: Tensor = squares / count - (total / count).square()
    return (variance.clamp(min=0) + 1e-6).sqrt().mean()


def perplexity(counts_KV: Tensor) -> Tensor:
    """exp(entropy) of the codes that were used, for each codebook: (K,). V where all are used alike, 1 for one."""
    shares = counts_KV.double() / counts_KV.double().sum(-1, keepdim=True).clamp(min=1)
    entropy_K: Tensor = torch.special.entr(shares).sum(-1)
    return entropy_K.exp()
