"""The step `prepare` as a whole: what a corpus is made of; neither kills nor workers change a byte of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from sonorant.data.corpus import Utterance, read_corpus
from sonorant.steps.prepare import convert, prepare

RUN = """
import json, sys
from sonorant.steps.prepare import prepare

config, corpus, scratch = sys.argv[1:]
prepare(json.loads(config), corpus=corpus, scratch=scratch)
"""


def write_noise(path: Path, seed: int, seconds: float = 0.5, rate: int = 16_000) -> None:
    """A file of noise that no other seed gives."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.random.default_rng(seed).normal(0, 0.1, round(seconds * rate)), rate)


def write_tree(folder: Path, num_speakers: int, num_files: int, **how: Any) -> None:
    """A folder of noise by so many speakers."""
    for seed in range(num_speakers * num_files):
        write_noise(folder / f"speaker-{seed % num_speakers}" / f"{seed:03}.wav", seed, **how)


def folder_source(path: Path, name: str = "noise", **fields: Any) -> dict[str, Any]:
    """The configuration of a folder source."""
    return {"kind": "folder", "name": name, "path": str(path), **fields}


def run(
    tmp_path: Path, *sources: dict[str, Any], name: str = "corpus", **config: Any
) -> tuple[dict[str, float], list[Utterance]]:
    """Prepare in this process; returns metrics and utterances."""
    config = {"sources": sources, "num_workers": 1} | config
    metrics = prepare(config, corpus=tmp_path / name, scratch=tmp_path / f"{name}-scratch")
    return metrics, read_corpus(tmp_path / name)


def refusals(corpus: Path) -> list[tuple[str, str, str]]:
    """Source, path and reason of what a corpus does without."""
    lines = map(json.loads, (corpus / "refused.jsonl").read_text().splitlines())
    return [(line["source"], line["path"], line["reason"]) for line in lines]


def digest(corpus: Path) -> str:
    """The digest of a corpus's files."""
    value: str = json.loads((corpus / "artifact.json").read_text())["digest"]
    return value


# --------------------------------------------------------------------------------------------------- content


def test_real_speech(tmp_path: Path, shared_data: Path) -> None:
    manifest = shared_data / "timit_sample" / "manifest.jsonl"
    source = {"kind": "manifest", "name": "timit", "path": str(manifest)}
    metrics, utterances = run(tmp_path, source)
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert metrics["utterances"] == len(rows) == 120
    assert metrics["hours"] == pytest.approx(sum(row["num_samples"] for row in rows) / 16_000 / 3600, abs=1e-6)
    for utterance, row in zip(utterances, rows, strict=True):
        assert (utterance.id, utterance.split) == (row["id"], row["split"])
        assert utterance.speaker == f"timit/{row['speaker']}"
        original = soundfile.read(manifest.parent / row["path"], dtype="float32")[0]
        np.testing.assert_array_equal(utterance.wave(), original)
        assert utterance.phones is not None
        assert len(utterance.phones) == len(row["phones39"])
    stats = json.loads((tmp_path / "corpus" / "stats.json").read_text())
    assert {name: split["speakers"] for name, split in stats["splits"].items()} == {
        "train": 8,
        "dev": 2,
        "test": 2,
    }


def test_the_built_in_corpus(tmp_path: Path) -> None:
    source = {"kind": "synthetic", "voice": "tones", "num_utterances": 12, "num_speakers": 4}
    metrics, utterances = run(tmp_path, source)
    assert metrics["utterances"] == 12
    assert metrics["refused"] == 0
    assert {u.split for u in utterances} == {"train", "dev", "test"}
    assert all(u.image is not None and u.image.is_file() and u.words and u.phones for u in utterances)
    stats = json.loads((tmp_path / "corpus" / "stats.json").read_text())
    assert stats["sources"]["synthetic"]["voice"] == "tones"
    run(tmp_path, source, name="again", num_workers=2)
    assert digest(tmp_path / "again") == digest(tmp_path / "corpus")


def test_no_speaker_is_in_two_splits(tmp_path: Path) -> None:
    write_tree(tmp_path / "noise", num_speakers=10, num_files=2)
    _, utterances = run(tmp_path, folder_source(tmp_path / "noise", dev_share=0.2, test_share=0.3))
    splits = {(u.speaker, u.split) for u in utterances}
    assert len(splits) == 10
    assert sorted(split for _, split in splits).count("test") == 3
    assert sorted(split for _, split in splits).count("dev") == 2


