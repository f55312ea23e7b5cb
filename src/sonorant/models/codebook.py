"""A codebook turns an utterance's frames into unit tokens: nearest centroid after a scaling of each dimension."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor


@dataclass(frozen=True)
class Codebook:
    """`num_units` centroids in the space of (frame - shift) * scale.

    centroids (K, D); shift (D,) and scale (D,), zeros and ones where frames are clustered as they are. With `centred`
    an utterance's mean is taken from its frames first, and with it much of the speaker and the channel.
    """

    centroids: NDArray[np.float32]
    shift: NDArray[np.float32]
    scale: NDArray[np.float32]
    centred: bool = False

    @property
    def num_units(self) -> int:
        """K."""
        return len(self.centroids)

    def assign(self, frames: NDArray[np.float32], mean: NDArray[np.float64] | None = None) -> NDArray[np.int64]:
        """The nearest unit of each frame of one utterance: (T, D) to (T,). Ties go to the lower unit.

        `mean` (D,) is that of the whole utterance, where these frames are part of one.
        """
        if self.centred:
            frames = centre_frames(frames, mean)
        scaled = torch.from_numpy(np.ascontiguousarray((frames - self.shift) * self.scale, dtype=np.float32))
        units: NDArray[np.int64] = nearest(scaled, torch.from_numpy(self.centroids)).numpy()
        return units

    def save(self, path: Path) -> None:
        """Write it as safetensors."""
        arrays = {"centroids": self.centroids, "shift": self.shift, "scale": self.scale}
        save_file({**arrays, "centred": np.array([self.centred], np.uint8)}, path)

    @classmethod
    def load(cls, path: Path) -> Codebook:
        """Read it back; ValueError where the file is missing or is no codebook."""
        try:
            arrays = load_file(path)
            return cls(centred=bool(arrays.pop("centred")[0]), **arrays)
        except (OSError, KeyError, TypeError, SafetensorError) as error:
            raise ValueError(
                f"codebook {path}: found no readable codebook ({error}), wanted one: publish the model again"
            ) from None


class Speller:
    """Units of an utterance whose end is not known yet.

    Where the codebook is centred, frames are centred by the mean of all that came so far, these included: early
    units are less certain than late ones.
    """

    def __init__(self, codebook: Codebook) -> None:
        self.codebook = codebook
        self._sum = np.zeros(codebook.centroids.shape[1])
        self._count = 0

    def spell(self, frames: NDArray[np.float32]) -> NDArray[np.int64]:
        """The units of the next frames: (T, D) to (T,)."""
        self._sum += frames.sum(0, dtype=np.float64)
        self._count += len(frames)
        return self.codebook.assign(frames, self._sum / max(1, self._count))


def centre_frames(frames: NDArray[np.float32], mean: NDArray[np.float64] | None = None) -> NDArray[np.float32]:
    """An utterance's frames (T, D) less their mean (D,), or the one given, in every dimension."""
    if not len(frames):
        return frames
    return (frames - (frames.mean(0, dtype=np.float64) if mean is None else mean)).astype(np.float32)


def nearest(frames: Tensor, centroids: Tensor, chunk: int = 4_096) -> Tensor:
    """Index of the centroid nearest by Euclid, as one matrix product a chunk: (T, D), (K, D) to (T,)."""
    half_norms = centroids.square().sum(1).mul(-0.5)
    parts = [torch.addmm(half_norms, part, centroids.T).argmax(1) for part in torch.split(frames, chunk)]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long)
