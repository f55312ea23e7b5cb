"""ABX: how often a phone x is nearer to another token of its own phone (a) than to one of another phone (b).

A *cell* is one ordered phone pair in one context, A and B spoken by one speaker and X by the same ("within")
or by another ("across"). Its error is the share of triplets where x is nearer to b, ties counting one half.
Errors are averaged over contexts and X speakers, then over speakers of A and B, then over phone pairs, as the
ZeroSpeech challenges do (Schatz et al., Interspeech 2013).

One matrix product gives the frame distances between X and everything its cells need; each cell reads slices.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numba import njit
from numpy.typing import NDArray

from sonorant.data.frames import FRAME_RATE

Speaker = Literal["within", "across"]
Context = Literal["any", "in"]
Slicing = Literal["fixed", "librilight"]
Distance = Literal["angular", "identical"]
Segment = tuple[str, float, float]
"""(label, start, end) in seconds."""
Floats = NDArray[np.floating[Any]]
Indices = NDArray[np.int64]

HEADER = "#file onset offset #phone prev-phone next-phone speaker"
SILENCE = "SIL"
TIE = 1e-7
"""Distances closer than this are equal: float64 resolves 7e-9 near zero, float32 6e-8 near one half."""


@dataclass(frozen=True, slots=True, order=True)
class Item:
    """One token of a phone: where it is, its neighbours and who says it. Times are seconds in the file."""

    file: str
    onset: float
    offset: float
    phone: str
    previous: str
    following: str
    speaker: str


@dataclass(frozen=True, slots=True)
class Score:
    """An ABX error in [0, 1] (nan where there is no cell) and what it was measured on."""

    error: float
    num_cells: int
    num_pairs: int
    """Ordered phone pairs."""
    num_items: int
    """Items left after sub-sampling."""
    num_dropped: int
    """Items that hold no frame."""


def read_items(path: Path) -> list[Item]:
    """The items of an `.item` file; ValueError where a line is not one."""
    items = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        try:
            file, onset, offset, phone, previous, following, speaker = line.split()
            items.append(Item(file, float(onset), float(offset), phone, previous, following, speaker))
        except ValueError:
            raise ValueError(f"{path}:{number}: found {line!r}, wanted {HEADER[1:]!r}: correct it") from None
    return items


def write_items(path: Path, items: Iterable[Item]) -> None:
    """Write items as an `.item` file, times to a tenth of a millisecond."""
    lines = [HEADER]
    for item in items:
        times = f"{item.onset:.4f} {item.offset:.4f}"
        lines.append(" ".join([item.file, times, item.phone, item.previous, item.following, item.speaker]))
    path.write_text("\n".join(lines) + "\n")


def phone_items(file: str, speaker: str, phones: Sequence[Segment]) -> list[Item]:
    """Every phone of an utterance as an item of its own span; silence, and what is off the edge, is `SIL`."""
    labels = [SILENCE, *(label for label, _, _ in phones), SILENCE]
    return [
        Item(file, start, end, label, labels[place], labels[place + 2], speaker)
        for place, (label, start, end) in enumerate(phones)
        if label != SILENCE
    ]


def triphone_items(file: str, speaker: str, phones: Sequence[Segment]) -> list[Item]:
    """Every phone between two phones as an item that spans all three; none of them may be silence."""
    return [
        Item(file, before[1], after[2], middle[0], before[0], after[0], speaker)
        for before, middle, after in zip(phones, phones[1:], phones[2:], strict=False)
        if SILENCE not in (before[0], middle[0], after[0])
    ]


def frame_span(item: Item, num_frames: int, slicing: Slicing = "fixed", rate: float = FRAME_RATE) -> tuple[int, int]:
    """First frame of an item and one past its last; frame i is at (i + ½) / `rate` seconds.

    "fixed" keeps every frame in the closed interval; "librilight" leaves out the last, as that program does.
    """
    # Times are decimal: 0.29 s * 50 Hz must be 14.5 and not 14.499999999999998.
    first = max(0, math.ceil(round(item.onset * rate - 0.5, 6)))
    last = math.floor(round(item.offset * rate - 0.5, 6))
    stop = min(num_frames, last + 1 if slicing == "fixed" else last)
    return first, max(first, stop)


def score_abx(
    items: Iterable[Item],
    features: Mapping[str, NDArray[Any]],
    *,
    speaker: Speaker,
    context: Context,
    slicing: Slicing = "fixed",
    distance: Distance = "angular",
    rate: float = FRAME_RATE,
    max_items: int | None = 10,
    max_speakers: int | None = 5,
    seed: int = 0,
) -> Score:
    """The ABX error of `features`, (T, D) by file, or of unit tokens, (T,), with the "identical" distance.

    At most `max_items` items are drawn from each (context, speaker, phone) and, across speakers, at most
    `max_speakers` X speakers for each cell's A and B; None draws all. "angular" computes in the features' own
    precision. The result does not depend on the order of the items.

    Raises ValueError where a file has no features, or features that cannot be compared.
    """
    spans, num_dropped = [], 0
    for item in sorted(items):
        if item.file not in features:
            raise ValueError(f"abx: found no features for {item.file!r}, wanted some: compute them too")
        first, stop = frame_span(item, len(features[item.file]), slicing, rate)
        if stop > first:
            spans.append((item, first, stop))
        else:
            num_dropped += 1
    rng = np.random.default_rng(seed)
    spans, groups = _group(spans, context, max_items, rng)
    cells = _within_cells(groups) if speaker == "within" else _across_cells(groups, max_speakers, rng)
    if not len(cells):
        return Score(math.nan, 0, 0, len(spans), num_dropped)
    offsets = np.cumsum([0, *(stop - first for _, first, stop in spans)], dtype=np.int64)
    frames = _stack([features[item.file][first:stop] for item, first, stop in spans], distance)
    errors = _score_cells(cells, groups, frames, offsets, _DISTANCES[distance])
    a, b, _ = cells.T
    error, num_pairs = _aggregate(errors, groups.phone[a], groups.phone[b], groups.speaker[a])
    return Score(error, len(cells), num_pairs, len(spans), num_dropped)


# ------------------------------------------------------------------------------------------- groups and cells


@dataclass(frozen=True)
class _Groups:
    """Items that share context, speaker and phone lie side by side: group g is items start[g]:stop[g]."""

    context: Indices
    speaker: Indices
    phone: Indices
    start: Indices
    stop: Indices


Span = tuple[Item, int, int]


def _group(
    spans: list[Span], context: Context, max_items: int | None, rng: np.random.Generator
) -> tuple[list[Span], _Groups]:
    """Spans sorted by group, at most `max_items` from each, and the groups."""

    def key(span: Span) -> tuple[str, str, str, str]:
        item = span[0]
        around = (item.previous, item.following) if context == "in" else ("", "")
        return (*around, item.speaker, item.phone)

    by_group: dict[tuple[str, str, str, str], list[Span]] = {}
    for span in spans:
        by_group.setdefault(key(span), []).append(span)
    names = sorted(by_group)
    kept: list[Span] = []
    bounds = [0]
    for name in names:
        members = by_group[name]
        if max_items is not None and len(members) > max_items:
            members = [members[i] for i in sorted(rng.choice(len(members), max_items, replace=False))]
        kept += members
        bounds.append(len(kept))
    edges = np.array(bounds, dtype=np.int64)
    contexts = _codes([f"{before} {after}" for before, after, _, _ in names])
    speakers = _codes([speaker for _, _, speaker, _ in names])
    phones = _codes([phone for _, _, _, phone in names])
    return kept, _Groups(contexts, speakers, phones, edges[:-1], edges[1:])


def _codes(names: list[str]) -> Indices:
    """Each name's place among the distinct ones, (N,)."""
    places = {name: place for place, name in enumerate(sorted(set(names)))}
    return np.array([places[name] for name in names], dtype=np.int64)


