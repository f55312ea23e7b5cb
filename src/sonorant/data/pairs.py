"""The images that utterances speak of, as the side of images reads them.

A file of pixels becomes bytes (3, S, S) of a square, `.npz` the features (R, ·) and boxes (R, 4) of regions that a
detector found. Where a transformers model does not change, it sees each image once, and what it made of it is kept.

Shapes: I images, S pixels of a side, R regions, D width.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sonorant.config import ImageConfig
from sonorant.data.corpus import REGIONS, Utterance

if TYPE_CHECKING:
    from PIL.Image import Image

CACHE_BYTES = 1 << 30
"""Of decoded images that are kept in memory."""
Pixels = NDArray[np.uint8]


class Pictures:
    """The images of some utterances, by number: those of one file have one number."""

    def __init__(
        self, utterances: Sequence[Utterance], image: ImageConfig, side: int, seen: NDArray[np.float32] | None = None
    ) -> None:
        """`side`: pixels of the square that images are brought to; `seen` (I, D): vectors that stand for them."""
        self.image, self.side, self.seen = image, side, seen
        first = first_with_image(utterances)
        self.names = sorted(first)
        self.of = [first[name] for name in self.names]
        """An utterance of each image."""
        self.numbers = {name: number for number, name in enumerate(self.names)}
        self._kept: dict[int, tuple[Tensor, ...]] = {}
        self._room = CACHE_BYTES

    def __len__(self) -> int:
        return len(self.names)

    def number(self, utterance: Utterance) -> int:
        """The image's number, -1 where the utterance has none."""
        return -1 if utterance.image is None else self.numbers[name_of(utterance)]

    def read(self, utterances: Sequence[Utterance]) -> tuple[Tensor, ...]:
        """What the side of images reads of these, each of which has an image: tensors whose rows are images."""
        return self.rows([self.number(utterance) for utterance in utterances])

    def rows(self, numbers: Sequence[int]) -> tuple[Tensor, ...]:
        """The same of images by number."""
        if self.seen is not None:
            return (torch.from_numpy(self.seen[list(numbers)]),)
        if not numbers:
            return ()
        columns = list(zip(*map(self._row, numbers), strict=True))
        for number, tensor in zip(numbers, columns[0], strict=True):
            if tensor.shape != columns[0][0].shape:
                raise ValueError(
                    f"image {self.names[number]}: found {len(tensor)} regions, wanted {len(columns[0][0])} as others "
                    "have: give every image as many"
                )
        return tuple(torch.stack(column) for column in columns)

    def _row(self, number: int) -> tuple[Tensor, ...]:
        if number in self._kept:
            return self._kept[number]
        content = self.of[number].picture()
        assert content is not None
        if self.image.kind == "regions":
            row = tuple(map(torch.from_numpy, read_regions(content, self.names[number], self.image.region_dim)))
        else:
            row = (torch.from_numpy(read_square(content, self.names[number], self.side)),)
        size = sum(tensor.nbytes for tensor in row)
        if size <= self._room:
            self._kept[number] = row
            self._room -= size
        return row


def first_with_image(utterances: Sequence[Utterance]) -> dict[str, Utterance]:
    """The first utterance of each image, by the image's name."""
    first: dict[str, Utterance] = {}
    for utterance in utterances:
        if utterance.image is not None:
            first.setdefault(name_of(utterance), utterance)
    return first


def name_of(utterance: Utterance) -> str:
    """What its image is called in the corpus, which names images after their content."""
    assert utterance.image is not None
    return utterance.image.name


def open_picture(content: bytes, name: str) -> Image:
    """A picture upright and in colours; ValueError where it cannot be read."""
    import PIL.Image
    import PIL.ImageOps

    try:
        with PIL.Image.open(io.BytesIO(content)) as picture:
            turned = PIL.ImageOps.exif_transpose(picture)
            if turned.mode.startswith("I;16"):
                # Pillow would cut all that is lighter than 255 of 65,535.
                turned = PIL.Image.fromarray((np.asarray(turned) >> 8).astype(np.uint8))
            return turned.convert("RGB")
    except (OSError, ValueError, PIL.Image.DecompressionBombError) as error:
        raise ValueError(
            f"image {name}: found no picture that can be read ({error}), wanted one: prepare the corpus again"
        ) from None


def read_square(content: bytes, name: str, side: int) -> Pixels:
    """A picture as bytes (3, S, S), its longer side cut to a square around the middle."""
    from PIL import ImageOps
    from PIL.Image import Resampling

    square = ImageOps.fit(open_picture(content, name), (side, side), Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(square, np.uint8).transpose(2, 0, 1))


def thumbnail(utterance: Utterance, side: int, kind: Literal["JPEG", "PNG"]) -> bytes | None:
    """Its image, at most `side` pixels wide and high; None where there is none to be seen."""
    from PIL.Image import Resampling

    content = utterance.picture()
    if content is None or name_of(utterance).endswith(REGIONS):
        return None
    small = open_picture(content, name_of(utterance))
    small.thumbnail((side, side), Resampling.BICUBIC)
    file = io.BytesIO()
    small.save(file, kind, quality=85, optimize=True)
    return file.getvalue()


def read_regions(content: bytes, name: str, dim: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Features (R, D) and boxes (R, 4) of the regions of an image, from an `.npz`."""
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            features, boxes = (np.asarray(arrays[key], np.float32) for key in ("features", "boxes"))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"image {name}: found no features and boxes of regions ({error}), wanted an .npz with both: prepare a "
            "corpus of regions or choose another ground.grounding.image.kind"
        ) from None
    if features.ndim != 2 or features.shape[1] != dim or boxes.shape != (len(features), 4):
        raise ValueError(
            f"image {name}: found features {features.shape} and boxes {boxes.shape}, wanted (R, {dim}) and (R, 4): "
            "set ground.grounding.image.region_dim"
        )
    return features, boxes
