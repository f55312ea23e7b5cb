"""Slow oracles of retrieval: one query, one candidate, one order at a time."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from fractions import Fraction
from itertools import permutations


def place(scores: Sequence[float], right: Collection[int]) -> int:
    """Where the first right candidate stands in a list by score in which, of equals, the wrong ones stand first."""
    order = sorted(range(len(scores)), key=lambda one: (-scores[one], one in right))
    return 1 + next(position for position, one in enumerate(order) if one in right)


def places_by_chance(num_candidates: int, num_right: int) -> list[int]:
    """The same of every order of the candidates, the first `num_right` of which are right."""
    orders = permutations(range(num_candidates))
    return [1 + next(i for i, one in enumerate(order) if one < num_right) for order in orders]


def recall_by_chance(num_candidates: int, num_right: Sequence[int], top: int) -> Fraction:
    """The mean over queries and orders."""
    hits = [[place <= top for place in places_by_chance(num_candidates, count)] for count in num_right]
    return sum((Fraction(sum(own), len(own)) for own in hits), Fraction(0)) / len(hits)


def right_images(owners: Sequence[int], labels: Sequence[int], utterance: int) -> set[int]:
    """Images of which somebody says what this utterance says."""
    return {owner for owner, label in zip(owners, labels, strict=True) if label == labels[utterance]}


def right_utterances(owners: Sequence[int], labels: Sequence[int], image: int) -> set[int]:
    """Utterances that say what is said of this image."""
    said = {label for owner, label in zip(owners, labels, strict=True) if owner == image}
    return {row for row, label in enumerate(labels) if label in said}
