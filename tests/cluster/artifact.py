"""Small artifacts to bring to the store, and what is sent to it on the way."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sonorant.artifacts import digest_folder, write_record
from sonorant.store import Store, objects

PART_BYTES = 5 * 2**20
"""The least that S3 takes as a part."""


def write_artifact(folder: Path, seed: int = 0, size: int = 1000, name: str = "model") -> Path:
    """An artifact of four files, one of `size` bytes, two the same whatever the seed, of which one is empty."""
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "same.txt").write_text("whatever the seed\n")
    (folder / "sub" / "the émpty one.txt").touch()
    (folder / "config.json").write_text(f'{{"seed": {seed}}}')
    (folder / "weights.bin").write_bytes(random.Random(seed).randbytes(size))
    write_record(folder, {"artifact": name, "digest": digest_folder(folder), "seed": seed})
    return folder


def use_small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let files be sent in the smallest parts there are."""
    monkeypatch.setattr(objects, "PART_BYTES", PART_BYTES)


@contextmanager
def requests_of(store: Store) -> Iterator[list[tuple[str, str, int]]]:
    """What is asked of the store meanwhile: method, path with query, and bytes sent."""
    pool: Any = store._objects.client._http
    asked, urlopen = [], pool.urlopen

    def record(method: str, url: str, **given: Any) -> Any:
        asked.append((method, url.split("/", 3)[3], len(given.get("body") or b"")))
        return urlopen(method, url, **given)

    pool.urlopen = record
    yield asked
    pool.urlopen = urlopen
