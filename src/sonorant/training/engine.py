"""Views → tasks → loss: the one sentence that every recipe is.

The stem runs once per distinct waveform, each view once and as deep as it is read, however many tasks read it; a
task of weight zero does not run, and a view that only such tasks read is not computed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from sonorant.config import AlignConfig, GroundConfig, StemConfig, TrainConfig
from sonorant.data.batching import Batch
from sonorant.data.frames import Ragged
from sonorant.models.encoder import Context, Encoder
from sonorant.models.grounding import Grounder
from sonorant.models.quantizer import Quantizer
from sonorant.models.teacher import Teacher
from sonorant.tasks import build_tasks
from sonorant.tasks.task import Front, Outcome, Shares, Task, View, Views

Total = Callable[[Tensor], Tensor]
"""A tensor to its sum over ranks."""
Parts = Mapping[str, Sequence[Shares]]
"""What every part of an update lets the whole know, by task, in an order that all parts agree on."""
Gather = Callable[[Mapping[str, Shares]], Parts]
"""This part's shares to those of all parts."""


def alone(shares: Mapping[str, Shares]) -> Parts:
    """Of a part that is the whole update."""
    return {name: [share] for name, share in shares.items()}


class Engine(nn.Module):
    """The shared encoder, the tasks, and what a task wants beside them: a teacher, a quantiser, the side of images, the
    context network as it was."""

    def __init__(
        self,
        encoder: Encoder,
        tasks: Mapping[str, Task],
        teacher: Teacher | None = None,
        quantizer: Quantizer | None = None,
        grounder: Grounder | None = None,
        anchor: Context | None = None,
        stem: StemConfig | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.tasks = nn.ModuleDict(dict(tasks))
        self.teacher = teacher
        self.quantizer = quantizer
        self.grounder = grounder
        self.anchor = anchor
        self.stem = stem or StemConfig()
        self.pending: dict[str, Tensor] = {}
        """Each task's statistics over the parts of the update in hand."""

    def forward(
        self,
        batch: Batch,
        weights: Mapping[str, float],
        update: int = 0,
        gather: Gather = alone,
        part: int = 0,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Σ weight · loss of the update with this index from 0, and the sums that tasks log, as `task/sum`.

        Of all parts of the update that `gather` brings together, this batch is the one with index `part`.
        """
        outcomes = self.outcomes(batch, weights, update, gather, part)
        loss = torch.stack([weights[name] * outcome.loss for name, outcome in outcomes.items()]).sum()
        for name, outcome in outcomes.items():
            if outcome.statistics is not None:
                fresh, before = outcome.statistics / outcome.times, self.pending.get(name)
                self.pending[name] = fresh if before is None else before + fresh
        sums = {
            f"{name}/{key}": value.detach() / outcome.times
            for name, outcome in outcomes.items()
            for key, value in {"loss": outcome.loss, **outcome.sums}.items()
        }
        return loss, sums

    def outcomes(
        self,
        batch: Batch,
        weights: Mapping[str, float],
        update: int = 0,
        gather: Gather = alone,
        part: int = 0,
    ) -> dict[str, Outcome]:
        """Every task's loss and sums on one part of an update; nothing is changed by it."""
        tasks = self._tasks(weights)
        views = self.views(batch, tasks, update)
        own = {name: share for name, task in tasks.items() if (share := task.share(views))}
        shares = gather(own) if own else {}
        outcomes = {}
        for name, task in tasks.items():
            # The gradient goes through this part's own share alone: every part computes the whole loss.
            live = [own[name] if index == part else share for index, share in enumerate(shares.get(name, ()))]
            outcome: Outcome = task(views, tuple(torch.cat(tensors) for tensors in zip(*live, strict=True)))
            outcomes[name] = replace(outcome, times=max(1, len(live)))
        return outcomes

    @torch.no_grad()
    def shares(self, batch: Batch, weights: Mapping[str, float], update: int) -> dict[str, Shares]:
        """What this part lets the whole update know, of the tasks whose loss is not a sum over frames."""
        tasks = {name: task for name, task in self._tasks(weights).items() if task.per == "update"}
        if not tasks:
            return {}
        views = self.views(batch, tasks, update)
        return {name: task.share(views) for name, task in tasks.items()}

    def views(self, batch: Batch, tasks: Mapping[str, Task], update: int) -> Views:
        """The views that these tasks read, each as deep as the deepest of them reads it."""
        wanted = deepest([task.views for task in tasks.values()])
        encoder, frames = self.encoder, Ragged.of_samples(batch.num_samples)
        views = Views(
            frames, batch.mask, batch.waves, batch.num_samples, batch.seeds,
            lambda: self._front(batch.waves, batch.num_samples, update),
            batch.units, batch.speakers, batch.sources,
        )  # fmt: skip
        # First what `shares` computes too, so that dropout draws there what it draws here.
        if "halves" in wanted:
            assert batch.halves is not None
            views.half_frames = Ragged.of_samples(batch.half_samples)
            z_halves = self._front(batch.halves, batch.half_samples, update)[2]
            views.halves = encoder.context(z_halves, views.half_frames, wanted["halves"])
        if "spoken" in wanted:
            self._ground(batch, views)
        if "twins" in wanted:
            assert batch.twins is not None
            views.twin_frames = Ragged.of_samples(batch.twin_samples)
            z_twins = self._front(batch.twins, batch.twin_samples, update)[2]
            views.twins = encoder.context(z_twins, views.twin_frames)
            if self.anchor is not None:
                first = encoder.context.num_frozen or 0
                views.anchors = self.anchor.climb(views.twins.states[first].detach(), views.twin_frames, first)
        if "masked" in wanted:
            views.masked = encoder.context(encoder.mask(views.z, batch.mask), frames, wanted["masked"])
        if "clean" in wanted:
            views.clean = encoder.context(views.z, frames, wanted["clean"])
        if "teacher" in wanted:
            assert self.teacher is not None
            with torch.autocast(views.z.device.type, enabled=False):
                copied = self.stem.freeze == "copy" and self._has_frozen_stem(update)
                seen_FD = self.teacher.project(batch.waves, batch.num_samples) if copied else views.z.detach()
                views.targets = self.teacher.targets(seen_FD, frames, batch.mask)
        if "quantised" in wanted:
            assert self.quantizer is not None
            uniform = views.uniform(0, self.quantizer.codewords.shape[:2].numel()) if self.training else None
            temperature = self.quantizer.temperature(update)
            views.quantised = self.quantizer(views.features[batch.mask], uniform, temperature)
        return views

    def _ground(self, batch: Batch, views: Views) -> None:
        """The utterances that have an image, and the images, into their common space."""
        grounder, encoder = self.grounder, self.encoder
        assert grounder is not None
        assert batch.image_ids is not None
        has_image = batch.image_ids >= 0
        views.image_ids = batch.image_ids[has_image]
        views.pair_seeds = torch.tensor(batch.seeds, device=has_image.device)[has_image]
        rows = [rows for rows, kept in zip(views.frames.slices(), has_image.tolist(), strict=True) if kept]
        if not rows:
            views.spoken = views.seen = views.z.new_zeros(0, grounder.config.dim)
            return
        z_FD = encoder.mask(views.z, batch.mask) if grounder.config.masked else views.z
        kept_FD = torch.cat([z_FD[part] for part in rows])
        frames = Ragged(tuple(part.stop - part.start for part in rows))
        led_FD, led = grounder.prepend(kept_FD, frames)
        states = encoder.context(led_FD, led, grounder.layer).states
        views.spoken = grounder.speech(states[grounder.layer], led)
        views.seen = grounder.image(batch.pictures)

    def _front(self, waves_N: Tensor, num_samples: Sequence[int], update: int) -> Front:
        """Stem, its norm and the projection, each (F, ·): trained, slowed down or frozen, as the recipe says."""
        encoder = self.encoder
        frozen = encoder.is_front_frozen or (self.stem.freeze == "freeze" and self._has_frozen_stem(update))
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            stem_FC: Tensor = encoder.stem(waves_N, num_samples)
            if self.stem.gradient != 1:
                # The same value, bit for bit; only the gradient is smaller.
                stem_FC = stem_FC.detach() + self.stem.gradient * (stem_FC - stem_FC.detach())
            features_FC: Tensor = encoder.stem_norm(stem_FC)
            return stem_FC, features_FC, encoder.projection(features_FC)

    def task(self, name: str) -> Task:
        """The task of that name."""
        return cast(Task, self.tasks[name])

    def _has_frozen_stem(self, update: int) -> bool:
        return self.stem.freeze_at is not None and update >= self.stem.freeze_at

    def _tasks(self, weights: Mapping[str, float]) -> dict[str, Task]:
        return {name: self.task(name) for name in self.tasks if weights.get(name)}

    @torch.no_grad()
    def after_update(self, update: int, total: Total = lambda tensor: tensor) -> None:
        """What follows an optimizer step, `update` of them made: the teacher follows, tasks settle.

        The statistics of all tasks cross the ranks as one tensor.
        """
        if self.teacher is not None:
            self.teacher.follow(self.encoder, update)
        if self.pending:
            packed = total(torch.cat([statistics.float().flatten() for statistics in self.pending.values()]))
            parts = torch.split(packed, [statistics.numel() for statistics in self.pending.values()])
            for (name, statistics), part in zip(self.pending.items(), parts, strict=True):
                self.task(name).settle(part.view_as(statistics), update)
        self.pending = {}

    def monitor(self) -> dict[str, float]:
        """Every task's numbers on what was settled since the last call, as `task/number`."""
        return {f"{name}/{key}": value for name in self.tasks for key, value in self.task(name).monitor().items()}


def deepest(wishes: Sequence[Mapping[View, int | None]]) -> dict[View, int | None]:
    """Every view that someone reads, and the deepest layer that anyone does: None is all."""
    wanted: dict[View, int | None] = {}
    for wish in wishes:
        for view, layer in wish.items():
            before = wanted.get(view, 0)
            wanted[view] = None if layer is None or before is None else max(layer, before)
    return wanted


def build_engine(config: TrainConfig, encoder: Encoder, num_units: int) -> Engine:
    """An encoder and all that the recipe's tasks need to train it.

    Raises ValueError where the recipe wants layers that the encoder has not.
    """
    config.check_encoder(encoder.config)
    encoder.checkpointing = config.checkpointing
    if config.num_trained_layers is not None:
        encoder.freeze_below(config.num_trained_layers)
    tasks = build_tasks(config, encoder.config, num_units)
    wanted = deepest([task.views for task in tasks.values()])
    teacher = Teacher(encoder, config.teacher, config.stem) if "teacher" in wanted else None
    quantizer = Quantizer(encoder.config.stem_widths[-1], config.quantiser) if "quantised" in wanted else None
    grounder = anchor = None
    if isinstance(config, GroundConfig) and "spoken" in wanted:
        grounder = Grounder(encoder.config.dim, encoder.config.num_layers, config.grounding)
    if isinstance(config, AlignConfig) and config.alignment.partner == "frozen":
        anchor = copy.deepcopy(encoder.context).requires_grad_(False)
        anchor.num_frozen = len(anchor.layers)
    return Engine(encoder, tasks, teacher, quantizer, grounder, anchor, config.stem)
