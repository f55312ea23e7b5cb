"""What sources offer as rows, what of it is kept, and why the rest is refused."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from sonorant.config import FolderSource, LhotseSource, LibrispeechSource, ManifestSource, Part, Source
from sonorant.data.corpus import Refused, Row
from sonorant.data.intake import RefusalError, fit_times, read_row
from sonorant.data.sources import read_source
from sonorant.data.splits import draw_splits, num_held_out, split_rows


def offered(source: Source, folder: Path) -> list[Row]:
    """A source's rows, all of them good."""
    entries = read_source(source, folder, 1, lambda _done, _total: None, Part())
    assert not [entry for entry in entries if isinstance(entry, Refused)]
    return [entry for entry in entries if isinstance(entry, Row)]


def noise(seconds: float = 1.0, rate: int = 16_000, channels: int = 1) -> NDArray[np.float64]:
    """Noise of RMS 0.1, (S, channels)."""
    return np.random.default_rng(0).normal(0, 0.1, (round(seconds * rate), channels))


def tone(seconds: float, rate: int, channels: int = 1) -> NDArray[np.float64]:
    """440 Hz at amplitude 0.3 in every channel, (S, channels)."""
    wave = 0.3 * np.sin(2 * np.pi * 440 * np.arange(round(seconds * rate)) / rate)
    return np.repeat(wave[:, None], channels, axis=1)


def encoded(samples: NDArray[np.float64], rate: int = 16_000, **how: str) -> bytes:
    """A file's bytes."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, **({"format": "WAV"} | how))
    return file.getvalue()


def row_of(path: Path, **fields: object) -> Row:
    """A row of which nothing but the file matters."""
    return Row(id="x", source="s", speaker="a", path=path, **fields)  # type: ignore[arg-type]


def read(path: Path, **fields: object) -> NDArray[np.int16]:
    """A row's samples, between 0.1 and 10 s."""
    return read_row(row_of(path, **fields), 0.1, 10.0)


# ----------------------------------------------------------------------------------------------------- audio


@pytest.mark.parametrize(
    ("container", "subtype", "rate", "channels"),
    [
        ("WAV", "PCM_U8", 8_000, 1),
        ("WAV", "PCM_24", 48_000, 2),
        ("WAV", "DOUBLE", 96_000, 6),
        ("WAV", "ULAW", 8_000, 1),
        ("WAV", "IMA_ADPCM", 22_050, 1),
        ("FLAC", "PCM_24", 44_100, 2),
        ("OGG", "VORBIS", 32_000, 1),
        ("OGG", "OPUS", 48_000, 2),
        ("MP3", "MPEG_LAYER_III", 44_100, 2),
        ("AIFF", "PCM_16", 11_025, 1),
        ("AU", "PCM_32", 16_000, 2),
        ("W64", "FLOAT", 22_254, 1),
        ("CAF", "ALAC_16", 16_000, 1),
        ("NIST", "PCM_16", 16_000, 1),
        ("RF64", "PCM_16", 44_101, 1),
    ],
)
def test_any_audio_becomes_16_khz_mono(tmp_path: Path, container: str, subtype: str, rate: int, channels: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(encoded(tone(2.0, rate, channels), rate, format=container, subtype=subtype))
    samples = read(path)
    # ADPCM, Opus and MP3 fill their last block: at most 1,152 samples of 22,050 Hz
    assert 2.0 <= len(samples) / 16_000 < 2.06
    middle = samples[8_000:24_000] / 32768
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle))))
    assert np.argmax(spectrum) == 440  # one bin is one hertz
    # lossy codecs and 8 bits change a tone's level by less than 5 %
    assert np.sqrt(2 * (middle**2).mean()) == pytest.approx(0.3, rel=0.05)


def test_16_bit_16_khz_is_not_changed(tmp_path: Path) -> None:
    samples = np.random.default_rng(0).integers(-32768, 32768, 8000).astype(np.int16)
    soundfile.write(tmp_path / "x.wav", samples, 16_000)
    np.testing.assert_array_equal(read(tmp_path / "x.wav"), samples)


