"""Artifacts: folders that describe themselves, and appear and are replaced whole.

`artifact.json` says which step made the folder, from which configuration and inputs, and the digest of its files; it
holds no time and no host, so the same work gives the same bytes.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

RECORD = "artifact.json"
ELSEWHERE = "elsewhere.json"
"""Says which files of an artifact lie in the store: under `files`, by path, a list that begins with the SHA-256."""
ABSENCE = "absent.txt"


def read_record(folder: Path, name: str) -> dict[str, Any]:
    """What an artifact says of itself; ValueError where the folder is not an artifact.

    Of an encoder that transformers wrote nothing is known but its bytes.
    """
    path = folder / RECORD
    if name == "encoder" and not path.is_file() and (folder / "config.json").is_file():
        return {"config": {}, "digest": digest_folder(folder), "inputs": {}, "metrics": {}}
    if not path.is_file():
        state = "a folder without artifact.json" if folder.is_dir() else "nothing there"
        raise ValueError(
            f"{name} {folder}: found {state}, wanted an artifact: run the step that writes it first"
        )
    try:
        record: dict[str, Any] = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: found no valid JSON ({error}), wanted an artifact's record: make the artifact again"
        ) from None
    return record


def write_absence(folder: Path, reason: str) -> None:
    """Write, where an artifact is wanted, that there is none: a step takes such an optional input as not given."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ABSENCE).write_text(reason + "\n")


def is_absent(folder: Path) -> bool:
    """Whether the folder says that there is no artifact."""
    return (folder / ABSENCE).is_file()


def check_replaceable(path: Path, name: str, inputs: Collection[Path]) -> None:
    """ValueError where writing the artifact would delete an input, or what is no artifact."""
    if path.resolve() in {given.resolve() for given in inputs}:
        raise ValueError(f"{name} {path}: found an input's path, wanted one of its own: name another folder")
    if path.is_dir() and ((path / RECORD).is_file() or not any(path.iterdir())):
        return
    if path.exists():
        raise ValueError(
            f"{name} {path}: found something that is no artifact, wanted an artifact to replace or nothing: "
            "move it away or name another folder"
        )


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write what the artifact says of itself."""
    (folder / RECORD).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


def let_read(folder: Path) -> None:
    """Give a folder's files the rights of new files: some libraries let nobody but the owner read theirs, and whoever
    serves a model is another user."""
    mask = os.umask(0o077)
    os.umask(mask)
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def digest_folder(folder: Path) -> str:
    """SHA-256 over the names and contents of all files below `folder` except its record.

    Files that lie elsewhere count as those that are here: an artifact is the same wherever its files are.
    """
    digests = {name: listed[0] for name, listed in files_elsewhere(folder).items()}
    for path in folder.rglob("*"):
        if path.is_file() and path not in (folder / RECORD, folder / ELSEWHERE):
            with path.open("rb") as file:
                digests[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    total = hashlib.sha256()
    for name in sorted(digests, key=lambda name: name.split("/")):
        total.update(f"{name}\0{digests[name]}\n".encode())
    return total.hexdigest()


def files_elsewhere(folder: Path) -> dict[str, list[Any]]:
    """What is listed of each file of the artifact that lies in the store, by its path; none where all are here."""
    path = folder / ELSEWHERE
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text())["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: found no list of files ({type(error).__name__}: {error}), wanted what `sonorant store shard` "
            "wrote: write or fetch the artifact again"
        ) from None


def staging_place(final: Path) -> Path:
    """Where an artifact is while its step runs."""
    return final.with_name(f".{final.name}.partial")


def final_place(staged: Path) -> Path:
    """Where an artifact will be once its step has returned."""
    return staged.with_name(staged.name.removeprefix(".").removesuffix(".partial"))


def put_in_place(staged: Path, final: Path) -> None:
    """Move a finished folder to its name; what was there before goes only then."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        if exchange(staged, final):
            staged.rename(old)
        else:
            final.rename(old)
            staged.rename(final)
    else:
        staged.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def exchange(one: Path, other: Path) -> bool:
    """Let two folders swap names at one instant, so that who reads either finds one at any time.

    False where the system or its file system cannot; nothing is changed then.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(here, bytes(one), here, bytes(other), swap) == 0
