"""The published folder: what serves, what is measured and what transformers opens are one model."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.numpy import load_file
from transformers import AutoModel

from sonorant.artifacts import read_record
from sonorant.clustering import fit_kmeans
from sonorant.data.audio import standardise
from sonorant.data.corpus import read_corpus
from sonorant.data.pairs import read_square
from sonorant.inference import load
from sonorant.models.grounding import load_grounder
from sonorant.steps import cluster, ground, prepare, pretrain, publish
from tests.tiny import encoder_config, pretrain_values

SOURCE = {"kind": "synthetic", "voice": "tones", "num_utterances": 24, "num_speakers": 6, "dev_share": 0.2}
CONFIG = {"num_units": 12, "licence": "cc0-1.0"}


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, units and an encoder of a few updates."""
    folder = tmp_path_factory.mktemp("published")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SONORANT_RUNS", str(folder / "runs"))
        prepare({"sources": [{**SOURCE, "test_share": 0.2}], "num_workers": 1}, corpus=folder / "corpus")
        cluster({"num_units": 12}, corpus=folder / "corpus", units=folder / "units")
        paths = {name: folder / name for name in ("corpus", "units", "encoder")}
        pretrain(pretrain_values(), **paths)
    return folder


def run(folder: Path, model: Path, **changes: object) -> dict[str, float]:
    return publish({**CONFIG, **changes}, corpus=folder / "corpus", encoder=folder / "encoder", model=model)


def test_transformers_sees_the_published_frames(artifacts: Path, tmp_path: Path) -> None:
    run(artifacts, tmp_path / "model", layer=1)
    theirs = AutoModel.from_pretrained(tmp_path / "model").eval()
    speech = load(tmp_path / "model")
    assert speech.layer == 1
    for utterance in read_corpus(artifacts / "corpus", split="test")[:3]:
        wave = utterance.wave()
        [ours] = speech.embed([wave])
        with torch.no_grad():
            states = theirs(torch.from_numpy(standardise(wave))[None], output_hidden_states=True).hidden_states
        # float32 through two layers of values of size one; the issue asks for 1e-4.
        np.testing.assert_allclose(ours, states[1][0].numpy(), atol=1e-4)


def test_the_layer_with_the_best_dev_units_is_chosen(artifacts: Path, tmp_path: Path) -> None:
    metrics = run(artifacts, tmp_path / "model")
    scores = {int(name[-1]): value for name, value in metrics.items() if name.startswith("dev_pnmi")}
    assert sorted(scores) == [1, 2]
    assert metrics["layer"] == load(tmp_path / "model").layer == max(scores, key=lambda layer: scores[layer])


@pytest.mark.parametrize("normalise", ["none", "corpus", "utterance_mean"])
def test_units_are_nearest_centroids_of_what_was_fitted(artifacts: Path, tmp_path: Path, normalise: str) -> None:
    run(artifacts, tmp_path / "model", layer=2, normalise=normalise, num_restarts=1)
    speech = load(tmp_path / "model")
    train = [speech.embed([u.wave()])[0] for u in read_corpus(artifacts / "corpus", split="train")]
    if normalise == "utterance_mean":
        train = [(frames - frames.mean(0, dtype=np.float64)).astype(np.float32) for frames in train]
    fit = fit_kmeans(np.concatenate(train), 12, num_restarts=1, seed=0, normalise=normalise == "corpus")
    wave = read_corpus(artifacts / "corpus", split="test")[0].wave()
    [frames] = speech.embed([wave])
    if normalise == "utterance_mean":
        frames = (frames - frames.mean(0, dtype=np.float64)).astype(np.float32)
    scaled = (frames - fit.codebook.shift) * fit.codebook.scale
    distances = ((scaled[:, None] - fit.codebook.centroids) ** 2).sum(-1)
    np.testing.assert_array_equal(speech.units([wave])[0], distances.argmin(1))