def test_channels_are_averaged_or_chosen(tmp_path: Path) -> None:
    samples = np.stack([np.full(8000, 1000), np.arange(8000)], axis=1).astype(np.int16)
    soundfile.write(tmp_path / "x.wav", samples, 16_000)
    # half a step is rounded to the even neighbour
    np.testing.assert_array_equal(read(tmp_path / "x.wav"), np.rint(samples.mean(axis=1)))
    np.testing.assert_array_equal(read(tmp_path / "x.wav", channel=1), samples[:, 1])
    with pytest.raises(RefusalError, match="channel 2 of 2"):
        read(tmp_path / "x.wav", channel=2)


def test_a_segment_is_cut_out(tmp_path: Path) -> None:
    samples = np.arange(16_000).astype(np.int16)
    soundfile.write(tmp_path / "x.wav", samples, 16_000)
    np.testing.assert_array_equal(read(tmp_path / "x.wav", start=0.25, end=0.5), samples[4000:8000])
    np.testing.assert_array_equal(read(tmp_path / "x.wav", start=0.25), samples[4000:])
    # rounded to hundredths, an end may lie that much too late
    np.testing.assert_array_equal(read(tmp_path / "x.wav", end=1.005), samples)


def test_resampling_does_not_depend_on_threads(tmp_path: Path) -> None:
    import torch

    soundfile.write(tmp_path / "x.wav", noise(rate=44_100), 44_100)
    before = torch.get_num_threads()
    found = []
    try:
        for num_threads in (1, 3):
            torch.set_num_threads(num_threads)
            found.append(read(tmp_path / "x.wav"))
            assert torch.get_num_threads() == num_threads
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(*found)


def with_value(value: float) -> NDArray[np.float64]:
    """Noise with one sample replaced."""
    samples = noise()
    samples[5000] = value
    return samples


def unknown_length_flac() -> bytes:
    """A FLAC whose header gives no number of samples, as a stream's does not."""
    content = bytearray(encoded(noise(), format="FLAC"))
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (lambda: b"", "zero-length"),
        (lambda: encoded(noise(0.0)), "zero-length"),
        (lambda: b"no audio at all, but some bytes" * 99, "unreadable"),
        (lambda: encoded(noise())[:30], "unreadable"),
        (unknown_length_flac, "unreadable"),
        (lambda: encoded(with_value(np.nan), subtype="FLOAT"), "not finite"),
        (lambda: encoded(with_value(np.inf), subtype="DOUBLE"), "not finite"),
        (lambda: encoded(noise() * 32768, subtype="FLOAT"), "beyond full scale"),
        (lambda: encoded(noise() * 0), "silence"),
        (lambda: encoded(noise() * 0 + 0.25), "silence"),
        (lambda: encoded(noise() * 1e-6, subtype="PCM_24"), "silence"),
        (lambda: encoded(noise(0.09)), "too short"),
        (lambda: encoded(noise(10.1)), "too long"),
    ],
)
def test_bad_audio_is_refused(tmp_path: Path, content: Callable[[], bytes], reason: str) -> None:
    path = tmp_path / "x.wav"
    path.write_bytes(content())
    with pytest.raises(RefusalError) as refusal:
        read(path)
    assert refusal.value.reason == reason
    assert str(tmp_path) not in refusal.value.detail


@pytest.mark.parametrize("kept", [0.5, 0.98])
@pytest.mark.parametrize(
    ("container", "subtype"),
    [
        ("WAV", "PCM_16"),
        ("WAV", "FLOAT"),
        ("WAV", "IMA_ADPCM"),
        ("FLAC", "PCM_16"),
        ("OGG", "VORBIS"),
        ("OGG", "OPUS"),
        ("MP3", "MPEG_LAYER_III"),
        ("AIFF", "PCM_16"),
        ("AU", "PCM_16"),
        ("W64", "PCM_16"),
        ("RF64", "PCM_16"),
        ("CAF", "PCM_16"),
        ("NIST", "PCM_16"),
    ],
)
def test_a_truncated_file_is_refused(tmp_path: Path, container: str, subtype: str, kept: float) -> None:
    content = encoded(noise(2.0), format=container, subtype=subtype)
    path = tmp_path / "file"
    path.write_bytes(content)
    assert len(read(path)) >= 32_000
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(RefusalError) as refusal:
        read(path)
    assert refusal.value.reason in {"truncated", "unreadable"}


