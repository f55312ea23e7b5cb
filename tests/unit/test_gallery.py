"""Images that are found: on disk and back, the best first, damage told in one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sonorant.config import GroundingConfig
from sonorant.data.frames import Ragged, pack_waves
from sonorant.inference import Gallery, Picture, Speech, load
from sonorant.models.gallery import INDEX, LINES, THUMBNAILS
from sonorant.models.grounding import Grounder, save_grounder
from sonorant.models.huggingface import save_encoder
from tests.tiny import make_encoder, noise, write_model

TEXTS = ("eins\u2028zwei", "", "三")
"""A line's end that is none in JSON, nothing, and no ASCII."""


def made(num_images: int = 7, dim: int = 5, seed: int = 0) -> Gallery:
    vectors = np.random.default_rng(seed).normal(size=(num_images, dim)).astype(np.float32)
    return Gallery(vectors, [Picture(f"{row}.png", "test", TEXTS[: row % 4]) for row in range(num_images)])


def written(folder: Path) -> Path:
    made().save(folder, [bytes([row]) * row if row else None for row in range(7)])
    return folder


def loaded(folder: Path) -> Gallery:
    gallery = Gallery.load(folder)
    assert gallery is not None
    return gallery


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    before, after = made(), loaded(written(tmp_path))
    np.testing.assert_array_equal(after.vectors(range(7)), before.vectors(range(7)))
    assert [(p.id, p.split, p.texts) for p in after.pictures] == [(p.id, p.split, p.texts) for p in before.pictures]
    assert [after.thumbnail(row) for row in range(7)] == [None, *(bytes([row]) * row for row in range(1, 7))]
    assert after.rows["3.png"] == 3
    assert Gallery.load(tmp_path.parent / "nowhere") is None


def test_small_pictures_stay_those_of_their_lines(tmp_path: Path) -> None:
    """A model in use goes on when another is published in its place."""
    gallery = loaded(written(tmp_path))
    (tmp_path / "new").write_bytes(b"x" * 21)
    (tmp_path / "new").replace(tmp_path / THUMBNAILS)
    assert gallery.thumbnail(2) == b"\2\2"


def test_without_small_pictures_there_is_no_file(tmp_path: Path) -> None:
    made().save(tmp_path, [None] * 7)
    assert not (tmp_path / THUMBNAILS).exists()
    assert loaded(tmp_path).thumbnail(1) is None


def test_the_best_come_first_and_no_query_depends_on_the_others() -> None:
    gallery = made(200, 16)
    queries = np.random.default_rng(1).normal(size=(40, 16)).astype(np.float32)
    scores, rows = gallery.search(queries, 9)
    table = queries.astype(np.float64) @ gallery.vectors(range(200)).astype(np.float64).T
    np.testing.assert_array_equal(rows, np.argsort(-table, axis=1)[:, :9])
    # Sixteen products of size one in float32.
    np.testing.assert_allclose(scores, np.take_along_axis(table, rows, axis=1), atol=1e-5)
    for query, own in zip(queries, scores, strict=True):
        np.testing.assert_array_equal(gallery.search(query[None], 9)[0][0], own)
    assert gallery.search(queries[:1], 1000)[1].shape == (1, 200)
    [found] = gallery.find(queries[:1], 3)
    assert [(image.rank, image.picture.id) for image in found] == [
        (rank, f"{row}.png") for rank, row in enumerate(rows[0, :3], start=1)
    ]


def test_of_equals_the_first_row_comes_first() -> None:
    gallery = Gallery(np.ones((6, 3), np.float32), made(6, 3).pictures)
    assert gallery.search(np.ones((1, 3), np.float32), 6)[1].tolist() == [[0, 1, 2, 3, 4, 5]]


def drop_a_line(folder: Path) -> None:
    lines = (folder / LINES).read_text().splitlines()
    (folder / LINES).write_text("\n".join(lines[:-1]) + "\n")


def repeat_an_id(folder: Path) -> None:
    text = (folder / LINES).read_text()
    (folder / LINES).write_text(text.replace('"6.png"', '"5.png"'))


def move_a_thumbnail(folder: Path) -> None:
    text = (folder / LINES).read_text()
    assert '"thumbnail": [15, 6]' in text
    (folder / LINES).write_text(text.replace('"thumbnail": [15, 6]', '"thumbnail": [-1, 6]'))


def change_the_index(folder: Path, dim: int, kind: str) -> None:
    import faiss

    index = faiss.index_factory(dim, "Flat", faiss.METRIC_L2 if kind == "l2" else faiss.METRIC_INNER_PRODUCT)
    index.add(np.full((7, dim), np.nan if kind == "nan" else 1, np.float32))
    faiss.write_index(index, str(folder / INDEX))


