"""Artifacts in an object store: published whole under their digest, found again by digest or alias.

    artifacts/NAME/<digest>.json   its files' names, sizes and SHA-256: written last, so what has one is whole
    files/<sha256>                 the files, each once however many artifacts have it
    aliases/NAME/ALIAS/…           see journal.py

A reference is NAME@ALIAS, NAME@sha256:DIGEST, or a digest alone; of a digest eight characters do if no other has them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Self

from sonorant.artifacts import RECORD, check_replaceable, digest_folder, put_in_place, read_record
from sonorant.store.connection import Settings, explained, read_settings
from sonorant.store.journal import Journal, Move
from sonorant.store.objects import Objects, digest_file

NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}")
DIGEST = re.compile(r"[0-9a-f]{8,64}")
REFERENCE = "wanted NAME@ALIAS, NAME@sha256:DIGEST or a digest of at least 8 characters"
MOST_MOVES = 1000
Report = Callable[[int, int], None]
"""Called with how many bytes are done and how many there are."""


@dataclass(frozen=True)
class Artifact:
    """An artifact in the store: its name, its digest, and the aliases that stand for it now."""

    name: str
    digest: str
    aliases: tuple[str, ...]


@dataclass(frozen=True)
class File:
    """A file of an artifact: its SHA-256 and number of bytes."""

    digest: str
    size: int


def unheard(_: int, __: int) -> None:
    """A report to nobody."""


class Store:
    """The store of artifacts; every failure of the store or the network is a ValueError on one line."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._objects = Objects(settings)

    @classmethod
    def from_environment(cls, url: str | None = None) -> Self:
        """The store at s3://BUCKET[/PREFIX], else at $SONORANT_STORE, reached by the AWS_* variables."""
        return cls(read_settings(url))

    def push(self, folder: Path, alias: str | None = None, report: Report = unheard) -> str:
        """Publish the artifact in `folder` under its digest, which is returned, then move the alias to it.

        Whenever it is ended nothing half-done can be found, and the same push goes on with what is there already.
        """
        folder = Path(folder)
        record = read_record(folder, "artifact")
        name, digest = check_name("artifact", str(record.get("artifact", ""))), str(record.get("digest"))
        if alias is not None:
            check_name("alias", alias)
        if (found := digest_folder(folder)) != digest:
            raise ValueError(
                f"{name} {folder}: found files of digest {found}, wanted {digest} as its record says: make it again"
            )
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        files = {path: File(digest_file(path), path.stat().st_size) for path in paths}
        listing = {p.relative_to(folder).as_posix(): {"sha256": f.digest, "bytes": f.size} for p, f in files.items()}
        content = json.dumps({"files": listing}, indent=1, sort_keys=True).encode()
        with explained(self.settings, f"push {name}"):
            count = counting(report, sum(file.size for file in files.values()))
            for path, file in files.items():
                if self._objects.size(file_key(file)) == file.size:
                    count(file.size)
                else:
                    self._objects.upload(file_key(file), path, file.digest, count)
            if self._objects.size(manifest_key(name, digest)) is None:
                self._objects.put(manifest_key(name, digest), content)
        if alias is not None:
            self._move(name, alias, digest)
        return digest

    def fetch(self, reference: str, folder: Path, report: Report = unheard) -> str:
        """Bring an artifact to `folder`, where it appears whole; its digest is returned.

        What came over before an earlier fetch ended is not read again. Raises ValueError where an object is damaged or
        something that is no artifact lies there; the folder is left as it was.
        """
        folder = Path(os.path.abspath(folder))
        name, digest = self._locate(reference)
        check_place(folder, name)
        if (folder / RECORD).is_file() and read_record(folder, name).get("digest") == digest == digest_folder(folder):
            return digest
        with explained(self.settings, f"fetch {reference}"):
            files = self._files(name, digest)
            staged = folder.with_name(f".{folder.name}.{digest[:16]}.partial")
            remove_others(folder, staged)
            count = counting(report, sum(file.size for file in files.values()))
            for path, file in files.items():
                self._objects.download(file_key(file), staged / path, file.size, file.digest, count)
        for stray in [path for path in staged.rglob("*") if path.is_file()]:
            if stray.relative_to(staged).as_posix() not in files:
                stray.unlink()
        if digest_folder(staged) != digest:
            shutil.rmtree(staged)
            raise damaged(self._objects.url(manifest_key(name, digest)))
        put_in_place(staged, folder)
        return digest

    def resolve(self, reference: str) -> str:
        """The digest a reference stands for; ValueError where it stands for nothing, with what there is instead."""
        return self._locate(reference)[1]

    def find(self, reference: str) -> str | None:
        """The digest a reference stands for, None where it stands for nothing."""
        found = self._look_up(reference)
        return found[1] if found else None

    def move(self, reference: str, alias: str) -> str:
        """Let an alias of the artifact's name stand for it; its digest is returned."""
        check_name("alias", alias)
        name, digest = self._locate(reference)
        self._move(name, alias, digest)
        return digest

    def rollback(self, reference: str) -> str:
        """Take back the last move of NAME@ALIAS that was not taken back yet; the digest it stands for now is returned.

        So two rollbacks lead two back, and a move after a rollback can be taken back like any other.
        """
        name, alias = split_alias(reference)
        with explained(self.settings, f"roll back {reference}"):
            journal = Journal(self._objects, name, alias)
            if journal.current() is None:
                raise self._unknown(reference)
            before = journal.before()
            if before is None:
                raise ValueError(f"{reference}: found no move before the present one, wanted one: move it instead")
            if self._objects.size(manifest_key(name, before)) is None:
                raise ValueError(f"{reference}: found {name}@sha256:{before} gone, wanted it: push it again or move")
            journal.append(before, "rolled-back")
        return before

    def history(self, reference: str, limit: int = MOST_MOVES) -> list[Move]:
        """The moves of NAME@ALIAS, the newest first; ValueError where there is no such alias."""
        name, alias = split_alias(reference)
        with explained(self.settings, f"read {reference}"):
            moves = list(Journal(self._objects, name, alias).moves(limit))
            if not moves:
                raise self._unknown(reference)
        return moves

    def record(self, reference: str) -> dict[str, Any]:
        """What an artifact says of itself, without its other files."""
        name, digest = self._locate(reference)
        with explained(self.settings, f"read {reference}"):
            file = self._files(name, digest).get(RECORD)
            content = self._objects.get(file_key(file)) if file else None
        try:
            record = json.loads(content or b"")
        except ValueError:
            record = None
        if not isinstance(record, dict) or record.get("digest") != digest:
            raise damaged(self._objects.url(file_key(file) if file else manifest_key(name, digest)))
        return record

    def artifacts(self, name: str | None = None) -> list[Artifact]:
        """The artifacts, or those of one name, by name and digest."""
        found = []
        with explained(self.settings, "list"):
            for each in [check_name("artifact", name)] if name else self._children("artifacts/"):
                aliases = self._children(f"aliases/{each}/")
                current = {alias: Journal(self._objects, each, alias).current() for alias in aliases}
                for digest in self._digests(each):
                    standing = tuple(alias for alias, stands_for in current.items() if stands_for == digest)
                    found.append(Artifact(each, digest, standing))
        return found

    def check(self, writes: bool = True) -> None:
        """List, and with `writes` write and read back, as a real use would; ValueError says what fails."""
        with explained(self.settings, "check reading"):
            next(self._objects.names(""), None)
        if writes:
            content = b"written by `sonorant store check`\n"
            with explained(self.settings, "check writing"):
                self._objects.put("check", content)
            with explained(self.settings, "check reading back"):
                found = self._objects.get("check")
            if found != content:
                raise ValueError(f"{self._objects.url('check')}: found {found!r}, wanted {content!r}: check the store")

    # ------------------------------------------------------------------------------------------------- inner rooms

    def _move(self, name: str, alias: str, digest: str) -> None:
        with explained(self.settings, f"move {name}@{alias}"):
            journal = Journal(self._objects, name, alias)
            # A move to where it is would make the next rollback lead nowhere; so a push that is repeated is none.
            if journal.current() != digest:
                journal.append(digest, "moved")

    def _locate(self, reference: str) -> tuple[str, str]:
        found = self._look_up(reference)
        if found is None:
            with explained(self.settings, f"resolve {reference}"):
                raise self._unknown(reference)
        return found

    def _look_up(self, reference: str) -> tuple[str, str] | None:
        """Name and digest; ValueError where the reference cannot be one, or stands for several."""
        name, at, target = reference.rpartition("@")
        with explained(self.settings, f"resolve {reference}"):
            if at and not target.startswith("sha256:"):
                name, alias = split_alias(reference)
                current = Journal(self._objects, name, alias).current()
                return None if current is None else (name, current)
            start = target.removeprefix("sha256:")
            if not DIGEST.fullmatch(start) or (at and not NAME.fullmatch(name)):
                raise ValueError(f"reference: found {reference!r}, {REFERENCE}: respell it")
            names = [name] if at else self._children("artifacts/")
            found = [(name, digest) for name in names for digest in self._digests(name, start)]
        if len(found) > 1:
            several = ", ".join(f"{name}@sha256:{digest}" for name, digest in found[:5])
            raise ValueError(
                f"{reference}: found several ({several}), wanted one: give its name and more of its digest"
            )
        return found[0] if found else None

    def _unknown(self, reference: str) -> ValueError:
        name, at, _ = reference.rpartition("@")
        names = self._children("artifacts/")
        if not at or name not in names:
            there = f"the names {', '.join(names)}" if names else "no artifacts at all"
        else:
            aliases = [f"{name}@{alias}" for alias in self._children(f"aliases/{name}/")]
            there = f"the aliases {', '.join(aliases)}" if aliases else f"no alias of {name}"
        return ValueError(
            f"{reference}: found {there} in {self.settings.url}, wanted it there: "
            "see `sonorant store list`, or push it first"
        )

    def _children(self, folder: str) -> list[str]:
        found = (found.name.removeprefix(folder) for found in self._objects.names(folder, whole=False))
        return sorted(name.rstrip("/") for name in found if name.endswith("/"))

    def _digests(self, name: str, start: str = "") -> list[str]:
        folder = f"artifacts/{name}/"
        found = (found.name.removeprefix(folder) for found in self._objects.names(folder + start))
        return sorted(name.removesuffix(".json") for name in found if name.endswith(".json"))

    def _files(self, name: str, digest: str) -> dict[str, File]:
        """An artifact's files by their paths, each of which leads to below its folder."""
        key = manifest_key(name, digest)
        content = self._objects.get(key)
        if content is None:
            raise ValueError(f"{self._objects.url(key)}: found none, wanted the artifact: push it again")
        try:
            listing = json.loads(content)["files"]
            files = {path: File(listed["sha256"], int(listed["bytes"])) for path, listed in listing.items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise damaged(self._objects.url(key)) from None
        if not all(is_below(path) and DIGEST.fullmatch(str(file.digest)) for path, file in files.items()):
            raise damaged(self._objects.url(key))
        return files


def file_key(file: File) -> str:
    """The name of the object that holds a file."""
    return f"files/{file.digest}"


def manifest_key(name: str, digest: str) -> str:
    """The name of the object that lists an artifact's files."""
    return f"artifacts/{name}/{digest}.json"


def damaged(url: str) -> ValueError:
    """What to say of an object that is not what was pushed."""
    return ValueError(
        f"{url}: found it damaged, wanted what was pushed: remove it from the store and push the artifact again"
    )


def is_below(path: str) -> bool:
    """Whether a path in a listing leads to a file below the folder."""
    parts = PurePosixPath(path).parts
    return bool(parts) and not path.startswith("/") and ".." not in parts and "\0" not in path


def check_name(what: str, name: str) -> str:
    """The name; ValueError where it cannot be one of an artifact or alias."""
    if not NAME.fullmatch(name):
        raise ValueError(f"{what}: found {name!r}, wanted a name of a-z, 0-9, _, . and -: choose another")
    return name


def split_alias(reference: str) -> tuple[str, str]:
    """Name and alias; ValueError where the reference is not NAME@ALIAS."""
    name, _, alias = reference.partition("@")
    if not NAME.fullmatch(name) or not NAME.fullmatch(alias):
        raise ValueError(f"reference: found {reference!r}, wanted NAME@ALIAS, such as model@production: respell it")
    return name, alias


def check_place(folder: Path, name: str) -> None:
    """ValueError where no artifact could appear whole at `folder`, or what is no artifact would be overwritten."""
    if folder.is_mount():
        raise ValueError(f"{name} {folder}: found a mount point, wanted a folder in it: give {folder / name}")
    if folder.is_symlink():
        raise ValueError(f"{name} {folder}: found a link, wanted a folder: give {folder.resolve()}")
    check_replaceable(folder, name, [])


def remove_others(folder: Path, staged: Path) -> None:
    """Remove what earlier fetches of other artifacts to the same place left unfinished."""
    for path in folder.parent.iterdir() if folder.parent.is_dir() else ():
        if re.fullmatch(rf"\.{re.escape(folder.name)}\.[0-9a-f]{{16}}\.partial", path.name) and path != staged:
            shutil.rmtree(path, ignore_errors=True)


def counting(report: Report, total: int) -> Callable[[int], None]:
    """A function that takes what is newly done and reports all that is."""
    done = 0

    def count(bytes_more: int) -> None:
        nonlocal done
        done += bytes_more
        report(done, total)

    return count