def test_a_stream_that_did_not_know_its_length_is_kept(tmp_path: Path) -> None:
    content = bytearray(encoded(noise()))
    content[4:8] = content[40:44] = b"\xff" * 4
    (tmp_path / "x.wav").write_bytes(content)
    assert len(read(tmp_path / "x.wav")) == 16_000


def test_a_file_that_ends_in_other_chunks_is_kept(tmp_path: Path) -> None:
    content = encoded(noise()) + b"LIST\x04\x00\x00\x00INFO" + b"LIST\xff\x00\x00\x00cut off"
    (tmp_path / "x.wav").write_bytes(content)
    assert len(read(tmp_path / "x.wav")) == 16_000


@pytest.mark.parametrize(("start", "end"), [(0.0, 1.02), (-0.5, 0.5), (0.6, 0.4), (1.5, None), (0.5, 0.5)])
def test_times_outside_the_file_are_refused(tmp_path: Path, start: float, end: float | None) -> None:
    soundfile.write(tmp_path / "x.wav", noise(), 16_000)
    with pytest.raises(RefusalError, match="times outside the file"):
        read(tmp_path / "x.wav", start=start, end=end)


def test_missing_files_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.wav", tmp_path):
        with pytest.raises(RefusalError, match="missing file"):
            read(path)


def test_segments_are_fitted_to_the_audio() -> None:
    given_times = (("a", 0.0, 0.5), ("nothing", 0.5, 0.5), ("b", 0.5, 1.004))
    assert fit_times(given_times, 1.0, "phone") == (("a", 0.0, 0.5), ("b", 0.5, 1.0))
    assert fit_times(None, 1.0, "phone") is None
    for outside in (("c", 0.9, 1.02), ("c", -0.1, 0.3), ("c", 0.5, 0.4)):
        with pytest.raises(RefusalError, match="phone 'c'"):
            fit_times((outside,), 1.0, "phone")


# ------------------------------------------------------------------------------------------------- manifests


