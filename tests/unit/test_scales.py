"""The scales beside the phoneme's: samples rebuilt, spectra predicted, halves of utterances told from one another."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.fft
import torch
import torchaudio.functional as audio
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from sonorant.config import SpectrumConfig, UtteranceConfig
from sonorant.data.frames import HOP_SAMPLES, WINDOW_SAMPLES, num_frames, num_samples
from sonorant.tasks import spectrum as spectra
from sonorant.tasks import waveform as waveforms
from sonorant.tasks.spectrum import Spectrum, cepstra, differences, log_powers, mel_bands
from sonorant.tasks.utterance import Utterance, nt_xent
from sonorant.tasks.waveform import Decoder, Waveform
from sonorant.training.engine import Engine
from tests.references import losses as slow_losses
from tests.references import scales as slow
from tests.tiny import alone, grid, make_batch, make_engine

SHAPES = st.tuples(st.integers(1, 6), st.integers(2, 5), st.integers(0, 10_000))
RAGGED = [2_600, 400, 1_700, 719]
"""None a multiple of the hop, one of a single frame, one a sample short of another."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal values in float64."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


# ------------------------------------------------------------------------------------------------------- waveform


def make_waveform() -> tuple[Engine, Waveform]:
    """A tiny engine with `waveform` alone, and that task."""
    engine = make_engine(tasks=["waveform"])
    task = engine.task("waveform")
    assert isinstance(task, Waveform)
    return engine, task


@settings(deadline=None)
@given(st.integers(1, 60))
def test_the_decoder_makes_as_many_samples_as_the_frames_were_made_from(frames: int) -> None:
    found = Decoder([2] * 7, None)(torch.randn(frames, 2))
    assert found.shape == (num_samples(frames),)
    assert num_frames(len(found)) == frames


def test_the_decoder_is_transposed_convolutions_with_norm_and_gelu_between() -> None:
    torch.manual_seed(0)
    decoder, frames = Decoder([3, 2, 2, 3, 2, 2, 4], None).double(), normal(2, 4)
    x = frames.tolist()
    for index, (taps, stride) in enumerate(zip(slow.KERNELS[::-1], slow.STRIDES[::-1], strict=True)):
        weight = decoder.weights[index]
        assert weight.shape[2] == taps
        x = slow.transposed_convolution(x, weight.tolist(), stride)
        if index < 6:
            width = len(x[0])
            x = F.gelu(F.layer_norm(torch.tensor(x, dtype=torch.float64), (width,))).tolist()
    # Mirrored widths: those of what goes into each of the stem's convolutions.
    assert [weight.shape[1] for weight in decoder.weights] == [2, 2, 3, 2, 2, 3, 1]
    torch.testing.assert_close(decoder(frames), torch.tensor(x, dtype=torch.float64)[:, 0], atol=1e-10, rtol=0)


def test_a_decoder_can_be_narrower_than_the_stem() -> None:
    assert [tuple(w.shape[:2]) for w in Decoder([16] * 7, 3).weights] == [(16, 3), *[(3, 3)] * 5, (3, 1)]


@pytest.mark.parametrize("channels", [16, 256])
def test_the_decoder_begins_about_as_loud_as_what_it_is_to_rebuild(channels: int) -> None:
    torch.manual_seed(0)
    decoder = Decoder([channels] * 7, None)
    with torch.no_grad():
        found = float(decoder(F.gelu(torch.randn(60, channels))).std())
    # Kaiming: 2 · E[gelu(x)²] = 0.85 is the variance of a normed layer's sum; 16 channels scatter by a third.
    assert found == pytest.approx(math.sqrt(0.85), rel=0.35)


def test_the_decoder_has_the_right_gradients() -> None:
    torch.manual_seed(0)
    decoder = Decoder([2] * 7, None).double()
    frames, wave = normal(2, 2).requires_grad_(), normal(720)
    # The squared error is smooth, as |x| is not; numbers of 720 samples would be slow one by one.
    assert torch.autograd.gradcheck(lambda x: (decoder(x) - wave).square().sum(), (frames,), atol=1e-4)


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(0, 10_000))
def test_absolute_error_is_the_loop(samples: int, seed: int) -> None:
    a, b = normal(samples, seed=seed), normal(samples, seed=seed + 1)
    wanted = slow.absolute_error(a.tolist(), b.tolist())
    assert float(waveforms.absolute_error(a, b)) == pytest.approx(wanted, rel=1e-12)
    assert waveforms.absolute_error(a.bfloat16(), b.float()).dtype == torch.float32
    a.requires_grad_()
    (gradient,) = torch.autograd.grad(waveforms.absolute_error(a, b), a)
    assert torch.equal(gradient, (a - b).detach().sign())


