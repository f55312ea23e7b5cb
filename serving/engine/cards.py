"""What the server knows of the models that its workers have loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.engine.wire import Array, Letter
from serving.engine.worker import pack_moments
from sonorant.inference import FRAME_MS, STREAM, Codebook, EncoderConfig, measure, num_operations

Wave = NDArray[np.float32]


@dataclass(frozen=True)
class Card:
    """What the server knows of a model that is loaded in its workers.

    layer: the published one; grounded_layer: the one that is searched by, where there is one; encoder: its
    configuration, where the model has one; about: what was published with it.
    """

    name: str
    digest: str
    precision: str
    device: str
    layer: int
    num_layers: int
    dim: int
    num_units: int
    grounded_layer: int | None
    num_images: int
    poolings: tuple[str, ...]
    encoder: EncoderConfig | None
    about: Mapping[str, Any]
    codebook: Codebook | None

    @property
    def centred(self) -> bool:
        """Whether units are made of frames less the recording's mean."""
        return self.codebook is not None and self.codebook.centred

    def operations(self, num_frames: int, layer: int | tuple[float, ...]) -> float:
        """What it costs to take so many frames to a layer, or to the last with a weight."""
        if self.encoder is None:
            return 1e6 * num_frames
        last = layer if isinstance(layer, int) else max((i for i, weight in enumerate(layer) if weight), default=0)
        return num_operations(self.encoder, num_frames, last)

    def moments(self, wave: Wave) -> Array | None:
        """What the model must know of a recording to hear its windows as it hears all of it, packed."""
        return None if self.encoder is None else pack_moments(measure(wave, self.encoder))

    def describe(self) -> dict[str, Any]:
        """It, as /v1/models tells it."""
        step, after, before = (FRAME_MS * count / 1000 for count in (STREAM.step, STREAM.after, STREAM.before))
        return {
            "id": self.name,
            "digest": self.digest,
            "precision": self.precision,
            "device": self.device,
            "layer": self.layer,
            "num_layers": self.num_layers,
            "dim": self.dim,
            "num_units": self.num_units,
            "grounded": self.grounded_layer is not None,
            "num_images": self.num_images,
            "centred": self.centred,
            "poolings": self.poolings,
            "frame_ms": FRAME_MS,
            "stream": {"step": step, "look_ahead": after, "history": before},
            "encoder": {} if self.encoder is None else self.encoder.model_dump(mode="json"),
            "provenance": self.about.get("provenance", {}),
        }


def cards_of(introduction: Letter) -> dict[str, Card]:
    """The models that a replica has loaded, by name."""
    arrays = iter(introduction.arrays)
    cards = {}
    for fields in introduction.fields["models"]:
        centred = fields.pop("centred")
        codebook = None if centred is None else Codebook(*(next(arrays) for _ in range(3)), centred=centred)
        encoder = None if fields["encoder"] is None else EncoderConfig.model_validate(fields["encoder"])
        named = {**fields, "poolings": tuple(fields["poolings"]), "encoder": encoder}
        cards[fields["name"]] = Card(**named, codebook=codebook)
    return cards
