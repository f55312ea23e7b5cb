"""Cells: an ordered phone pair in one context, A and B spoken by one speaker and X by the same or by another."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sonorant.evaluation.abx.items import Item

Speaker = Literal["within", "across"]
Context = Literal["any", "in"]
Indices = NDArray[np.int64]
Span = tuple[Item, int, int]
"""An item, its first frame and one past its last."""


@dataclass(frozen=True)
class Groups:
    """Items that share context, speaker and phone lie side by side: group g is items start[g]:stop[g]."""

    context: Indices
    speaker: Indices
    phone: Indices
    start: Indices
    stop: Indices


@dataclass(frozen=True)
class Block:
    """Groups first:stop that are compared with each other, and the cells (C, 3) among them: groups A, B, X."""

    first: int
    stop: int
    cells: Indices


def group_items(
    spans: list[Span], context: Context, max_items: int | None, rng: np.random.Generator
) -> tuple[list[Span], Groups]:
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
    return kept, Groups(contexts, speakers, phones, edges[:-1], edges[1:])


def _codes(names: list[str]) -> Indices:
    """Each name's place among the distinct ones, (N,)."""
    places = {name: place for place, name in enumerate(sorted(set(names)))}
    return np.array([places[name] for name in names], dtype=np.int64)


def within_blocks(groups: Groups) -> list[Block]:
    """A block for each context and speaker; X is of the same group as A, which must have two items."""
    blocks = []
    enough = groups.stop - groups.start > 1
    for first, stop in _runs(groups.context, groups.speaker):
        if stop - first > 1 and enough[first:stop].any():
            a, b = np.meshgrid(np.arange(first, stop), np.arange(first, stop), indexing="ij")
            chosen = (a != b) & enough[a]
            blocks.append(Block(first, stop, np.stack([a[chosen], b[chosen], a[chosen]], axis=1)))
    return blocks


def across_blocks(groups: Groups, max_speakers: int | None, rng: np.random.Generator) -> list[Block]:
    """A block for each context; X is of another speaker than A and B, of at most `max_speakers` drawn for each pair."""
    blocks = []
    for first, stop in _runs(groups.context):
        speakers, row = np.unique(groups.speaker[first:stop], return_inverse=True)
        phones, column = np.unique(groups.phone[first:stop], return_inverse=True)
        if len(speakers) < 2 or len(phones) < 2:
            continue
        table = np.full((len(speakers), len(phones)), -1, np.int64)  # group of (speaker, phone)
        table[row, column] = np.arange(first, stop)
        parts = []
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
        cells = np.concatenate(parts)
        if len(cells):
            blocks.append(Block(first, stop, cells))
    return blocks


def _runs(*columns: Indices) -> list[tuple[int, int]]:
    """(first, stop) of each run of equal values in sorted columns."""
    if not len(columns[0]):
        return []
    changes = np.any([column[1:] != column[:-1] for column in columns], axis=0)
    edges = [0, *(np.flatnonzero(changes) + 1).tolist(), len(columns[0])]
    return list(itertools.pairwise(edges))


def weigh(groups: Groups, cells: Indices) -> tuple[NDArray[np.float64], int]:
    """What each cell's error counts in the whole, (C,), in sum 1, and the number of ordered phone pairs.

    The whole is the mean over contexts and X speakers, then over speakers of A and B, then over phone pairs.
    """
    a, b, _ = cells.T
    keys = np.stack([groups.phone[a], groups.phone[b], groups.speaker[a]], axis=1)
    spoken, place = np.unique(keys, axis=0, return_inverse=True)
    place = place.reshape(-1)
    pairs, of_pair = np.unique(spoken[:, :2], axis=0, return_inverse=True)
    of_pair = of_pair.reshape(-1)
    return 1 / (np.bincount(place)[place] * np.bincount(of_pair)[of_pair][place] * len(pairs)), len(pairs)
