"""A corpus in the object store: its audio and images in lhotse's Shar shards, all else of it here.

    s3://place/prefix/corpora/<digest>/
      cuts.000000.jsonl.gz
      recording.000000.tar   the very FLAC files; CutSet.from_shar reads them
      image.000000.tar       the images, where there are any; lhotse passes over them
    corpus/
      elsewhere.json         where the shards are, and of each file its SHA-256, shard, first byte and number of bytes
      …                      the corpus's other files

Both together are the corpus: its record and digest are those of the folder that was written to the store, and so is
whatever is made of it. A file is read by its range and held to its SHA-256, so any utterance can be the next one.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from sonorant.artifacts import (
    ELSEWHERE,
    RECORD,
    check_replaceable,
    digest_folder,
    files_elsewhere,
    put_in_place,
    read_record,
    staging_place,
)
from sonorant.data.corpus import CUTS, to_line
from sonorant.data.progress import Report
from sonorant.store.connection import CONNECTIONS, explained, read_settings
from sonorant.store.objects import Objects, digest_file

SHARD_BYTES = 256 * 2**20
READS = 3  # of one range whose bytes are not what was written
Cut = dict[str, Any]
"""A lhotse cut as cuts.jsonl.gz has it."""


def shard_corpus(corpus: Path, light: Path, url: str | None, shard_bytes: int, report: Report) -> str:
    """Write a corpus's audio and images into the store, the rest of it to the folder `light`; returns where they lie.

    No shard holds more than `shard_bytes` of files unless it is one file. The same corpus makes the same bytes under
    the same names, so what a killed run has brought into the store is not sent again. `report` is told the bytes of
    files that are done.
    Raises ValueError where the corpus is not what its record says, or the store refuses.
    """
    record = read_record(corpus, "corpus")
    check_replaceable(light, "corpus", [corpus])
    if (corpus / ELSEWHERE).is_file():
        raise ValueError(
            f"corpus {corpus}: found one whose audio lies in a store, wanted it here: run `sonorant store unshard`"
        )
    if (found := digest_folder(corpus)) != record["digest"]:
        raise ValueError(
            f"corpus {corpus}: found files of digest {found}, wanted {record['digest']} as its record says: "
            "prepare it again"
        )
    place = f"corpora/{record['digest']}/{shard_bytes}/"
    objects = Objects(read_settings(url))
    staged = staging_place(light)
    shutil.rmtree(staged, ignore_errors=True)
    work = staged / "shards"
    try:
        work.mkdir(parents=True)
        total = sum(path.stat().st_size for kind in ("audio", "images") for path in (corpus / kind).rglob("*.*"))
        files: dict[str, list[Any]] = {}
        done = 0
        for number, cuts in enumerate(split_cuts(corpus, shard_bytes)):
            files |= write_shard(corpus, cuts, work, number)
            with explained(objects.settings, "shard corpus"):
                for path in sorted(work.iterdir()):
                    if objects.size(place + path.name) != path.stat().st_size:
                        objects.upload(place + path.name, path, digest_file(path), lambda _: None)
                    path.unlink()
            done += sum(size for cut in cuts for _, size in files_of(corpus, cut))
            report(min(done, total), total)
        work.rmdir()
        for name in (path.name for path in corpus.iterdir() if path.is_file()):
            shutil.copyfile(corpus / name, staged / name)
        write_elsewhere(staged, objects.url(place).rstrip("/"), files)
        assert digest_folder(staged) == record["digest"]
        put_in_place(staged, light)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return objects.url(place).rstrip("/")


def unshard_corpus(light: Path, corpus: Path, report: Report) -> str:
    """Bring a corpus's audio and images back from the store, and return its digest: `corpus` is what was sharded.

    What a killed run has brought is not read again. `report` is told the number of files done.
    """
    elsewhere = Elsewhere(light)
    check_replaceable(corpus, "corpus", [light])
    staged = staging_place(corpus)

    def bring(name: str) -> None:
        path = staged / name
        if not path.is_file():
            partial = path.with_name(f"{path.name}.partial")
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(elsewhere.read(light / name))
            partial.rename(path)

    names = sorted(files_elsewhere(light))
    for done, _ in enumerate(elsewhere.readers.map(bring, names), 1):
        report(done, len(names))
    for path in light.iterdir():
        if path.is_file() and path.name != ELSEWHERE:
            shutil.copyfile(path, staged / path.name)
    digest = str(read_record(light, "corpus")["digest"])
    if (found := digest_folder(staged)) != digest:
        shutil.rmtree(staged)
        raise ValueError(
            f"corpus {corpus}: found remains of another corpus, of digest {found} together, wanted {digest}: they are "
            "removed; run the same command again"
        )
    put_in_place(staged, corpus)
    return digest


def split_cuts(corpus: Path, shard_bytes: int) -> Iterator[list[Cut]]:
    """The cuts of each shard, in the corpus's order."""
    shard: list[Cut] = []
    total = 0
    with gzip.open(corpus / CUTS, "rt", encoding="utf-8") as lines:
        for cut in map(json.loads, lines):
            check_name(cut["id"])
            size = sum(size for _, size in files_of(corpus, cut))
            if shard and total + size > shard_bytes:
                yield shard
                shard, total = [], 0
            shard.append(cut)
            total += size
    if shard:
        yield shard


