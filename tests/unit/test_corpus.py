"""A corpus on disk: what is written is read back, by lhotse too; the same content gives the same bytes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile

from sonorant.data.corpus import (
    CUTS,
    Refused,
    Row,
    Taken,
    place,
    read_corpus,
    summarise,
    write_corpus,
    write_refused,
)

KINDS = {"lab": {"kind": "folder"}, "field": {"kind": "manifest"}}


def make_taken(folder: Path, id: str, split: str, seconds: float, **fields: object) -> Taken:
    """A row with a file of noise of its own."""
    folder.mkdir(exist_ok=True)
    num_samples = round(seconds * 16_000)
    samples = np.random.default_rng(len(id)).integers(-999, 999, num_samples).astype(np.int16)
    audio = folder / f"{id}.flac"
    soundfile.write(audio, samples, 16_000)
    image = folder / f"{id}.png" if fields.pop("pictured", False) else None
    if image:
        image.write_bytes(id.encode())
    known = {"source": "lab", "speaker": "lab/ann", "path": audio, "split": split} | fields
    return Taken(Row(id=id, **known), split, f"digest-{id}", num_samples, audio, image)  # type: ignore[arg-type]


@pytest.fixture
def taken(tmp_path: Path) -> list[Taken]:
    """Three utterances of two sources and two splits, with all and with nothing known of them."""
    files = tmp_path / "files"
    return [
        make_taken(
            files,
            "a-full",
            "train",
            1.5,
            text="ein Käse",
            words=(("ein", 0.1, 0.4), ("Käse", 0.4, 1.23456)),
            phones=(("SIL", 0.0, 0.1), ("ai", 0.1, 0.4)),
            pictured=True,
            distractors=("zwei Käse",),
        ),
        make_taken(files, "bare", "test", 0.5, source="field", speaker="field/bob"),
        make_taken(files, "empty-times", "train", 31.0, words=()),
    ]


def test_what_is_written_is_read(tmp_path: Path, taken: list[Taken]) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    write_corpus(folder, taken, [], KINDS)
    full, bare, empty = read_corpus(folder)
    assert [full.id, bare.id, empty.id] == ["a-full", "bare", "empty-times"]
    assert (full.text, full.speaker, full.source, full.split) == ("ein Käse", "lab/ann", "lab", "train")
    assert full.phones == (("SIL", 0.0, 0.1), ("ai", 0.1, 0.4))
    assert full.words is not None
    # durations are rounded to a nanosecond, a sample is 62,500
    assert full.words[1] == ("Käse", 0.4, pytest.approx(1.23456, abs=1e-9))
    assert full.image is not None
    assert full.image.read_bytes() == b"a-full"
    assert (bare.text, bare.words, bare.phones, bare.image) == (None, None, None, None)
    assert empty.words == ()
    for utterance, one in zip((full, bare, empty), taken, strict=True):
        assert utterance.num_samples == one.num_samples
        np.testing.assert_array_equal(utterance.wave(), soundfile.read(one.audio, dtype="float32")[0])
    assert [u.id for u in read_corpus(folder, split="train")] == ["a-full", "empty-times"]
    assert [u.id for u in read_corpus(folder, source="field")] == ["bare"]


def test_lhotse_reads_the_cuts(tmp_path: Path, taken: list[Taken], monkeypatch: pytest.MonkeyPatch) -> None:
    from lhotse import CutSet, validate

    folder = tmp_path / "corpus"
    folder.mkdir()
    write_corpus(folder, taken, [], KINDS)
    monkeypatch.chdir(folder)
    cuts = CutSet.from_file(CUTS)
    validate(cuts, read_data=True)
    first = next(iter(cuts))
    assert first.load_audio().shape == (1, 24_000)
    assert first.distractors == ["zwei Käse"]
    assert not any(Path(cut.recording.sources[0].source).is_absolute() for cut in cuts)


def test_same_content_same_bytes(tmp_path: Path, taken: list[Taken]) -> None:
    contents = []
    for name in ("one", "another"):
        folder = tmp_path / name
        folder.mkdir()
        write_corpus(folder, taken, [Refused("lab", "x", "x.wav", "silence", "all samples are 0")], KINDS)
        contents.append({p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()})
    assert contents[0] == contents[1]
    # RFC 1952: bytes 4 to 7 of a gzip header are a time; two runs within a second would hide one
    assert contents[0][Path(CUTS)][4:8] == bytes(4)


def test_stats_add_up(taken: list[Taken]) -> None:
    refused = [
        Refused("lab", "x", "x.wav", "silence", ""),
        Refused("field", None, "manifest.jsonl:3", "broken row", ""),
    ]
    stats = summarise(taken, refused, KINDS)
    assert stats["hours"] == pytest.approx(33 / 3600, abs=1e-6)  # written to the millionth
    assert (stats["utterances"], stats["speakers"]) == (3, 2)
    assert {name: split["utterances"] for name, split in stats["splits"].items()} == {"train": 2, "test": 1}
    assert stats["sources"]["field"]["kind"] == "manifest"
    assert stats["sources"]["field"]["utterances"] == 1
    assert stats["sources"]["field"]["refused"] == {"broken row": 1}
    assert stats["refused"] == {"rows": 2, "share": 0.4, "reasons": {"broken row": 1, "silence": 1}}
    edges, counts = stats["durations"]["from_seconds"], stats["durations"]["utterances"]
    assert {edge: n for edge, n in zip(edges, counts, strict=True) if n} == {0: 1, 1: 1, 30: 1}


def test_refused_rows_are_lines_of_json(tmp_path: Path) -> None:
    path = tmp_path / "refused.jsonl"
    write_refused(path, [Refused("lab", None, "é.wav", "unreadable", "two\nlines")] * 2)
    lines = path.read_text("utf-8").splitlines()
    assert len(lines) == 2
    assert json.loads(lines[0]) == {
        "source": "lab", "id": None, "path": "é.wav", "reason": "unreadable", "detail": "two\nlines"
    }  # fmt: skip


def test_files_are_linked_where_they_can_be(tmp_path: Path) -> None:
    file = tmp_path / "abc.flac"
    file.write_bytes(b"abc")
    assert place(file, tmp_path / "corpus", "audio") == "audio/ab/abc.flac"
    assert os.path.samefile(file, tmp_path / "corpus" / "audio" / "ab" / "abc.flac")


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a second file system at /dev/shm")
def test_files_are_copied_from_another_disk(tmp_path: Path) -> None:
    import tempfile

    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        if os.stat(other).st_dev == os.stat(tmp_path).st_dev:
            pytest.skip("the temporary folder is on /dev/shm as well")
        file = Path(other) / "abc.flac"
        file.write_bytes(b"abc")
        place(file, tmp_path, "audio")
    assert (tmp_path / "audio" / "ab" / "abc.flac").read_bytes() == b"abc"


def test_no_corpus_and_nothing_left_are_refused(tmp_path: Path, taken: list[Taken]) -> None:
    with pytest.raises(ValueError, match="sonorant prepare"):
        read_corpus(tmp_path)
    write_corpus(tmp_path, taken, [], KINDS)
    with pytest.raises(ValueError, match="'dev'"):
        read_corpus(tmp_path, split="dev")
