"""How much unit tokens tell about phones, and how many bits they cost (evaluation.md §3.4–3.5)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sonorant.evaluation.intervals import Estimate, ratio_of_sums

Units = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Joint:
    """How often each phone and each unit share a frame: counts (Y, K), rows in the order of `phones`."""

    phones: tuple[str, ...]
    counts: NDArray[np.int64]

    @classmethod
    def of_frames(cls, phones: Iterable[Sequence[str]], units: Iterable[Units], num_units: int) -> Joint:
        """Count the frames of utterances with aligned phones and units; the longer of a pair is cut."""
        names: dict[str, int] = {}
        rows, columns = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for labels, tokens in zip(phones, units, strict=True):
            length = min(len(labels), len(tokens))
            rows.append(np.array([names.setdefault(label, len(names)) for label in labels[:length]], np.int64))
            columns.append(np.asarray(tokens[:length], np.int64))
        flat = np.concatenate(rows) * num_units + np.concatenate(columns)
        counts = np.bincount(flat, minlength=len(names) * num_units).reshape(len(names), num_units)
        order = sorted(names)
        return cls(tuple(order), counts[[names[name] for name in order]])

    def without(self, phone: str) -> Joint:
        """The same without one phone's frames, such as silence."""
        kept = [row for row, name in enumerate(self.phones) if name != phone]
        return Joint(tuple(self.phones[row] for row in kept), self.counts[kept])

    @property
    def num_frames(self) -> int:
        """Frames counted."""
        return int(self.counts.sum())

    @property
    def pnmi(self) -> float:
        """Share of the phones' entropy that the units resolve, I(y; z) / H(y); 0 where there is one phone."""
        p = self.counts / max(1, self.num_frames)
        p_phone, p_unit = p.sum(axis=1), p.sum(axis=0)
        seen = p > 0
        information = float((p[seen] * np.log(p[seen] / np.outer(p_phone, p_unit)[seen])).sum())
        uncertainty = _entropy_bits(self.counts.sum(axis=1)) * np.log(2)
        return information / float(uncertainty) if uncertainty > 0 else 0.0

    @property
    def phone_purity(self) -> float:
        """Accuracy of guessing each unit's most frequent phone, Σ_z max_y p(y, z)."""
        return float(self.counts.max(axis=0, initial=0).sum() / max(1, self.num_frames))

    @property
    def cluster_purity(self) -> float:
        """Accuracy of guessing each phone's most frequent unit, Σ_y max_z p(y, z)."""
        return float(self.counts.max(axis=1, initial=0).sum() / max(1, self.num_frames))


def estimate_pnmi(joint: Joint, phones: Mapping[str, Sequence[str]], units: Mapping[str, Units]) -> Estimate:
    """PNMI with the influence of each of the utterances that `joint` counts; phones that it leaves out have none.

    One more copy of an utterance moves p(y, z) towards its own, so I by its mean of log p(y, z) / p(y) p(z) less I, and
    H by its mean of -log p(y) less H, both times its share of the frames.
    """
    p = joint.counts / max(1, joint.num_frames)
    p_phone, p_unit = p.sum(axis=1), p.sum(axis=0)
    seen = p > 0
    pointwise, surprise = np.zeros_like(p), np.zeros_like(p_phone)
    pointwise[seen] = np.log(p[seen] / np.outer(p_phone, p_unit)[seen])
    surprise[p_phone > 0] = -np.log(p_phone[p_phone > 0])
    information, entropy, pnmi = float((p * pointwise).sum()), float(p_phone @ surprise), joint.pnmi
    row_of = {phone: row for row, phone in enumerate(joint.phones)}
    influence = {}
    for name, labels in phones.items():
        pairs = [(row_of[label], unit) for label, unit in zip(labels, units[name], strict=False) if label in row_of]
        rows, columns = np.array(pairs, np.int64).reshape(-1, 2).T
        of_information = pointwise[rows, columns].sum() - len(rows) * information
        of_entropy = surprise[rows].sum() - len(rows) * entropy
        moved = (of_information - pnmi * of_entropy) / joint.num_frames
        influence[name] = float(moved / entropy) if entropy > 0 else 0.0
    return Estimate(pnmi, influence)


def estimate_purities(
    joint: Joint, phones: Mapping[str, Sequence[str]], units: Mapping[str, Units]
) -> tuple[Estimate, Estimate]:
    """Phone purity and cluster purity with the influence of each of the utterances that `joint` counts.

    Both are shares of frames that are guessed right; which guess is best is taken for settled.
    """
    row_of = {phone: row for row, phone in enumerate(joint.phones)}
    phone_of, unit_of = joint.counts.argmax(axis=0), joint.counts.argmax(axis=1)
    right: dict[str, tuple[float, float]] = {}
    likely: dict[str, tuple[float, float]] = {}
    for name, labels in phones.items():
        pairs = [(row_of[label], unit) for label, unit in zip(labels, units[name], strict=False) if label in row_of]
        rows, columns = np.array(pairs, np.int64).reshape(-1, 2).T
        right[name] = (float((phone_of[columns] == rows).sum()), float(len(rows)))
        likely[name] = (float((unit_of[rows] == columns).sum()), float(len(rows)))
    return ratio_of_sums(right), ratio_of_sums(likely)


