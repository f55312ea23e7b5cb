"""The time grid: frames from samples and back, labels on frames, waves end to end."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from sonorant.data.frames import (
    FRAME_MS,
    FRAME_RATE,
    FRAME_SECONDS,
    HOP_SAMPLES,
    SAMPLE_RATE,
    STEM_KERNELS,
    STEM_STRIDES,
    WINDOW_SAMPLES,
    Ragged,
    frame_centres,
    frame_labels,
    num_frames,
    num_samples,
    pack_waves,
)


def test_the_grid_is_25_ms_every_20_ms() -> None:
    assert (SAMPLE_RATE, WINDOW_SAMPLES, HOP_SAMPLES) == (16_000, 400, 320)
    assert (FRAME_RATE, FRAME_SECONDS, FRAME_MS) == (50.0, 0.02, 20)


@pytest.mark.parametrize(
    ("samples", "frames"),
    [(0, 0), (399, 0), (400, 1), (719, 1), (720, 2), (16_000, 49), (32_000, 99), (160_000, 499), (320_000, 999)],
)
def test_known_lengths(samples: int, frames: int) -> None:
    # 99, 499 and 999 frames for 2, 10 and 20 s: pretraining.md §0.
    assert num_frames(samples) == frames


@given(st.integers(0, 2_000_000))
@example(WINDOW_SAMPLES - 1)
@example(WINDOW_SAMPLES + HOP_SAMPLES - 1)
def test_frames_are_what_the_seven_convolutions_leave(samples: int) -> None:
    left = samples
    for kernel, stride in zip(STEM_KERNELS, STEM_STRIDES, strict=True):
        left = (left - kernel) // stride + 1 if left >= kernel else 0
    assert num_frames(samples) == left


@given(st.integers(1, 100_000))
def test_num_samples_is_the_fewest_that_make_so_many_frames(frames: int) -> None:
    assert num_frames(num_samples(frames)) == frames
    assert num_frames(num_samples(frames) - 1) == frames - 1


def test_no_frames_need_no_samples() -> None:
    assert num_samples(0) == 0


def test_a_frame_sees_its_window_and_nothing_else() -> None:
    # The receptive field as autograd sees it, through convolutions of ones.
    wave = torch.zeros(1, 1, 3000, dtype=torch.float64, requires_grad=True)
    x = wave
    for kernel, stride in zip(STEM_KERNELS, STEM_STRIDES, strict=True):
        x = torch.nn.functional.conv1d(x, torch.ones(1, 1, kernel, dtype=torch.float64), stride=stride)
    (gradient,) = torch.autograd.grad(x[0, 0, 3], wave)
    seen = gradient[0, 0].nonzero()[:, 0]
    assert (int(seen[0]), int(seen[-1]) + 1) == (3 * HOP_SAMPLES, 3 * HOP_SAMPLES + WINDOW_SAMPLES)
    assert frame_centres(4)[3] == (3 * HOP_SAMPLES + WINDOW_SAMPLES / 2) / SAMPLE_RATE


SEGMENTS = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(0, 120), st.integers(1, 60)).map(
        lambda s: (s[0], s[1] / 100, (s[1] + s[2]) / 100)
    ),
    max_size=6,
)


@given(SEGMENTS, st.integers(0, 80))
def test_a_frame_has_the_label_at_its_centre(segments: list[tuple[str, float, float]], frames: int) -> None:
    labels = frame_labels(segments, frames)
    assert len(labels) == frames
    for label, centre in zip(labels, frame_centres(frames), strict=True):
        holding = [s for s in segments if s[1] <= centre < s[2]]
        latest = max((s[1] for s in holding), default=None)
        assert label in {s[0] for s in holding if s[1] == latest} or (label == "SIL" and not holding)


def test_overlap_and_outside() -> None:
    # Centres at 12.5, 32.5, 52.5, 72.5 and 92.5 ms.
    segments = [("b", 0.05, 0.08), ("a", 0.02, 0.06)]
    assert frame_labels(segments, 5, outside="-") == ["-", "a", "b", "b", "-"]
    assert frame_labels([("a", 0.0125, 0.0325)], 2) == ["a", "SIL"], "a segment is half-open"


@given(st.lists(st.integers(0, 2000), max_size=5))
def test_packed_waves_begin_on_the_grid_and_are_all_there(lengths: list[int]) -> None:
    waves = [np.arange(1, length + 1, dtype=np.float32) for length in lengths]
    packed = pack_waves(waves)
    assert packed.dtype == np.float32
    start = 0
    for wave in waves:
        assert start % HOP_SAMPLES == 0
        room = -(-len(wave) // HOP_SAMPLES) * HOP_SAMPLES
        np.testing.assert_array_equal(packed[start : start + len(wave)], wave)
        assert not packed[start + len(wave) : start + room].any()
        start += room
    assert len(packed) == start


@given(st.lists(st.integers(0, 9), max_size=6))
def test_ragged_rows_tile_the_buffer(lengths: list[int]) -> None:
    ragged = Ragged(tuple(lengths))
    rows = [list(range(ragged.total))[where] for where in ragged.slices()]
    assert [len(r) for r in rows] == lengths
    assert [row for r in rows for row in r] == list(range(sum(lengths)))
    assert ragged.is_uniform == (len(set(lengths)) <= 1)
    assert Ragged.of_samples([399, 400, 16_000]).lengths == (0, 1, 49)
