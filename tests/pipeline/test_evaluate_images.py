"""Retrieval measured by `evaluate`: of a model grounded for a few updates, of one that was not, on strange images."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sonorant.artifacts import digest_folder
from sonorant.data.corpus import Utterance, read_corpus
from sonorant.inference import load
from sonorant.steps import evaluate, ground, prepare, publish
from tests.references.retrieval import place, recall_by_chance, right_images, right_utterances
from tests.tiny import encoder_config, write_model, write_pairs_corpus

EXACT = 1e-12  # a handful of float64 factors between 0 and 1
IMAGE: dict[str, Any] = {"side": 24, "dim": 32, "num_layers": 1, "num_heads": 2, "ffn_dim": 64}
GROUND: dict[str, Any] = {
    "num_updates": 80,
    "phases": [{"weights": {"grounding": 1.0}}],
    "encoder": encoder_config().model_dump(mode="json"),
    "batching": {"batch_seconds": 20.0, "crop_seconds": 2.0},
    "optim": {"learning_rate": 0.005, "warmup_share": 0.1, "decay_share": 0.3},
    "grounding": {"layer": 1, "dim": 32, "image": IMAGE},
}
EVALUATE: dict[str, Any] = {"split": "train", "num_examples": 2}
Scores = dict[str, dict[str, float]]


def make_model(folder: Path, corpus: Path, **changes: Any) -> Path:
    """Grounded on the corpus and published."""
    folder.mkdir()
    values = {**GROUND, **changes}
    ground(values, corpus=corpus, grounded=folder / "grounded", scratch=folder / "scratch")
    publish({"num_units": 4, "layer": 1}, corpus=corpus, encoder=folder / "grounded", model=folder / "model")
    return folder / "model"


def row_of(utterance: Utterance) -> dict[str, str]:
    """Its row in a manifest."""
    files = {"path": str(utterance.path), "image": str(utterance.image)}
    return {
        "id": utterance.id,
        "speaker": utterance.speaker,
        "split": utterance.split,
        "text": str(utterance.text),
        **files,
    }


def prepared(folder: Path, rows: list[dict[str, str]]) -> Path:
    """The corpus of a manifest."""
    manifest = folder.with_suffix(".jsonl")
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"kind": "manifest", "name": "field", "path": str(manifest)}
    prepare({"sources": [source], "num_workers": 1}, corpus=folder, scratch=folder.with_name(f"{folder.name}-scratch"))
    return folder


def measure(corpus: Path, report: Path, **inputs: Any) -> Scores:
    """What metrics.json says."""
    evaluate(EVALUATE, corpus=corpus, report=report, **inputs)
    scores: Scores = json.loads((report / "metrics.json").read_text())
    return scores


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tones, and two images of each that an utterance may begin with; either is right for what begins alike."""
    folder = tmp_path_factory.mktemp("images")
    written, _ = write_pairs_corpus(folder / "tones", num_utterances=40)
    return prepared(folder / "corpus", [row_of(utterance) for utterance in read_corpus(written, "train")])


@pytest.fixture(scope="module")
def model(corpus: Path) -> Path:
    return make_model(corpus.with_name("trained"), corpus)


@pytest.fixture(scope="module")
def measured(corpus: Path, model: Path) -> tuple[Scores, Path]:
    """Its scores beside those of a model that saw one update, and the report."""
    report = corpus.with_name("report")
    previous = make_model(corpus.with_name("untrained"), corpus, num_updates=1, seed=1)
    return measure(corpus, report, model=model, previous=previous), report


def test_what_is_measured_is_what_is_served(corpus: Path, model: Path, measured: tuple[Scores, Path]) -> None:
    scores, _ = measured
    utterances, speech = read_corpus(corpus, "train"), load(model)
    assert speech.gallery is not None
    names = sorted({name_of(u) for u in utterances})
    owners = [names.index(name_of(u)) for u in utterances]
    words = [int(str(u.text).split()[1]) for u in utterances]
    heard = np.concatenate([speech.query([u.wave()]) for u in utterances])
    seen = speech.gallery.vectors([speech.gallery.rows[name] for name in names])
    table = heard.astype(np.float64) @ seen.astype(np.float64).T
    for kind, labels in {"": owners, "_by_class": words}.items():
        ways = {
            "speech_to_image": (table, [right_images(owners, labels, row) for row in range(len(owners))]),
            "image_to_speech": (table.T, [right_utterances(owners, labels, row) for row in range(len(names))]),
        }
        for way, (rows, right) in ways.items():
            places = [place(row.tolist(), own) for row, own in zip(rows, right, strict=True)]
            assert scores["model"][f"{way}_median_rank{kind}"] == np.median(places)
            for top in (1, 5, 10):
                found = scores["model"][f"{way}_recall_at_{top}{kind}"]
                assert found == pytest.approx(np.mean([one <= top for one in places]), abs=EXACT)
    counts = [len(right_images(owners, words, row)) for row in range(len(owners))]
    by_chance = float(recall_by_chance(len(names), counts, 1))
    assert scores["chance"]["speech_to_image_recall_at_1_by_class"] == pytest.approx(by_chance, abs=EXACT)


