"""The step `cluster` on 40 s of made-up sounds: what it writes, what it refuses, what a kill costs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from lhotse import CutSet, MonoCut, Recording, SupervisionSegment
from lhotse.audio import AudioSource

from sonorant.artifacts import digest_folder, read_record, write_record
from sonorant.config import ClusterConfig, EncoderConfig
from sonorant.data.corpus import CUTS, read_corpus
from sonorant.data.mfcc import mfcc
from sonorant.data.units import UnitStore
from sonorant.models.codebook import Codebook
from sonorant.models.encoder import Encoder
from sonorant.models.huggingface import save_encoder
from sonorant.steps import cluster, features
from sonorant.steps.features import draw_utterances, grow_rows, split_shards, standardise_frames

RATE = 16_000
TONES = (200, 400, 700, 1100, 1600, 2300)  # Hz: six sounds that MFCC tell apart


def write_corpus(folder: Path, splits: dict[str, int], seconds: float = 1.0) -> Path:
    """So many utterances of each split, a row of tones in noise; every one a little longer than the last."""
    (folder / "audio").mkdir(parents=True)
    rng = np.random.default_rng(0)
    cuts = []
    for split, count in splits.items():
        for number in range(count):
            name = f"{split}-{number:03d}"
            pitches = rng.choice(TONES, 4)
            num_samples = int(seconds * RATE) + 37 * number
            pitch = pitches[np.arange(num_samples) * len(pitches) // num_samples]
            wave = 0.3 * np.sin(2 * np.pi * pitch * np.arange(num_samples) / RATE)
            wave += 0.003 * rng.standard_normal(num_samples)
            soundfile.write(folder / "audio" / f"{name}.flac", wave, RATE)
            duration = num_samples / RATE
            source = AudioSource("file", [0], f"audio/{name}.flac")
            recording = Recording(name, [source], RATE, num_samples, duration)
            said = SupervisionSegment(name, name, 0.0, duration, speaker=split)
            custom = {"split": split, "source": "tones"}
            cuts.append(MonoCut(name, 0.0, duration, 0, supervisions=[said], recording=recording, custom=custom))
    CutSet.from_cuts(cuts).to_file(folder / CUTS)
    write_record(folder, {"step": "prepare", "digest": digest_folder(folder)})
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 utterances to fit on, 3 and 4 that are only labelled: 40 s in all."""
    return write_corpus(tmp_path_factory.mktemp("prepared") / "corpus", {"train": 30, "dev": 3, "test": 4})


