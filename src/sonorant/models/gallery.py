"""The images that a published model finds: their vectors in a faiss index, a line about each, small pictures of them.

    images.faiss        a flat index of inner products, one vector an image
    images.jsonl        one object an image, in the index's order: id, split, texts, thumbnail
    images.thumbnails   JPEG files end to end, each where `thumbnail` (first byte, number of bytes) says; may lack

Shapes: B queries, I images, E width of the common space.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

INDEX, LINES, THUMBNAILS = "images.faiss", "images.jsonl", "images.thumbnails"
FLAT_INNER_PRODUCT = b"IxFI"
"""How the file of such an index begins: no other kind is read."""
Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class Picture:
    """An image. id: its file's name in the corpus; texts: what is said of it; thumbnail: its place in the file."""

    id: str
    split: str
    texts: tuple[str, ...]
    thumbnail: tuple[int, int] | None = None


@dataclass(frozen=True)
class Found:
    """An image that was found. rank: from 1; score: its inner product with the query; row: in the gallery."""

    rank: int
    score: float
    row: int
    picture: Picture


class Gallery:
    """Images by row: their vectors, what is known of each, and a small picture of it where there is one."""

    def __init__(self, vectors: Vectors, pictures: Sequence[Picture], thumbnails: BinaryIO | None = None) -> None:
        """vectors (I, E); `thumbnails`: an open file, so that it stays the one that `pictures` speak of."""
        import faiss

        assert vectors.ndim == 2
        assert len(vectors) == len(pictures)
        self.pictures, self.thumbnails = tuple(pictures), thumbnails
        self.rows = {picture.id: row for row, picture in enumerate(self.pictures)}
        """By id."""
        self.dim = vectors.shape[1]
        self._index: Any = faiss.IndexFlatIP(self.dim)
        self._index.add(np.ascontiguousarray(vectors, np.float32))

    def __len__(self) -> int:
        return len(self.pictures)

    def search(self, vectors: Vectors, top: int) -> tuple[Vectors, NDArray[np.int64]]:
        """The scores and rows of the `top` images nearest each query (B, E), best first, or of all: (B, top) each."""
        count = min(top, len(self))
        scores, rows = np.empty((len(vectors), count), np.float32), np.empty((len(vectors), count), np.int64)
        for place, vector in enumerate(vectors):
            # One by one: of many at once faiss sums in another order, and a score would depend on the others.
            [scores[place]], [rows[place]] = self._index.search(np.ascontiguousarray(vector[None], np.float32), count)
            order = np.lexsort((rows[place], -scores[place]))
            scores[place], rows[place] = scores[place, order], rows[place, order]
        return scores, rows

    def find(self, vectors: Vectors, top: int) -> Iterator[list[Found]]:
        """The same as images, query by query."""
        for scores, rows in zip(*self.search(vectors, top), strict=True):
            pairs = enumerate(zip(scores.tolist(), rows.tolist(), strict=True), start=1)
            yield [Found(rank, score, row, self.pictures[row]) for rank, (score, row) in pairs]

    def vectors(self, rows: Sequence[int]) -> Vectors:
        """The vectors of some images, (I, E)."""
        found: Vectors = self._index.reconstruct_batch(np.asarray(rows, np.int64))
        return found

    def thumbnail(self, row: int) -> bytes | None:
        """A small JPEG of an image, None where there is none."""
        place = self.pictures[row].thumbnail
        if place is None:
            return None
        assert self.thumbnails is not None
        first, size = place
        return os.pread(self.thumbnails.fileno(), size, first)

    def save(self, folder: Path, thumbnails: Sequence[bytes | None] | None = None) -> None:
        """Write it, with a JPEG or None for each image."""
        import faiss

        places: list[tuple[int, int] | None] = [None] * len(self)
        if thumbnails is not None and any(thumbnails):
            assert len(thumbnails) == len(self)
            sizes = [len(content or b"") for content in thumbnails]
            ends = np.cumsum(sizes).tolist()
            places = [(end - size, size) if size else None for end, size in zip(ends, sizes, strict=True)]
            (folder / THUMBNAILS).write_bytes(b"".join(content for content in thumbnails if content))
        faiss.write_index(self._index, str(folder / INDEX))
        with (folder / LINES).open("w", encoding="utf-8") as file:
            for picture, place in zip(self.pictures, places, strict=True):
                file.write(json.dumps({**asdict(picture), "thumbnail": place}, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Gallery | None:
        """What `save` wrote, None where it wrote nothing; ValueError where it is damaged."""
        if not ((folder / INDEX).exists() or (folder / LINES).exists()):
            return None
        try:
            vectors = read_vectors(folder / INDEX)
            with (folder / LINES).open(encoding="utf-8") as lines:
                pictures = [picture_of(line) for line in lines]
            if len(pictures) != len(vectors) or len({picture.id for picture in pictures}) != len(pictures):
                raise ValueError(f"{len(vectors)} vectors and {len(pictures)} lines")
            end = max((sum(picture.thumbnail) for picture in pictures if picture.thumbnail), default=0)
            thumbnails = (folder / THUMBNAILS).open("rb") if end else None
            if thumbnails is not None and (size := os.fstat(thumbnails.fileno()).st_size) != end:
                raise ValueError(f"{size} bytes of thumbnails where {end} are spoken of")
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            found = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(
                f"model {folder}: found images that cannot be searched ({found}), wanted {INDEX}, {LINES} and "
                f"{THUMBNAILS} as `sonorant publish` wrote them: copy them again"
            ) from None
        return cls(vectors, pictures, thumbnails)


def can_search() -> bool:
    """Whether faiss is installed, which the extras `serve` and `train` bring."""
    try:
        importlib.import_module("faiss")
    except ImportError:
        return False
    return True


def picture_of(line: str) -> Picture:
    """An image from its line; ValueError, KeyError or TypeError where it is none."""
    about = json.loads(line)
    place = about["thumbnail"]
    if place is not None:
        first, size = place
        if not (type(first) is type(size) is int and first >= 0 and size > 0):
            raise ValueError(f"a thumbnail at {place}")
    texts = tuple(about["texts"])
    if not all(isinstance(text, str) for text in (about["id"], about["split"], *texts)):
        raise TypeError(f"a line that is no image's: {line[:80]}")
    return Picture(about["id"], about["split"], texts, None if place is None else (first, size))


def read_vectors(path: Path) -> Vectors:
    """The vectors of a flat index of inner products, (I, E); OSError, RuntimeError or ValueError where it is none."""
    import faiss

    with path.open("rb") as file:
        if (found := file.read(4)) != FLAT_INNER_PRODUCT:
            raise ValueError(f"an index that begins with {found!r}")
    index: Any = faiss.read_index(str(path))
    vectors: Vectors = index.reconstruct_n(0, index.ntotal)
    if not np.isfinite(vectors).all():
        raise ValueError("vectors that are not finite")
    return vectors
