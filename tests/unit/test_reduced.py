"""Reduced precision: near float32's frames and the same units, whatever a wave travels with and wherever it runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from sonorant.data.frames import Ragged, pack_waves
from sonorant.inference import load
from sonorant.models.codebook import Codebook
from sonorant.models.encoder import Encoder
from sonorant.models.huggingface import save_encoder
from sonorant.models.reduced import TOLERANCES, at_precision
from tests.tiny import LAYOUTS, TONES, make_encoder, noise, tones

Wave = NDArray[np.float32]
RELATIVE = {**LAYOUTS["group"], "relative_buckets": 12, "relative_max_distance": 20}
WIDE = {**LAYOUTS["group"], "stem_channels": 256, "dim": 128, "ffn_dim": 512}
"""As wide as it takes for products of other sizes to sum in another order."""
BIASED = {**LAYOUTS["pre"], "stem_bias": True, "position_kernel": 32}
ALL_LAYOUTS = {**LAYOUTS, "bias": BIASED, "relative": RELATIVE, "wide": WIDE}
LENGTHS = [16_000, 5_000, 400, 9_999, 719, 720]
reduced = pytest.mark.parametrize("precision", TOLERANCES)
layouts = pytest.mark.parametrize("layout", ALL_LAYOUTS)


def states(encoder: Encoder, waves: list[Wave]) -> list[list[Tensor]]:
    """Of each hidden state, the frames of each wave."""
    lengths = [len(wave) for wave in waves]
    with torch.inference_mode():
        hidden = encoder(torch.from_numpy(pack_waves(waves)), lengths)
    return [[state[rows].float() for rows in Ragged.of_samples(lengths).slices()] for state in hidden.states]


def error(found: Tensor, wanted: Tensor) -> float:
    """Relative L2."""
    return float((found - wanted).norm() / wanted.norm())


@reduced
@layouts
def test_near_float32(layout: str, precision: str) -> None:
    encoder, waves = make_encoder(**ALL_LAYOUTS[layout]), [noise(length, seed) for seed, length in enumerate(LENGTHS)]
    wanted, found = states(encoder, waves), states(at_precision(encoder, precision), waves)
    for state, near in zip(wanted, found, strict=True):
        assert 0 < error(torch.cat(near), torch.cat(state)) < TOLERANCES[precision]


@reduced
@layouts
def test_same_units(layout: str, precision: str) -> None:
    encoder, rng = make_encoder(**ALL_LAYOUTS[layout]), np.random.default_rng(0)
    waves, sounding = zip(*(tones(rng, 32_000) for _ in range(8)), strict=True)
    frames = [state.numpy() for state in states(encoder, list(waves))[-1]]
    which = np.concatenate(sounding)
    centroids = np.stack([np.concatenate(frames)[which == tone].mean(0) for tone in range(len(TONES))])
    codebook = Codebook(centroids, np.zeros_like(centroids[0]), np.ones_like(centroids[0]), centred=False)
    found = [state.numpy() for state in states(at_precision(encoder, precision), list(waves))[-1]]
    wanted_units, found_units = (np.concatenate([codebook.assign(one) for one in many]) for many in (frames, found))
    assert len(np.unique(wanted_units)) == len(TONES)
    assert (wanted_units == found_units).mean() >= 0.99


@reduced
@layouts
def test_independent_of_the_batch(layout: str, precision: str) -> None:
    encoder = at_precision(make_encoder(**ALL_LAYOUTS[layout]), precision)
    waves = [noise(length, seed) for seed, length in enumerate(LENGTHS)]
    together = states(encoder, waves)
    for index, wave in enumerate(waves):
        for state, [alone] in zip(together, states(encoder, [wave]), strict=True):
            # A sum in another order that lies on the brink is rounded the other way: less than all roundings do.
            assert error(state[index], alone) < TOLERANCES[precision] / 2


@reduced
@pytest.mark.filterwarnings("ignore:TF32")
def test_right_without_the_instructions(precision: str) -> None:
    encoder, waves = make_encoder(), [noise(8_000)]
    fast = at_precision(encoder, precision)
    with torch.backends.mkldnn.flags(enabled=False):
        found = states(fast, waves)
    for [near], [state] in zip(found, states(encoder, waves), strict=True):
        assert error(near, state) < TOLERANCES[precision]


@reduced
def test_leaves_the_encoder_alone(precision: str) -> None:
    encoder, waves = make_encoder(**LAYOUTS["group"]), [noise(8_000)]
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    wanted = states(encoder, waves)
    states(at_precision(encoder, precision), waves)
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
    for [found], [state] in zip(states(encoder, waves), wanted, strict=True):
        assert torch.equal(found, state)


def test_float32_is_the_encoder_itself() -> None:
    encoder = make_encoder()
    assert at_precision(encoder, "float32") is encoder


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^precision: found 'float8', wanted float32 or .*: choose one of them$"):
        at_precision(make_encoder(), "float8")


@reduced
def test_a_published_model_at_a_precision(precision: str, tmp_path: Path) -> None:
    encoder, waves = make_encoder(**LAYOUTS["group"], standardised=False), [noise(8_000, seed) for seed in range(2)]
    save_encoder(encoder, tmp_path, layer=2)
    frames = torch.cat(states(encoder, waves)[-1]).numpy()
    codebook = Codebook(frames[::5], np.zeros_like(frames[0]), np.ones_like(frames[0]))
    codebook.save(tmp_path / "codebook.safetensors")
    found = torch.from_numpy(np.concatenate(load(tmp_path, precision=precision).embed(waves)))
    wanted = torch.from_numpy(np.concatenate(load(tmp_path).embed(waves)))
    assert torch.equal(wanted, torch.from_numpy(frames))
    assert 0 < error(found, wanted) < TOLERANCES[precision]
    with pytest.raises(ValueError, match=r"^precision: found 'half', wanted"):
        load(tmp_path, precision="half")