def write_manifest(folder: Path, *rows: object) -> ManifestSource:
    """A manifest of these rows; a string is a line as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "manifest.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    return ManifestSource(name="m", path=folder / "manifest.jsonl")


def test_a_manifest_row_with_all_that_may_be_in_it(tmp_path: Path) -> None:
    source = write_manifest(
        tmp_path,
        {
            "id": "u1",
            "path": "audio/u1.flac",
            "speaker": 17,
            "split": "dev",
            "start": 1.5,
            "end": 3,
            "text": "hi",
            "words": [["hi", 0.1, 0.5]],
            "phones": [["h#", 0, 0.1], ["hh", 0.1, 0.2], ["SIL", 0.2, 0.3], ["pau", 0.3, 0.4]],
            "image": "images/u1.png",
            "distractors": ["ho"],
            "who knows": "what",
        },
        "",
        {"id": "u2", "path": "/there/u2.wav", "speaker": "b", "phones": None, "image": None},
    )
    first, second = offered(source, tmp_path)
    assert first == Row(
        id="u1",
        source="m",
        speaker="17",
        path=tmp_path / "audio/u1.flac",
        split="dev",
        start=1.5,
        end=3.0,
        text="hi",
        words=(("hi", 0.1, 0.5),),
        phones=(("SIL", 0.0, 0.1), ("hh", 0.1, 0.2), ("SIL", 0.2, 0.3), ("SIL", 0.3, 0.4)),
        image=tmp_path / "images/u1.png",
        distractors=("ho",),
    )
    assert second == Row(id="u2", source="m", speaker="b", path=Path("/there/u2.wav"))


def test_folded_phones_come_first(tmp_path: Path) -> None:
    row = {"id": "u", "path": "u.wav", "speaker": "a", "phones": [["tcl", 0, 1]], "phones39": [["sil", 0, 1]]}
    assert offered(write_manifest(tmp_path, row), tmp_path)[0].phones == (("SIL", 0.0, 1.0),)


@pytest.mark.parametrize(
    "line",
    [
        '{"id": "u", "path": "u.wav"',
        '{"id": "u", "path": "u.wav"}',
        '{"id": "", "path": "u.wav", "speaker": "a"}',
        '{"id": "u", "path": "u.wav", "speaker": "a", "split": "validation"}',
        '{"id": "u", "path": "u.wav", "speaker": "a", "start": NaN}',
        '{"id": "u", "path": "u.wav", "speaker": "a", "words": [["x", 1]]}',
        '["u", "u.wav", "a"]',
        "\udcff",
    ],
)
def test_a_broken_row_is_refused_by_its_line(tmp_path: Path, line: str) -> None:
    source = write_manifest(tmp_path, {"id": "good", "path": "g.wav", "speaker": "a"})
    with source.path.open("ab") as file:
        file.write(line.encode("utf-8", "surrogateescape") + b"\n")
    good, bad = read_source(source, tmp_path, 1, lambda _done, _total: None, Part())
    assert isinstance(good, Row)
    assert isinstance(bad, Refused)
    assert (bad.reason, bad.path, bad.id) == ("broken row", "manifest.jsonl:2", None)
    assert bad.detail
    assert "\n" not in bad.detail


def test_the_sample_manifests_are_read(shared_data: Path, tmp_path: Path) -> None:
    counts = {"timit_sample": 120, "speechocean": 384, "fsdd_digits": 3000}
    rows = {
        name: offered(ManifestSource(name=name, path=shared_data / name / "manifest.jsonl"), tmp_path)
        for name in counts
    }
    assert {name: len(own) for name, own in rows.items()} == counts
    labels = {label for row in rows["timit_sample"] for label, _, _ in row.phones or ()}
    assert "SIL" in labels
    assert len(labels) == 39  # Lee & Hon's, silence among them
    assert all(row.image is not None and row.image.is_file() for row in rows["fsdd_digits"])


# --------------------------------------------------------------------------------------------------- folders


def write_audio(path: Path, seconds: float = 0.5) -> None:
    """A file of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, noise(seconds), 16_000)


def test_librispeech(tmp_path: Path) -> None:
    root = tmp_path / "LibriSpeech"
    for name in ("train-clean-5/19/198/19-198-0000", "dev-clean-2/84/121/84-121-0000", "mine/7/8/7-8-0000"):
        write_audio(root / f"{name}.flac")
    transcript = "19-198-0000 NORTHANGER ABBEY\n19-198-0001 LOST\n"
    (root / "train-clean-5/19/198/19-198.trans.txt").write_text(transcript)
    rows = {row.id: row for row in offered(LibrispeechSource(name="l", path=root), tmp_path)}
    assert {name: (row.speaker, row.split, row.text) for name, row in rows.items()} == {
        "84-121-0000": ("84", "dev", None),
        "7-8-0000": ("7", None, None),
        "19-198-0000": ("19", "train", "NORTHANGER ABBEY"),
        "19-198-0001": ("19", "train", "LOST"),
    }
    assert not rows["19-198-0001"].path.exists()
    subset = offered(LibrispeechSource(name="l", path=root / "dev-clean-2"), tmp_path)
    assert [(row.id, row.split) for row in subset] == [("84-121-0000", "dev")]


def test_folder(tmp_path: Path) -> None:
    root = tmp_path / "speech"
    for name in ("ann/a.wav", "ann/a.flac", "day 2/bob/b.WAV", "c.wav", "ann/._a.wav"):
        if name.endswith("WAV"):
            write_audio((root / name).with_suffix(".wav"))
            (root / name).with_suffix(".wav").rename(root / name)
        else:
            write_audio(root / name)
    (root / "ann" / "notes.txt").write_text("no audio")
    (root / "ann" / "call.m4a").write_bytes(b"what libsndfile cannot read is for prepare to refuse")
    rows = offered(FolderSource(name="f", path=root), tmp_path)
    assert [(row.id, row.speaker, row.split) for row in rows] == [
        ("ann/a.flac", "ann", None),
        ("ann/a.wav", "ann", None),
        ("ann/call", "ann", None),
        ("c", "speech", None),
        ("day 2/bob/b", "bob", None),
    ]


