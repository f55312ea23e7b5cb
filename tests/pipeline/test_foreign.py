"""A model that transformers wrote in the place of one of ours: clustered, published and evaluated as it is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, WavLMConfig, WavLMModel

from sonorant.artifacts import digest_folder, read_record
from sonorant.data.corpus import read_corpus
from sonorant.data.units import UnitStore
from sonorant.inference import load
from sonorant.models.codebook import Codebook
from sonorant.steps import cluster, evaluate, prepare, publish

SOURCE = {"kind": "synthetic", "voice": "tones", "num_utterances": 24, "num_speakers": 6, "dev_share": 0.2}


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, and a tiny random WavLM that hears waves as they were recorded."""
    folder = tmp_path_factory.mktemp("foreign")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SONORANT_RUNS", str(folder / "runs"))
        prepare({"sources": [{**SOURCE, "test_share": 0.2}], "num_workers": 1}, corpus=folder / "corpus")
    torch.manual_seed(0)
    config = WavLMConfig(
        conv_dim=[16] * 7,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        conv_bias=True,
    )
    WavLMModel(config).save_pretrained(folder / "wavlm")
    (folder / "wavlm" / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False}))
    return folder


def test_its_layers_are_clustered(artifacts: Path, tmp_path: Path) -> None:
    paths = {"corpus": artifacts / "corpus", "encoder": artifacts / "wavlm", "units": tmp_path / "units"}
    cluster({"num_units": 8, "layer": 1}, **paths)
    assert read_record(tmp_path / "units", "units")["inputs"]["encoder"] == digest_folder(artifacts / "wavlm")
    model = AutoModel.from_pretrained(artifacts / "wavlm").eval()
    codebook, store = Codebook.load(tmp_path / "units" / "codebook.safetensors"), UnitStore(tmp_path / "units")
    same = []
    for utterance in read_corpus(artifacts / "corpus", split="test"):
        with torch.no_grad():
            states = model(torch.from_numpy(utterance.wave())[None], output_hidden_states=True).hidden_states
        same.append(store[utterance.id] == codebook.assign(states[1][0].numpy()))
    # Frames agree to 1e-5; one that lies so close to a border may change sides.
    assert np.concatenate(same).mean() > 0.995


def test_it_is_published_and_evaluated(artifacts: Path, tmp_path: Path) -> None:
    corpus = artifacts / "corpus"
    publish({"num_units": 8, "layer": 2}, corpus=corpus, encoder=artifacts / "wavlm", model=tmp_path / "model")
    utterance = read_corpus(corpus, split="test")[0]
    [frames] = load(tmp_path / "model").embed([utterance.wave()])
    with torch.no_grad():
        model = AutoModel.from_pretrained(tmp_path / "model").eval()
        wanted = model(torch.from_numpy(utterance.wave())[None], output_hidden_states=True).hidden_states[2][0]
    np.testing.assert_allclose(frames, wanted.numpy(), atol=1e-4)
    card = (tmp_path / "model" / "README.md").read_text()
    assert digest_folder(artifacts / "wavlm") in card
    assert "nothing standardised" in card
    metrics = evaluate({"num_examples": 1}, corpus=corpus, model=tmp_path / "model", report=tmp_path / "report")
    assert "model.pnmi" in metrics


def test_a_folder_that_is_neither_is_refused(artifacts: Path, tmp_path: Path) -> None:
    (tmp_path / "encoder").mkdir()
    with pytest.raises(ValueError, match=r"^encoder .*a folder without artifact.json, wanted an artifact"):
        cluster({"layer": 1}, corpus=artifacts / "corpus", encoder=tmp_path / "encoder", units=tmp_path / "units")
