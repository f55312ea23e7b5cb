"""A corpus in the store: read there it is the same corpus, through everything that is made of it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from lhotse import CutSet

from sonorant.artifacts import ELSEWHERE, digest_folder, read_record
from sonorant.data.corpus import read_corpus, read_waves
from sonorant.data.shards import shard_corpus, unshard_corpus
from sonorant.steps import cluster, evaluate, prepare, pretrain, publish
from sonorant.store import Store
from sonorant.store.connection import open_client, read_settings
from tests.cluster.rgw import Rgw, answers
from tests.running import begun, command
from tests.tiny import pretrain_values

SOURCE = {"kind": "synthetic", "voice": "tones", "num_utterances": 40, "num_speakers": 8, "dev_share": 0.2}
SHARD_BYTES = 400_000
UPDATES = 80
"""More than are made ready before the store is taken away."""


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus with images, and its units, on this machine."""
    folder = tmp_path_factory.mktemp("local")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SONORANT_RUNS", str(folder / "runs"))
        prepare({"sources": [{**SOURCE, "test_share": 0.3}], "num_workers": 1}, corpus=folder / "corpus")
        cluster({"num_units": 12}, corpus=folder / "corpus", units=folder / "units")
    return folder


@pytest.fixture
def light(local: Path, bucket: str, tmp_path: Path) -> Path:
    """The same corpus, its audio and images in the test's bucket."""
    assert bucket
    shard(local / "corpus", tmp_path / "light")
    return tmp_path / "light"


