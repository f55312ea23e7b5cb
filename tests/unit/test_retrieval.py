"""Retrieval against an order written out, on vectors in which ties are the rule."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sonorant.evaluation import retrieval
from sonorant.evaluation.retrieval import TOPS, Ranks, Rows, Vectors, first_of, plain_words, rank, related
from tests.references.retrieval import (
    place,
    places_by_chance,
    recall_by_chance,
    right_images,
    right_utterances,
)

EXACT = 1e-12  # a handful of float64 factors between 0 and 1
LEVELS = st.integers(-2, 2)


@st.composite
def searches(draw: st.DrawFn) -> tuple[Vectors, Vectors, list[Rows]]:
    """Small whole numbers as vectors, so that many scores are equal, and any candidates right."""
    num_queries, num_candidates, dim = draw(st.integers(1, 6)), draw(st.integers(1, 8)), draw(st.integers(1, 3))

    def vectors(count: int) -> Vectors:
        row = st.lists(LEVELS, min_size=dim, max_size=dim)
        return np.array(draw(st.lists(row, min_size=count, max_size=count)), np.float32)

    some = st.sets(st.integers(0, num_candidates - 1), min_size=1)
    right = [np.array(sorted(draw(some)), np.int64) for _ in range(num_queries)]
    return vectors(num_queries), vectors(num_candidates), right


@given(searches(), st.integers(1, 20))
def test_places_are_those_of_an_order_with_the_wrong_ones_first(
    search: tuple[Vectors, Vectors, list[Rows]], cells: int
) -> None:
    queries, candidates, right = search
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "CELLS", cells)
        found = rank(queries, candidates, right)
        first, reached = first_of(queries, candidates, right, top=5)
    scores = (queries @ candidates.T).tolist()
    assert found.places.tolist() == [place(row, set(own.tolist())) for row, own in zip(scores, right, strict=True)]
    assert found.num_right.tolist() == [len(own) for own in right]
    for row, (line, rows) in enumerate(zip(scores, first.tolist(), strict=True)):
        assert reached[row].tolist() == sorted(line, reverse=True)[:5]
        assert [line[one] for one in rows] == reached[row].tolist()
        # What is shown agrees with what is counted.
        shown = [position for position, one in enumerate(rows, start=1) if one in right[row]]
        assert (shown[0] if shown else None) == (found.places[row] if found.places[row] <= len(rows) else None)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=12))
def test_what_bears_the_same_words_is_right(said: list[tuple[int, int]]) -> None:
    names = sorted({owner for owner, _ in said})
    owners = np.array([names.index(owner) for owner, _ in said])
    labels = np.array([7 * label for _, label in said])
    of_speech, of_images = related(owners, labels, len(names))
    for row, images in enumerate(of_speech):
        assert images.tolist() == sorted(right_images(owners.tolist(), labels.tolist(), row))
        assert owners[row] in images
    for image, utterances in enumerate(of_images):
        assert utterances.tolist() == sorted(right_utterances(owners.tolist(), labels.tolist(), image))
    pairs, captions = related(owners, owners, len(names))
    assert [rows.tolist() for rows in pairs] == [[owner] for owner in owners.tolist()]
    assert [rows.tolist() for rows in captions] == [np.flatnonzero(owners == i).tolist() for i in range(len(names))]


@given(st.integers(1, 6), st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(1, 10))
def test_chance_is_the_mean_over_all_orders(num_candidates: int, counts: list[int], top: int) -> None:
    num_right = [min(count, num_candidates) for count in counts]
    ranks = Ranks(np.ones(len(counts), np.int64), np.array(num_right), num_candidates)
    assert ranks.chance_recall(top) == pytest.approx(float(recall_by_chance(num_candidates, num_right, top)), abs=EXACT)
    every = [one for count in num_right for one in places_by_chance(num_candidates, count)]
    assert ranks.chance_median == statistics.median(every)


@pytest.mark.parametrize("vector", ["equal", "zero"])
@pytest.mark.parametrize("by_class", [False, True])
def test_a_collapsed_model_is_at_most_as_good_as_chance(vector: str, by_class: bool) -> None:
    rng = np.random.default_rng(3)
    one = rng.normal(size=37).astype(np.float32) * (vector == "equal")
    owners = np.arange(215) % 43
    labels = owners % 10 if by_class else owners
    for queries, candidates, right in (
        (215, 43, related(owners, labels, 43)[0]),
        (43, 215, related(owners, labels, 43)[1]),
    ):
        ranks = rank(np.tile(one, (queries, 1)), np.tile(one, (candidates, 1)), right)
        assert ranks.places.tolist() == [1 + candidates - len(rows) for rows in right]
        for top in TOPS:
            assert ranks.recall(top) <= ranks.chance_recall(top)
        assert ranks.median >= ranks.chance_median


def test_a_perfect_model_finds_everything() -> None:
    vectors = np.eye(12, dtype=np.float32)
    owners = np.arange(12)
    of_speech, of_images = related(owners, owners, 12)
    for right in (of_speech, of_images):
        ranks = rank(vectors, vectors, right)
        assert ([ranks.recall(top) for top in TOPS], ranks.median) == ([1, 1, 1], 1)
        assert ranks.chance_recall(1) == pytest.approx(1 / 12, abs=EXACT)


def test_any_of_an_images_captions_counts() -> None:
    # The second caption of image 0 is as far from it as can be: the first one alone makes the hit.
    owners = np.array([0, 0, 1])
    images = np.array([[1, 0], [0, 1]], np.float32)
    speech = np.array([[1, 0], [-1, 0], [0, 1]], np.float32)
    _, of_images = related(owners, owners, 2)
    assert rank(images, speech, of_images).places.tolist() == [1, 1]


def test_the_original_data_sets_chance() -> None:
    # 25,000 captions of 5,000 images (evaluation.md §3.6).
    of_speech = Ranks(np.ones(25_000, np.int64), np.ones(25_000, np.int64), 5_000)
    assert of_speech.chance_recall(10) == pytest.approx(0.002, abs=EXACT)
    assert of_speech.chance_median == 2500.5


@pytest.mark.parametrize("damage", [np.nan, np.inf, 3e38])
def test_scores_that_are_no_numbers_are_refused(damage: float) -> None:
    vectors = np.eye(3, dtype=np.float32)
    broken = vectors.copy()
    broken[1] = damage
    rows = [np.array([row]) for row in range(3)]
    for queries, candidates in ((broken, vectors * 9), (vectors * 9, broken)):
        with pytest.raises(ValueError, match="found scores that are not finite numbers") as error:
            rank(queries, candidates, rows)
        assert "\n" not in str(error.value)


def test_words_without_what_writing_adds() -> None:
    assert plain_words("  Zero. ") == plain_words("zero") == "zero"
    assert plain_words("Don't — stop, “42”!") == "don't stop 42"
    assert plain_words("one two") != plain_words("onetwo")
