"""The step `evaluate` on a real corpus and a real published folder, whose encoder has not been trained."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from sonorant.artifacts import digest_folder, write_record
from sonorant.clustering import fit_kmeans
from sonorant.config import EncoderConfig
from sonorant.data.corpus import read_corpus
from sonorant.inference import Speech
from sonorant.models.encoder import Encoder
from sonorant.models.huggingface import save_encoder
from sonorant.steps import evaluate, prepare

NUM_UNITS = 24


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny built-in corpus of six speakers, its voice the tones."""
    folder = tmp_path_factory.mktemp("evaluate") / "corpus"
    source = {
        "kind": "synthetic",
        "num_utterances": 40,
        "num_speakers": 6,
        "voice": "tones",
        "test_share": 0.4,
    }
    prepare({"sources": [source]}, corpus=folder, scratch=folder.with_name("scratch"))
    return folder


def publish(folder: Path, corpus: Path, seed: int) -> Path:
    """A published model without training: random weights and a codebook that fits them."""
    folder.mkdir(parents=True)
    config = EncoderConfig(
        stem_channels=16, dim=16, num_layers=2, num_heads=2, ffn_dim=32, position_kernel=5, position_groups=2
    )
    torch.manual_seed(seed)
    encoder = Encoder(config)
    save_encoder(encoder, folder, layer=1, commit=f"made by the test with seed {seed}")
    waves = [utterance.wave() for utterance in read_corpus(corpus, "train")[:8]]
    frames = np.concatenate(Speech(encoder, 1).embed(waves))
    fit_kmeans(frames, NUM_UNITS, normalise=True).codebook.save(folder / "codebook.safetensors")
    entries = [
        {"update": 10 * k, "learning_rate": 1e-3 / k, "loss": 5.0 / k, "units/accuracy": 0.1 * k} for k in (1, 2, 3)
    ]
    (folder / "journal.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    write_record(folder, {"step": "publish", "digest": digest_folder(folder)})
    return folder


@pytest.fixture(scope="module")
def model(corpus: Path) -> Path:
    """The model that is evaluated."""
    return publish(corpus.with_name("model"), corpus, seed=1)


@pytest.fixture(scope="module")
def evaluated(corpus: Path, model: Path) -> tuple[Path, dict[str, float]]:
    """Its report, and the metrics returned."""
    report = corpus.with_name("report")
    previous = publish(corpus.with_name("previous"), corpus, seed=2)
    return report, evaluate({"num_examples": 2}, corpus=corpus, model=model, report=report, previous=previous)


def test_all_systems_have_all_scores(evaluated: tuple[Path, dict[str, float]]) -> None:
    report, metrics = evaluated
    written = json.loads((report / "metrics.json").read_text())
    assert list(written) == ["model", "mfcc", "mfcc_centred", "untrained", "previous"]
    assert {
        f"{system}.{name}": value for system, scores in written.items() for name, value in scores.items()
    } == metrics
    changes = {f"unit_edits_{name}" for name in ("speed", "pitch", "noise", "room")}
    for name, scores in written.items():
        assert set(scores) | changes == set(written["model"])
        assert (changes <= set(scores)) == (name in ("model", "previous"))  # of what is published
    assert {"abx_across_any", "abx_within_any", "abx_across_any_librilight", "unit_abx_across_any"} <= set(
        written["mfcc"]
    )
    assert all(math.isfinite(value) for value in metrics.values())
    shares = [name for name in written["mfcc"] if name.startswith(("abx", "unit_abx", "pnmi", "phone", "cluster"))]
    assert all(0 <= scores[name] <= 1 for scores in written.values() for name in shares)
    assert all(scores["num_units"] == NUM_UNITS for scores in written.values())


def test_mfcc_tells_phones_apart_better_than_chance(evaluated: tuple[Path, dict[str, float]]) -> None:
    _, metrics = evaluated
    # The tone voices' phones have spectra of their own, and chance is .5.
    assert metrics["mfcc.abx_across_any"] < 0.4
    assert metrics["mfcc.pnmi"] > 0.2


def test_the_page_is_whole_and_loads_nothing(evaluated: tuple[Path, dict[str, float]]) -> None:
    page = (evaluated[0] / "report.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:)|url\((?!data:)|@import|<script|<link""", page)
    assert page.count("<figure>") == 2 + 2  # two heat maps and two utterances
    assert "synthetic: absolute scores on it say little" in page
    assert "made by the test with seed 1" in page
    for name in ("this model", "MFCC", "MFCC, centred", "untrained", "previous model"):
        assert f">{name}</th>" in page


def test_tables_for_dvc(evaluated: tuple[Path, dict[str, float]]) -> None:
    report, metrics = evaluated
    with (report / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["system"] for row in rows] == ["model", "mfcc", "mfcc_centred", "untrained", "previous"]
    assert float(rows[1]["pnmi"]) == metrics["mfcc.pnmi"]
    with (report / "training.csv").open() as file:
        assert [float(row["loss"]) for row in csv.DictReader(file)] == [5.0, 2.5, 5 / 3]


def test_what_is_heard_of_each_phone_sums_to_its_frames(evaluated: tuple[Path, dict[str, float]]) -> None:
    report, metrics = evaluated
    with (report / "confusion.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["phone", "heard_as", "share", "frames"]
    for phone in {row["phone"] for row in rows}:
        own = [row for row in rows if row["phone"] == phone]
        # Shares are float64 near 1.
        assert sum(float(row["share"]) for row in own) == pytest.approx(1, abs=1e-12)
    right = sum(int(row["frames"]) for row in rows if row["phone"] == row["heard_as"])
    assert right / sum(int(row["frames"]) for row in rows) == pytest.approx(metrics["model.phone_purity"], abs=1e-12)


def test_its_own_items_give_the_same_scores(
    corpus: Path,
    model: Path,
    evaluated: tuple[Path, dict[str, float]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the report holds of the items is what was scored; a path is taken from where the command runs."""
    report, metrics = evaluated
    shutil.copy(report / "phones.item", tmp_path / "own.item")
    monkeypatch.chdir(tmp_path)
    config = {"items": "own.item", "max_changed": 0, "num_examples": 0}
    found = evaluate(config, corpus=corpus, model=model, report=tmp_path / "phones")
    same = [name for name in found if "_in" not in name]
    assert any("abx_across_any" in name for name in same)
    assert {name: found[name] for name in same} == {name: metrics[name] for name in same}
    assert (tmp_path / "phones" / "phones.item").read_bytes() == (report / "phones.item").read_bytes()
    assert "items of own.item." in (tmp_path / "phones" / "report.html").read_text()
    # Phones alone, in their contexts, are others than whole triphones.
    assert found["mfcc.abx_across_in"] != metrics["mfcc.abx_across_in"]
    found = evaluate(
        {**config, "items": str(report / "triphones.item")}, corpus=corpus, model=model, report=tmp_path / "triphones"
    )
    assert found["mfcc.abx_across_in"] == metrics["mfcc.abx_across_in"]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (None, r"found no text \(FileNotFoundError\)"),
        ("", "found no item"),
        ("radio-1 0.1 0.2 n ae d s\n", "found items of 1 utterances, 'radio-1' the first"),
    ],
)
def test_items_of_nothing_are_one_clear_line(
    corpus: Path, model: Path, tmp_path: Path, text: str | None, wanted: str
) -> None:
    if text is not None:
        (tmp_path / "my.item").write_text(text)
    with pytest.raises(ValueError, match=rf"my\.item: {wanted}") as error:
        evaluate({"items": str(tmp_path / "my.item")}, corpus=corpus, model=model, report=tmp_path / "report")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "report").exists()


def test_twice_gives_the_same_bytes(
    corpus: Path, model: Path, evaluated: tuple[Path, dict[str, float]], tmp_path: Path
) -> None:
    again = tmp_path / "report"
    previous = corpus.with_name("previous")
    evaluate({"num_examples": 2}, corpus=corpus, model=model, report=again, previous=previous)
    assert digest_folder(again) == digest_folder(evaluated[0])


def test_without_phones_the_rest_remains(
    corpus: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wordless = tmp_path / "corpus"
    audio = tmp_path / "tree"
    for utterance in read_corpus(corpus):
        speaker = audio / utterance.speaker
        speaker.mkdir(parents=True, exist_ok=True)
        shutil.copy(utterance.path, speaker)
    source = {"kind": "folder", "name": "tree", "path": str(audio), "test_share": 0.4}
    prepare({"sources": [source]}, corpus=wordless, scratch=tmp_path / "scratch")
    metrics = evaluate({}, corpus=wordless, model=model, report=tmp_path / "report")
    assert not any("abx" in name or "pnmi" in name or "purity" in name for name in metrics)
    assert metrics["model.bitrate"] > 0
    said = " ".join(capsys.readouterr().out.split())
    assert "None of the evaluated utterances has phones: ABX errors, PNMI and purities are left out." in said
    assert f"report: {tmp_path / 'report' / 'report.html'}" in said
    assert not any((tmp_path / "report" / name).exists() for name in ("confusion.csv", "phones.item", "triphones.item"))
    assert "absolute scores" not in (tmp_path / "report" / "report.html").read_text()
    # Items of their own say what phones would.
    ids = [utterance.id for utterance in read_corpus(wordless, "test")]
    lines = [f"{name} 0.{n} 0.{n + 1} {phone} SIL SIL s" for name in ids for n, phone in ((1, "a"), (3, "b"), (5, "a"))]
    (tmp_path / "my.item").write_text("\n".join(lines))
    given = {"items": str(tmp_path / "my.item"), "max_changed": 0}
    metrics = evaluate(given, corpus=wordless, model=model, report=tmp_path / "given")
    assert {"model.abx_within_any", "model.abx_within_in"} <= set(metrics)
    assert not any("pnmi" in name or "purity" in name for name in metrics)
    said = " ".join(capsys.readouterr().out.split())
    assert "None of the evaluated utterances has phones: PNMI and purities are left out." in said


def test_a_source_that_is_not_there_is_one_clear_line(corpus: Path, model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found no utterance of split 'test' and source 'radio'") as error:
        evaluate({"source": "radio"}, corpus=corpus, model=model, report=tmp_path / "report")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "report").exists()