def test_absolute_errors_have_the_right_gradients() -> None:
    a, b = normal(4, 3).requires_grad_(), normal(4, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(waveforms.absolute_error, (a, b))
    assert torch.autograd.gradcheck(spectra.absolute_error, (a, b))


def test_every_utterance_is_compared_with_its_own_samples() -> None:
    engine, task = make_waveform()
    batch = make_batch(RAGGED)
    loss = 0.0
    for part in alone(batch):
        rebuilt = task.decoder(engine.encoder.stem(part.waves, part.num_samples))
        heard = part.waves[: num_samples(num_frames(part.num_samples[0]))]
        loss += slow.absolute_error(rebuilt.tolist(), heard.tolist())
    # Some thousand float32 terms.
    assert engine(batch, {"waveform": 1.0})[0].item() == pytest.approx(loss, rel=1e-5)


def test_a_sample_that_is_in_no_frame_is_not_rebuilt() -> None:
    engine, _ = make_waveform()
    batch = make_batch([719, 1_700])
    loss = engine(batch, {"waveform": 1.0})[0].item()
    changed = replace(batch, waves=batch.waves.clone())
    # 719 samples make one frame, of the first 400.
    changed.waves[400:719] += 3
    assert engine(changed, {"waveform": 1.0})[0].item() == loss
    changed.waves[399] += 3
    assert engine(changed, {"waveform": 1.0})[0].item() != loss


def test_the_waveforms_monitor_is_the_spread_of_what_was_rebuilt() -> None:
    engine, task = make_waveform()
    rebuilt = []
    for update in range(2):
        batch = make_batch(RAGGED, seed=update)
        for part in alone(batch):
            rebuilt += task.decoder(engine.encoder.stem(part.waves, part.num_samples)).tolist()
        engine(batch, {"waveform": 1.0}, update)
        engine.after_update(update + 1)
    wanted = slow_losses.spread([[x] for x in rebuilt])
    # Sums over thousands, carried as float32.
    assert engine.monitor() == {"waveform/prediction_std": pytest.approx(wanted, rel=1e-4)}
    task.settle(torch.tensor([[9.0], [0.0], [0.0]]), 3)
    assert engine.monitor() == {"waveform/prediction_std": pytest.approx(1e-3)}, "silence"


# ------------------------------------------------------------------------------------------------------- spectrum


def make_spectrum(**changes: Any) -> tuple[Engine, Spectrum]:
    """A tiny engine with `spectrum` alone, and that task."""
    engine = make_engine(tasks=["spectrum"], **changes)
    task = engine.task("spectrum")
    assert isinstance(task, Spectrum)
    return engine, task


def test_log_powers_are_the_naive_transform() -> None:
    windows = normal(2, WINDOW_SAMPLES) * torch.tensor([[1.0], [0.001]])
    wanted = torch.tensor([slow.log_powers(window) for window in windows.tolist()], dtype=torch.float64)
    torch.testing.assert_close(log_powers(windows), wanted, atol=1e-9, rtol=0)
    # Float32 sums of 400 samples: a weak bin has a relative error of 1e-3, and the floor hides what is weaker.
    torch.testing.assert_close(log_powers(windows.float()), wanted.float(), atol=3e-3, rtol=0)
    assert bool((wanted[1] == math.log(1e-5)).any()), "the floor was met"


def test_log_powers_are_numpys_and_of_silence_the_floor() -> None:
    windows = normal(3, WINDOW_SAMPLES, seed=1)
    n = np.arange(WINDOW_SAMPLES)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * n / WINDOW_SAMPLES)
    wanted = np.log(np.maximum(np.abs(np.fft.rfft(windows.numpy() * hann, 512)) ** 2, 1e-5))
    torch.testing.assert_close(log_powers(windows).numpy(), wanted, atol=1e-9, rtol=0)
    # ln is taken in float32 of 1e-5: seven digits.
    assert log_powers(torch.zeros(1, WINDOW_SAMPLES)).unique().tolist() == pytest.approx([math.log(1e-5)])


