"""A published model in use: embeddings and unit tokens. What is measured is what is served.

speech = load(Path("artifacts/model"))
[frames] = speech.embed([read_wave(Path("a.flac"))])   # (T, D), one frame every 20 ms
[units] = speech.units([read_wave(Path("a.flac"))])    # (T,)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from sonorant.data.audio import TooLongError, read_wave, standardise
from sonorant.data.frames import FRAME_MS, SAMPLE_RATE, WINDOW_SAMPLES, Ragged, pack_waves
from sonorant.models.codebook import Codebook
from sonorant.models.encoder import Encoder
from sonorant.models.huggingface import from_transformers, load_encoder

__all__ = [
    "FRAME_MS",
    "SAMPLE_RATE",
    "Speech",
    "TooLongError",
    "load",
    "load_trained",
    "load_untrained",
    "read_wave",
]

BATCH_SECONDS = 60.0
Wave = NDArray[np.float32]


class Speech:
    """An encoder, the layer it is published for, and its codebook."""

    def __init__(
        self,
        encoder: Encoder,
        layer: int,
        codebook: Codebook | None = None,
        about: dict[str, Any] | None = None,
    ) -> None:
        self.encoder = encoder.eval()
        self.layer, self.codebook, self.about = layer, codebook, about or {}
        self.num_layers = encoder.config.num_layers
        self.dim = encoder.config.dim
        self.num_units = codebook.num_units if codebook else 0

    def embed(self, waves: Sequence[Wave], layer: int | None = None) -> list[NDArray[np.float32]]:
        """Frames of one layer (default: the published one) of 16 kHz mono waves (S,): (T, D) each.

        A wave's frames do not depend on the others. Raises ValueError where a wave is shorter than one window
        or the layer does not exist.
        """
        layer = self.layer if layer is None else layer
        return [states[0] for states in self._states(waves, [layer])]

    def states(self, waves: Sequence[Wave], layers: Sequence[int]) -> list[list[NDArray[np.float32]]]:
        """Frames of several layers from one pass: per wave a list of (T, D)."""
        return list(self._states(waves, layers))

    def units(self, waves: Sequence[Wave]) -> list[NDArray[np.int64]]:
        """Unit tokens of the published codebook: (T,) each."""
        if self.codebook is None:
            raise ValueError("model: found no codebook, wanted one to make units: publish the model first")
        return [self.codebook.assign(frames) for frames in self.embed(waves)]

    def _states(self, waves: Sequence[Wave], layers: Sequence[int]) -> Iterator[list[NDArray[np.float32]]]:
        for layer in layers:
            if not 0 <= layer <= self.num_layers:
                raise ValueError(
                    f"layer: found {layer}, wanted 0 to {self.num_layers}: choose a layer of this model"
                )
        for wave in waves:
            if wave.ndim != 1 or len(wave) < WINDOW_SAMPLES:
                raise ValueError(
                    f"wave: found shape {wave.shape}, wanted (samples,) with at least {WINDOW_SAMPLES} "
                    f"({1000 * WINDOW_SAMPLES // SAMPLE_RATE} ms at 16 kHz): send longer audio"
                )
        for batch in batches_of(waves):
            lengths = [len(wave) for wave in batch]
            heard = [standardise(wave) for wave in batch] if self.encoder.config.standardised else batch
            packed = torch.from_numpy(pack_waves(heard))
            device = self.encoder.mask_embedding.device
            with torch.inference_mode():
                hidden = self.encoder(packed.to(device), lengths, last=max(layers))
            chosen = [hidden.states[layer].float().cpu().numpy() for layer in layers]
            for rows in Ragged.of_samples(lengths).slices():
                yield [np.ascontiguousarray(state[rows]) for state in chosen]


def batches_of(waves: Sequence[Wave], seconds: float = BATCH_SECONDS) -> Iterator[list[Wave]]:
    """Consecutive waves that together last at most so long, at least one."""
    batch: list[Wave] = []
    for wave in waves:
        if batch and sum(map(len, batch)) + len(wave) > seconds * SAMPLE_RATE:
            yield batch
            batch = []
        batch.append(wave)
    if batch:
        yield batch


def load(folder: Path) -> Speech:
    """The model that `sonorant publish` wrote; ValueError where the folder holds none."""
    encoder, about = load_encoder(folder)
    if "layer" not in about:
        raise ValueError(
            f"model {folder}: found an encoder without a layer, wanted a model: run `sonorant publish`"
        )
    return Speech(encoder, about["layer"], Codebook.load(folder / "codebook.safetensors"), about)


def load_trained(folder: Path, network: str = "student") -> Speech:
    """The student or the teacher of an encoder that `sonorant pretrain` wrote, without a codebook."""
    encoder, about = load_encoder(folder)
    if network == "teacher":
        path = folder / "teacher.safetensors"
        if not path.is_file():
            raise ValueError(
                f"encoder {folder}: found no teacher, wanted one: publish the student or train with a teacher"
            )
        names = [name for name, _ in encoder.named_parameters()]
        encoder.load_state_dict(from_transformers(load_file(path), names))
    return Speech(encoder, encoder.config.num_layers, about=about)


def load_untrained(folder: Path, seed: int = 0) -> Speech:
    """The same architecture and layer with random weights: what training is measured against."""
    encoder, about = load_encoder(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = Encoder(encoder.config)
    return Speech(fresh, about.get("layer", encoder.config.num_layers), about=about)
