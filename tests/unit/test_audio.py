"""Reading audio: every container comes out as 16 kHz mono, and a stranger's file cannot do harm."""

from __future__ import annotations

import io
import tracemalloc
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torchaudio.functional
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from sonorant.data.audio import (
    MAX_KERNEL_VALUES,
    TooLongError,
    read_wave,
    resample,
    simple_ratio,
    standardise,
)

Wave = NDArray[np.float32]


def tone(seconds: float, rate: int, hertz: float = 440.0) -> Wave:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def audio(wave: NDArray[np.floating], rate: int = 16_000, form: str = "WAV", subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format=form, subtype=subtype)
    return file.getvalue()


@pytest.mark.parametrize(
    ("form", "subtype", "tolerance"),
    [
        ("WAV", "FLOAT", 0.0),  # what was written
        ("WAV", "PCM_U8", 2**-7),  # one step of 8 bits
        ("WAV", "PCM_24", 2**-23),
        ("FLAC", "PCM_16", 2**-15),
        ("AIFF", "PCM_32", 2**-24),  # float32 has 24 bits
        ("OGG", "VORBIS", 0.1),  # lossy: a fifth of the amplitude says that it is this tone
        ("MP3", None, 0.1),
    ],
)
def test_every_container_gives_its_samples(form, subtype, tolerance):
    wave = tone(0.5, 16_000)
    read = read_wave(io.BytesIO(audio(wave, 16_000, form, subtype)))
    assert read.dtype == np.float32
    assert read.shape == wave.shape
    assert np.abs(read - wave)[800:-800].max() <= tolerance


def test_channels_are_averaged_over_block_borders():
    """600,000 × 3 values are seven blocks; the mean of a wave, its negative and itself is a third of it."""
    wave = np.random.default_rng(0).uniform(-1, 1, 600_000).astype(np.float32)
    read = read_wave(io.BytesIO(audio(np.stack([wave, -wave, wave], 1), subtype="FLOAT")), max_seconds=60)
    np.testing.assert_allclose(read, wave / 3, atol=1e-7)  # three float32 roundings of values below 1


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000, 44_101, 383_993])
def test_a_tone_keeps_its_pitch_at_any_rate(rate):
    wave = read_wave(io.BytesIO(audio(tone(1, rate), rate, subtype="FLOAT")), max_seconds=2)
    # 44,101 and 383,993 Hz go by a neighbouring rate, which can end a few samples sooner or later.
    assert abs(len(wave) - 16_000) <= 4
    # A pitch 0.026 % off over 0.1 s turns the phase by 2π·440·0.1·0.00026 = 0.07: 0.04 at amplitude 0.5.
    assert np.abs(wave[400:2_000] - tone(1, 16_000)[400:2_000]).max() < 0.04


def test_usual_rates_are_resampled_exactly_as_torchaudio_does():
    for rate in (8_000, 22_050, 44_100, 48_000, 96_000):
        wave = tone(0.3, rate)
        expected = torchaudio.functional.resample(torch.from_numpy(wave), rate, 16_000).numpy()
        assert np.array_equal(resample(wave, rate), expected)
    assert len(resample(np.zeros(0, np.float32), 8_000)) == 0


@given(st.integers(1, 2**31 - 1))
def test_no_rate_makes_a_large_filter_bank(rate):
    given_rate, wanted = simple_ratio(rate, 16_000)
    assert 1 <= given_rate * wanted <= MAX_KERNEL_VALUES
    # Between 1/1 and its nearest neighbour 2000/1999 lie 0.05 %; the middle is 0.025 % from both.
    assert abs(given_rate / wanted / (rate / 16_000) - 1) < 2.6e-4


def test_standardise_gives_mean_0_and_variance_1():
    wave = standardise(3 * tone(1, 16_000) + np.float32(2))
    assert wave.dtype == np.float32
    assert abs(wave.mean(dtype=np.float64)) < 1e-6  # float32 rounding of values near 1, averaged
    assert abs(wave.var(dtype=np.float64) - 1) < 2e-5  # eps 1e-5 against a variance of 1.1
    assert not standardise(np.full(100, 0.3, np.float32)).any()