DAMAGES = {
    "half an index": lambda folder: (folder / INDEX).write_bytes((folder / INDEX).read_bytes()[:90]),
    "no index": lambda folder: (folder / INDEX).unlink(),
    "no lines": lambda folder: (folder / LINES).unlink(),
    "a line too few": drop_a_line,
    "no JSON": lambda folder: (folder / LINES).write_text("seven\n" * 7),
    "not about images": lambda folder: (folder / LINES).write_text(json.dumps({"id": "a"}) + "\n"),
    "one id twice": repeat_an_id,
    "a thumbnail before the file": move_a_thumbnail,
    "half of the thumbnails": lambda folder: (folder / THUMBNAILS).write_bytes(b"x"),
    "no thumbnails": lambda folder: (folder / THUMBNAILS).unlink(),
    "another metric": lambda folder: change_the_index(folder, 5, "l2"),
    "not finite": lambda folder: change_the_index(folder, 5, "nan"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_told_in_one_line(tmp_path: Path, damage: str) -> None:
    DAMAGES[damage](written(tmp_path))
    with pytest.raises(ValueError, match="found images that cannot be searched") as told:
        Gallery.load(tmp_path)
    assert "\n" not in str(told.value)
    assert str(told.value).endswith("copy them again")


# ------------------------------------------------------------------------------------------------------ queries


def grounded(**changes: object) -> Speech:
    """A random model with a random grounding, and seven images in its space."""
    torch.manual_seed(3)
    config = GroundingConfig.model_validate({"layer": 1, "dim": 6, "branch_widths": (8, 12), **changes})
    encoder = make_encoder()
    grounder = Grounder(encoder.config.dim, encoder.config.num_layers, config, with_images=False)
    return Speech(encoder, 2, grounder=grounder, gallery=made(7, 6))


def waves() -> list[NDArray[np.float32]]:
    return [noise(length, seed) for seed, length in enumerate((16_000, 700, 9_000, 30_000))]


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_a_query_is_what_the_grounder_makes_of_the_led_utterance(similarity: str) -> None:
    speech = grounded(similarity=similarity)
    assert speech.grounder is not None
    found = speech.query(waves())
    assert found.dtype == np.float32
    for wave, own in zip(waves(), found, strict=True):
        scaled = (wave - wave.mean()) / np.sqrt(wave.var() + 1e-5)
        with torch.no_grad():
            z = speech.encoder.project(torch.from_numpy(pack_waves([scaled])), [len(wave)])
            led = torch.cat([speech.grounder.cls[None], z])
            frames = Ragged((len(led),))
            vectors = speech.grounder.speech(speech.encoder.context(led, frames).states[1], frames)
        # float32 in batches of another shape, through a layer and the branch, values of size one.
        np.testing.assert_allclose(own, vectors[0], atol=1e-4)


def test_a_query_does_not_depend_on_the_batch() -> None:
    speech = grounded()
    together = speech.query(waves())
    for wave, own in zip(waves(), together, strict=True):
        # Matrix products of other shapes may sum in another order.
        np.testing.assert_allclose(speech.query([wave])[0], own, atol=2e-5)
    assert np.abs(np.diff(together, axis=0)).max() > 0.01
    assert speech.query([]).shape == (0, 6)


def test_a_search_is_the_gallerys_of_the_query() -> None:
    speech = grounded()
    assert speech.gallery is not None
    for wave, found in zip(waves(), speech.search(waves(), top=3), strict=True):
        scores, rows = speech.gallery.search(speech.query([wave]), 3)
        assert [image.row for image in found] == rows[0].tolist()
        np.testing.assert_allclose([image.score for image in found], scores[0], atol=1e-4)


def test_what_cannot_be_searched_says_so() -> None:
    speech = grounded()
    with pytest.raises(ValueError, match="wave: found shape"):
        speech.query([noise(10)])
    with pytest.raises(ValueError, match="model: found no images, wanted some to search"):
        Speech(speech.encoder, 2, grounder=speech.grounder).search(waves(), 3)
    with pytest.raises(ValueError, match="model: found it not grounded"):
        Speech(speech.encoder, 2, gallery=speech.gallery).query(waves())


def test_a_model_whose_images_are_gone_or_anothers_is_refused(tmp_path: Path) -> None:
    folder, speech = write_model(tmp_path / "model"), grounded()
    assert speech.grounder is not None
    save_grounder(speech.grounder, folder)
    made(7, 6).save(folder)
    with pytest.raises(ValueError, match="found 7 images, wanted 0"):
        load(folder)
    save_encoder(make_encoder(), folder, layer=2, num_images=7)
    assert len(load(folder).search(waves()[:1], top=9)[0]) == 7
    made(7, 5).save(folder)
    with pytest.raises(ValueError, match="wanted 7 in the space of its grounding"):
        load(folder)
    for name in (INDEX, LINES):
        (folder / name).unlink()
    with pytest.raises(ValueError, match="found 0 images, wanted 7"):
        load(folder)