def test_log_powers_of_a_tone_peak_at_its_bin() -> None:
    seconds = torch.arange(WINDOW_SAMPLES) / 16_000
    # Bin 32 is 1 kHz: 16,000 / 512 · 32.
    assert int(log_powers(torch.sin(2 * math.pi * 1_000 * seconds)[None]).argmax()) == 32


def test_mel_bands_are_torchaudios_and_the_loops() -> None:
    found = torch.from_numpy(mel_bands(40))
    wanted = audio.melscale_fbanks(257, 0.0, 8_000.0, 40, 16_000, norm=None, mel_scale="htk")
    # torchaudio computes mel in float32: of 8,000 Hz half a hertz in a triangle of a hundred is lost, at worst.
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    loop = [[slow.mel_filter(band, 40, p * 31.25) for band in range(40)] for p in range(257)]
    torch.testing.assert_close(found, torch.tensor(loop), atol=1e-6, rtol=0)


def test_cepstra_are_the_loop_and_scipys() -> None:
    powers = 2 * normal(3, 257)
    powers[2] = math.log(1e-5)
    found = cepstra(powers)
    wanted = torch.tensor([slow.cepstra(row) for row in powers.tolist()], dtype=torch.float64)
    # Triangles are float32.
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
    bands = np.log(np.maximum(np.exp(powers.numpy()) @ mel_bands(40).astype(np.float64), 1e-5))
    by_scipy = scipy.fft.dct(bands, type=2, norm="ortho")[:, :13]
    torch.testing.assert_close(found.numpy(), by_scipy, atol=1e-9, rtol=0)


@settings(deadline=None)
@given(SHAPES)
def test_differences_are_the_loop_and_torchaudios(shape: tuple[int, int, int]) -> None:
    frames, dims, seed = shape
    x = normal(frames, dims, seed=seed)
    found = differences(x)
    torch.testing.assert_close(found, torch.tensor(slow.differences(x.tolist()), dtype=torch.float64))
    torch.testing.assert_close(found, audio.compute_deltas(x.T[None], win_length=5, mode="replicate")[0].T)


def test_the_difference_of_a_line_is_its_slope() -> None:
    line = 3 * torch.arange(9.0)[:, None]
    assert differences(line)[2:-2].flatten().tolist() == pytest.approx([3.0] * 5)


def test_targets_are_the_loops_within_each_utterance() -> None:
    engine, task = make_spectrum()
    batch = make_batch([1_100, 400, 1_400])
    views = engine.views(batch, {"spectrum": task}, 0)
    found = task.targets(views)
    row = 0
    for part in alone(batch):
        count = num_frames(part.num_samples[0])
        windows = [part.waves[320 * t : 320 * t + 400].tolist() for t in range(count)]
        powers = [slow.log_powers(window) for window in windows]
        static = [slow.cepstra(row) for row in powers]
        first = slow.differences(static)
        rows = zip(powers, static, first, slow.differences(first), strict=True)
        wanted = slow_losses.instance_norm([[*a, *b, *c, *d] for a, b, c, d in rows])
        # log-powers in float32 are good to 1e-3 (above); a dimension that varies by 0.3 over few frames triples it.
        torch.testing.assert_close(found[row : row + count], torch.tensor(wanted), atol=1e-2, rtol=0)
        row += count
    assert row == len(found)


def test_targets_have_mean_zero_and_variance_one_within_their_utterance() -> None:
    engine, task = make_spectrum()
    batch = make_batch([16_000, 9_000])
    batch = replace(batch, waves=batch.waves * torch.linspace(0.1, 3, len(batch.waves)))
    views = engine.views(batch, {"spectrum": task}, 0)
    found = task.targets(views)
    assert found.shape == (views.frames.total, 257 + 39)
    assert not found.requires_grad
    for rows in views.frames.slices():
        # float32 sums of some fifty values; eps 1e-5 beside variances of which the least (second differences) is 1e-2.
        torch.testing.assert_close(found[rows].mean(0), torch.zeros(296), atol=1e-5, rtol=0)
        torch.testing.assert_close(found[rows].var(0, correction=0), torch.ones(296), atol=2e-3, rtol=0)


