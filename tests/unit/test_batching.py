"""Batching: one order whatever the ranks, entered anywhere, crops and labels on one grid."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st

from sonorant.config import BatchingConfig, MaskingConfig, PerturbationConfig, UtteranceConfig
from sonorant.data.audio import standardise
from sonorant.data.batching import Batch, Cursor, Loader, split_evenly, split_in_halves
from sonorant.data.corpus import Utterance
from sonorant.data.frames import HOP_SAMPLES, SAMPLE_RATE, num_frames, num_samples
from sonorant.data.units import UnitStore, write_units
from tests.tiny import alone, noise

STRIDE = 1000
"""The label of frame t of utterance u is 1000 u + t, so a label tells where it comes from."""
Item = tuple[int, int, int, bytes]
"""Utterance, first frame, frames, mask."""


@pytest.fixture(scope="module")
def utterances(tmp_path_factory: pytest.TempPathFactory) -> list[Utterance]:
    folder = tmp_path_factory.mktemp("audio")
    lengths = np.random.default_rng(0).integers(8_000, 40_000, size=11).tolist()
    found = []
    for index, length in enumerate(lengths):
        path = folder / f"{index}.flac"
        soundfile.write(path, 0.1 * noise(length, index), SAMPLE_RATE)
        found.append(Utterance(f"u{index}", "train", "s", f"s{index}", length, path))
    return found


@pytest.fixture(scope="module")
def units(utterances: list[Utterance], tmp_path_factory: pytest.TempPathFactory) -> UnitStore:
    folder = tmp_path_factory.mktemp("units")
    labels = [(u.id, u.num_samples, STRIDE * i + np.arange(u.num_frames)) for i, u in enumerate(utterances)]
    write_units(folder, labels, num_units=20_000)
    return UnitStore(folder)


def loader(
    utterances: list[Utterance], units: UnitStore | None, rank: int = 0, num_ranks: int = 1, **batching: Any
) -> Loader:
    """Crops of at most 1 s, up to 8 s an update."""
    config = BatchingConfig(**{"batch_seconds": 8.0, "crop_seconds": 1.0, **batching})
    return Loader(utterances, units, config, MaskingConfig(), 3, rank, num_ranks)


def take(loader: Loader, count: int, cursor: Cursor | None = None) -> list[tuple[list[Batch], Cursor]]:
    """The first updates from `cursor` on."""
    updates = loader.updates(cursor or Cursor())
    taken = list(itertools.islice(updates, count))
    updates.close()
    return taken


def items(batches: list[Batch]) -> list[Item]:
    """What a rank's micro-batches are made of."""
    found = []
    for batch in batches:
        assert batch.units is not None
        end = 0
        for length in batch.num_samples:
            frames = num_frames(length)
            labels = batch.units[end : end + frames]
            utterance, first = divmod(int(labels[0]), STRIDE)
            assert labels.tolist() == list(range(int(labels[0]), int(labels[0]) + frames))
            found.append((utterance, first, frames, batch.mask[end : end + frames].numpy().tobytes()))
            end += frames
        assert end == len(batch.mask) == len(batch.units)
    return found


@pytest.mark.parametrize(("ranks", "micro_batches"), [(2, 1), (1, 2), (3, 1), (2, 2)])
def test_ranks_and_micro_batches_share_one_order(
    utterances: list[Utterance], units: UnitStore, ranks: int, micro_batches: int
) -> None:
    whole = take(loader(utterances, units), 6)
    parts = [take(loader(utterances, units, rank, ranks, micro_batches=micro_batches), 6) for rank in range(ranks)]
    for update, (batches, after) in enumerate(whole):
        shares = [part[update] for part in parts]
        assert all(len(share) == micro_batches for share, _ in shares)
        assert sorted(items(batches)) == sorted(item for share, _ in shares for item in items(share))
        assert {cursor for _, cursor in shares} == {after}


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_hear_the_same_perturbed_speech(utterances: list[Utterance], units: UnitStore, ranks: int) -> None:
    config = PerturbationConfig(max_warp=0.2, max_tilt=0.5, noise_share=0.7)

    def heard(rank: int, num_ranks: int) -> list[list[tuple[bytes, bytes]]]:
        share = Loader(
            utterances, units, BatchingConfig(batch_seconds=8.0, crop_seconds=1.0), MaskingConfig(), 3, rank, num_ranks,
            perturbation=config,
        )  # fmt: skip
        found = []
        for batches, _ in take(share, 3):
            parts = [part for batch in batches for part in alone(batch)]
            assert all(part.units is not None and len(part.units) == len(part.mask) for part in parts)
            found.append([(p.waves.numpy().tobytes(), p.units.numpy().tobytes()) for p in parts if p.units is not None])
        return found

    shares = [heard(rank, ranks) for rank in range(ranks)]
    for whole, *parts in zip(heard(0, 1), *shares, strict=True):
        assert sorted(whole) == sorted(item for part in parts for item in part)