def test_only_the_wanted_splits_are_kept(tmp_path: Path) -> None:
    write_tree(tmp_path / "noise", num_speakers=10, num_files=1)
    metrics, utterances = run(tmp_path, folder_source(tmp_path / "noise", splits=["dev", "test"]))
    assert metrics["utterances"] == 2
    assert {u.split for u in utterances} == {"dev", "test"}
    with pytest.raises(ValueError, match="found rows of \\['train'\\] only"):
        run(
            tmp_path,
            folder_source(tmp_path / "noise", splits=["dev"], dev_share=0, test_share=0),
            name="none",
        )


def test_sources_do_not_clash(tmp_path: Path) -> None:
    write_noise(tmp_path / "a" / "ann" / "x.wav", 1)
    write_noise(tmp_path / "a" / "ann" / "only-a.wav", 2)
    write_noise(tmp_path / "b" / "ann" / "x.wav", 3)
    _, utterances = run(tmp_path, folder_source(tmp_path / "a", "a"), folder_source(tmp_path / "b", "b"))
    assert [(u.id, u.speaker) for u in utterances] == [
        ("ann/only-a", "a/ann"),
        ("a/ann/x", "a/ann"),
        ("b/ann/x", "b/ann"),
    ]


# --------------------------------------------------------------------------------------------------- refused


def test_bad_rows_are_refused_and_counted(tmp_path: Path) -> None:
    write_tree(tmp_path / "noise", num_speakers=3, num_files=4)
    ann = tmp_path / "noise" / "ann"
    write_noise(ann / "short.wav", 100, seconds=0.2)
    write_noise(ann / "long.wav", 101, seconds=2.5)
    ann.joinpath("corrupt.flac").write_bytes(b"fLaC" + bytes(100))
    soundfile.write(ann / "silent.wav", np.zeros(16_000), 16_000)
    shutil.copy(tmp_path / "noise" / "speaker-0" / "000.wav", ann / "copy.wav")
    metrics, utterances = run(tmp_path, folder_source(tmp_path / "noise"), max_seconds=2, max_refused_share=0.5)
    assert metrics["utterances"] == len(utterances) == 12
    assert metrics["refused"] == 5
    assert metrics["refused_share"] == pytest.approx(5 / 17, abs=1e-6)  # written to the millionth
    # in the order of the rows: of two with the same audio the first one is kept
    assert refusals(tmp_path / "corpus") == [
        ("noise", "ann/corrupt.flac", "unreadable"),
        ("noise", "ann/long.wav", "too long"),
        ("noise", "ann/short.wav", "too short"),
        ("noise", "ann/silent.wav", "silence"),
        ("noise", "speaker-0/000.wav", "duplicate audio"),
    ]
    assert "ann/copy" in {u.id for u in utterances}
    stats = json.loads((tmp_path / "corpus" / "stats.json").read_text())
    assert stats["refused"]["reasons"] == {
        "duplicate audio": 1, "silence": 1, "too long": 1, "too short": 1, "unreadable": 1
    }  # fmt: skip


def test_the_same_audio_in_another_container_is_a_duplicate(tmp_path: Path) -> None:
    write_noise(tmp_path / "a" / "ann" / "x.wav", 1)
    samples, rate = soundfile.read(tmp_path / "a" / "ann" / "x.wav", dtype="int16")
    (tmp_path / "b" / "bob").mkdir(parents=True)
    soundfile.write(tmp_path / "b" / "bob" / "y.flac", np.stack([samples, samples], axis=1), rate)
    sources = folder_source(tmp_path / "a", "a"), folder_source(tmp_path / "b", "b")
    _, utterances = run(tmp_path, *sources, max_refused_share=0.5)
    assert [u.id for u in utterances] == ["ann/x"]
    assert refusals(tmp_path / "corpus") == [("b", "bob/y.flac", "duplicate audio")]