def test_a_click_is_seen_by_the_frames_whose_windows_hold_it() -> None:
    engine, task = make_spectrum()
    for click in (1_000, 320 * 4, 320 * 5 + 200, 3_999):
        waves = torch.zeros(2_560 + 4_200)
        waves[2_560 + click] = 100.0
        batch = replace(make_batch([2_400, 4_200]), waves=torch.cat([waves, torch.zeros(-len(waves) % HOP_SAMPLES)]))
        views = engine.views(batch, {"spectrum": task}, 0)
        found = task.targets(views)[:, :257]
        assert not found[: num_frames(2_400)].any(), "the first utterance is silent"
        seen = (found[num_frames(2_400) :, 10] > 0).nonzero()[:, 0].tolist()
        # Hann is 0 at the first sample of a window.
        assert seen == [t for t in range(num_frames(4_200)) if 320 * t < click < 320 * t + 400]


def test_the_spectrums_loss_is_the_loop_on_the_layer_it_reads() -> None:
    for layer in (None, 1, 3):
        engine, task = make_spectrum(num_layers=3, sections={"spectrum": {"layer": layer, "hidden_dim": 16}})
        batch = make_batch([5_000, 2_000])
        loss, sums = engine(batch, {"spectrum": 1.0})
        hidden = engine.encoder(batch.waves, batch.num_samples)
        views = engine.views(batch, {"spectrum": task}, 0)
        targets = task.targets(views).tolist()
        predictions = task.head(hidden.states[2 if layer is None else layer]).tolist()
        powers = slow.mean_absolute_error([row[:257] for row in predictions], [row[:257] for row in targets])
        mel = slow.mean_absolute_error([row[257:] for row in predictions], [row[257:] for row in targets])
        # Float32 sums.
        assert loss.item() == pytest.approx(powers + mel, rel=1e-5)
        assert float(sums["spectrum/power_error"]) == pytest.approx(powers, rel=1e-5)
        assert float(sums["spectrum/cepstral_error"]) == pytest.approx(mel, rel=1e-5)


def test_the_middle_layer_is_half_way_up() -> None:
    layers = [Spectrum(8, num_layers, SpectrumConfig(hidden_dim=4)).layer for num_layers in (1, 2, 3, 6, 12)]
    assert layers == [1, 1, 2, 3, 6]


def test_the_spectrums_monitor_is_the_spread_of_its_predictions() -> None:
    engine, task = make_spectrum()
    batch = make_batch([5_000, 2_000])
    predictions = task.head(engine.encoder(batch.waves, batch.num_samples).states[1])
    engine(batch, {"spectrum": 1.0})
    engine.after_update(1)
    wanted = slow_losses.spread(predictions.tolist())
    # Carried as float32; the spread is small beside the values.
    assert engine.monitor() == {"spectrum/prediction_std": pytest.approx(wanted, rel=1e-3)}


# ------------------------------------------------------------------------------------------------------ utterance


def make_utterance(**config: object) -> tuple[Engine, Utterance]:
    """A tiny engine with `utterance` alone, and that task."""
    engine = make_engine(tasks=["utterance"], sections={"utterance": {"dim": 8, **config}})
    task = engine.task("utterance")
    assert isinstance(task, Utterance)
    return engine, task


def unit_rows(count: int, dim: int, seed: int = 0) -> Tensor:
    """Rows of length one in float64."""
    return F.normalize(normal(count, dim, seed=seed), dim=1)


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(2, 4), st.integers(0, 10_000), st.booleans(), st.booleans())
def test_nt_xent_is_the_loop(utterances: int, dim: int, seed: int, same: bool, others: bool) -> None:
    rng = np.random.default_rng(seed)
    rows = unit_rows(2 * utterances, dim, seed)
    speakers, sources = (rng.integers(high, size=utterances).repeat(2) for high in (3, 2))
    wanted = slow.nt_xent(rows.tolist(), speakers.tolist(), sources.tolist(), 0.3, same, others)
    task = Utterance(4, UtteranceConfig(
        dim=dim, temperature=0.3, same_speaker_negatives=same, other_source_negatives=others
    ))  # fmt: skip
    found = task(None, (rows, torch.from_numpy(speakers), torch.from_numpy(sources)))
    assert float(found.loss) == pytest.approx(wanted[0], rel=1e-10, abs=1e-12)
    assert float(found.sums["accuracy"]) == pytest.approx(wanted[1])


