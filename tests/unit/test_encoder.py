"""The encoder: what transformers computes, and in a packed batch what each utterance gives alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoFeatureExtractor, AutoModel

from sonorant.data.audio import standardise
from sonorant.data.frames import Ragged, num_frames, pack_waves
from sonorant.models.encoder import Encoder
from sonorant.models.huggingface import load_encoder, save_encoder, to_transformers
from tests.tiny import LAYOUTS as PLAIN_LAYOUTS
from tests.tiny import alone, make_batch, make_encoder, make_engine, noise

LAYOUTS = {
    **PLAIN_LAYOUTS,
    "large": {**PLAIN_LAYOUTS["pre"], "stem_bias": True},
    "relative": {**PLAIN_LAYOUTS["group"], "relative_buckets": 12, "relative_max_distance": 20},
    "relative-large": {**PLAIN_LAYOUTS["pre"], "stem_bias": True, "relative_buckets": 320},
}

LENGTHS = [16_000, 5_000, 400, 9_999, 719, 720]
"""Samples: a second, lengths off the grid, and from one frame to the brink of the second."""


def hidden_states(encoder: Encoder, lengths: list[int]) -> list[list[Tensor]]:
    """Per utterance of noise: its hidden states, then its output."""
    waves = [noise(length, seed) for seed, length in enumerate(lengths)]
    with torch.no_grad():
        hidden = encoder(torch.from_numpy(pack_waves(waves)), lengths)
    rows = Ragged.of_samples(lengths).slices()
    return [[state[row] for state in (*hidden.states, hidden.output)] for row in rows]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("widths", [16, (8, 8, 12, 12, 16, 16, 24)], ids=["even", "growing"])
def test_transformers_opens_it_and_computes_the_same(layout: str, widths: Any, tmp_path: Path) -> None:
    encoder = make_encoder(**LAYOUTS[layout], num_layers=3, stem_channels=widths)
    save_encoder(encoder, tmp_path, note="hello")
    theirs, loading = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"] | loading["unexpected_keys"] | loading["mismatched_keys"]
    theirs = theirs.eval()
    for seed, states in enumerate(hidden_states(encoder, LENGTHS)):
        with torch.no_grad():
            wave = torch.from_numpy(noise(LENGTHS[seed], seed))[None]
            found = theirs(wave, output_hidden_states=True)
        wanted = [*(state[0] for state in found.hidden_states), found.last_hidden_state[0]]
        assert len(states) == len(wanted) == 3 + 2
        assert len(states[0]) == num_frames(LENGTHS[seed])
        for ours, other in zip(states, wanted, strict=True):
            # The figure; float32 rounding in another order of operations leaves about 1e-6.
            torch.testing.assert_close(ours, other, atol=1e-4, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_saved_and_loaded_is_the_same_encoder(layout: str, tmp_path: Path) -> None:
    encoder = make_encoder(**LAYOUTS[layout])
    save_encoder(encoder, tmp_path, note="hello")
    loaded, about = load_encoder(tmp_path)
    assert not loaded.training
    assert loaded.config == encoder.config
    assert about["note"] == "hello"
    ours, theirs = encoder.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_no_tensor_is_lost_on_the_way() -> None:
    for layout in LAYOUTS.values():
        encoder = make_encoder(**layout)
        kept = sum(tensor.numel() for tensor in to_transformers(encoder).values())
        assert kept == sum(parameter.numel() for parameter in encoder.parameters())


def test_the_feature_extractor_standardises_as_we_do(tmp_path: Path) -> None:
    save_encoder(make_encoder(), tmp_path)
    wave = 0.3 * noise(8_000) + 0.1
    found = AutoFeatureExtractor.from_pretrained(tmp_path)(wave, sampling_rate=16_000)["input_values"][0]
    # Their epsilon is 1e-7, ours 1e-5 beside a variance of 0.09.
    torch.testing.assert_close(torch.as_tensor(found), torch.from_numpy(standardise(wave)), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("damage", ["missing", "foreign", "broken json", "cut off", "other size", "bad config"])
def test_what_is_no_encoder_is_refused_on_one_line(damage: str, tmp_path: Path) -> None:
    save_encoder(make_encoder(), tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    described = json.loads(config.read_text())
    match damage:
        case "missing":
            weights.unlink()
        case "foreign":
            config.write_text('{"model_type": "hubert"}')
        case "broken json":
            config.write_text("{")
        case "cut off":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "other size":
            described["sonorant"]["encoder"]["dim"] = 64
            config.write_text(json.dumps(described))
        case "bad config":
            described["sonorant"]["encoder"] |= {"dim": -1, "num_heads": "many"}
            config.write_text(json.dumps(described))
    with pytest.raises(ValueError, match=r"^model .*: found .*, wanted .*: ") as caught:
        load_encoder(tmp_path)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------- packed batches


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lengths", [LENGTHS, [4_000, 4_100, 4_000]], ids=["ragged", "uniform"])
def test_packed_is_each_alone(layout: str, lengths: list[int]) -> None:
    engine = make_engine(**LAYOUTS[layout], unmasked_weight=0.5)
    engine.eval()
    batch = make_batch(lengths)
    parts = alone(batch)
    frames = Ragged.of_samples(lengths)

    def views(one: Any) -> tuple[Tensor, ...]:
        rows = Ragged.of_samples(one.num_samples)
        with torch.no_grad():
            z = engine.encoder.project(one.waves, one.num_samples)
            masked = engine.encoder.context(engine.encoder.mask(z, one.mask), rows)
            assert engine.teacher is not None
            everywhere = torch.ones_like(one.mask)
            targets = engine.teacher.targets(z, rows, everywhere)
        return (z, *masked.states, *masked.ffn, masked.output, *targets)

    together, singly = views(batch), [views(part) for part in parts]
    for packed, *others in zip(together, *singly, strict=True):
        for row, other in zip(frames.slices(), others, strict=True):
            # The 1e-4 in float32; measured 2e-6, for matrix products of other shapes sum in another order.
            torch.testing.assert_close(packed[row], other, atol=2e-5, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_losses_and_gradients_are_the_sum_of_each_alone(layout: str) -> None:
    engine = make_engine(**LAYOUTS[layout], unmasked_weight=0.5)
    batch = make_batch(LENGTHS)
    weights = {"units": 1.0, "teacher": 0.7}

    def run(*batches: Any) -> tuple[dict[str, float], dict[str, Tensor]]:
        engine.zero_grad()
        sums: dict[str, float] = {}
        for one in batches:
            loss, parts = engine(one, weights)
            loss.backward()
            for name, value in {"loss": loss.detach(), **parts}.items():
                if value.ndim == 0:
                    sums[name] = sums.get(name, 0.0) + float(value)
        return sums, {n: p.grad.clone() for n, p in engine.named_parameters() if p.grad is not None}

    (sums, gradients), (sums_alone, gradients_alone) = run(batch), run(*alone(batch))
    assert gradients.keys() == gradients_alone.keys()
    assert {name.split(".")[0] for name in gradients} == {"encoder", "tasks"}
    assert {"loss", "units/loss", "teacher/loss"} <= sums.keys()
    for name, value in sums.items():
        assert value == pytest.approx(sums_alone[name], rel=1e-5), name
    for name, gradient in gradients.items():
        # Sums over about 130 frames in float32: 1e-6 each of the largest entry, with room.
        scale = float(gradients_alone[name].abs().max()) + 1e-3
        torch.testing.assert_close(gradient, gradients_alone[name], atol=2e-5 * scale, rtol=0, msg=name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_utterance_does_not_see_its_neighbours(layout: str) -> None:
    encoder = make_encoder(**LAYOUTS[layout])
    waves = [noise(6_000, 0), noise(7_000, 1), noise(6_500, 2)]
    lengths = [len(wave) for wave in waves]
    rows = Ragged.of_samples(lengths).slices()
    with torch.no_grad():
        before = encoder(torch.from_numpy(pack_waves(waves)), lengths).output
        waves[1] = 100 * noise(7_000, 3)
        after = encoder(torch.from_numpy(pack_waves(waves)), lengths).output
    assert torch.equal(before[rows[0]], after[rows[0]])
    assert torch.equal(before[rows[2]], after[rows[2]])
    assert not torch.allclose(before[rows[1]], after[rows[1]])


def test_only_the_layers_asked_for_are_computed() -> None:
    encoder = make_encoder(num_layers=3)
    wave = torch.from_numpy(pack_waves([noise(4_000)]))
    with torch.no_grad():
        whole, part = encoder(wave, [4_000]), encoder(wave, [4_000], last=1)
    assert len(part.states) == 2
    assert all(torch.equal(a, b) for a, b in zip(part.states, whole.states, strict=False))


def test_a_masked_frame_shows_nothing_of_its_audio() -> None:
    encoder = make_encoder()
    z = torch.randn(20, 32)
    mask = torch.zeros(20, dtype=torch.bool)
    mask[4:9] = True
    masked = encoder.mask(z, mask)
    assert torch.equal(masked[~mask], z[~mask])
    assert torch.equal(masked[mask], encoder.mask_embedding.expand(5, -1))


def test_dropout_and_dropped_layers_act_in_training_alone() -> None:
    encoder = make_encoder(dropout=0.5, attention_dropout=0.5, ffn_dropout=0.5, layer_drop=0.5)
    wave = torch.from_numpy(pack_waves([noise(4_000)]))
    with torch.no_grad():
        assert torch.equal(encoder(wave, [4_000]).output, encoder(wave, [4_000]).output)
        encoder.train()
        assert not torch.equal(encoder(wave, [4_000]).output, encoder(wave, [4_000]).output)
        skipping = make_encoder(layer_drop=1.0).train()
        states = skipping(wave, [4_000]).states
    assert all(torch.equal(state, states[0]) for state in states)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_checkpointing_changes_no_gradient(layout: str) -> None:
    chances = {"dropout": 0.3, "attention_dropout": 0.3, "ffn_dropout": 0.3, "layer_drop": 0.4}
    encoder = make_encoder(**LAYOUTS[layout], num_layers=4, **chances).train()
    waves = torch.from_numpy(pack_waves([noise(length, seed) for seed, length in enumerate(LENGTHS)]))

    def run(checkpointing: bool) -> tuple[Tensor, list[Tensor | None]]:
        encoder.checkpointing = checkpointing
        torch.manual_seed(1)
        hidden = encoder(waves, LENGTHS)
        loss = hidden.output.square().sum() + sum(ffn.sum() for ffn in hidden.ffn)
        return loss.detach(), list(torch.autograd.grad(loss, list(encoder.parameters()), allow_unused=True))

    (kept, gradients), (computed_again, same) = run(False), run(True)
    assert torch.equal(kept, computed_again)
    # The same operations on the same numbers.
    assert all(
        a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in zip(gradients, same, strict=True)
    )