def test_samples_beyond_full_scale_are_kept():
    assert read_wave(io.BytesIO(audio(np.full(100, 1.5), subtype="FLOAT")), max_seconds=1).max() == 1.5


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "found no readable audio"),
        (b"RIFF", "found no readable audio"),
        (b"\xf0\x7e\x00\x01" + bytes(99), r"found no readable audio \(it begins with f0 7e 00 01\)"),
        (audio(np.zeros(0)), "found 0 samples"),
        (audio(np.zeros((99, 33))), "found 33 channels, wanted 1 to 32"),
        (audio(np.zeros(99), 384_001), "found a rate of 384001 Hz, wanted 1000 to 384000"),
        (audio(np.zeros(99), 999), "found a rate of 999 Hz"),
        (audio(np.array([0, np.nan]), subtype="FLOAT"), "found NaN or infinite"),
        (audio(np.array([0, np.inf]), subtype="FLOAT"), "found NaN or infinite"),
        (audio(np.full((9, 4), 3e38), subtype="FLOAT"), "found NaN or infinite"),
    ],
)
def test_a_strangers_file_is_refused_on_one_line(data, words):
    with pytest.raises(ValueError, match=words) as refusal:
        read_wave(io.BytesIO(data), max_seconds=10)
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize("form", ["WAV", "AIFF", "AU", "FLAC", "MP3", "CAF"])
@pytest.mark.parametrize("max_seconds", [None, 10])
def test_a_file_that_was_cut_off_is_refused(form, max_seconds):
    noise = np.random.default_rng(0).normal(0, 0.1, 16_000)
    data = audio(noise, form=form)
    assert len(read_wave(io.BytesIO(data), max_seconds)) == 16_000
    with pytest.raises(ValueError, match=r"cut off|no readable audio"):
        read_wave(io.BytesIO(data[: len(data) * 2 // 3]), max_seconds)


def test_a_stream_recorder_s_size_is_no_cut():
    data = audio(np.zeros(1_000))
    at = data.index(b"data") + 4
    for claim in (0xFFFF_FFFF, 0x7FFF_FFFF, 0x7FFF_F000):
        assert len(read_wave(io.BytesIO(data[:at] + claim.to_bytes(4, "little") + data[at + 4 :]))) == 1_000


def test_the_file_is_named(tmp_path: Path):
    path = tmp_path / "a.flac"
    path.write_bytes(b"fLaC")
    with pytest.raises(ValueError, match=r"a\.flac: found no readable audio"):
        read_wave(path)
    with pytest.raises(ValueError, match=r"missing\.flac: found no readable audio"):
        read_wave(tmp_path / "missing.flac")


def test_length_is_what_is_decoded():
    data = audio(np.zeros(16_001), form="FLAC")
    assert len(read_wave(io.BytesIO(data), 16_001 / 16_000)) == 16_001
    with pytest.raises(TooLongError, match="found more than 1 s, wanted at most 1 s"):
        read_wave(io.BytesIO(data), 1)


def test_a_small_file_of_ten_hours_takes_little_memory():
    """Silence packs well: here an hour in less than 1 MB. Ten seconds are decoded, in blocks of 1 MB."""
    data = audio(np.zeros(3_600 * 16_000, np.float32), form="FLAC")
    assert len(data) < 1_000_000
    tracemalloc.start()
    try:
        with pytest.raises(TooLongError):
            read_wave(io.BytesIO(data), 10)
        assert tracemalloc.get_traced_memory()[1] < 8_000_000  # 10 s and a block, not 230 MB
    finally:
        tracemalloc.stop()


def flac_that_claims(num_samples: int) -> io.BytesIO:
    """One second of FLAC whose header says something else."""
    flac = bytearray(audio(tone(1, 16_000), form="FLAC"))
    flac[18:26] = (int.from_bytes(flac[18:26], "big") & ~(2**36 - 1) | num_samples).to_bytes(8, "big")
    return io.BytesIO(flac)


@pytest.mark.parametrize("max_seconds", [None, 10])
def test_flac_that_claims_ten_hours_is_cut_off(max_seconds):
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="found 16000 samples of 576000000, wanted all"):
            read_wave(flac_that_claims(36_000 * 16_000), max_seconds)
        assert tracemalloc.get_traced_memory()[1] < 8_000_000  # what it holds, and a block
    finally:
        tracemalloc.stop()


def test_flac_from_a_pipe_does_not_know_its_length():
    read = read_wave(flac_that_claims(0), max_seconds=10)
    assert np.abs(read - tone(1, 16_000)).max() <= 2**-15  # one step of 16 bits


def test_no_damage_makes_libsndfile_s_callbacks_raise(monkeypatch: pytest.MonkeyPatch):
    """Lengths of chunks that lead to before the beginning: what a callback raises nobody can catch."""
    raised = []
    monkeypatch.setattr("sys.unraisablehook", raised.append)
    whole = bytearray(audio(tone(0.1, 16_000), form="AIFF"))
    for place in range(60):
        for lie in (0xFFFF_FFFF, 0xFFFF_FFF0, 0x8000_0000):
            body = bytearray(whole)
            body[place : place + 4] = lie.to_bytes(4, "big")
            with suppress(ValueError):
                read_wave(io.BytesIO(body), 5)
    assert not raised