def test_nt_xent_has_the_right_gradient() -> None:
    is_negative = torch.from_numpy(np.random.default_rng(0).random((6, 6)) < 0.5)
    rows = unit_rows(6, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: nt_xent(x, is_negative, 0.5)[0], (rows,))


def test_the_partner_and_oneself_are_never_negatives() -> None:
    rows = unit_rows(6, 3)
    everyone = torch.ones(6, 6, dtype=torch.bool)
    proper = everyone.clone()
    for own in range(6):
        proper[own, own] = proper[own, own ^ 1] = False
    assert float(nt_xent(rows, everyone, 0.5)[0]) == float(nt_xent(rows, proper, 0.5)[0])


def test_with_nothing_to_be_told_from_there_is_no_loss() -> None:
    rows = unit_rows(6, 3).requires_grad_()
    loss, wins = nt_xent(rows, torch.zeros(6, 6, dtype=torch.bool), 0.1)
    (gradient,) = torch.autograd.grad(loss, rows)
    assert loss.item() == wins.item() == 0
    assert not gradient.any()


def test_of_halves_that_all_agree_the_loss_is_log_of_how_many_there_are() -> None:
    rows = torch.ones(8, 4) / 2
    # The partner among partner and six negatives.
    assert float(nt_xent(rows, torch.ones(8, 8, dtype=torch.bool), 0.1)[0]) == pytest.approx(math.log(7), rel=1e-6)


def test_a_speakers_other_utterances_and_other_sources_are_left_out() -> None:
    _, task = make_utterance()
    rows = unit_rows(8, 8).float()
    pairs = {
        "same speaker": ([0, 0, 0, 0], [0, 0, 0, 0]),
        "other source": ([0, 1, 2, 3], [0, 1, 2, 3]),
    }
    for speakers, sources in pairs.values():
        labels = [torch.tensor(values).repeat_interleave(2) for values in (speakers, sources)]
        assert float(task(None, (rows, *labels)).loss) == 0
    _, both = make_utterance(same_speaker_negatives=True, other_source_negatives=True)
    for speakers, sources in pairs.values():
        labels = [torch.tensor(values).repeat_interleave(2) for values in (speakers, sources)]
        assert float(both(None, (rows, *labels)).loss) > 0.1


def test_an_utterances_share_is_each_halfs_mean_frame_through_the_head() -> None:
    engine, task = make_utterance()
    batch = make_batch([9_000, 4_000, 6_000])
    assert batch.halves is not None
    views = engine.views(batch, {"utterance": task}, 0)
    rows, speakers, sources = task.share(views)
    assert speakers.tolist() == [0, 0, 0, 0, 1, 1]
    assert sources.tolist() == [0] * 6
    start = 0
    for row, length in enumerate(batch.half_samples):
        half = batch.halves[start : start + length]
        start += grid(length)
        mean = engine.encoder(half, (length,)).output.mean(0)
        wanted = task.head(mean)
        # Packed against alone, in float32.
        torch.testing.assert_close(rows[row], wanted / wanted.norm(), atol=1e-5, rtol=0)


def test_the_utterances_monitor_is_the_spread_of_embeddings() -> None:
    engine, task = make_utterance()
    batch = make_batch([9_000, 4_000, 6_000])
    rows = task.share(engine.views(batch, {"utterance": task}, 0))[0]
    engine(batch, {"utterance": 1.0})
    engine.after_update(1)
    # Carried as float32: of numbers up to one, variances of 1e-4 are good to three digits.
    assert engine.monitor() == {"utterance/embedding_std": pytest.approx(slow_losses.spread(rows.tolist()), rel=1e-2)}
