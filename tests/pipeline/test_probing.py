"""Probes in `evaluate`: right where the encoder knows, at chance where it knows nothing, and paid for once."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sonorant.config import EvaluateConfig
from sonorant.data.corpus import Utterance, read_corpus
from sonorant.data.frames import frame_labels
from sonorant.steps import evaluate, prepare
from sonorant.steps.probing import Probed, measure_probes
from sonorant.steps.states import Layers, States, keep_states, layers_of_mfcc
from tests.tiny import write_model

pytestmark = pytest.mark.usefixtures("runs")
BUDGET: dict[str, Any] = {"num_updates": 400, "learning_rate": 1e-2, "batch_seconds": 30.0, "hidden_dim": 48}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A built-in corpus of eight speakers, its voice the tones."""
    folder = tmp_path_factory.mktemp("probing") / "corpus"
    source = {
        "kind": "synthetic", "num_utterances": 120, "num_speakers": 8, "voice": "tones", "dev_share": 0.3,
        "test_share": 0.3,
    }  # fmt: skip
    prepare({"sources": [source]}, corpus=folder, scratch=folder.with_name("scratch"))
    return folder


def gold(utterances: Sequence[Utterance], count: list[int] | None = None, *, beside_noise: bool = False) -> Layers:
    """An encoder whose last layer is the phone of each frame and whose voice it is, one-hot; the first may be noise."""
    phones = sorted({name for u in utterances for name, _, _ in u.phones or ()} | {"SIL"})
    speakers = sorted({u.speaker for u in utterances})

    def make(part: Sequence[Utterance]) -> Iterator[States]:
        for u in part:
            rng = np.random.default_rng(len(u.id) + u.num_samples)
            labels = [phones.index(name) for name in frame_labels(u.phones or (), u.num_frames)]
            known = np.concatenate([np.eye(len(phones))[labels], np.zeros((u.num_frames, len(speakers)))], axis=1)
            known[:, len(phones) + speakers.index(u.speaker)] = 1
            if count is not None:
                count[0] += 1
            layers = [rng.standard_normal(known.shape), known] if beside_noise else [known]
            yield np.stack(layers).astype(np.float32)

    return Layers(f"gold, {beside_noise}", 1 + beside_noise, len(phones) + len(speakers), make)


def noise() -> Layers:
    """An encoder that knows nothing."""

    def make(part: Sequence[Utterance]) -> Iterator[States]:
        rng = np.random.default_rng(0)
        for u in part:
            yield rng.standard_normal((2, u.num_frames, 24)).astype(np.float32)

    return Layers("noise", 2, 24, make)


def probe(layers: Layers, utterances: Sequence[Utterance], *names: str, **changes: Any) -> Probed:
    config = EvaluateConfig.model_validate({"probes": dict.fromkeys(names, BUDGET | changes)})
    return measure_probes(config, layers, utterances, "digest", "evaluate: it")


def test_gold_frames_are_read(corpus: Path) -> None:
    utterances = read_corpus(corpus)
    found = probe(gold(utterances), utterances, "phones", "speaker").estimates
    # .6 % cannot be read: phones between two centres of frames, and the same one twice in a row.
    assert found["probe_per"].value <= 0.02
    assert found["probe_speaker"].value >= 0.98
    shares = probe(gold(utterances, beside_noise=True), utterances, "phones", "speaker").shares
    assert {name: int(found.argmax()) for name, found in shares.items()} == {"phones": 1, "speaker": 1}


def test_gold_frames_of_recorded_speech_are_read(shared_data: Path, tmp_path: Path) -> None:
    source = {"kind": "manifest", "name": "timit", "path": str(shared_data / "timit_sample" / "manifest.jsonl")}
    prepare({"sources": [source]}, corpus=tmp_path / "corpus", scratch=tmp_path / "scratch")
    utterances = read_corpus(tmp_path / "corpus")
    # 1.3 % cannot be read.
    told = probe(gold(utterances), utterances, "phones", num_updates=1_500, hidden_dim=256)
    assert told.estimates["probe_per"].value <= 0.02


def test_noise_is_not_read(corpus: Path) -> None:
    utterances = read_corpus(corpus)
    found = probe(noise(), utterances, "phones", "speaker").estimates
    assert found["probe_per"].value > 0.7
    num_speakers = len({u.speaker for u in utterances if u.split != "train"})
    chance, count = 1 / num_speakers, len(found["probe_speaker"].influence)
    assert abs(found["probe_speaker"].value - chance) < 3 * (chance * (1 - chance) / count) ** 0.5


def test_states_are_made_once(corpus: Path) -> None:
    utterances, made = read_corpus(corpus), [0]
    layers = gold(utterances, made)
    first = keep_states(layers, utterances, "digest", "states")
    assert made[0] == len(utterances)
    again = keep_states(layers, utterances, "digest", "states")
    assert made[0] == len(utterances), "a second probe pays nothing"
    for u, states in zip(utterances, gold(utterances).make(utterances), strict=True):
        np.testing.assert_array_equal(first[u.id], states)
        np.testing.assert_array_equal(again[u.id], states)
    base = first[utterances[0].id]
    while not isinstance(base, np.memmap):
        assert base.base is not None, "not on disk"
        base = base.base
    keep_states(layers, utterances, "another corpus", "states")
    assert made[0] == 2 * len(utterances)


def test_a_full_disk_is_said_before_anything_is_made(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    utterances, made = read_corpus(corpus), [0]
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(ValueError, match=r"states.float32: found 0.0 GiB free, wanted 0.0 for the states of every"):
        keep_states(gold(utterances, made), utterances, "digest", "states")
    assert made[0] == 0


def test_evaluate_reports_probes_of_model_and_baselines(corpus: Path, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    short = {**BUDGET, "num_updates": 10, "evaluate_every": 10}
    config = {"probes": {"phones": short, "text": short, "speaker": short}, "baselines": ["mfcc"], "max_changed": 0}
    metrics = evaluate(config, corpus=corpus, model=model, report=tmp_path / "report")
    names = ("probe_per", "probe_wer", "probe_cer", "probe_speaker")
    assert {f"{system}.{name}" for system in ("model", "mfcc") for name in names} <= metrics.keys()
    assert not any(name.startswith("untrained") for name in metrics)
    page = (tmp_path / "report" / "report.html").read_text()
    assert "phone error rate, linear CTC" in page
    assert "Weight of each layer in the probe of text" in page
    with (tmp_path / "report" / "layers.csv").open() as file:
        rows = list(csv.DictReader(file))
    sums = {(row["system"], row["probe"]): 0.0 for row in rows}
    for row in rows:
        sums[row["system"], row["probe"]] += float(row["share"])
    assert all(total == pytest.approx(1, abs=1e-5) for total in sums.values())
    assert {(row["system"], row["layer"]) for row in rows} == {("mfcc", "0"), *(("model", str(n)) for n in range(3))}
    written = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert written["model"]["probe_per"] == metrics["model.probe_per"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "dev"}, "evaluate.probes: found evaluate.split dev, on which heads are fitted or chosen, wanted"),
        ({"probes": {"emotion": {}}}, "evaluate.probes.emotion: found no utterance with it for train and dev and test"),
    ],
)
def test_what_cannot_be_probed_is_refused(corpus: Path, changes: dict[str, Any], message: str) -> None:
    utterances = read_corpus(corpus)
    config = EvaluateConfig.model_validate({"probes": {"phones": BUDGET}, **changes})
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        measure_probes(config, layers_of_mfcc(1, centred=False), utterances, "digest", "evaluate: it")
    assert "\n" not in str(caught.value)