@pytest.fixture(autouse=True)
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where checkpoints go."""
    monkeypatch.setenv("SONORANT_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


def shard(corpus: Path, light: Path, url: str | None = None) -> str:
    return shard_corpus(corpus, light, url, SHARD_BYTES, lambda *_: None)


def download(url: str, folder: Path) -> dict[str, bytes]:
    """All objects below an address, by name, and in a folder."""
    settings = read_settings(url)
    client = open_client(settings)
    for found in client.list_objects(settings.bucket, settings.prefix, recursive=True):
        name = str(found.object_name)
        client.fget_object(settings.bucket, name, str(folder / name.removeprefix(settings.prefix)))
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------------ what is written


def test_the_shards_are_lhotses_and_hold_the_very_files(local: Path, bucket: str, tmp_path: Path) -> None:
    url = shard(local / "corpus", tmp_path / "light", f"s3://{bucket}/first")
    objects = download(url, tmp_path / "shards")
    utterances = read_corpus(local / "corpus")
    cuts = list(CutSet.from_shar(in_dir=tmp_path / "shards"))
    assert [cut.id for cut in cuts] == [utterance.id for utterance in utterances]
    for cut, utterance in zip(cuts, utterances, strict=True):
        np.testing.assert_array_equal(cut.load_audio()[0], utterance.wave())
        assert cut.supervisions[0].speaker == utterance.speaker
        assert cut.custom["split"] == utterance.split

    tars = sorted((tmp_path / "shards").glob("*.tar"))
    assert {path.name.split(".")[0] for path in tars} == {"recording", "image"}
    assert len(tars) > 4
    held = {}
    for path in tars:
        with tarfile.open(path) as tar:
            held |= {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}  # type: ignore[union-attr]
    for utterance in utterances:
        assert held[f"{utterance.id}.flac"] == utterance.path.read_bytes()
        assert utterance.image is not None
        assert held[f"{utterance.id}{utterance.image.suffix}"] == utterance.image.read_bytes()
    numbers = sorted({path.name.split(".")[1] for path in tars})
    for number in numbers:
        with tarfile.open(tmp_path / "shards" / f"recording.{number}.tar") as tar:
            assert sum(member.size for member in tar if member.name.endswith(".flac")) <= SHARD_BYTES

    again = shard(local / "corpus", tmp_path / "again", f"s3://{bucket}/second")
    assert download(again, tmp_path / "shards-again") == objects


def test_it_is_the_same_corpus(local: Path, light: Path, rgw: Rgw, tmp_path: Path) -> None:
    corpus = local / "corpus"
    assert not (light / "audio").exists()
    assert not (light / "images").exists()
    assert (light / "artifact.json").read_bytes() == (corpus / "artifact.json").read_bytes()
    assert digest_folder(light) == digest_folder(corpus) == read_record(light, "corpus")["digest"]
    here, there = read_corpus(corpus), read_corpus(light)
    assert [(u.id, u.speaker, u.phones) for u in here] == [(u.id, u.speaker, u.phones) for u in there]
    for utterance, wave in zip(there, read_waves(there), strict=True):
        own = here.pop(0)
        np.testing.assert_array_equal(wave, own.wave())
        assert utterance.picture() == own.picture()
    # So it goes to another machine, which has the same key; and all of it comes back.
    store = Store.from_environment()
    store.fetch(f"corpus@sha256:{store.push(light)}", tmp_path / "fetched")
    assert contents(tmp_path / "fetched") == contents(light)
    unshard_corpus(tmp_path / "fetched", tmp_path / "whole", lambda *_: None)
    assert contents(tmp_path / "whole") == contents(corpus)
    for name, content in contents(light).items():
        for secret in (rgw.secret_key, rgw.access_key):
            assert secret.encode() not in content, name


def test_a_killed_upload_goes_on_where_it_was(local: Path, bucket: str, tmp_path: Path) -> None:
    light = tmp_path / "light"
    words = ["store", "shard", str(local / "corpus"), str(light), "--megabytes", "0.05"]
    process = subprocess.Popen([sys.executable, "-m", "sonorant", *words], stderr=subprocess.PIPE, text=True)
    settings = read_settings()
    client = open_client(settings)

    def sent() -> dict[str, object]:
        found = client.list_objects(bucket, "corpora/", recursive=True)
        return {str(one.object_name): one.last_modified for one in found}

    deadline = time.monotonic() + 60
    while len(sent()) < 4:
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not light.exists()
    before = sent()
    done = subprocess.run([sys.executable, "-m", "sonorant", *words], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    after = sent()
    assert len(before) < len(after)
    assert {name: after[name] for name in before} == before
    waves = list(read_waves(read_corpus(light)))
    assert len(waves) == len(read_corpus(local / "corpus"))


# --------------------------------------------------------------------------------------------- what is made of it


def test_what_is_made_of_it_is_the_same_to_the_last_byte(local: Path, light: Path, tmp_path: Path, rgw: Rgw) -> None:
    folders = {}
    perturbed = pretrain_values(num_updates=2, perturbation={"noise_share": 1.0, "max_snr_db": 20.0, "max_warp": 0.1})
    for name, corpus in (("here", local / "corpus"), ("there", light)):
        made = {a: tmp_path / name / a for a in ("units", "encoder", "model", "report")}
        cluster({"num_units": 12}, corpus=corpus, units=made["units"])
        pretrain(perturbed, corpus=corpus, units=made["units"], encoder=made["encoder"])
        publish({"num_units": 12, "licence": "cc0-1.0"}, corpus=corpus, encoder=made["encoder"], model=made["model"])
        evaluate({"split": "test", "num_examples": 1}, corpus=corpus, model=made["model"], report=made["report"])
        folders[name] = contents(tmp_path / name)
    assert folders["here"] == folders["there"]
    assert len(folders["here"]) > 12
    for name, content in folders["there"].items():
        assert rgw.secret_key.encode() not in content, name


@pytest.fixture
def away(rgw: Rgw) -> Iterator[Rgw]:
    """The gateway, to be taken away; it is back for the next test."""
    yield rgw
    if not answers(rgw.endpoint):
        rgw.start()


def take_away(rgw: Rgw, process: subprocess.Popen[str]) -> None:
    """Stop the gateway at one instant of the process's life."""
    process.send_signal(signal.SIGSTOP)
    rgw.stop()
    process.send_signal(signal.SIGCONT)