def _within_cells(groups: _Groups) -> Indices:
    """(C, 3) group indices A, B, X with X = A, which must have two items."""
    parts = [np.zeros((0, 3), np.int64)]
    enough = groups.stop - groups.start > 1
    for first, stop in _runs(groups.context, groups.speaker):
        a, b = np.meshgrid(np.arange(first, stop), np.arange(first, stop), indexing="ij")
        chosen = (a != b) & enough[a]
        parts.append(np.stack([a[chosen], b[chosen], a[chosen]], axis=1))
    return np.concatenate(parts)


def _across_cells(groups: _Groups, max_speakers: int | None, rng: np.random.Generator) -> Indices:
    """(C, 3) group indices A, B, X with X of another speaker than A and B."""
    parts = [np.zeros((0, 3), np.int64)]
    for first, stop in _runs(groups.context):
        speakers, row = np.unique(groups.speaker[first:stop], return_inverse=True)
        phones, column = np.unique(groups.phone[first:stop], return_inverse=True)
        if len(speakers) < 2 or len(phones) < 2:
            continue
        table = np.full((len(speakers), len(phones)), -1, np.int64)  # group of (speaker, phone)
        table[row, column] = np.arange(first, stop)
        for own in range(len(speakers)):
            spoken = np.flatnonzero(table[own] >= 0)
            a, b = np.meshgrid(spoken, spoken, indexing="ij")
            a, b = a[a != b], b[a != b]
            possible = table[:, a] >= 0  # (S, P)
            possible[own] = False
            if max_speakers is not None and len(speakers) - 1 > max_speakers:
                order = np.argsort(np.where(possible, rng.random(possible.shape), 2.0), axis=0)
                drawn = np.zeros_like(possible)
                np.put_along_axis(drawn, order[:max_speakers], True, axis=0)
                possible &= drawn
            other, pair = np.nonzero(possible)
            parts.append(np.stack([table[own, a[pair]], table[own, b[pair]], table[other, a[pair]]], axis=1))
    return np.concatenate(parts)