def test_the_same_work_gives_the_same_bytes(artifacts: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        run(artifacts, tmp_path / name)
    assert read_record(tmp_path / "first", "model")["digest"] == read_record(tmp_path / "second", "model")["digest"]


def test_the_card_and_the_provenance_say_where_it_comes_from(artifacts: Path, tmp_path: Path) -> None:
    run(artifacts, tmp_path / "model", layer=1)
    _, front, card = (tmp_path / "model" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["license"] == "cc0-1.0"
    provenance = json.loads((tmp_path / "model" / "provenance.json").read_text())
    for name in ("corpus", "encoder"):
        assert provenance[name]["digest"] == read_record(artifacts / name, name)["digest"]
    assert provenance["corpus"]["digest"] in card
    assert "teacher 1, units 1" in card


def test_how_many_units_bfloat16_keeps_is_measured_and_heeded(artifacts: Path, tmp_path: Path) -> None:
    metrics = run(artifacts, tmp_path / "model", layer=2)
    full = load(tmp_path / "model")
    dev = [utterance.wave() for utterance in read_corpus(artifacts / "corpus", split="dev")]
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    share = written["sonorant"]["agreement"]["bfloat16"]
    assert share == metrics["bfloat16_agreement"] > 0.9
    written["sonorant"]["agreement"]["bfloat16"] = 0.995
    (tmp_path / "model" / "config.json").write_text(json.dumps(written))
    reduced = load(tmp_path / "model", precision="bfloat16")
    assert (full.precision, reduced.precision) == ("float32", "bfloat16")
    kept = np.concatenate([a == b for a, b in zip(full.units(dev), reduced.units(dev), strict=True)])
    # Fewer frames than are drawn at most, so all were heard; in other batches a unit or two may differ.
    assert abs(kept.mean() - share) < 0.01
    written["sonorant"]["agreement"]["bfloat16"] = 0.98
    (tmp_path / "model" / "config.json").write_text(json.dumps(written))
    with pytest.raises(ValueError, match=r"keeps 98.00% of its units at it, wanted at least 99%: take float32"):
        load(tmp_path / "model", precision="bfloat16")
    load(tmp_path / "model")


def test_the_teacher_can_be_published(artifacts: Path, tmp_path: Path) -> None:
    waves = [read_corpus(artifacts / "corpus", split="test")[0].wave()]
    frames = {}
    for network in ("student", "teacher"):
        run(artifacts, tmp_path / network, layer=2, network=network)
        [frames[network]] = load(tmp_path / network).embed(waves)
    assert np.abs(frames["student"] - frames["teacher"]).max() > 1e-4  # the teacher lags behind


# ------------------------------------------------------------------------------------------------------- images

IMAGE: dict[str, Any] = {"side": 24, "dim": 16, "num_layers": 1, "num_heads": 2, "ffn_dim": 32}


@pytest.fixture(scope="module")
def with_images(artifacts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus, and an encoder grounded on it in two updates."""
    folder = tmp_path_factory.mktemp("grounded")
    (folder / "corpus").symlink_to(artifacts / "corpus")
    values = {
        "num_updates": 2,
        "phases": [{"weights": {"grounding": 1.0}}],
        "encoder": encoder_config().model_dump(mode="json"),
        "grounding": {"layer": 1, "dim": 8, "image": IMAGE},
        "batching": {"batch_seconds": 4.0, "crop_seconds": 1.0},
    }
    ground(values, corpus=folder / "corpus", grounded=folder / "encoder", scratch=folder / "scratch")
    return folder


def test_a_grounded_model_finds_every_image_of_its_corpus(with_images: Path, tmp_path: Path) -> None:
    metrics = run(with_images, tmp_path / "model", layer=2)
    speech, utterances = load(tmp_path / "model"), read_corpus(with_images / "corpus")
    gallery, grounder = speech.gallery, load_grounder(with_images / "encoder", with_images=True)
    assert gallery is not None
    assert grounder is not None
    images = {u.image.name: u for u in utterances if u.image is not None}
    assert metrics["images"] == len(gallery) == len(images) > 10
    assert [picture.id for picture in gallery.pictures] == sorted(images)
    for row, picture in enumerate(gallery.pictures):
        content = images[picture.id].picture()
        assert content is not None
        with torch.no_grad():
            [vector] = grounder.image((torch.from_numpy(read_square(content, picture.id, 24))[None],)).numpy()
        # Alone or with others, float32 sums of a vector of length one.
        np.testing.assert_allclose(gallery.vectors([row])[0], vector, atol=1e-5)
        owners = [u for u in utterances if u.image is not None and u.image.name == picture.id]
        assert picture.texts == tuple(dict.fromkeys(u.text for u in owners))
        assert picture.split == owners[0].split
        small = gallery.thumbnail(row)
        assert small is not None
        shown, told = (np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), int) for data in (small, content))
        assert shown.shape == (64, 64, 3)
        # Shapes of one colour: what JPEG and another size move is at their edges.
        assert np.abs(shown.mean((0, 1)) - told.mean((0, 1))).max() < 2
    [found] = speech.search([utterances[0].wave()], top=3)
    assert [image.rank for image in found] == [1, 2, 3]
    assert f"among {len(images)} images" in (tmp_path / "model" / "README.md").read_text()
    stored = load_file(tmp_path / "model" / "grounding.safetensors")
    assert not [name for name in stored if name.startswith("image_side")]


def test_grounded_twice_published_gives_the_same_bytes(with_images: Path, tmp_path: Path) -> None:
    for name, side in (("first", 16), ("second", 16), ("without", 0)):
        run(with_images, tmp_path / name, layer=2, thumbnail_side=side)
    first, second, without = (
        read_record(tmp_path / name, "model")["digest"] for name in ("first", "second", "without")
    )
    assert first == second != without
    gallery = load(tmp_path / "first").gallery
    assert gallery is not None
    small = gallery.thumbnail(0)
    assert small is not None
    assert Image.open(io.BytesIO(small)).size == (16, 16)
    assert not (tmp_path / "without" / "images.thumbnails").exists()


def test_without_images_the_grounding_is_kept_and_nothing_is_found(with_images: Path, tmp_path: Path) -> None:
    """Another corpus gives the units: it need not have images."""
    manifest = tmp_path / "manifest.jsonl"
    files = [
        {"id": u.id, "path": str(u.path), "speaker": u.speaker, "split": u.split}
        for u in read_corpus(with_images / "corpus")[:6]
    ]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in files))
    source = {"kind": "manifest", "name": "field", "path": str(manifest)}
    prepare({"sources": [source], "num_workers": 1}, corpus=tmp_path / "corpus", scratch=tmp_path / "scratch")
    paths = {"corpus": tmp_path / "corpus", "encoder": with_images / "encoder", "model": tmp_path / "model"}
    assert publish({**CONFIG, "layer": 2}, **paths)["images"] == 0
    speech = load(tmp_path / "model")
    assert speech.gallery is None
    assert speech.query([read_corpus(paths["corpus"])[0].wave()]).shape == (1, 8)


def test_the_teacher_was_not_grounded(with_images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "taught"
    folder.mkdir()
    (folder / "corpus").symlink_to(with_images / "corpus")
    shutil.copytree(with_images / "encoder", folder / "encoder")
    shutil.copy(folder / "encoder" / "model.safetensors", folder / "encoder" / "teacher.safetensors")
    with pytest.raises(ValueError, match=r"publish\.network: found teacher for an encoder that was grounded"):
        run(folder, tmp_path / "model", network="teacher")
