"""Who is asked for what in retrieval, and what of it the report shows."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from sonorant.data.corpus import Utterance
from sonorant.data.pairs import thumbnail
from sonorant.evaluation.intervals import bootstrap, difference
from sonorant.evaluation.measures import RETRIEVAL, System, best_systems
from sonorant.steps.searching import PICTURE_SIDE, Hunt, Pairs, draw_searches


def make_utterances(folder: Path, said: list[tuple[str, str | None]]) -> list[Utterance]:
    """Utterances of a picture each, by the picture's name, and of a text."""
    found = []
    for number, (name, text) in enumerate(said):
        path, image = folder / f"{number}.flac", folder / name
        soundfile.write(path, np.full(800, 0.1), 16_000)
        Image.new("RGB", (3, 3), "red").save(image)
        found.append(Utterance(f"u{number}", "test", "field", "a", 800, path, text, image=image))
    return found


def test_pairs_are_of_known_images_and_words_without_what_writing_adds(tmp_path: Path) -> None:
    said = [("b.png", "Two."), ("a.png", "one"), ("c.png", "two"), ("b.png", "three"), ("x.png", "one")]
    utterances = make_utterances(tmp_path, said)
    pairs = Pairs.among({"a.png", "b.png", "c.png", "unasked.png"}, utterances)
    assert pairs is not None
    assert [utterance.id for utterance in pairs.utterances] == ["u0", "u1", "u2", "u3"]
    assert (list(pairs.names), pairs.owners.tolist()) == (["a.png", "b.png", "c.png"], [1, 0, 2, 1])
    of_speech, of_images = pairs.right["_by_class"]
    assert [rows.tolist() for rows in of_speech] == [[1, 2], [0], [1, 2], [1]]
    assert [rows.tolist() for rows in of_images] == [[1], [0, 2, 3], [0, 2]]
    assert Pairs.among({"unasked.png"}, utterances) is None


def test_without_words_only_the_pair_is_right(tmp_path: Path) -> None:
    for text in (None, " ? "):
        pairs = Pairs.among({"a.png", "b.png"}, make_utterances(tmp_path, [("a.png", "one"), ("b.png", text)]))
        assert pairs is not None
        assert list(pairs.right) == [""]


def test_examples_say_which_is_right_and_where_it_stands(tmp_path: Path) -> None:
    said = [(f"{letter}.png", "same" if letter in "ac" else letter) for letter in "abcdefg"]
    utterances = make_utterances(tmp_path, said)
    pairs = Pairs.among({name for name, _ in said}, utterances)
    assert pairs is not None
    # The first utterance's own image scores 0, the others 1 to 6, so that its own comes last.
    images = np.arange(7, dtype=np.float32)[:, None]
    hunt = Hunt(pairs, np.ones((7, 1), np.float32), images)
    searches = draw_searches(hunt, 7, seed=0)
    assert [search.id for search in searches] == [utterance.id for utterance in utterances]
    first = searches[0]
    assert [(shown.name, shown.place, shown.score) for shown in first.found] == [
        (f"{name}.png", place, 7 - place) for place, name in enumerate("gfedc", start=1)
    ]
    assert [shown.mark for shown in first.found] == ["", "", "", "", "same words"]
    assert (first.own.name, first.own.place, first.own.score, first.own.mark) == ("a.png", 7, 0, "right")
    assert (searches[6].own.place, searches[6].found[0].mark) == (1, "right")
    assert first.num_images == 7
    drawn = draw_searches(hunt, 3, seed=0)
    assert [search.id for search in draw_searches(hunt, 3, seed=0)] == [search.id for search in drawn]
    assert (len(drawn), draw_searches(hunt, 0, seed=0)) == (3, [])


def test_recalls_are_known_by_query_and_chance_by_none(tmp_path: Path) -> None:
    """Of 30 images 20 lie where their utterances do: better than chance in every draw of queries."""
    names = [f"{number:02}.png" for number in range(30)]
    pairs = Pairs.among(set(names), make_utterances(tmp_path, [(name, name[:2]) for name in names]))
    assert pairs is not None
    speech = np.eye(30, dtype=np.float32)
    images = speech.copy()
    images[20:] = np.roll(images[20:], 1, axis=0)
    hunt = Hunt(pairs, speech, images)
    for way, queries in {"speech_to_image": [u.id for u in pairs.utterances], "image_to_speech": names}.items():
        key = f"{way}_recall_at_1"
        estimate, chance = hunt.estimates[key], hunt.chance.estimates[key]
        assert estimate.value == hunt.scores[key] == pytest.approx(20 / 30)
        assert list(estimate.influence) == queries
        # A hit adds (1 - 2/3) / 30, a miss takes away 2/3 / 30.
        assert list(estimate.influence.values()) == pytest.approx([1 / 90] * 20 + [-2 / 90] * 10)
        assert bootstrap(difference(estimate, chance)).excludes_zero
        measure = next(m for group in RETRIEVAL.values() for m in group if m.key == key)
        model = System("model", "", "", hunt.scores, hunt.estimates)
        assert best_systems(measure, [model, hunt.chance]) == {"model"}
        lucky = dataclasses.replace(model, estimates={key: dataclasses.replace(estimate, value=chance.value + 0.05)})
        assert best_systems(measure, [lucky, hunt.chance]) == set()


@pytest.mark.parametrize(("mode", "size"), [("RGB", (1000, 400)), ("P", (300, 900)), ("LA", (8, 8)), ("1", (97, 97))])
def test_a_thumbnail_keeps_its_shape_within_a_bounded_size(tmp_path: Path, mode: str, size: tuple[int, int]) -> None:
    path = tmp_path / "image.png"
    Image.new(mode, size).save(path)
    content = thumbnail(Utterance("u", "test", "s", "a", 800, path, image=path), PICTURE_SIDE, "PNG")
    assert content is not None
    with Image.open(io.BytesIO(content)) as small:
        assert (small.format, small.mode) == ("PNG", "RGB")
        scale = min(1, PICTURE_SIDE / max(size))
        # Pillow rounds the shorter side to a whole pixel.
        assert np.abs(np.array(small.size) - scale * np.array(size)).max() <= 1
        assert max(small.size) <= PICTURE_SIDE


def test_features_of_regions_cannot_be_seen(tmp_path: Path) -> None:
    path = tmp_path / "image.npz"
    np.savez(path, features=np.zeros((2, 3)), boxes=np.zeros((2, 4)))
    assert thumbnail(Utterance("u", "test", "s", "a", 800, path, image=path), PICTURE_SIDE, "PNG") is None
    assert thumbnail(Utterance("u", "test", "s", "a", 800, path), PICTURE_SIDE, "PNG") is None