def _runs(*columns: Indices) -> list[tuple[int, int]]:
    """(first, stop) of each run of equal values in sorted columns."""
    if not len(columns[0]):
        return []
    changes = np.any([column[1:] != column[:-1] for column in columns], axis=0)
    edges = [0, *(np.flatnonzero(changes) + 1).tolist(), len(columns[0])]
    return list(itertools.pairwise(edges))


# -------------------------------------------------------------------------------------------------- distances


def _stack(parts: list[NDArray[Any]], distance: Distance) -> NDArray[Any]:
    """All items' frames end to end, made ready for the distance."""
    shapes = {part.shape[1:] for part in parts}
    if len(shapes) > 1 or len(shapes.pop()) != (1 if distance == "angular" else 0):
        found = sorted({str(("T", *part.shape[1:])) for part in parts})
        wanted = "(T, D) with one D" if distance == "angular" else "(T,)"
        raise ValueError(f"abx: found features {found}, wanted {wanted} for {distance} distances: reshape")
    frames = np.concatenate(parts)
    if distance == "identical":
        return frames
    if frames.dtype != np.float64:
        frames = frames.astype(np.float32)
    if not np.isfinite(frames).all():
        raise ValueError("abx: found NaN or infinite features, wanted finite ones: find out what made them")
    return _to_sphere(frames)


def _to_sphere(frames: Floats) -> Floats:
    """Unit vectors, and a column that puts null vectors at 1 from all others and at 0 from each other."""
    peak = np.abs(frames).max(axis=1, keepdims=True, initial=0)
    is_null = peak[:, 0] == 0
    scaled = frames / np.where(peak == 0, 1, peak)  # squares of the raw values could over- or underflow
    sphere = np.empty((len(frames), frames.shape[1] + 1), frames.dtype)
    sphere[:, :-1] = scaled / np.where(is_null, 1, np.sqrt(np.square(scaled).sum(axis=1)))[:, None]
    # Products: 2^-80 between two others, vanishing; -4 and 2^84 with a null vector, clipped to -1 and 1.
    sphere[:, -1] = np.where(is_null, -(2.0**42), 2.0**-40)
    return sphere


def _angular(x: Floats, y: Floats) -> Floats:
    """Angles between unit vectors over π: (N, D), (M, D) to (N, M)."""
    cosine: Floats = x @ y.T
    np.clip(cosine, -1, 1, out=cosine)
    np.arccos(cosine, out=cosine)
    cosine *= 1 / np.pi
    return cosine


def _identical(x: NDArray[Any], y: NDArray[Any]) -> Floats:
    """0 where two units are the same, else 1: (N,), (M,) to (N, M)."""
    different: Floats = (x[:, None] != y[None, :]).astype(np.float32)
    return different


Measure = Callable[[NDArray[Any], NDArray[Any]], Floats]
_DISTANCES: dict[Distance, Measure] = {"angular": _angular, "identical": _identical}