def test_every_utterance_once_an_epoch_in_a_new_order(utterances: list[Utterance]) -> None:
    planner, cursor, seen = loader(utterances, None), Cursor(), []
    while len(seen) < 3 * len(utterances):
        crops, cursor = planner.plan(cursor)
        seen += [crop.utterance.id for crop in crops]
    epochs = [seen[start : start + len(utterances)] for start in range(0, 3 * len(utterances), len(utterances))]
    assert all(sorted(epoch) == sorted(u.id for u in utterances) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


@pytest.mark.parametrize("stop", [1, 2, 5])
def test_entering_anywhere_gives_the_same_updates(
    utterances: list[Utterance], units: UnitStore, stop: int
) -> None:
    whole = take(loader(utterances, units), 7)
    rest = take(loader(utterances, units), 7 - stop, whole[stop - 1][1])
    for (batches, after), (again, after_again) in zip(whole[stop:], rest, strict=True):
        assert after == after_again
        for one, two in zip(batches, again, strict=True):
            assert torch.equal(one.waves, two.waves)
            assert torch.equal(one.mask, two.mask)
            assert one.num_samples == two.num_samples


def test_crops_lie_on_the_grid_with_their_labels(utterances: list[Utterance], units: UnitStore) -> None:
    starts = set()
    for batches, _ in take(loader(utterances, units), 8):
        for batch in batches:
            begin = 0
            for (index, first, frames, _), length in zip(items([batch]), batch.num_samples, strict=True):
                utterance = utterances[index]
                wave = standardise(utterance.wave())
                start = first * HOP_SAMPLES
                assert length == num_samples(frames) <= SAMPLE_RATE
                assert frames == min(utterance.num_frames, num_frames(SAMPLE_RATE))
                found = batch.waves[begin : begin + length].numpy()
                np.testing.assert_array_equal(found, wave[start : start + length])
                begin += -(-length // HOP_SAMPLES) * HOP_SAMPLES
                starts.add((index, first))
            assert begin == len(batch.waves)
    assert len({index for index, _ in starts}) < len(starts), "crops move from epoch to epoch"


def test_crops_from_the_start(utterances: list[Utterance], units: UnitStore) -> None:
    for batches, _ in take(loader(utterances, units, start_crops=True), 4):
        assert {first for _, first, _, _ in items(batches)} == {0}


def test_masks_are_drawn_anew_each_update(utterances: list[Utterance], units: UnitStore) -> None:
    seen = [item for batches, _ in take(loader(utterances, units, start_crops=True), 8) for item in items(batches)]
    assert len(set(seen)) == len(seen) > len(utterances)


@pytest.mark.parametrize("batch_seconds", [2.5, 8.0, 30.0])
def test_an_update_holds_as_much_audio_as_fits(utterances: list[Utterance], batch_seconds: float) -> None:
    planner, cursor = loader(utterances, None, batch_seconds=batch_seconds), Cursor()
    for _ in range(10):
        crops, cursor = planner.plan(cursor)
        seconds = sum(num_samples(crop.num_frames) for crop in crops) / SAMPLE_RATE
        # Another crop is at most 1 s.
        assert batch_seconds - 1 < seconds <= batch_seconds


def test_an_update_gives_every_part_an_utterance(utterances: list[Utterance], units: UnitStore) -> None:
    for rank in range(2):
        for batches, _ in take(loader(utterances, units, rank, 2, micro_batches=2, batch_seconds=0.1), 3):
            assert [len(batch.num_samples) for batch in batches] == [1, 1]


def test_too_few_utterances_are_refused(utterances: list[Utterance]) -> None:
    with pytest.raises(ValueError, match=r"found 11 utterances for 4 ranks × 3 micro-batches") as caught:
        loader(utterances, None, 0, 4, micro_batches=3)
    assert "\n" not in str(caught.value)


def test_labels_of_another_corpus_are_refused_before_training(
    utterances: list[Utterance], tmp_path: Path
) -> None:
    labels = [(u.id, u.num_samples + 320, np.zeros(u.num_frames + 1, np.int64)) for u in utterances]
    write_units(tmp_path, labels, num_units=2)
    with pytest.raises(ValueError, match=r"units: found \d+ labels for u0, wanted \d+, one a frame"):
        loader(utterances, UnitStore(tmp_path))
    empty = tmp_path / "empty"
    empty.mkdir()
    write_units(empty, labels[1:], num_units=2)
    with pytest.raises(ValueError, match="found no labels for 'u0'"):
        loader(utterances, UnitStore(empty))


@given(st.lists(st.integers(1, 100), min_size=1, max_size=30), st.integers(1, 8))
def test_rows_are_dealt_once_and_evenly(lengths: list[int], num_parts: int) -> None:
    parts = split_evenly(lengths, num_parts)
    assert len(parts) == num_parts
    assert sorted(row for part in parts for row in part) == list(range(len(lengths)))
    assert all(part == sorted(part) for part in parts)
    if len(lengths) >= num_parts:
        assert all(parts)
        totals = [sum(lengths[row] for row in part) for part in parts]
        # Longest first onto the emptiest part: the last row put on the fullest part was no longer than any other.
        assert max(totals) - min(totals) <= max(lengths)


# -------------------------------------------------------------------------------------------- length buckets


def padding(updates: list[list[int]]) -> float:
    """The share of padded batches that would be padding."""
    padded = sum(max(lengths) * len(lengths) for lengths in updates)
    return 1 - sum(map(sum, updates)) / padded


def test_length_buckets_bring_like_lengths_together() -> None:
    # 2 to 16 s, as a random batch of LibriSpeech's has them.
    lengths = np.random.default_rng(0).uniform(2, 16, size=3_000) * SAMPLE_RATE
    speech = [Utterance(f"u{i}", "train", "s", "s", int(n), Path("unread")) for i, n in enumerate(lengths)]

    def planned(buckets: int) -> list[list[int]]:
        config = BatchingConfig(batch_seconds=87.5, crop_seconds=20, length_buckets=buckets)
        one, cursor, updates = Loader(speech, None, config, MaskingConfig(), seed=0), Cursor(), []
        while True:
            crops, cursor = one.plan(cursor)
            if cursor.epoch:
                return updates
            updates.append([crop.num_frames for crop in crops])

    random, alike = planned(1), planned(20)
    assert padding(random) > 0.35
    assert padding(alike) < 0.05
    # Every utterance once an epoch, and no long run of short ones: halves of the epoch are alike.
    assert abs(sum(map(len, alike)) - len(speech)) <= max(map(len, alike))
    means = [np.mean(np.concatenate(half)) for half in (alike[: len(alike) // 2], alike[len(alike) // 2 :])]
    # Of some 150 updates each, whose means lie 200 frames apart: a tenth is two standard deviations.
    assert means[0] == pytest.approx(means[1], rel=0.2)


def test_length_buckets_are_the_same_for_every_rank(utterances: list[Utterance], units: UnitStore) -> None:
    shares = [take(loader(utterances, units, rank, 2, length_buckets=3), 6) for rank in range(2)]
    whole = take(loader(utterances, units, length_buckets=3), 6)
    for (one, _), (two, _), (both, _) in zip(*shares, whole, strict=True):
        heard = [part.num_samples[0] for batch in (*one, *two) for part in alone(batch)]
        assert sorted(heard) == sorted(part.num_samples[0] for batch in both for part in alone(batch))


# ---------------------------------------------------------------------------------------------------- halves


@given(st.integers(2, 60), st.integers(0, 1_000))
def test_halves_share_no_sample_and_lie_on_the_grid(frames: int, seed: int) -> None:
    wave = noise(num_samples(frames), seed)
    quiet = UtteranceConfig(max_gain_db=0.0, min_snr_db=200.0, max_snr_db=200.0)
    first, second = split_in_halves(wave, quiet, np.random.default_rng(seed))
    assert min(num_frames(len(first)), num_frames(len(second))) >= 1
    begin = len(wave) - len(second)
    assert begin % HOP_SAMPLES == 0
    # An utterance of two or three frames is too short for halves that share nothing.
    assert begin >= len(first) or frames < 3
    np.testing.assert_allclose(first, wave[: len(first)], atol=1e-6)
    np.testing.assert_allclose(second, wave[begin:], atol=1e-6)


def test_halves_are_as_loud_and_as_noisy_as_they_are_told() -> None:
    wave = noise(num_samples(400))
    config = UtteranceConfig(max_gain_db=6.0, min_snr_db=10.0, max_snr_db=10.0)
    gains = []
    for seed in range(200):
        half, _ = split_in_halves(wave, config, np.random.default_rng(seed))
        clean = wave[: len(half)]
        gain = float(half @ clean / (clean @ clean))
        rest = half - gain * clean
        # 10 dB below the half, after the gain; a tenth for the noise's own spread and its part along the wave.
        assert 10 * np.log10((gain * clean).var() / rest.var()) == pytest.approx(10, abs=0.3)
        gains.append(20 * np.log10(gain))
    assert -6.3 < min(gains) < -5
    assert 5 < max(gains) < 6.3


def test_a_rank_draws_what_one_process_draws(utterances: list[Utterance], units: UnitStore) -> None:
    def heard(num_ranks: int) -> dict[int, tuple[bytes, int, int]]:
        found = {}
        for rank in range(num_ranks):
            config = BatchingConfig(batch_seconds=8.0, crop_seconds=1.0)
            one = Loader(utterances, units, config, MaskingConfig(), 3, rank, num_ranks, halves=UtteranceConfig())
            ((batches, _),) = take(one, 1)
            for part in (part for batch in batches for part in alone(batch)):
                assert part.halves is not None
                assert part.speakers is not None
                found[part.seeds[0]] = (part.halves.numpy().tobytes(), len(part.half_samples), int(part.speakers[0]))
        return found

    assert heard(1) == heard(2) == heard(3)
    assert all(count == 2 for _, count, _ in heard(1).values())
