"""Speech and images in one space: the two sides, and how they are compared."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from sonorant.config.section import Section, Share

Width = Annotated[int, Field(ge=1)]


class ImageConfig(Section):
    """The side of images: a small ViT of our own, a transformers vision model, or regions that a detector found."""

    kind: Literal["small", "transformers", "regions"] = "small"
    path: Path | None = Field(None, description="transformers: the model's folder")
    trained: bool = Field(True, description="transformers: false keeps it as it is, and it sees each image once")
    side: int = Field(96, ge=8, description="small: pixels of the square that an image is brought to")
    patch: int = Field(12, ge=1, description="small: pixels of a square patch's side")
    region_dim: int = Field(2048, ge=1, description="regions: features of each")
    dim: int = Field(128, ge=1, description="small, regions: width of the layers")
    num_layers: int = Field(3, ge=1)
    num_heads: int = Field(4, ge=1)
    ffn_dim: int = Field(512, ge=1)
    dropout: Share = 0.0

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        if (self.kind == "transformers") != (self.path is not None):
            found = "no path" if self.path is None else f"path {self.path}"
            raise ValueError(f"image.kind {self.kind}: found {found}, wanted one for transformers alone: change one")
        if self.kind == "small" and self.side % self.patch:
            raise ValueError(f"image.side {self.side} is not divisible by image.patch {self.patch}: change one")
        if self.dim % self.num_heads:
            raise ValueError(f"image.dim {self.dim} is not divisible by image.num_heads {self.num_heads}: change one")
        return self


class GroundingConfig(Section):
    """How an utterance is told from others by its image, and an image by its utterances (grounding.md §1)."""

    layer: int | None = Field(None, ge=1, description="of the encoder, that speech is read from; None: two thirds up")
    masked: bool = Field(False, description="speech is read from the masked view, as the original's code does")
    dim: int = Field(256, ge=1, description="of the common space")
    similarity: Literal["dot", "cosine"] = Field("cosine", description="cosine: with a learned temperature")
    temperature: float = Field(0.07, ge=0.01, description="of the cosine, at the start; never below 0.01")
    margin: float = Field(0.0, ge=0, description="δ: taken from the score of what belongs together; 1 in the original")
    queue_size: int = Field(0, ge=0, description="pairs of former updates that are told apart from too")
    branch_widths: tuple[Width, ...] = Field(
        (), description="of the speech branch's stages, each half as long; the original's are 128, 256, 512, 768"
    )
    pooling: Literal["lead", "max"] = Field(
        "lead",
        description="lead: the leading state looks through a layer, as in the paper; max: the largest value of each "
        "channel over time, which learns from few pairs",
    )
    branch_heads: int = Field(4, ge=1, description="of the layer that the leading state looks through")
    image: ImageConfig = ImageConfig()