def _align(block: Floats, rows: Indices, columns: Indices, wanted: NDArray[np.bool_], out: NDArray[np.float64]) -> None:
    """DTW cost over path length for each pair of items, from the distances `block` of their frames.

    Item i is rows[i]:rows[i + 1] of the block, item j columns[j]:columns[j + 1]; `out` (I, J) is written
    where wanted[j]. A path's length is carried along with its cost; ties go to the diagonal, left, up.
    """
    widest = 0
    for j in range(len(columns) - 1):
        widest = max(widest, columns[j + 1] - columns[j])
    cost = np.empty(widest, np.float64)
    length = np.empty(widest, np.int64)
    for i in range(len(rows) - 1):
        for j in range(len(columns) - 1):
            if not wanted[j]:
                continue
            left_edge = columns[j]
            width = columns[j + 1] - left_edge
            cost[0] = block[rows[i], left_edge]
            length[0] = 1
            for c in range(1, width):
                cost[c] = cost[c - 1] + block[rows[i], left_edge + c]
                length[c] = c + 1
            for r in range(rows[i] + 1, rows[i + 1]):
                diagonal, diagonal_length = cost[0], length[0]
                left, left_length = cost[0] + block[r, left_edge], length[0] + 1
                cost[0], length[0] = left, left_length
                for c in range(1, width):
                    up, up_length = cost[c], length[c]
                    if diagonal <= left and diagonal <= up:
                        left, left_length = diagonal, diagonal_length
                    elif left > up:
                        left, left_length = up, up_length
                    left += block[r, left_edge + c]
                    left_length += 1
                    diagonal, diagonal_length = up, up_length
                    cost[c], length[c] = left, left_length
            out[i, j] = cost[width - 1] / length[width - 1]


def _count(
    distances: NDArray[np.float64],
    x_start: int,
    y_start: int,
    bounds: Indices,
    tie: float,
    errors: NDArray[np.float64],
) -> None:
    """The error of cells that share X, from the distances (X items, Y items) of items x_start… and y_start….

    bounds (C, 4) are the first item and one past the last of A, then of B. No item is compared with itself.
    """
    for cell in range(len(bounds)):
        a_start, a_stop, b_start, b_stop = bounds[cell]
        wrong = 0.0
        total = 0
        for x in range(distances.shape[0]):
            for a in range(a_start, a_stop):
                if a == x_start + x:
                    continue
                total += b_stop - b_start
                to_a = distances[x, a - y_start]
                for b in range(b_start, b_stop):
                    gap = distances[x, b - y_start] - to_a
                    if gap < -tie:
                        wrong += 1.0
                    elif gap <= tie:
                        wrong += 0.5
        errors[cell] = wrong / total


_align_compiled = njit(cache=True)(_align)
_count_compiled = njit(cache=True)(_count)


def _score_cells(
    cells: Indices,
    groups: _Groups,
    frames: NDArray[Any],
    offsets: Indices,
    measure: Measure,
) -> NDArray[np.float64]:
    """The error of every cell, (C,). `offsets` says where each item's frames begin."""
    order = np.argsort(cells[:, 2], kind="stable")
    errors = np.empty(len(cells))
    for first, stop in _runs(cells[order, 2]):
        chosen = order[first:stop]
        a, b, x = cells[chosen].T
        x_start, x_stop = groups.start[x[0]], groups.stop[x[0]]
        needed = np.unique(np.concatenate([a, b]))
        y_start, y_stop = groups.start[needed[0]], groups.stop[needed[-1]]
        wanted = np.zeros(y_stop - y_start, np.bool_)
        for group in needed:
            wanted[groups.start[group] - y_start : groups.stop[group] - y_start] = True
        rows = offsets[x_start : x_stop + 1]
        columns = offsets[y_start : y_stop + 1]
        block = measure(frames[rows[0] : rows[-1]], frames[columns[0] : columns[-1]])
        distances = np.empty((x_stop - x_start, y_stop - y_start))
        _align_compiled(block, rows - rows[0], columns - columns[0], wanted, distances)
        bounds = np.stack([groups.start[a], groups.stop[a], groups.start[b], groups.stop[b]], axis=1)
        part = np.empty(len(chosen))
        _count_compiled(distances, x_start, y_start, bounds, TIE, part)
        errors[chosen] = part
    return errors


def _aggregate(errors: NDArray[np.float64], a: Indices, b: Indices, speaker: Indices) -> tuple[float, int]:
    """Mean over contexts and X speakers, then A/B speakers, then phone pairs; and the number of pairs."""
    keys, place = np.unique(np.stack([a, b, speaker], axis=1), axis=0, return_inverse=True)
    place = place.reshape(-1)
    by_speaker = np.bincount(place, errors) / np.bincount(place)
    pairs, place = np.unique(keys[:, :2], axis=0, return_inverse=True)
    place = place.reshape(-1)
    by_pair = np.bincount(place, by_speaker) / np.bincount(place)
    return float(by_pair.mean()), len(pairs)