def files_of(corpus: Path, cut: Cut) -> list[tuple[str, int]]:
    """The cut's audio and its image if it has one: path in the corpus, and bytes."""
    image = cut["custom"].get("image")
    paths = [cut["recording"]["sources"][0]["source"], *([image] if image else [])]
    return [(path, (corpus / path).stat().st_size) for path in paths]


def check_name(name: str) -> None:
    """ValueError where lhotse would not find an utterance of that id in a tar again."""
    path = PurePosixPath(f"{name}.flac")
    if path.is_absolute() or ".." in path.parts or str(path.parent / path.stem) != name:
        raise ValueError(
            f"utterance {name!r}: found an id that is no path for a file in a shard, wanted one without //, . "
            "and .. in it: rename it at its source and prepare again"
        )


def write_shard(corpus: Path, cuts: list[Cut], folder: Path, number: int) -> dict[str, list[Any]]:
    """Write one shard's files, and return what is listed of each file that they hold."""
    files: dict[str, list[Any]] = {}
    lines = []
    with Tar(folder / f"recording.{number:06d}.tar", "w") as audio:
        for cut in cuts:
            recording = cut["recording"]
            [source] = recording["sources"]
            files[source["source"]] = audio.put(f"{cut['id']}.flac", (corpus / source["source"]).read_bytes())
            # As lhotse's own writer leaves it: the tar has the audio.
            inside = {**recording, "sources": [{"type": "shar", "channels": source["channels"], "source": ""}]}
            audio.put(f"{cut['id']}.json", to_line(inside).encode())
            lines.append(to_line({**cut, "recording": inside}))
    (folder / f"cuts.{number:06d}.jsonl.gz").write_bytes(gzip.compress("".join(lines).encode(), mtime=0))
    if (corpus / "images").is_dir():
        with Tar(folder / f"image.{number:06d}.tar", "w") as images:
            for cut in cuts:
                if path := cut["custom"].get("image"):
                    files[path] = images.put(cut["id"] + PurePosixPath(path).suffix, (corpus / path).read_bytes())
                else:
                    images.put(f"{cut['id']}.nodata", b"")
                # Shar's word for a field that lhotse need not understand.
                images.put(f"{cut['id']}.nometa", b"")
    return files


class Tar(tarfile.TarFile):
    """A tar file that is the same bytes for the same files: no times, no owners."""

    def put(self, name: str, content: bytes) -> list[Any]:
        """Append a file; returns its SHA-256, the tar's name, and the content's first byte and size in it."""
        info = tarfile.TarInfo(name)
        info.size = len(content)
        first = self.offset + len(info.tobuf(tarfile.PAX_FORMAT))
        self.addfile(info, io.BytesIO(content))
        return [hashlib.sha256(content).hexdigest(), Path(str(self.name)).name, first, len(content)]


def write_elsewhere(folder: Path, url: str, files: dict[str, list[Any]]) -> None:
    """Write where files lie, one a line."""
    lines = ",\n".join(f"  {json.dumps(path)}: {json.dumps(files[path])}" for path in sorted(files))
    (folder / ELSEWHERE).write_text(f'{{\n "url": {json.dumps(url)},\n "files": {{\n{lines}\n }}\n}}\n')


class Elsewhere:
    """The files of an artifact that lie in the store; `readers` are threads to read some of them at once.

    Raises ValueError where what is listed of them is not what the artifact's record was written of.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._files = folder, files_elsewhere(folder)
        if (found := digest_folder(folder)) != (wanted := read_record(folder, "corpus")["digest"]):
            raise ValueError(
                f"corpus {folder}: found files and {ELSEWHERE} of digest {found}, wanted {wanted} as {RECORD} says: "
                "fetch it again"
            )
        self._objects = Objects(read_settings(json.loads((folder / ELSEWHERE).read_text())["url"]))
        self._lost = ""
        self.readers = ThreadPoolExecutor(CONNECTIONS)

    def read(self, path: Path) -> bytes:
        """The content of a file, by its path in the folder.

        Raises ValueError where it is not to be had, or not what was written. Once a read has waited in vain for the
        store, no other waits for it.
        """
        digest, shard, first, size = self._files[path.relative_to(self._folder).as_posix()]
        try:
            with explained(self._objects.settings, f"read {shard}"):
                if self._lost:
                    raise ValueError(self._lost)
                contents = (self._objects.get(shard, first, size) for _ in range(READS))
                whole = next((c for c in contents if c and hashlib.sha256(c).hexdigest() == digest), None)
        except ValueError as error:
            self._lost = str(error)
            raise
        if whole is None:
            raise ValueError(
                f"{self._objects.url(shard)}: found no or other bytes than were written from {first} on, wanted "
                f"{path.name}: remove it from the store and shard the corpus again"
            )
        return whole
