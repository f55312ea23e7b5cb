"""Recordings in windows: the cut, what a window is told of the whole, joined results, and listening as it comes in."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sonorant.data.audio import BLOCK_VALUES, measure, standardise
from sonorant.data.frames import HOP_SAMPLES, SAMPLE_RATE, WINDOW_SAMPLES, num_frames, num_samples
from sonorant.data.windows import Cut, Listener
from sonorant.inference import LONG, STREAM, Speech
from sonorant.models.codebook import Codebook, Speller
from sonorant.models.stem import FirstMoments
from tests.tiny import LAYOUTS, encoder_config, make_encoder, noise

cuts = st.builds(Cut, st.integers(1, 30), st.integers(0, 40), st.integers(0, 40))
lengths = st.integers(0, 100 * HOP_SAMPLES)


def recording(seconds: float, seed: int = 0) -> NDArray[np.float32]:
    """Noise that is louder towards its end and off centre, so that no window has the moments of the whole."""
    wave = noise(round(seconds * SAMPLE_RATE), seed)
    return np.float32(0.1) * wave * np.linspace(0.2, 2, len(wave), dtype=np.float32) + np.float32(0.05)


def make_speech(centred: bool = False, num_units: int = 20, **changes: Any) -> Speech:
    encoder = make_encoder(**changes)
    frames = np.concatenate(Speech(encoder, 2).embed([recording(2.0, seed=9)]))
    centroids = frames[:: len(frames) // num_units][:num_units]
    centroids = centroids - frames.mean(0) if centred else centroids
    dim = frames.shape[1]
    codebook = Codebook(centroids, np.zeros(dim, np.float32), np.ones(dim, np.float32), centred)
    return Speech(encoder, 2, codebook)


# ------------------------------------------------------------------------------------------------------- the cut


@given(cuts, lengths)
def test_windows_tile_a_recording_once_with_all_the_context_there_is(cut: Cut, length: int) -> None:
    total, windows = num_frames(length), cut.windows(length)
    frames = [frame for w in windows for frame in range(w.frames.start, w.frames.stop)]
    assert frames == list(range(total))
    for window in windows:
        start, left = divmod(window.samples.start, HOP_SAMPLES)
        made = num_frames(window.samples.stop - window.samples.start)
        assert left == 0
        assert window.samples.stop <= length
        assert made >= 1
        assert made <= cut.before + cut.step + cut.after
        assert (window.frames.start, window.frames.stop) == (start + window.kept.start, start + window.kept.stop)
        assert window.kept.start == min(cut.before, window.frames.start)
        assert made - window.kept.stop == min(cut.after, total - window.frames.stop)
    if windows:
        assert all(w.frames.stop - w.frames.start == cut.step for w in windows[:-1])
        last = windows[-1].frames
        assert 1 <= last.stop - last.start < cut.step + max(1, cut.after)


@given(cuts, lengths)
def test_a_recording_of_at_most_whole_frames_is_one_window(cut: Cut, length: int) -> None:
    windows = Cut(cut.step, cut.before, cut.after, whole=50).windows(length)
    if 1 <= num_frames(length) <= 50:
        [window] = windows
        assert (window.samples, window.frames) == (slice(0, length), slice(0, num_frames(length)))
    else:
        assert windows == cut.windows(length)


def test_long_leaves_30_seconds_whole() -> None:
    assert len(LONG.windows(30 * SAMPLE_RATE)) == 1
    assert len(LONG.windows(31 * SAMPLE_RATE)) == 2


@pytest.mark.parametrize(
    ("values", "named"), [((0, 1, 1), "step 0"), ((1, -1, 0), "before -1"), ((1, 0, -2), "after -2")]
)
def test_an_impossible_cut_is_refused(values: tuple[int, int, int], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Cut(*values)


# ------------------------------------------------------------------------------- what it is told of the whole


@pytest.mark.parametrize("stem_norm", ["layer", "group"])
@pytest.mark.parametrize("standardised", [True, False])
@pytest.mark.parametrize("length", [WINDOW_SAMPLES, 1_003, 2 * BLOCK_VALUES + 7])
def test_blockwise_moments_are_those_that_one_pass_uses(stem_norm: str, standardised: bool, length: int) -> None:
    wave = recording(length / SAMPLE_RATE)
    moments = measure(wave, encoder_config(stem_norm=stem_norm, standardised=standardised))
    if stem_norm == "layer" and not standardised:
        assert moments is None
        return
    assert moments is not None
    heard = wave
    if standardised:
        heard = standardise(wave)
        # The float64 sums differ in their last digits, and with them a float32 by one step.
        np.testing.assert_allclose(standardise(wave, moments), heard, rtol=2e-7, atol=1e-9)
    if stem_norm == "group":
        wanted = FirstMoments.of(torch.from_numpy(heard))
        # Samples are float32, of 6e-8 relative error, and such errors do not add up in a mean.
        np.testing.assert_allclose(moments.first_mean, wanted.mean, atol=1e-7)
        np.testing.assert_allclose(moments.first_covariance, wanted.covariance, atol=1e-7)
    else:
        assert moments.first_mean is None


def test_too_short_a_wave_is_refused() -> None:
    speech = make_speech()
    for made in (speech.measure, speech.embed_long, speech.units_long):
        with pytest.raises(ValueError, match="with at least 400"):
            made(noise(WINDOW_SAMPLES - 1))


# ------------------------------------------------------------------------------------------------------- layers


def test_weights_sum_the_layers() -> None:
    speech, waves = make_speech(), [noise(4_000), noise(6_000, 1)]
    states = speech.states(waves, [0, 1, 2])
    for frames, layers in zip(speech.embed(waves, [0.5, 0.0, -2.0]), states, strict=True):
        # Two float32 products and a sum.
        np.testing.assert_allclose(frames, 0.5 * layers[0] - 2 * layers[2], rtol=1e-6, atol=1e-6)
    for layer in range(3):
        one_hot = [float(index == layer) for index in range(3)]
        np.testing.assert_array_equal(speech.embed(waves[:1], one_hot)[0], speech.embed(waves[:1], layer)[0])
    assert not speech.embed(waves, [0.0] * 3)[0].any()


@pytest.mark.parametrize(
    ("layer", "named"),
    [([1.0, 2.0], "2 weights"), ([1.0, float("nan"), 0.0], "not finite"), (3, "found 3"), (-1, "found -1")],
)
def test_a_layer_that_is_not_there_is_refused(layer: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make_speech().embed([noise(4_000)], layer)


# ------------------------------------------------------------------------------------------------------- joined


@pytest.mark.parametrize("standardised", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_windows_are_heard_as_the_whole_up_to_the_first_layer(layout: str, standardised: bool) -> None:
    """The stem sees one frame and the positional convolutions at most 6 on either side: a context of 6 is exact."""
    speech, wave = make_speech(standardised=standardised, **LAYOUTS[layout]), recording(3.0)
    [whole] = speech.embed([wave], 0)
    # Float32 sums over 16 channels in another order.
    np.testing.assert_allclose(speech.embed_long(wave, 0, Cut(20, 6, 6)), whole, atol=1e-5)
    if layout == "group" or standardised:
        alone = [speech.embed([wave[w.samples]], 0)[0][w.kept] for w in Cut(20, 6, 6).windows(len(wave))]
        assert np.abs(np.concatenate(alone) - whole).max() > 1e-3  # without the moments of the whole


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_the_context_there_is_gives_the_whole(layout: str) -> None:
    speech, wave = make_speech(**LAYOUTS[layout]), recording(3.0)
    [whole] = speech.embed([wave])
    # Float32 sums in another order, through two layers.
    np.testing.assert_allclose(speech.embed_long(wave, cut=Cut(20, 200, 200)), whole, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_attention_beyond_the_windows_changes_little(layout: str) -> None:
    speech, wave = make_speech(**LAYOUTS[layout]), recording(8.0)
    [whole] = speech.embed([wave])

    def difference(cut: Cut) -> float:
        return float(np.linalg.norm(speech.embed_long(wave, cut=cut) - whole) / np.linalg.norm(whole - whole.mean(0)))

    differences = [difference(Cut(40, context, context)) for context in (0, 10, 60)]
    assert differences[0] > differences[1] > differences[2]
    # A random encoder attends everywhere alike, to half of this recording with 60 frames: the worst case.
    assert differences[2] < 0.1


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_units_of_the_whole(layout: str, centred: bool) -> None:
    speech, wave = make_speech(centred, **LAYOUTS[layout]), recording(3.0)
    [whole] = speech.units([wave])
    assert len(set(whole)) > 3
    np.testing.assert_array_equal(speech.units_long(wave), whole)  # one window: the same bits
    np.testing.assert_array_equal(speech.embed_long(wave), speech.embed([wave])[0])
    # Frames that differ by 1e-5 may lie at another side of a border between units, but hardly ever do.
    assert np.mean(speech.units_long(wave, Cut(20, 200, 200)) == whole) > 0.98


# ------------------------------------------------------------------------------------------------------- listening


@st.composite
def pieces(draw: st.DrawFn) -> tuple[int, list[int]]:
    """A length and how the network cut it."""
    length = draw(lengths)
    edges = sorted(draw(st.lists(st.integers(0, length), max_size=12)))
    return length, [0, *edges, length]


def feed(listener: Listener, wave: NDArray[np.float32], edges: list[int]) -> Any:
    for start, stop in itertools.pairwise(edges):
        yield from listener.feed(wave[start:stop])
        assert listener.num_held <= (listener.cut.before + listener.cut.step + listener.cut.after + 2) * HOP_SAMPLES
    yield from listener.finish()


@given(cuts, pieces())
def test_listening_cuts_as_the_whole_is_cut(cut: Cut, cut_up: tuple[int, list[int]]) -> None:
    length, edges = cut_up
    wave, found = noise(length), list(feed(Listener(cut), noise(length), edges))
    assert [window for window, _ in found] == cut.windows(length)
    for window, heard in found:
        np.testing.assert_array_equal(heard, wave[window.samples])


@given(cuts, st.integers(1, 100 * HOP_SAMPLES))
def test_a_window_comes_as_soon_as_it_can(cut: Cut, length: int) -> None:
    listener = Listener(cut)
    done = len(listener.feed(noise(length)))
    assert done == max(0, (num_frames(length) - cut.after) // cut.step)
    needed = num_samples((done + 1) * cut.step + cut.after) - length
    assert not listener.feed(noise(needed - 1))
    assert len(listener.feed(noise(1))) == 1


def test_what_is_fed_may_be_overwritten() -> None:
    listener, buffer = Listener(Cut(10, 5, 5)), noise(3_000)
    first = buffer.copy()
    listener.feed(buffer)
    buffer[:] = 0
    [(window, heard)] = listener.finish()
    np.testing.assert_array_equal(heard, first[window.samples])


SPEECHES = {
    (layout, centred): make_speech(centred, **LAYOUTS[layout]) for layout in LAYOUTS for centred in (False, True)
}


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(sorted(SPEECHES)), cuts, pieces(), st.integers(0, 3))
def test_units_do_not_depend_on_how_the_network_cuts(
    which: tuple[str, bool], cut: Cut, cut_up: tuple[int, list[int]], seed: int
) -> None:
    speech, (length, edges) = SPEECHES[which], cut_up
    assert speech.codebook is not None
    wave, speller, units = recording(length / SAMPLE_RATE, seed), Speller(speech.codebook), []
    for window, heard in feed(Listener(cut), wave, edges):
        units += speller.spell(speech.embed([heard])[0][window.kept]).tolist()
    assert units == speech.stream_units(wave, cut).tolist()
    assert len(units) == num_frames(length)


def test_a_speller_centres_by_all_that_came_so_far() -> None:
    speech = SPEECHES["pre", True]
    assert speech.codebook is not None
    [frames] = speech.embed([recording(2.0)])
    speller, first, last = Speller(speech.codebook), frames[:30], frames[30:]
    np.testing.assert_array_equal(speller.spell(first), speech.codebook.assign(first))
    np.testing.assert_array_equal(speller.spell(last), speech.codebook.assign(frames)[30:])
    assert len(speller.spell(frames[:0])) == 0


def test_stream_has_a_look_ahead_of_under_a_second() -> None:
    assert (STREAM.step + STREAM.after) * HOP_SAMPLES < SAMPLE_RATE


def test_units_need_a_codebook() -> None:
    speech = Speech(make_encoder(), 1)
    for made in (speech.units_long, speech.stream_units):
        with pytest.raises(ValueError, match="no codebook"):
            made(noise(4_000))