def name_of(utterance: Utterance) -> str:
    assert utterance.image is not None
    return utterance.image.name


def test_a_few_updates_find_more_than_chance(measured: tuple[Scores, Path]) -> None:
    scores, _ = measured
    for way in ("speech_to_image", "image_to_speech"):
        name = f"{way}_recall_at_1_by_class"
        # Four tones begin a sequence: chance is about a quarter, and 80 updates find four fifths.
        assert scores["chance"][name] < 0.35
        assert scores["model"][name] > 0.5


def test_every_system_that_searches_has_the_same_scores(measured: tuple[Scores, Path]) -> None:
    scores, _ = measured
    assert list(scores) == ["model", "mfcc", "mfcc_centred", "untrained", "previous", "chance"]
    found = {key: {name for name in own if "_to_" in name} for key, own in scores.items()}
    assert len(found["model"]) == 16
    assert found["model"] == found["previous"] == set(scores["chance"])
    assert not found["mfcc"] | found["untrained"]


def test_the_page_shows_what_was_found(measured: tuple[Scores, Path]) -> None:
    page = (measured[1] / "report.html").read_text()
    assert page.count('<figure class="search">') == 2
    assert 10 <= page.count("data:image/png;base64,") <= 12  # five each, and its own where it comes later
    assert page.count(">right</div>") == 2
    assert not re.search(r"""(src|href)=["'](?!data:)|url\((?!data:)|@import|<script|<link""", page)
    assert "Retrieval is left out" not in page
    table = (measured[1] / "table.txt").read_text()
    assert "Speech to image, any with the same words" in table


def test_twice_gives_the_same_bytes(corpus: Path, model: Path, measured: tuple[Scores, Path], tmp_path: Path) -> None:
    measure(corpus, tmp_path / "report", model=model, previous=corpus.with_name("untrained") / "model")
    assert digest_folder(tmp_path / "report") == digest_folder(measured[1])


def test_a_model_that_is_not_grounded_says_so(corpus: Path, model: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "model")
    scores = measure(corpus, tmp_path / "report", model=other, previous=model)
    assert not any("_to_" in name for own in scores.values() for name in own)
    page = (tmp_path / "report" / "report.html").read_text()
    assert "Retrieval is left out: 34 of the evaluated utterances have an image, but the model has no gallery." in page
    assert "<h2>Retrieval</h2>" not in page


def test_a_previous_model_that_cannot_search_is_said(corpus: Path, model: Path, tmp_path: Path) -> None:
    scores = measure(corpus, tmp_path / "report", model=model, previous=write_model(tmp_path / "model"))
    assert "speech_to_image_recall_at_1" in scores["model"]
    assert "speech_to_image_recall_at_1" not in scores["previous"]
    assert "The previous model has no gallery, or one that lacks" in (tmp_path / "report" / "report.html").read_text()


def test_images_that_the_gallery_lacks_are_counted(corpus: Path, model: Path, tmp_path: Path) -> None:
    """A corpus of which one utterance has a known image and one a strange one, and a third none."""
    known, other, plain = read_corpus(corpus, "train")[:3]
    Image.new("RGB", (24, 24), "pink").save(tmp_path / "strange.png")
    rows = [row_of(known), {**row_of(other), "image": "strange.png"}, row_of(plain)]
    del rows[0]["text"], rows[2]["image"]
    scores = measure(prepared(tmp_path / "mixed", rows), tmp_path / "report", model=model)
    assert scores["model"]["speech_to_image_recall_at_1"] == 1  # there is nothing else to find
    assert scores["chance"]["speech_to_image_recall_at_1"] == 1
    page = (tmp_path / "report" / "report.html").read_text()
    assert "Retrieval is of the 1 utterances of 3 whose image is in the model" in page
    assert "speech_to_image_recall_at_1_by_class" not in scores["model"]
    assert "Retrieval of the same words is left out: some of these utterances have no text." in page

    for name, kept, said in (
        ("strange", rows[1:2], "of their images, 1, none is in the model"),
        ("imageless", rows[2:], "they have no images"),
    ):
        scores = measure(prepared(tmp_path / name, kept), tmp_path / f"report-{name}", model=model)
        assert list(scores) == ["model", "mfcc", "mfcc_centred", "untrained"]
        assert said in (tmp_path / f"report-{name}" / "report.html").read_text()
