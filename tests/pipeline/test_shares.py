"""A corpus prepared in parts, as many machines do it, is the corpus that one machine makes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from sonorant.artifacts import read_record
from sonorant.steps import convert, prepare


@pytest.fixture(scope="module")
def section(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Speech of three sources, more than one block each of two, with all that may be wrong with rows."""
    folder = tmp_path_factory.mktemp("speech")
    for number in range(40):
        path = folder / "noise" / f"speaker-{number % 5}" / f"{number:02}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        # 36 to 39 hold the samples of 0 to 3: duplicates that lie in another block.
        wave = np.random.default_rng(number % 36).normal(0, 0.1, 8000)
        soundfile.write(path, wave, 16_000)
    (folder / "noise" / "speaker-0" / "broken.wav").write_bytes(b"RIFF, or not")
    for number in range(3):
        soundfile.write(folder / f"{number}.wav", np.random.default_rng(100 + number).normal(0, 0.1, 8000), 16_000)
    rows = [{"id": f"m{number % 2}", "path": f"{number}.wav", "speaker": "s"} for number in range(3)]
    rows[0] |= {"text": "a b", "words": [["a", 0.0, 0.2], ["b", 0.2, 0.5]], "phones": [["x", 0.0, 0.5]]}
    lines = [*map(json.dumps, rows), "{", json.dumps({"id": "m9", "path": "absent.wav", "speaker": "s"})]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return {
        "sources": [
            {"kind": "synthetic", "voice": "tones", "num_utterances": 70, "num_speakers": 5},
            {"kind": "folder", "name": "noise", "path": str(folder / "noise"), "splits": ["train", "test"]},
            {"kind": "manifest", "name": "rows", "path": str(folder / "rows.jsonl")},
        ],
        "max_refused_share": 0.5,
        "num_workers": 1,
    }


@pytest.fixture(scope="module")
def whole(section: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The record of the corpus that one machine makes."""
    folder = tmp_path_factory.mktemp("whole")
    prepare(section, corpus=folder / "corpus", scratch=folder / "scratch")
    return read_record(folder / "corpus", "corpus")


def convert_all(section: dict[str, Any], folder: Path, count: int) -> list[Path]:
    """All shares, each made as if by another machine: with a scratch folder of its own."""
    shares = [folder / f"share-{index}" for index in range(count)]
    for index, share in enumerate(shares):
        part = {"index": index, "count": count}
        convert({**section, "part": part}, share=share, scratch=folder / f"scratch-{index}")
        shutil.rmtree(folder / f"scratch-{index}")
    return shares


@pytest.mark.parametrize("count", [1, 2, 5])
def test_any_number_of_parts_makes_the_same_bytes(
    section: dict[str, Any], whole: dict[str, Any], tmp_path: Path, count: int
) -> None:
    shares = convert_all(section, tmp_path, count)
    # In any order: Kubeflow promises none.
    metrics = prepare(section, corpus=tmp_path / "corpus", shares=shares[::-1], scratch=tmp_path / "scratch")
    record = read_record(tmp_path / "corpus", "corpus")
    assert record["digest"] == whole["digest"]
    assert metrics == whole["metrics"]
    assert metrics["refused"] > 4
    # It says what it was made of.
    assert record["inputs"] == {"shares": [read_record(share, "share")["digest"] for share in shares[::-1]]}
    assert {about["step"] for about in record["lineage"].values()} == {"convert"}


def test_a_part_makes_its_own_rows_only(section: dict[str, Any], tmp_path: Path) -> None:
    """Of 70 + 40 + 5 rows in blocks of 32: each row is in one share, and its audio too."""
    shares = convert_all(section, tmp_path, 3)
    places = [
        {(line["source"], line["place"]) for line in map(json.loads, (share / "entries.jsonl").open())}
        for share in shares
    ]
    assert {("synthetic", place) for place in range(32, 64)} <= places[1]
    assert [sum(source == "synthetic" for source, _ in found) for found in places] == [32, 32, 6]
    assert sum(map(len, places)) == len(set.union(*places))
    audio = [sum(1 for _ in share.glob("audio/*/*.flac")) for share in shares]
    assert all(num <= len(found) for num, found in zip(audio, places, strict=True))


def test_a_share_holds_no_folder_of_the_machine(section: dict[str, Any], tmp_path: Path) -> None:
    (share,) = convert_all(section, tmp_path, 1)
    assert str(tmp_path.parent) not in (share / "entries.jsonl").read_text()


@pytest.mark.parametrize(
    ("choose", "changes", "wanted"),
    [
        (lambda shares: shares[:1], {}, r"shares: found the parts 0 of 2, wanted each of one count once: convert"),
        (lambda shares: [*shares, shares[1]], {}, r"shares: found the parts 0 of 2, 1 of 2, 1 of 2, wanted each"),
        (lambda shares: shares, {"min_seconds": 0.3}, r"share .*share-0: found min_seconds of another section"),
        (lambda shares: shares, {"seed": 4}, r"share .*share-0: found seed of another section"),
    ],
)
def test_what_does_not_make_a_whole_is_refused(
    section: dict[str, Any], tmp_path: Path, choose: Any, changes: dict[str, Any], wanted: str
) -> None:
    shares = convert_all(section, tmp_path, 2)
    with pytest.raises(ValueError, match=wanted) as caught:
        prepare({**section, **changes}, corpus=tmp_path / "corpus", shares=choose(shares), scratch=tmp_path / "s")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "corpus").exists()


@pytest.mark.parametrize(
    ("part", "wanted"),
    [
        ({"index": 2, "count": 2}, "index 2 must be below count 2"),
        ({"index": -1, "count": 2}, "found -1"),
        (None, "found"),
        ({"index": 0.5, "count": 2}, "found 0.5"),
    ],
)
def test_a_part_that_is_none_is_refused(section: dict[str, Any], tmp_path: Path, part: Any, wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        convert({**section, "part": part}, share=tmp_path / "share")