@pytest.fixture(autouse=True)
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the steps keep their scratch folders."""
    monkeypatch.setenv("SONORANT_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


def test_every_frame_of_every_split_gets_its_nearest_unit(corpus: Path, tmp_path: Path, runs: Path) -> None:
    metrics = cluster({"num_units": 12}, corpus=corpus, units=tmp_path / "units")
    store = UnitStore(tmp_path / "units")
    codebook = Codebook.load(tmp_path / "units" / "codebook.safetensors")
    utterances = read_corpus(corpus)
    assert len(store) == len(utterances) == 37
    for utterance in utterances:
        units = store[utterance.id]
        assert len(units) == utterance.num_frames
        np.testing.assert_array_equal(units, codebook.assign(mfcc(utterance.wave())))

    assert (store.about["layer"], store.about["normalise"], store.num_units) == (None, "none", 12)
    training = [u for u in utterances if u.split == "train"]
    seen = np.concatenate([store[u.id] for u in training])
    shares = np.bincount(seen, minlength=12) / len(seen)
    assert metrics["perplexity"] == pytest.approx(np.exp(-(shares * np.log(np.maximum(shares, 1e-9))).sum()))
    assert metrics["dead_units"] == (shares == 0).sum() == 0
    assert metrics["num_frames"] == sum(u.num_frames for u in utterances)
    assert metrics["fitted_frames"] == sum(u.num_frames for u in training)
    assert read_record(tmp_path / "units", "units")["metrics"] == metrics
    assert list(runs.iterdir()) == []


def test_units_tell_the_tones_apart(corpus: Path, tmp_path: Path) -> None:
    """The frames of one tone within an utterance share a unit, but for those its deltas reach across an edge."""
    cluster({"num_units": 12}, corpus=corpus, units=tmp_path / "units")
    store = UnitStore(tmp_path / "units")
    middle = [store[u.id][2:8] for u in read_corpus(corpus, split="test")]  # within the first of four tones
    assert sum(len(set(units.tolist())) == 1 for units in middle) >= 3


def test_the_same_work_gives_the_same_bytes_whatever_the_workers(corpus: Path, tmp_path: Path) -> None:
    for name, workers in (("one", 1), ("three", 3)):
        cluster({"num_units": 9, "num_workers": workers}, corpus=corpus, units=tmp_path / name)
    assert digest_folder(tmp_path / "one") == digest_folder(tmp_path / "three")


def test_only_training_frames_are_fitted_and_no_more_than_asked_for(corpus: Path, tmp_path: Path) -> None:
    metrics = cluster({"num_units": 5, "max_frames": 400}, corpus=corpus, units=tmp_path / "units")
    training = read_corpus(corpus, split="train")
    drawn = draw_utterances(training, 400, seed=0)
    assert 300 < metrics["fitted_frames"] <= 400
    assert metrics["fitted_frames"] == sum(u.num_frames for u in drawn)
    assert [u.id for u in drawn] == sorted(u.id for u in drawn)
    assert draw_utterances(training, 400, seed=1) != drawn
    assert len(draw_utterances(training, 1, seed=0)) == 1
    assert len(UnitStore(tmp_path / "units")) == 37


def test_frames_are_clustered_with_their_neighbours(corpus: Path, tmp_path: Path) -> None:
    config = {"num_units": 8, "normalise": "utterance_mean", "context_frames": 2}
    cluster(config, corpus=corpus, units=tmp_path / "units")
    store = UnitStore(tmp_path / "units")
    codebook = Codebook.load(tmp_path / "units" / "codebook.safetensors")
    utterance = read_corpus(corpus, split="test")[0]
    frames = mfcc(utterance.wave())
    frames = (frames - frames.mean(0, dtype=np.float64)).astype(np.float32)
    last = len(frames) - 1
    for t in (0, 1, 7, last):
        window = np.concatenate([frames[min(max(t + shift, 0), last)] for shift in (-2, -1, 0, 1, 2)])
        assert store[utterance.id][t] == codebook.assign(window[None])[0]


@pytest.mark.parametrize("normalise", ["corpus", "utterance"])
def test_normalised_frames(corpus: Path, tmp_path: Path, normalise: str) -> None:
    metrics = cluster({"num_units": 8, "normalise": normalise}, corpus=corpus, units=tmp_path / "units")
    store, codebook = (
        UnitStore(tmp_path / "units"),
        Codebook.load(tmp_path / "units" / "codebook.safetensors"),
    )
    utterance = read_corpus(corpus, split="test")[0]
    frames = mfcc(utterance.wave())
    if normalise == "utterance":
        frames = standardise_frames(frames)
        assert not codebook.shift.any()
        np.testing.assert_allclose(frames.mean(0), 0, atol=1e-5)  # float32 means of 50 values of size 1
    else:
        frames_seen = np.concatenate([mfcc(u.wave()) for u in read_corpus(corpus, split="train")])
        # A mean of 1,500 float32 values of size 100; the reference sums in float64 too.
        np.testing.assert_allclose(codebook.shift, frames_seen.mean(0, dtype=np.float64), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(store[utterance.id], codebook.assign(frames))
    assert 0 < metrics["inertia"] < 39  # 39 dimensions of variance 1 have 39 before any clustering


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained encoder artifact of three layers."""
    folder = tmp_path_factory.mktemp("encoders") / "encoder"
    folder.mkdir()
    tiny = EncoderConfig(stem_channels=8, dim=16, num_layers=3, num_heads=2, ffn_dim=16)
    save_encoder(Encoder(tiny), folder)
    write_record(folder, {"step": "pretrain", "digest": digest_folder(folder)})
    return folder


def test_a_layer_of_an_encoder(corpus: Path, encoder: Path, tmp_path: Path) -> None:
    from sonorant.inference import load_trained

    cluster({"num_units": 6, "layer": 2}, corpus=corpus, encoder=encoder, units=tmp_path / "units")
    store, codebook = (
        UnitStore(tmp_path / "units"),
        Codebook.load(tmp_path / "units" / "codebook.safetensors"),
    )
    assert store.about["layer"] == 2
    assert codebook.centroids.shape == (6, 16)
    utterances = read_corpus(corpus)
    alone = [load_trained(encoder).embed([u.wave()], 2)[0] for u in utterances]
    same = np.concatenate([store[u.id] == codebook.assign(x) for u, x in zip(utterances, alone, strict=True)])
    # Batched frames equal single ones to 1e-4; a frame that lies so close to a border may change sides.
    assert same.mean() > 0.995


@pytest.mark.parametrize(
    ("config", "has_encoder", "wanted"),
    [
        ({"layer": 2}, False, "cluster.layer: found 2 without an encoder, wanted one: add --encoder"),
        ({}, True, "cluster.layer: found null with an encoder, wanted 0 to 3"),
        ({"layer": 4}, True, "cluster.layer: found 4 with an encoder, wanted 0 to 3"),
        ({"num_units": 5000}, False, "found 1527 frames for 5000 units, wanted at least one frame a unit"),
        ({"num_units": 1}, False, "cluster.num_units: found 1"),
    ],
)
def test_what_cannot_be_done_is_said_on_one_line(
    corpus: Path, encoder: Path, tmp_path: Path, config: dict[str, int], has_encoder: bool, wanted: str
) -> None:
    with pytest.raises(ValueError) as error:
        cluster(config, corpus=corpus, encoder=encoder if has_encoder else None, units=tmp_path / "units")
    assert wanted in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "units").exists()