@pytest.mark.parametrize("kind", [FolderSource, LibrispeechSource, ManifestSource, LhotseSource])
def test_nothing_to_read_is_an_error(tmp_path: Path, kind: type[FolderSource]) -> None:
    def attempt(path: Path) -> str:
        with pytest.raises(ValueError) as error:
            read_source(kind(name="s", path=path), tmp_path, 1, lambda _done, _total: None, Part())
        return str(error.value)

    assert "found nothing at" in attempt(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.jsonl").touch()
    for path in (tmp_path / "empty", tmp_path / "empty.jsonl"):
        message = attempt(path)
        assert message.startswith("source s: found")
        assert "wanted" in message
        assert "\n" not in message


# ---------------------------------------------------------------------------------------------------- lhotse


def make_cuts(folder: Path) -> list[object]:
    """Three cuts of one stereo file: the left channel's two halves and the right channel's first."""
    from lhotse import MonoCut, Recording, SupervisionSegment
    from lhotse.supervision import AlignmentItem

    folder.mkdir(parents=True, exist_ok=True)
    soundfile.write(folder / "call.wav", noise(2.0, channels=2), 16_000)
    recording = Recording.from_file(folder / "call.wav")

    def make(id: str, start: float, channel: int, speaker: str | None, **custom: str) -> MonoCut:
        words = {"word": [AlignmentItem("hi", 0.1, 0.2)], "phone": [AlignmentItem("sil", 0.0, 0.1)]}
        supervision = SupervisionSegment(
            id, recording.id, 0.0, 1.0, channel, text="hi", speaker=speaker, alignment=words
        )
        return MonoCut(id, start, 1.0, channel, [supervision], recording=recording, custom=custom or None)

    return [make("l0", 0, 0, "ann", split="dev"), make("l1", 1, 0, "ann"), make("r0", 0, 1, None)]


def test_lhotse_cuts(tmp_path: Path) -> None:
    from lhotse import CutSet

    CutSet.from_cuts(make_cuts(tmp_path)).to_file(tmp_path / "cuts.jsonl.gz")
    source = LhotseSource(name="l", path=tmp_path / "cuts.jsonl.gz")
    first, second, right = offered(source, tmp_path)
    assert (first.id, first.speaker, first.split, first.start, first.end) == ("l0", "ann", "dev", 0.0, 1.0)
    assert (first.text, first.words) == ("hi", (("hi", 0.1, pytest.approx(0.3)),))
    assert first.phones == (("SIL", 0.0, 0.1),)
    assert (second.split, second.start, second.end) == (None, 1.0, 2.0)
    assert (right.speaker, right.channel) == ("call", 1)
    whole = soundfile.read(tmp_path / "call.wav", dtype="int16")[0]
    np.testing.assert_array_equal(read_row(second, 0.1, 9), whole[16_000:, 0])
    np.testing.assert_array_equal(read_row(right, 0.1, 9), whole[:16_000, 1])


def test_lhotse_shar(tmp_path: Path) -> None:
    from lhotse import CutSet

    (tmp_path / "shar").mkdir()
    cuts = CutSet.from_cuts(make_cuts(tmp_path))
    cuts.to_shar(tmp_path / "shar", fields={"recording": "flac"}, shard_size=2)
    source = LhotseSource(name="l", path=tmp_path / "shar")
    rows = offered(source, tmp_path / "kept")
    assert [row.id for row in rows] == ["l0", "l1", "r0"]
    whole = soundfile.read(tmp_path / "call.wav", dtype="int16")[0]
    expected = (whole[:16_000, 0], whole[16_000:, 0], whole[:16_000, 1])
    for row, samples in zip(rows, expected, strict=True):
        np.testing.assert_array_equal(read_row(row, 0.1, 9), samples)
    assert offered(source, tmp_path / "kept") == rows
    shard = tmp_path / "shar" / "recording.000001.tar"
    shard.write_bytes(shard.read_bytes()[:600])
    with pytest.raises(ValueError, match="cannot be read to its end"):
        offered(source, tmp_path / "kept")


def test_lhotse_cuts_that_are_no_rows_are_refused(tmp_path: Path) -> None:
    from lhotse import MonoCut, SupervisionSegment

    plain, other, _ = make_cuts(tmp_path)
    assert isinstance(plain, MonoCut)
    crowd = [*plain.supervisions, SupervisionSegment("x", "call", 0.5, 0.1, speaker="bob")]
    cuts = [
        MonoCut("silent", 0, 1.0, 0, plain.supervisions),
        plain.mix(other, snr=10),
        plain.perturb_speed(1.1),
        MonoCut("crowd", 0, 1.0, 0, crowd, recording=plain.recording),
    ]
    lines = [json.dumps(cut.to_dict()) for cut in cuts] + ['{"type": "MonoCut", "id": "x"}', "[", "7"]
    (tmp_path / "cuts.jsonl").write_text("\n".join(lines))
    entries = read_source(
        LhotseSource(name="l", path=tmp_path / "cuts.jsonl"), tmp_path, 1, lambda _d, _t: None, Part()
    )
    assert [(entry.reason, entry.path) for entry in entries if isinstance(entry, Refused)] == [
        ("missing file", "cuts.jsonl:1"),
        ("unsupported cut", "cuts.jsonl:2"),
        ("unsupported cut", "cuts.jsonl:3"),
        ("several speakers", "cuts.jsonl:4"),
        ("broken row", "cuts.jsonl:5"),
        ("broken row", "cuts.jsonl:6"),
        ("broken row", "cuts.jsonl:7"),
    ]


# ---------------------------------------------------------------------------------------------------- splits


@given(num=st.integers(1, 200), dev=st.floats(0, 0.95), test=st.floats(0, 0.95), seed=st.integers(0, 9))
def test_splits_are_drawn_by_speaker(num: int, dev: float, test: float, seed: int) -> None:
    if dev + test >= 1:
        dev, test = dev / 2, test / 2
    names = [f"s{i}" for i in range(num)]
    splits = draw_splits("src", names, dev, test, seed)
    assert splits == draw_splits("src", reversed(names), dev, test, seed)
    counts = {split: list(splits.values()).count(split) for split in ("train", "dev", "test")}
    assert counts["train"] >= 1
    for split, share in (("dev", dev), ("test", test)):
        if num >= 3:
            assert (counts[split] >= 1) == (share > 0)
        # the share's whole part; one more, where it would be none; one fewer, where train would be empty
        assert -2 < counts[split] - share * num <= 1 + 1e-6


def test_shares_are_counted_exactly() -> None:
    assert num_held_out(100, 0.29, 0.1) == (29, 10)
    assert num_held_out(2, 0.1, 0.1) == (0, 0)


def test_seeds_draw_different_splits() -> None:
    names = [f"s{i}" for i in range(50)]
    assert draw_splits("src", names, 0.2, 0.2, 0) != draw_splits("src", names, 0.2, 0.2, 1)


def test_a_speaker_keeps_the_split_it_was_given() -> None:
    rows = [
        Row("1", "s", "ann", Path("1"), split="test"),
        Row("2", "s", "ann", Path("2")),
        Row("3", "s", "bob", Path("3")),
    ]
    speakers = ["ann", "ann", "bob"]
    assert split_rows(rows, "speaker", speakers, 0.1, 0.1, 0) == ["test", "test", "train"]
    rows.append(Row("4", "s", "ann", Path("4"), split="train"))
    with pytest.raises(ValueError, match="speaker 'ann' in test and in train") as error:
        split_rows(rows, "speaker", [*speakers, "ann"], 0.1, 0.1, 0)
    assert "split_by" not in str(error.value)  # there are no images to split by