def test_bad_manifest_rows_are_refused(tmp_path: Path) -> None:
    write_noise(tmp_path / "x.wav", 1, seconds=1.0)
    good = {"id": "good", "path": "x.wav", "speaker": "a", "end": 0.5}
    rows = [
        good,
        {**good, "start": 0.5, "end": 1.0},
        {**good, "id": "gone", "path": "y.wav"},
        {**good, "id": "late", "end": 1.5},
        {**good, "id": "words", "start": 0.1, "words": [["hi", 0.3, 0.6]]},
        {**good, "id": "image", "start": 0.05, "image": "no.png"},
        {"id": "no speaker", "path": "x.wav"},
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n{broken\n")
    source = {"kind": "manifest", "name": "m", "path": str(tmp_path / "m.jsonl")}
    _, utterances = run(tmp_path, source, max_refused_share=0.9)
    assert [(u.id, u.num_samples) for u in utterances] == [("good", 8000)]
    assert refusals(tmp_path / "corpus") == [
        ("m", "x.wav", "duplicate id"),
        ("m", "y.wav", "missing file"),
        ("m", "x.wav", "times outside the file"),
        ("m", "x.wav", "times outside the file"),
        ("m", "x.wav", "missing image"),
        ("m", "m.jsonl:7", "broken row"),
        ("m", "m.jsonl:8", "broken row"),
    ]


def write_picture(path: Path, seed: int, side: int = 16) -> None:
    """A square PNG that no other seed gives."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (side, side, 3)).astype(np.uint8)).save(path)


def write_captions(folder: Path, splits: dict[str, str]) -> dict[str, Any]:
    """Spoken captions by two speakers of each of these images, in the files of their splits; returns the source."""
    for number, (image, split) in enumerate(splits.items()):
        write_picture(folder / "images" / image, number)
        for speaker in ("ann", "bob"):
            write_noise(folder / "wavs" / f"{image}-{speaker}.wav", 2 * number + (speaker == "bob"))
        captions = [
            {"uttid": f"{image}-{speaker}", "speaker": speaker, "wav": f"wavs/{image}-{speaker}.wav", "text": "hi"}
            for speaker in ("ann", "bob")
        ]
        path = folder / f"{split}.json"
        content = json.loads(path.read_text()) if path.exists() else {"image_base_path": "images", "data": []}
        content["data"].append({"image": image, "captions": captions})
        path.write_text(json.dumps(content))
    files = [{"name": f"{split}.json", "split": split} for split in dict.fromkeys(splits.values())]
    return {"kind": "spoken_captions", "name": "coco", "path": str(folder), "files": files, "split_by": "image"}


def test_spoken_captions_keep_their_splits_and_images(tmp_path: Path) -> None:
    source = write_captions(tmp_path / "coco", {"a.png": "train", "b.png": "train", "c.png": "test"})
    metrics, utterances = run(tmp_path, source)
    assert (metrics["utterances"], metrics["speakers"], metrics["refused"]) == (6, 2, 0)
    assert [(u.id, u.split) for u in utterances] == [
        ("a.png-ann", "train"),
        ("a.png-bob", "train"),
        ("b.png-ann", "train"),
        ("b.png-bob", "train"),
        ("c.png-ann", "test"),
        ("c.png-bob", "test"),
    ]
    for utterance in utterances:
        assert utterance.picture() == (tmp_path / "coco" / "images" / utterance.id[:5]).read_bytes()
    assert len(list((tmp_path / "corpus" / "images").rglob("*.png"))) == 3
    # A corpus is a source as well, and splits as it was split.
    again = {"kind": "lhotse", "name": "coco", "path": str(tmp_path / "corpus"), "split_by": "image"}
    _, reread = run(tmp_path, again, name="again")
    assert [(u.id, u.split, u.picture()) for u in reread] == [(u.id, u.split, u.picture()) for u in utterances]


def test_an_image_is_in_one_split(tmp_path: Path) -> None:
    splits = {"a.png": "train", "b.png": "train", "c.png": "dev", "d.png": "test", "e.png": "test"}
    source = write_captions(tmp_path / "coco", splits)
    images = tmp_path / "coco" / "images"
    # Under other names, the same bytes.
    (images / "a.png").write_bytes((images / "d.png").read_bytes())
    (images / "c.png").write_bytes((images / "d.png").read_bytes())
    _, utterances = run(tmp_path, source, max_refused_share=0.5)
    assert [u.id for u in utterances] == ["b.png-ann", "b.png-bob", "d.png-ann", "d.png-bob", "e.png-ann", "e.png-bob"]
    assert refusals(tmp_path / "corpus") == [
        ("coco", f"wavs/{name}.wav", "image of another split")
        for name in ("a.png-ann", "a.png-bob", "c.png-ann", "c.png-bob")
    ]
    with pytest.raises(ValueError, match=r"4 of 10 rows refused \(image of another split 4\)"):
        run(tmp_path, source, name="strict")


def test_an_image_is_in_one_split_of_all_shares(tmp_path: Path) -> None:
    splits = {f"{number:02}.png": "test" if number > 20 else "train" for number in range(36)}
    source = write_captions(tmp_path / "coco", splits)
    images = tmp_path / "coco" / "images"
    (images / "00.png").write_bytes((images / "35.png").read_bytes())
    run(tmp_path, source)
    assert [reason for _, _, reason in refusals(tmp_path / "corpus")] == ["image of another split"] * 2
    config = {"sources": [source], "num_workers": 1}
    shares = [tmp_path / f"share-{index}" for index in range(2)]
    for index, share in enumerate(shares):
        scratch = tmp_path / f"scratch-{index}"
        convert({**config, "part": {"index": index, "count": 2}}, share=share, scratch=scratch)
    prepare(config, corpus=tmp_path / "joined", shares=shares, scratch=tmp_path / "joined-scratch")
    assert digest(tmp_path / "joined") == digest(tmp_path / "corpus")


def test_a_row_that_is_left_out_does_not_claim_its_image(tmp_path: Path) -> None:
    source = write_captions(tmp_path / "coco", {"a.png": "train", "b.png": "test", "c.png": "test"})
    images, waves = tmp_path / "coco" / "images", tmp_path / "coco" / "wavs"
    (images / "b.png").write_bytes((images / "a.png").read_bytes())
    for speaker in ("ann", "bob"):
        (waves / f"b.png-{speaker}.wav").write_bytes(b"no audio")
    _, utterances = run(tmp_path, source, max_refused_share=0.5)
    assert [(u.id, u.split) for u in utterances] == [
        ("a.png-ann", "train"),
        ("a.png-bob", "train"),
        ("c.png-ann", "test"),
        ("c.png-bob", "test"),
    ]


def test_images_are_refused_with_reasons(tmp_path: Path) -> None:
    names = ["good.png", "cut.png", "page.png", "large.png", "gone.png"]
    source = write_captions(tmp_path / "coco", dict.fromkeys(names, "train"))
    images = tmp_path / "coco" / "images"
    (images / "cut.png").write_bytes((images / "cut.png").read_bytes()[:300])
    (images / "page.png").write_text("<html>")
    write_picture(images / "large.png", 0, side=17)
    (images / "gone.png").unlink()
    _, utterances = run(tmp_path, source, max_refused_share=0.9, max_pixels=16 * 16)
    assert [u.id for u in utterances] == ["good.png-ann", "good.png-bob"]
    listed = (tmp_path / "corpus" / "refused.jsonl").read_text().splitlines()
    reasons = {(line["reason"], line["detail"].partition(":")[0]) for line in map(json.loads, listed)}
    assert reasons == {
        ("unreadable image", "cut.png"),
        ("unreadable image", "page.png"),
        ("oversized image", "large.png"),
        ("missing image", "no file gone.png"),
    }


def test_real_speech_of_real_images(tmp_path: Path, shared_data: Path) -> None:
    folder = shared_data / "fsdd_digits"
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    some = [row for row in rows if row["take"] < 4]  # of each speaker and digit
    with (tmp_path / "some.jsonl").open("w") as file:
        for row in some:
            row |= {"path": str(folder / row["path"]), "image": str(folder / row["image"])}
            file.write(json.dumps(row) + "\n")
    source = {"kind": "manifest", "name": "fsdd", "path": str(tmp_path / "some.jsonl")}
    _, utterances = run(tmp_path, source, min_seconds=0.1, num_workers=2)
    assert len(utterances) == len(some) == 240
    assert {u.split for u in utterances} == {"train", "dev", "test"}
    for utterance, row in zip(utterances, some, strict=True):
        assert (utterance.id, utterance.split, utterance.text) == (row["id"], row["split"], row["text"])
        assert utterance.picture() == Path(row["image"]).read_bytes()
    files = {u.image: {v.split for v in utterances if v.image == u.image} for u in utterances}
    assert len(files) == len({row["image"] for row in some}) < len(some)
    assert all(len(splits) == 1 for splits in files.values())


def test_too_many_refused_rows_fail_the_step(tmp_path: Path) -> None:
    write_tree(tmp_path / "noise", num_speakers=3, num_files=1)
    (tmp_path / "noise" / "bad.wav").write_bytes(b"no audio")
    with pytest.raises(ValueError) as error:
        run(tmp_path, folder_source(tmp_path / "noise"))
    message = str(error.value)
    assert "1 of 4 rows refused (unreadable 1)" in message
    assert "\n" not in message
    listed = tmp_path / "corpus-scratch" / "refused.jsonl"
    assert str(listed) in message
    assert json.loads(listed.read_text())["path"] == "bad.wav"
    assert not (tmp_path / "corpus").exists()
    # mended, the same command goes through
    write_noise(tmp_path / "noise" / "bad.wav", 99)
    assert run(tmp_path, folder_source(tmp_path / "noise"))[0]["utterances"] == 4


def test_an_empty_corpus_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "noise").mkdir()
    with pytest.raises(ValueError, match="found no utterance"):
        run(tmp_path, folder_source(tmp_path / "noise"))
    (tmp_path / "noise" / "bad.wav").write_bytes(b"no audio")
    with pytest.raises(ValueError, match="found an empty corpus, all 1 rows refused"):
        run(tmp_path, folder_source(tmp_path / "noise"), max_refused_share=1)
    assert not (tmp_path / "corpus").exists()


def test_a_speaker_in_two_given_splits_is_an_error(tmp_path: Path) -> None:
    rows = [{"id": s, "path": "x.wav", "speaker": "ann", "split": s} for s in ("train", "test")]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match="speaker 'ann' in train and in test"):
        run(tmp_path, {"kind": "manifest", "name": "m", "path": str(tmp_path / "m.jsonl")})


# ------------------------------------------------------------------------------------------ workers and kills


def start(config: dict[str, Any], corpus: Path, scratch: Path) -> subprocess.Popen[str]:
    """Prepare in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", RUN, json.dumps(config), str(corpus), str(scratch)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stderr=subprocess.PIPE,
        text=True,
    )


def children(process: int) -> list[int]:
    """Processes that a process has started."""
    path = Path(f"/proc/{process}/task/{process}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


def is_running(process: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in /proc")
def test_workers_and_kills_change_nothing(tmp_path: Path) -> None:
    # 44.1 kHz, so that resampling takes its time and is compared as well
    write_tree(tmp_path / "noise", num_speakers=5, num_files=20, seconds=1.0, rate=44_100)
    config = {"sources": [folder_source(tmp_path / "noise")], "num_workers": 2}
    process = start(config, tmp_path / "killed", tmp_path / "scratch")
    shards = tmp_path / "scratch" / "shards"
    workers: list[int] = []
    while not (finished := [p for p in shards.glob("*") if not p.name.startswith(".")]):
        assert process.poll() is None, process.stderr and process.stderr.read()
        workers = children(process.pid) or workers
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert not (tmp_path / "killed").exists()
    assert len(finished) < 4, "all rows were done before the kill: make more of them"
    deadline = time.monotonic() + 20
    while any(map(is_running, workers)):
        assert time.monotonic() < deadline, f"workers {workers} outlive the process that started them"
        time.sleep(0.05)
    done = {path: path.stat().st_mtime_ns for path in finished}
    again = start(config, tmp_path / "killed", tmp_path / "scratch")
    _, errors = again.communicate()
    assert again.returncode == 0, errors
    assert {path: path.stat().st_mtime_ns for path in finished} == done
    assert not list(shards.glob(".*"))
    run(tmp_path, *config["sources"], name="undisturbed")
    assert digest(tmp_path / "undisturbed") == digest(tmp_path / "killed")


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    write_tree(tmp_path / "noise", num_speakers=3, num_files=1)
    run(tmp_path, folder_source(tmp_path / "noise"))
    write_noise(tmp_path / "noise" / "speaker-0" / "000.wav", 77, seconds=0.75)
    _, utterances = run(tmp_path, folder_source(tmp_path / "noise"))
    assert [u.seconds for u in utterances] == [0.75, 0.5, 0.5]


FULL_DISK = """
mount -t tmpfs -o size=300k tmpfs "$1" || exit 77
"$2" -c '
import errno, json, pathlib, sys
from sonorant.steps.prepare import prepare

config, full, corpus, scratch = sys.argv[1:]
try:
    prepare(json.loads(config), corpus=corpus, scratch=scratch)
except OSError as error:
    assert error.errno == errno.ENOSPC, error
    assert not pathlib.Path(corpus).exists()
    sys.exit(28)
' "$3" "$1" "$4" "$5"
"""


@pytest.mark.parametrize(("output", "kept"), [("full", "scratch"), (".", "full")])
@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, output: str, kept: str, num_workers: int) -> None:
    write_tree(tmp_path / "noise", num_speakers=4, num_files=10)
    (tmp_path / "full").mkdir()
    config = json.dumps({"sources": [folder_source(tmp_path / "noise")], "num_workers": num_workers})
    paths = [str(tmp_path / output / "corpus"), str(tmp_path / kept / "scratch")]
    arguments = [str(tmp_path / "full"), sys.executable, config, *paths]
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", FULL_DISK, "sh", *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"this user may not mount a file system: {done.stderr.strip()}")
    assert done.returncode == 28, done.stderr
    assert not (tmp_path / "corpus").exists()
