"""The step `align` from any encoder: the topmost layers move, nothing below them does, no bit of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, HubertConfig, HubertModel, WavLMConfig, WavLMModel

from sonorant.artifacts import digest_folder, read_record
from sonorant.config import AlignConfig
from sonorant.data.audio import standardise
from sonorant.data.batching import Cursor, Loader
from sonorant.data.corpus import read_corpus
from sonorant.models.huggingface import load_encoder, save_encoder
from sonorant.steps import align
from tests.running import journal_of
from tests.tiny import POST_NORM, grid, make_encoder, noise, with_changes

pytestmark = pytest.mark.usefixtures("runs")
SHAPE = {
    "conv_dim": [16] * 7,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "layerdrop": 0.0,
}
ALIGN: dict[str, Any] = {
    "num_updates": 3,
    "phases": [{"weights": {"alignment": 1.0}}],
    "num_trained_layers": 1,
    "alignment": {"dim": 16},
    # Weight decay of one half would halve in 100 updates whatever is given to the optimizer.
    "optim": {"learning_rate": 0.01, "weight_decay": 0.5, "warmup_share": 0.0, "decay_share": 0.0},
    "batching": {"batch_seconds": 4.0, "crop_seconds": 2.0},
    "log_every": 1,
}
STARTS = ["hubert", "wavlm", "own"]


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three random encoders of three layers: as transformers saves a HuBERT and a WavLM base, and our own."""
    folder = tmp_path_factory.mktemp("starts")
    torch.manual_seed(0)
    HubertModel(HubertConfig(**SHAPE)).save_pretrained(folder / "hubert")
    WavLMModel(WavLMConfig(**SHAPE, num_buckets=8, max_bucket_distance=16)).save_pretrained(folder / "wavlm")
    # WavLM base hears waves as they were recorded.
    (folder / "wavlm" / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False}))
    (folder / "own").mkdir()
    save_encoder(make_encoder(num_layers=3, **POST_NORM), folder / "own")
    return {name: folder / name for name in STARTS}


def weights_of(folder: Path) -> dict[str, Tensor]:
    """As the file holds them."""
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("partner", ["student", "frozen"])
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("num_trained", [1, 2])
def test_nothing_below_the_trained_layers_moves(
    start: str, partner: str, num_trained: int, starts: dict[str, Path], tone_corpus: dict[str, Path], tmp_path: Path
) -> None:
    """Not the norm before the first layer either, which the official freeze leaves trainable, nor the relative bias,
    nor the mask embedding (alignment.md §2.1)."""
    values = with_changes(ALIGN, {"num_trained_layers": num_trained, "alignment": {"partner": partner}})
    align(values, corpus=tone_corpus["corpus"], encoder=starts[start], aligned=tmp_path / "aligned")
    before, after = weights_of(starts[start]), weights_of(tmp_path / "aligned")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    top = tuple(f"encoder.layers.{3 - 1 - place}." for place in range(num_trained))
    above = {name for name in before if name.startswith(top)}
    assert moved == above
    assert {"encoder.layer_norm.weight", "masked_spec_embed"} <= before.keys() - moved


@pytest.mark.parametrize("start", STARTS)
def test_the_head_is_dropped_and_transformers_opens_the_rest(
    start: str, starts: dict[str, Path], tone_corpus: dict[str, Path], tmp_path: Path
) -> None:
    aligned = tmp_path / "aligned"
    align(ALIGN, corpus=tone_corpus["corpus"], encoder=starts[start], aligned=aligned)
    assert {name: tuple(head.shape) for name, head in load_file(aligned / "heads.safetensors").items()} == {
        "alignment.head.weight": (16, 32),
        "alignment.head.bias": (16,),
    }
    assert read_record(aligned, "aligned")["inputs"]["encoder"] == digest_folder(starts[start])
    model, report = AutoModel.from_pretrained(aligned, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    wave = torch.from_numpy(noise(8_000))
    with torch.no_grad():
        wanted = model.eval()(wave[None], output_hidden_states=True).hidden_states[3][0]
        states = load_encoder(aligned)[0](wave, [len(wave)]).states[3]
    # Another order of float32 sums through three layers.
    torch.testing.assert_close(states, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("is_standardised", [True, False])
def test_twins_are_the_crop_and_its_copy_brought_to_the_encoders_scale(
    is_standardised: bool, tone_corpus: dict[str, Path]
) -> None:
    config = AlignConfig.model_validate(ALIGN)
    utterances = read_corpus(tone_corpus["corpus"], split="train")
    loader = Loader(
        utterances, None, config.batching, config.masking, 0, twins=config.alignment, is_standardised=is_standardised
    )
    [batch], _ = next(loader.updates(Cursor()))
    assert batch.twins is not None
    assert len(batch.twin_samples) == 2 * len(batch.num_samples)
    crops, twins = unpack(batch.waves, batch.num_samples), unpack(batch.twins, batch.twin_samples)
    places = set()
    for crop, first, second in zip(crops, twins[0::2], twins[1::2], strict=True):
        # The crop is of a whole that was standardised; each twin is standardised itself.
        wanted = torch.from_numpy(standardise(crop.numpy())) if is_standardised else crop
        same = [len(twin) == len(crop) and torch.equal(twin, wanted) for twin in (first, second)]
        assert sum(same) == 1
        places.add(same.index(True))
        copy = second if same[0] else first
        assert (abs(float(copy.std()) - 1) < 1e-3) == is_standardised
    assert places == {0, 1}


def unpack(waves_N: Tensor, num_samples: tuple[int, ...]) -> list[Tensor]:
    """Waves that `pack_waves` laid end to end."""
    ends = np.cumsum([grid(count) for count in num_samples])
    return [waves_N[end - grid(count) : end][:count] for end, count in zip(ends, num_samples, strict=True)]


def test_the_journal_tells_terms_and_collapse(
    starts: dict[str, Path], tone_corpus: dict[str, Path], tmp_path: Path
) -> None:
    align(ALIGN, corpus=tone_corpus["corpus"], encoder=starts["hubert"], aligned=tmp_path / "aligned")
    entries = journal_of(tmp_path / "aligned")
    assert [entry["update"] for entry in entries] == [1, 2, 3]
    for entry in entries:
        loss = entry["alignment/divergence_per_frame"] + 0.4 * entry["alignment/repulsion_relative"]
        assert entry["alignment/loss"] == pytest.approx(loss, rel=1e-5)
        assert -1 <= entry["alignment/mean_cosine"] <= 1
        assert 1 <= entry["alignment/effective_rank"] <= 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_trained_layers": 4}, r"^num_trained_layers 4 exceeds encoder.num_layers 3: lower it$"),
        ({"alignment": {"partner": "frozen"}, "num_trained_layers": None}, "partner frozen needs num_trained_layers"),
        ({"alignment": {"divergence_per_frame": 0}}, "are both 0, wanted one above 0: raise one"),
        ({"phases": [{"weights": {"grounding": 1.0}}]}, "the step ground alone can train"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_a_line(
    changes: dict[str, Any], message: str, starts: dict[str, Path], tone_corpus: dict[str, Path], tmp_path: Path
) -> None:
    paths = {"corpus": tone_corpus["corpus"], "encoder": starts["hubert"], "aligned": tmp_path / "aligned"}
    with pytest.raises(ValueError, match=message) as caught:
        align(with_changes(ALIGN, changes), **paths)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "aligned" / "model.safetensors").exists()