def test_a_store_that_goes_away_and_comes_back(
    local: Path, light: Path, tmp_path: Path, runs: Path, rgw: Rgw, away: Rgw, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = pretrain_values(num_updates=UPDATES)
    here = {"corpus": local / "corpus", "units": local / "units"}
    pretrain(values, **here, encoder=tmp_path / "wanted")
    there = tmp_path / "there"
    there.mkdir()
    words = command(there, values, {**here, "corpus": light})

    # It does not come back: one line.
    monkeypatch.setenv("SONORANT_STORE_RETRIES", "1")
    with begun(words, runs, 2) as process:
        take_away(away, process)
        _, errors = process.communicate(timeout=100)
    assert process.returncode == 1, errors
    *before, last = errors.splitlines()
    assert last.startswith("pretrain: read recording.")
    assert "wanted a store that answers" in last
    assert "Traceback" not in errors
    assert rgw.secret_key not in errors
    reached = int([line for line in before if line.startswith("pretrain: ")][-1].split()[1].split("/")[0])
    assert 2 <= reached < UPDATES
    assert not (there / "encoder").exists()

    # It is away for a while: the run waits and goes on, from the checkpoint that the last one left.
    away.start()
    monkeypatch.setenv("SONORANT_STORE_RETRIES", "20")
    process = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert process.stderr is not None
    lines = iter(process.stderr.readline, "")
    try:
        seen = [next(line for line in lines if line.startswith("pretrain: resuming at update"))]
        seen.append(next(line for line in lines if line.startswith("pretrain: ")))
        take_away(away, process)
        seen.append(next(line for line in lines if "trying again" in line))
        away.start()
        seen += lines
        assert process.wait(timeout=100) == 0, "".join(seen)
    finally:
        process.kill()
        process.communicate()
    assert contents(there / "encoder") == contents(tmp_path / "wanted")


# ------------------------------------------------------------------------------------------------- what is refused


def test_another_content_in_the_store_is_refused(local: Path, light: Path, bucket: str) -> None:
    utterances = read_corpus(light)
    listed = json.loads((light / ELSEWHERE).read_text())
    digest, name, first, size = listed["files"][utterances[0].path.relative_to(light).as_posix()]
    client, key = open_client(read_settings()), f"{listed['url'].removeprefix(f's3://{bucket}/')}/{name}"
    content = bytearray(client.get_object(bucket, key).read())
    content[first + size // 2] ^= 1
    damaged = light.with_name("damaged.tar")
    damaged.write_bytes(content)
    client.fput_object(bucket, key, str(damaged))
    with pytest.raises(ValueError, match=f"{key}: found no or other bytes than were written from {first} on") as caught:
        utterances[0].wave()
    assert "\n" not in str(caught.value)
    assert utterances[1].wave().size
    # Removed and written again, it is whole again.
    client.remove_object(bucket, key)
    with pytest.raises(ValueError, match=f"{key}: found no or other bytes"):
        utterances[0].wave()
    shard(local / "corpus", light)
    assert utterances[0].wave().size
    elsewhere = (light / ELSEWHERE).read_text()
    (light / ELSEWHERE).write_text(elsewhere.replace(digest, "0" * 64))
    with pytest.raises(ValueError, match=r"found files and elsewhere\.json of digest"):
        read_corpus(light)
    (light / ELSEWHERE).write_text(elsewhere[:100])
    with pytest.raises(ValueError, match="found no list of files"):
        read_corpus(light)


def test_what_is_no_whole_corpus_is_not_sharded(local: Path, light: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="wanted it here"):
        shard(light, tmp_path / "lighter")
    config = {"sources": [{"kind": "lhotse", "name": "corpus-light", "path": str(light)}], "num_workers": 1}
    with pytest.raises(ValueError, match=r"corpus-light: found a corpus .* whose audio lies in a store"):
        prepare(config, corpus=tmp_path / "corpus")
    changed = tmp_path / "changed"
    shutil.copytree(local / "corpus", changed)
    next(changed.glob("audio/*/*.flac")).write_bytes(b"fLaC")
    with pytest.raises(ValueError, match="found files of digest"):
        shard(changed, tmp_path / "lighter")
    (changed / "artifact.json").unlink()
    with pytest.raises(ValueError, match=r"without artifact\.json"):
        shard(changed, tmp_path / "lighter")
    (tmp_path / ".back.partial" / "audio").mkdir(parents=True)
    (tmp_path / ".back.partial" / "audio" / "stray.flac").write_bytes(b"of another run")
    with pytest.raises(ValueError, match="found remains of another corpus"):
        unshard_corpus(light, tmp_path / "back", lambda *_: None)
    unshard_corpus(light, tmp_path / "back", lambda *_: None)
    assert not (tmp_path / "lighter").exists()
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".lighter")]


def test_a_wrong_secret_is_one_line(light: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    utterances = read_corpus(light)
    # Ceph's word for a key's wrong secret depends on the request.
    refusal = r"^read recording\.\d+\.tar: .* found (SignatureDoesNotMatch|AccessDenied)"
    with pytest.raises(ValueError, match=refusal) as caught:
        utterances[0].wave()
    assert "\n" not in str(caught.value)
