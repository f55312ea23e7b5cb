"""How utterances become updates: one order, whatever the number of ranks, that can be entered anywhere.

An update's utterances, crops and masks follow from the seed, the epoch and the update alone. Ranks and
micro-batches each take a part of the update, so two ranks see what one rank with the same `batch_seconds`
sees, and a run resumes on any number of ranks. (lhotse's samplers deal batches to ranks: their order depends
on how many there are.)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sonorant.config import AlignmentConfig, BatchingConfig, MaskingConfig, PerturbationConfig, UtteranceConfig
from sonorant.data import frames
from sonorant.data.audio import standardise
from sonorant.data.corpus import Utterance, read_waves
from sonorant.data.masking import equalise, span_mask
from sonorant.data.pairs import Pictures
from sonorant.data.perturbation import draw_warp, frames_before, make_twins, perturb
from sonorant.data.units import UnitStore

NO_WAVE = np.zeros(0, np.float32)
AHEAD_SECONDS = 60  # of audio made ready where it comes from a store, which now and then takes its time
LOADERS = 4  # updates made ready at once then: a small one is a few reads, each of which takes a while


@dataclass
class Batch:
    """Utterances end to end: waves (N,) as pack_waves lays them, mask (F,), units (F,) or None.

    seeds has a number an utterance from which all its random numbers follow, the same however an update is divided;
    speakers and sources (B,) number who speaks and in which corpus. halves (N',) are the two disjoint halves of each
    utterance, one after the other, where a task compares them; twins likewise the utterance and its perturbed copy, in
    either order. image_ids (B,) number the image that belongs to each utterance, -1 for none; pictures are the images
    there are, in that order.
    """

    waves: Tensor
    num_samples: tuple[int, ...]
    mask: Tensor
    units: Tensor | None = None
    seeds: tuple[int, ...] = ()
    speakers: Tensor | None = None
    sources: Tensor | None = None
    halves: Tensor | None = None
    half_samples: tuple[int, ...] = ()
    twins: Tensor | None = None
    twin_samples: tuple[int, ...] = ()
    image_ids: Tensor | None = None
    pictures: tuple[Tensor, ...] = ()

    @property
    def seconds(self) -> float:
        """Audio in it."""
        return sum(self.num_samples) / frames.SAMPLE_RATE

    def moved(self, move: Callable[[Tensor], Tensor]) -> Batch:
        """The same with every tensor moved."""
        moved: dict[str, Any] = {name: move(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved, pictures=tuple(map(move, self.pictures)))

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        return self.moved(lambda tensor: tensor.to(device, non_blocking=True))


@dataclass(frozen=True)
class Cursor:
    """Where in the endless stream of utterances the next update begins."""

    epoch: int = 0
    position: int = 0
    update: int = 0


@dataclass(frozen=True)
class Crop:
    """A piece of an utterance on the frame grid."""

    utterance: Utterance
    first_frame: int
    num_source_frames: int
    warp: float = 1.0
    """How many times as fast it is played."""

    @property
    def num_frames(self) -> int:
        """Frames it makes when played so fast."""
        return frames.num_frames(int(frames.num_samples(self.num_source_frames) / self.warp))


class Loader:
    """This rank's share of every update."""

    def __init__(
        self,
        utterances: Sequence[Utterance],
        units: UnitStore | None,
        batching: BatchingConfig,
        masking: MaskingConfig,
        seed: int,
        rank: int = 0,
        num_ranks: int = 1,
        perturbation: PerturbationConfig | None = None,
        halves: UtteranceConfig | None = None,
        twins: AlignmentConfig | None = None,
        pictures: Pictures | None = None,
        is_standardised: bool = True,
        pin: bool = False,
    ) -> None:
        """`halves`, `twins`: how the halves of utterances, or their copies, are changed, where a task compares them;
        `is_standardised`: whether waves are brought to mean 0 and variance 1; `pin`: for a GPU's sake."""
        self.utterances, self.units = list(utterances), units
        self.halves, self.twins, self.pictures, self.pin = halves, twins, pictures, pin
        self.is_standardised = is_standardised
        self.speakers, self.sources = (
            {name: number for number, name in enumerate(sorted(names))}
            for names in ({u.speaker for u in self.utterances}, {u.source for u in self.utterances})
        )
        self.batching, self.masking, self.seed = batching, masking, seed
        self.perturbation = perturbation or PerturbationConfig()
        if self.perturbation != PerturbationConfig() and not is_standardised:
            raise ValueError(
                "perturbation: found some, and an encoder that hears waves as they were recorded, wanted none: "
                "perturbed waves are standardised; leave perturbation out"
            )
        self.rank, self.num_ranks = rank, num_ranks
        self._orders: dict[int, tuple[list[int], frozenset[int]]] = {}
        self.max_frames = frames.num_frames(round(batching.crop_seconds * frames.SAMPLE_RATE))
        parts = num_ranks * batching.micro_batches
        if len(self.utterances) < parts:
            raise ValueError(
                f"batching: found {len(self.utterances)} utterances for {num_ranks} ranks × "
                f"{batching.micro_batches} micro-batches, wanted at least one each: use fewer or more speech"
            )
        if units is not None:
            check_labels(self.utterances, units)

    def updates(self, cursor: Cursor) -> Generator[tuple[list[Batch], Cursor]]:
        """From `cursor` on: this rank's micro-batches of each update, and where the next one begins."""
        is_here = all(utterance.elsewhere is None for utterance in self.utterances)
        ahead = 1 if is_here else max(1, int(AHEAD_SECONDS * self.num_ranks / self.batching.batch_seconds))
        pending: deque[tuple[Future[list[Batch]], Cursor]] = deque()
        pool = ThreadPoolExecutor(min(ahead, LOADERS))
        try:
            while True:
                while len(pending) <= ahead:
                    crops, after = self.plan(cursor)
                    pending.append((pool.submit(self._load, crops, cursor.update), after))
                    cursor = after
                batches, after = pending.popleft()
                yield batches.result(), after
        finally:
            pool.shutdown(cancel_futures=True)

    def plan(self, cursor: Cursor) -> tuple[list[Crop], Cursor]:
        """The crops of one update over all ranks, and where the next update begins."""
        epoch, position = cursor.epoch, cursor.position
        order, ends = self._order(epoch)
        rng = np.random.default_rng((self.seed, 1, cursor.update))
        crops: list[Crop] = []
        seconds = 0.0
        while True:
            if position == len(order):
                epoch, position = epoch + 1, 0
                order, ends = self._order(epoch)
            utterance = self.utterances[order[position]]
            count = min(utterance.num_frames, self.max_frames)
            room = utterance.num_frames - count
            first = 0 if self.batching.start_crops else int(rng.integers(room + 1))
            crop = Crop(utterance, first, count, draw_warp(self.perturbation, rng))
            length = frames.num_samples(crop.num_frames) / frames.SAMPLE_RATE
            enough = len(crops) >= self.num_ranks * self.batching.micro_batches
            if enough and (seconds + length > self.batching.batch_seconds or position in ends):
                return crops, Cursor(epoch, position, cursor.update + 1)
            crops.append(crop)
            seconds += length
            position += 1

    def _order(self, epoch: int) -> tuple[list[int], frozenset[int]]:
        """The utterances of an epoch in order, and the places in it that no update reaches across."""
        if epoch not in self._orders:
            self._orders = {epoch: self._draw_order(np.random.default_rng((self.seed, 0, epoch)))}
        return self._orders[epoch]

    def _draw_order(self, rng: np.random.Generator) -> tuple[list[int], frozenset[int]]:
        order: list[int] = rng.permutation(len(self.utterances)).tolist()
        if (buckets := self.batching.length_buckets) == 1:
            return order, frozenset()
        # Classes of length are cut into pieces of an update each, and the pieces follow one another in random order.
        lengths = np.array([min(u.num_frames, self.max_frames) for u in self.utterances])
        pieces: list[list[int]] = []
        for members in np.array_split(sorted(order, key=lengths.__getitem__), buckets):
            seconds = np.inf
            for row in rng.permutation(members).tolist():
                length = frames.num_samples(int(lengths[row])) / frames.SAMPLE_RATE
                if seconds + length > self.batching.batch_seconds:
                    pieces.append([])
                    seconds = 0.0
                pieces[-1].append(row)
                seconds += length
        shuffled = [pieces[index] for index in rng.permutation(len(pieces))]
        ends = np.cumsum([0, *(len(piece) for piece in shuffled)])
        return [row for piece in shuffled for row in piece], frozenset(ends.tolist())

    def _load(self, crops: Sequence[Crop], update: int) -> list[Batch]:
        masks = [
            span_mask(crop.num_frames, self.masking, np.random.default_rng((self.seed, 2, update, row)))
            for row, crop in enumerate(crops)
        ]
        if self.masking.equalise:
            masks = equalise(masks, np.random.default_rng((self.seed, 3, update)))
        parts = split_evenly(
            [crop.num_frames for crop in crops], self.num_ranks * self.batching.micro_batches
        )
        mine = parts[self.rank :: self.num_ranks]
        batches = [self._batch(crops, masks, rows, update) for rows in mine]
        return [batch.moved(Tensor.pin_memory) for batch in batches] if self.pin else batches

    def _batch(
        self, crops: Sequence[Crop], masks: Sequence[NDArray[np.bool_]], rows: Sequence[int], update: int
    ) -> Batch:
        waves, units, halves, twins = [], [], [], []
        # What is heard behind a crop is the update's next one, wherever that is computed.
        behind = {row: (row + 1) % len(crops) for row in rows} if self.perturbation.noise_share else {}
        heard = sorted({*rows, *behind.values()})
        whole = read_waves([crops[row].utterance for row in heard])
        pieces = {row: cut(crops[row], wave, self.is_standardised) for row, wave in zip(heard, whole, strict=True)}
        for row in rows:
            crop, rng = crops[row], np.random.default_rng((self.seed, 4, update, row))
            other = pieces[behind[row]] if behind else NO_WAVE
            wave = perturb(pieces[row], crop.warp, other, self.perturbation, rng)
            waves.append(wave[: frames.num_samples(crop.num_frames)])
            if self.units is not None:
                source = frames_before(crop.num_frames, crop.warp, crop.num_source_frames)
                units.append(self.units[crop.utterance.id][crop.first_frame + source])
            if self.halves is not None:
                halves += split_in_halves(waves[-1], self.halves, np.random.default_rng((self.seed, 5, update, row)))
            if self.twins is not None:
                both = make_twins(pieces[row], self.twins, np.random.default_rng((self.seed, 7, update, row)))
                twins += [standardise(twin) if self.is_standardised else twin for twin in both]
        spoken = [crops[row].utterance for row in rows]
        numbers = None if self.pictures is None else [self.pictures.number(utterance) for utterance in spoken]
        shown = [utterance for utterance, number in zip(spoken, numbers or (), strict=False) if number >= 0]
        return Batch(
            torch.from_numpy(frames.pack_waves(waves)),
            tuple(len(wave) for wave in waves),
            torch.from_numpy(np.concatenate([masks[row] for row in rows])),
            torch.from_numpy(np.concatenate(units).astype(np.int64)) if units else None,
            tuple(int(np.random.default_rng((self.seed, 6, update, row)).integers(2**62)) for row in rows),
            torch.tensor([self.speakers[utterance.speaker] for utterance in spoken]),
            torch.tensor([self.sources[utterance.source] for utterance in spoken]),
            torch.from_numpy(frames.pack_waves(halves)) if halves else None,
            tuple(len(half) for half in halves),
            torch.from_numpy(frames.pack_waves(twins)) if twins else None,
            tuple(len(twin) for twin in twins),
            torch.tensor(numbers) if numbers is not None else None,
            self.pictures.read(shown) if self.pictures is not None else (),
        )


def cut(crop: Crop, wave: NDArray[np.float32], is_standardised: bool) -> NDArray[np.float32]:
    """The crop's samples of its whole utterance's `wave` (S,), which may be standardised, in memory of their own."""
    start = crop.first_frame * frames.HOP_SAMPLES
    heard = standardise(wave) if is_standardised else wave
    return heard[start : start + frames.num_samples(crop.num_source_frames)].copy()


def split_in_halves(
    wave: NDArray[np.float32], config: UtteranceConfig, rng: np.random.Generator
) -> list[NDArray[np.float32]]:
    """Two parts of a wave on the frame grid, each made louder or quieter, with noise.

    They have no sample in common where the wave has three frames or more.
    """
    num_frames = frames.num_frames(len(wave))
    first = max(1, num_frames // 2)
    # The first part's last window reaches into the frame after it.
    begin = min(first + 1, num_frames - 1) * frames.HOP_SAMPLES
    halves = []
    for half in (wave[: frames.num_samples(first)], wave[begin:]):
        gain = 10 ** (rng.uniform(-config.max_gain_db, config.max_gain_db) / 20)
        snr_db = rng.uniform(config.min_snr_db, config.max_snr_db)
        noise = rng.standard_normal(len(half), dtype=np.float32) * np.float32(half.std() * 10 ** (-snr_db / 20))
        halves.append(np.float32(gain) * (half + noise))
    return halves


def check_labels(utterances: Iterable[Utterance], units: UnitStore) -> None:
    """ValueError where an utterance has not one unit a frame."""
    for utterance in utterances:
        if (found := len(units[utterance.id])) != utterance.num_frames:
            raise ValueError(
                f"units: found {found} labels for {utterance.id}, wanted {utterance.num_frames}, "
                "one a frame: cluster this corpus again"
            )


def split_evenly(lengths: Sequence[int], num_parts: int) -> list[list[int]]:
    """Rows dealt to `num_parts` parts of nearly equal length, longest first; within a part in order."""
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    totals = [0] * num_parts
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        part = min(range(num_parts), key=lambda i: (len(parts[i]) > 0, totals[i]))
        parts[part].append(row)
        totals[part] += lengths[row]
    return [sorted(part) for part in parts]
