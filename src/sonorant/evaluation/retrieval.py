"""How well speech finds its image, and an image what was said of it (evaluation.md §3.6).

Ranks are counted, and of equal scores the wrong one goes first: a model to which everything is the same finds nothing.

Shapes: Q queries, C candidates, E the common space, S utterances, I images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

TOPS = (1, 5, 10)
"""Of how many of the first ones the recall is taken."""
CELLS = 1 << 22
"""Scores that are held at once."""
Vectors = NDArray[np.float32]
Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Ranks:
    """Of each query the place of its best right candidate, from 1 on, and how many are right, (Q,) each."""

    places: Rows
    num_right: Rows
    num_candidates: int

    def recall(self, top: int) -> float:
        """Share of the queries that have a right candidate among the first `top`."""
        return float((self.places <= top).mean())

    @property
    def median(self) -> float:
        """The place in the middle."""
        return float(np.median(self.places))

    def chance_recall(self, top: int) -> float:
        """The recall that a random order has on average."""
        return float(1 - np.mean(self._missed(top)))

    @property
    def chance_median(self) -> float:
        """The median place in random orders."""
        kinds, counts = np.unique(self.num_right, return_counts=True)
        missed, lower = np.ones(len(kinds)), None
        for place in range(1, self.num_candidates + 1):
            missed = missed * np.clip(1 - kinds / (self.num_candidates - place + 1), 0, 1)
            beyond = float(missed @ counts) / len(self.num_right)
            # Products of a few thousand factors: what is a half may come out a little beside it.
            if lower is None and beyond <= 0.5 + 1e-9:
                lower = place
            if beyond < 0.5 - 1e-9:
                break
        assert lower is not None
        return (lower + place) / 2

    def _missed(self, top: int) -> NDArray[np.float64]:
        """The chance of each query that none of the first `top` in a random order is right."""
        drawn = np.arange(min(top, self.num_candidates))
        wrong = self.num_candidates - self.num_right[:, None]
        missed: NDArray[np.float64] = np.prod(np.clip(wrong - drawn, 0, None) / (self.num_candidates - drawn), axis=1)
        return missed


def rank(queries: Vectors, candidates: Vectors, right: Sequence[Rows]) -> Ranks:
    """Ranks of vectors (Q, E) among vectors (C, E) by inner product; `right` has each query's right candidates.

    A right candidate's place is 1 + the number of wrong ones that score as high or higher. Raises ValueError where
    a score is not finite.
    """
    assert len(right) == len(queries) > 0
    places = np.empty(len(queries), np.int64)
    for start, scores in scores_of(queries, candidates):
        for row, line in enumerate(scores, start=start):
            own = line[right[row]]
            best = own.max()
            places[row] = 1 + (line >= best).sum() - (own >= best).sum()
    return Ranks(places, np.array([len(rows) for rows in right]), len(candidates))


def first_of(queries: Vectors, candidates: Vectors, right: Sequence[Rows], top: int) -> tuple[Rows, Vectors]:
    """Of each query the `top` candidates that rank first, and their scores, (Q, min(top, C)) each; ties as `rank`."""
    found = np.empty((len(queries), min(top, len(candidates))), np.int64)
    reached = np.empty(found.shape, np.float32)
    for start, scores in scores_of(queries, candidates):
        for row, line in enumerate(scores, start=start):
            is_right = np.zeros(len(line), bool)
            is_right[right[row]] = True
            found[row] = np.lexsort((is_right, -line))[: found.shape[1]]
            reached[row] = line[found[row]]
    return found, reached


def scores_of(queries: Vectors, candidates: Vectors) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Inner products in float32, some queries at a time: the first one's row, and (·, C)."""
    # Summed in float64: equal vectors then score the same wherever they stand, for what the sums' order changes is
    # far below what float32 keeps.
    others = candidates.astype(np.float64).T
    step = max(1, CELLS // len(candidates))
    for start in range(0, len(queries), step):
        with np.errstate(all="ignore"):
            scores = (queries[start : start + step].astype(np.float64) @ others).astype(np.float32)
        if not np.isfinite(scores).all():
            raise ValueError(
                "retrieval: found scores that are not finite numbers, wanted finite ones: the model's vectors are "
                "damaged or its training broke down; look at its journal and train it again"
            )
        yield start, scores


def related(owners: Rows, labels: Rows, num_images: int) -> tuple[list[Rows], list[Rows]]:
    """The images that are right for each utterance, and the utterances that are right for each image.

    owners (S,): each utterance's image, every image has one utterance at least; labels (S,): what is said of it. An
    image bears the labels of all its utterances, and what bears an utterance's label is right for it. With
    `labels` the owners themselves, the pairs alone are right.
    """
    _, labels = np.unique(labels, return_inverse=True)
    label_images = np.unique(np.stack([labels, owners], axis=1), axis=0)
    images_with = grouped(label_images[:, 0], label_images[:, 1], int(labels.max()) + 1)
    labels_on = grouped(label_images[:, 1], label_images[:, 0], num_images)
    utterances_with = grouped(labels, np.arange(len(labels)), int(labels.max()) + 1)
    assert all(map(len, labels_on))
    # Images that bear the same share one array: there may be a few classes of many.
    joined: dict[bytes, Rows] = {}
    of_images = []
    for own in labels_on:
        key = own.tobytes()
        if key not in joined:
            joined[key] = np.sort(np.concatenate([utterances_with[label] for label in own]))
        of_images.append(joined[key])
    return [images_with[label] for label in labels], of_images


def grouped(keys: Rows, values: Rows, num_keys: int) -> list[Rows]:
    """The values of each key from 0 on."""
    order = np.argsort(keys, kind="stable")
    return np.split(values[order], np.cumsum(np.bincount(keys, minlength=num_keys))[:-1])


def plain_words(text: str) -> str:
    """What is said, without case, punctuation and double spaces: texts that are the same then are one class."""
    kept = "".join(letter if letter.isalnum() or letter == "'" else " " for letter in text.casefold())
    return " ".join(kept.split())
