"""The images of a corpus as a side of images sees them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sonorant.config import ImageConfig
from sonorant.data.corpus import Utterance
from sonorant.data.pairs import Pictures
from sonorant.data.progress import shown_progress
from sonorant.models.images import load_foreign

SEEN, ABOUT = "seen.npy", "seen.json"
AT_ONCE = 32
"""Images that a network sees at once."""


def open_pictures(utterances: Sequence[Utterance], image: ImageConfig, cache: Path | None = None) -> Pictures:
    """The utterances' images as a side of images of that kind reads them.

    Where a transformers model does not change it sees them now; with a folder `cache`, what it makes of them is kept
    there and used again. Raises ValueError where the model or an image cannot be read.
    """
    if image.kind != "transformers":
        return Pictures(utterances, image, image.side)
    assert image.path is not None
    foreign = load_foreign(image.path)
    pictures = Pictures(utterances, image, foreign.side)
    if image.trained:
        return pictures
    digest = hashlib.sha256()
    for path in sorted(path for path in image.path.glob("*") if path.is_file()):
        digest.update(path.read_bytes())
    about = {"model": digest.hexdigest(), "images": pictures.names}
    seen = read_seen(cache, about) if cache else None
    if seen is None:
        seen = np.zeros((len(pictures), foreign.dim), np.float32)
        with torch.inference_mode(), shown_progress("images", "seen") as report:
            for rows, part in parts_of(pictures):
                seen[rows] = foreign(*part).numpy()
                report(rows.stop, len(pictures))
        if cache:
            write_seen(cache, about, seen)
    return Pictures(utterances, image, foreign.side, seen)


def parts_of(pictures: Pictures) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
    """All images, a few at a time: which they are, and what a side of images reads."""
    for start in range(0, len(pictures), AT_ONCE):
        rows = slice(start, min(start + AT_ONCE, len(pictures)))
        yield rows, pictures.rows(range(rows.start, rows.stop))


def read_seen(cache: Path, about: object) -> NDArray[np.float32] | None:
    """What was kept of the same images and model, if it is whole."""
    try:
        if json.loads((cache / ABOUT).read_text()) != about:
            return None
        seen: NDArray[np.float32] = np.load(cache / SEEN, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError):
        return None
    return seen


def write_seen(cache: Path, about: object, seen: NDArray[np.float32]) -> None:
    """Keep it; what says that it is whole comes last."""
    cache.mkdir(parents=True, exist_ok=True)
    (cache / ABOUT).unlink(missing_ok=True)
    np.save(cache / SEEN, seen)
    (cache / f"{ABOUT}.partial").write_text(json.dumps(about))
    (cache / f"{ABOUT}.partial").replace(cache / ABOUT)