def test_a_corpus_without_training_speech_is_refused(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", {"test": 2})
    with pytest.raises(ValueError, match="found no utterance of split 'train'"):
        cluster({"num_units": 4}, corpus=corpus, units=tmp_path / "units")


def test_audio_that_is_not_as_long_as_its_cut_is_refused(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", {"train": 3})
    soundfile.write(corpus / "audio" / "train-001.flac", np.zeros(RATE // 2), RATE)
    with pytest.raises(ValueError, match="utterance train-001: found audio of 24 frames, wanted 49"):
        cluster({"num_units": 4}, corpus=corpus, units=tmp_path / "units")


def test_dead_units_are_counted(tmp_path: Path) -> None:
    """Two different frames cannot fill five units: silence makes one, utterance by utterance the same."""
    corpus = write_corpus(tmp_path / "corpus", {"train": 2})
    for path in (corpus / "audio").iterdir():
        soundfile.write(path, np.zeros(soundfile.info(path).frames), RATE)
    metrics = cluster({"num_units": 5}, corpus=corpus, units=tmp_path / "units")
    assert metrics["dead_units"] == 4
    assert metrics["perplexity"] == 1


def test_a_file_goes_on_after_its_last_whole_shard(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "SHARD_FRAMES", 200)
    shards = split_shards(read_corpus(corpus))
    assert len(shards) > 5
    made: list[str] = []

    def make(shard: list[features.Utterance]) -> list[np.ndarray]:
        made.extend(utterance.id for utterance in shard)
        return [np.full((u.num_frames, 2), float(u.id[-3:]), np.float32) for u in shard]

    path = tmp_path / "rows"
    whole = np.array(grow_rows(path, shards, make, 2, np.float32, lambda *_: None))
    content = path.read_bytes()
    assert len(whole) == sum(u.num_frames for shard in shards for u in shard)
    frames_of_two = sum(u.num_frames for shard in shards[:2] for u in shard)
    for size in (0, 1, frames_of_two * 8 - 1, frames_of_two * 8, frames_of_two * 8 + 5, len(content)):
        path.write_bytes(content[:size])
        made.clear()
        np.testing.assert_array_equal(grow_rows(path, shards, make, 2, np.float32, lambda *_: None), whole)
        assert path.read_bytes() == content
        num_whole = {0: 0, 1: 0, frames_of_two * 8 - 1: 1, len(content): len(shards)}.get(size, 2)
        assert made == [u.id for shard in shards[num_whole:] for u in shard]


KILLED = """
import os, signal, sys
from pathlib import Path
from sonorant.data.corpus import Utterance
from sonorant.steps import cluster, features

features.SHARD_FRAMES = 100
left, read = int(sys.argv[3]), Utterance.wave

def wave(utterance):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    return read(utterance)

Utterance.wave = wave
cluster({"num_units": 10, "num_workers": 1}, corpus=Path(sys.argv[1]), units=Path(sys.argv[2]))
"""


@pytest.mark.parametrize(("kill_at_read", "growing"), [(15, "features.f32"), (33, "units.i16")])
def test_kill_and_resume_gives_the_same_artifact(
    corpus: Path,
    tmp_path: Path,
    runs: Path,
    monkeypatch: pytest.MonkeyPatch,
    kill_at_read: int,
    growing: str,
) -> None:
    """SIGKILL among the 30 readings for features or the 7 for units; then the same call, left alone."""
    monkeypatch.setattr(features, "SHARD_FRAMES", 100)
    command = [sys.executable, "-c", KILLED, str(corpus), str(tmp_path / "units"), str(kill_at_read)]
    # k-means promises the same bits on the same number of threads.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    killed = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "units").exists()
    (kept,) = runs.glob("cluster-*")
    whole = {"features.f32": 1527 * 39 * 4, "units.i16": 2 * sum(u.num_frames for u in read_corpus(corpus))}
    assert 0 < (kept / growing).stat().st_size < whole[growing]

    config = ClusterConfig(num_units=10, num_workers=1)
    cluster(config, corpus=corpus, units=tmp_path / "units")
    assert not list(runs.iterdir())
    cluster(config, corpus=corpus, units=tmp_path / "undisturbed")
    assert digest_folder(tmp_path / "units") == digest_folder(tmp_path / "undisturbed")