@dataclass(frozen=True)
class Confusion:
    """How each phone is heard where every unit is heard as its most frequent phone: frames (Y, Y), a row for what was
    said, a column for what was heard, both in the order of `phones`."""

    phones: tuple[str, ...]
    frames: NDArray[np.int64]

    @property
    def shares(self) -> NDArray[np.float64]:
        """Of the frames of what was said, (Y, Y); a row sums to 1, or to 0 where the phone has no frame."""
        shares: NDArray[np.float64] = self.frames / np.maximum(1, self.frames.sum(axis=1, keepdims=True))
        return shares

    def largest(self, count: int, min_frames: int) -> list[tuple[str, str, float]]:
        """The phones most often heard as another, (said, heard, share), of those that have so many frames."""
        shares = self.shares
        np.fill_diagonal(shares, 0.0)
        shares[self.frames.sum(axis=1) < min_frames] = 0.0
        places = np.argsort(-shares, axis=None, kind="stable")[:count]
        cells = [divmod(place, len(self.phones)) for place in places.tolist()]
        return [(self.phones[y], self.phones[x], float(shares[y, x])) for y, x in cells if shares[y, x] > 0]


def confuse(joint: Joint) -> Confusion:
    """Which phones are heard for which, the most frequent first; `joint` must count a frame.

    A unit that two phones share evenly is heard as the more frequent of them.
    """
    order = np.argsort(-joint.counts.sum(axis=1), kind="stable")
    counts = joint.counts[order]
    stands_for = np.eye(len(order), dtype=np.int64)[counts.argmax(axis=0)]  # (K, Y)
    return Confusion(tuple(joint.phones[row] for row in order), counts @ stands_for)


@dataclass(frozen=True)
class UnitUse:
    """What a set of unit sequences costs and how much of the codebook it uses. Bitrates are in bits a second.

    A bitrate is symbols a second times the entropy of their frequencies (ZeroSpeech 2019). Symbols are the
    units of all frames; units without repeats, which loses durations; or (unit, duration), which loses nothing.
    """

    num_active: int
    """Units that occur."""
    perplexity: float
    """2 to the entropy of the units in bits: how many equally frequent units would be as varied."""
    repetition_rate: float
    """Share of frames that repeat the unit of the frame before."""
    bitrate: float
    bitrate_dedup: float
    bitrate_dedup_durations: float


def measure_use(sequences: Sequence[Units], seconds: float) -> UnitUse:
    """Statistics of unit sequences, (T,) each at the frame rate, over `seconds` of audio in all.

    Raises ValueError where there is no frame or no time.
    """
    num_frames = sum(len(sequence) for sequence in sequences)
    if not num_frames or seconds <= 0:
        raise ValueError(f"units: found {num_frames} frames in {seconds:g} s, wanted some: add speech")
    runs = [collapse(np.asarray(sequence)) for sequence in sequences]
    units = np.concatenate([units for units, _ in runs])
    durations = np.concatenate([durations for _, durations in runs])
    counts = np.bincount(units, durations).astype(np.int64)
    entropy = _entropy_bits(counts)
    _, pair_counts = np.unique(np.stack([units, durations]), axis=1, return_counts=True)
    return UnitUse(
        num_active=int((counts > 0).sum()),
        perplexity=2**entropy,
        repetition_rate=1 - len(units) / num_frames,
        bitrate=num_frames / seconds * entropy,
        bitrate_dedup=len(units) / seconds * _entropy_bits(np.bincount(units)),
        bitrate_dedup_durations=len(units) / seconds * _entropy_bits(pair_counts),
    )


def collapse(units: Units) -> tuple[Units, NDArray[np.int64]]:
    """Runs of the same unit as one: the units (R,) and how many frames each lasts (R,)."""
    if not len(units):
        return units, np.zeros(0, np.int64)
    starts = np.concatenate([[0], np.flatnonzero(units[1:] != units[:-1]) + 1])
    return units[starts], np.diff(starts, append=len(units))


def count_edits(units: Units, others: Units) -> tuple[int, int]:
    """Insertions, deletions and replacements between two utterances' units without repeats, and the first one's number.

    Summed over utterances and divided, this is how unstable units are where the second is the first one's utterance
    changed in what units should not tell: the unit edit distance of Gat et al. (2023), here over units, not frames.
    """
    from jiwer import process_words

    kept, found = (" ".join(map(str, collapse(np.asarray(one))[0].tolist())) for one in (units, others))
    counts = process_words(kept, found)
    return counts.substitutions + counts.deletions + counts.insertions, len(kept.split())


def _entropy_bits(counts: NDArray[np.integer[Any]]) -> float:
    """Entropy in bits of what was seen so often; never below 0."""
    p = counts[counts > 0] / max(1, counts.sum())
    return max(0.0, float(-(p * np.log2(p)).sum()))
