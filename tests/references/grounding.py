"""Slow oracle of grounding's loss: one utterance, one image, one score at a time."""

from __future__ import annotations

from collections.abc import Sequence

from tests.references.contrast import info_nce
from tests.references.losses import Matrix


def dot(a: Sequence[float], b: Sequence[float]) -> float:
    """a · b."""
    return sum(x * y for x, y in zip(a, b, strict=True))


def one_way(
    asking: Matrix, answers: Matrix, ids: Sequence[int], answer_ids: Sequence[int], scale: float, margin: float
) -> tuple[float, float]:
    """Mean over those who ask of -log of their own answer's share, and how many score it highest, a share.

    `answers` begin with those that belong to who asks; answers with the id of who asks are told from nothing.
    """
    loss, right = 0.0, 0
    for own, question in enumerate(asking):
        true = scale * dot(question, answers[own])
        others = [
            scale * dot(question, answer)
            for place, answer in enumerate(answers)
            if place != own and answer_ids[place] != ids[own]
        ]
        loss += info_nce(true - margin, others)
        right += all(true > other for other in others)
    return loss / len(asking), right / len(asking)


def matching(
    spoken: Matrix,
    seen: Matrix,
    ids: Sequence[int],
    queued: tuple[Matrix, Matrix, Sequence[int]],
    scale: float,
    margin: float,
) -> tuple[float, float, float]:
    """Both directions, added (grounding.md §1.2); the shares of utterances and of images that win."""
    more_spoken, more_seen, more_ids = queued
    all_ids = [*ids, *more_ids]
    forth, found = one_way(spoken, [*seen, *more_seen], ids, all_ids, scale, margin)
    back, heard = one_way(seen, [*spoken, *more_spoken], ids, all_ids, scale, margin)
    return forth + back, found, heard
