"""The steps that train: what each adds to what all of them have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self

from pydantic import Field, model_validator

from sonorant.config.alignment import AlignmentConfig
from sonorant.config.encoder import EncoderConfig
from sonorant.config.grounding import GroundingConfig
from sonorant.config.training import TrainConfig


class PretrainConfig(TrainConfig):
    """A recipe for a new encoder, trained on speech alone."""

    step: ClassVar[str] = "pretrain"
    encoder: EncoderConfig = EncoderConfig()

    @model_validator(mode="after")
    def _has_an_encoder(self) -> Self:
        if not self.encoder.standardised:
            raise ValueError("encoder.standardised false: pretraining standardises its waves: leave it true")
        self.check_encoder(self.encoder)
        return self


class GroundConfig(TrainConfig):
    """A recipe for speech with images: grounding alone, with the tasks of pretraining, or after them."""

    step: ClassVar[str] = "ground"
    encoder: EncoderConfig | None = Field(None, description="None: the given one goes on; else a new one of this shape")
    grounding: GroundingConfig = GroundingConfig()

    @property
    def layers(self) -> Mapping[str, int]:
        """The deepest layers, and numbers of layers, that the recipe names."""
        return {**super().layers, "grounding.layer": self.grounding.layer or 0}


class AlignConfig(TrainConfig):
    """A recipe that fine-tunes the top layers until an utterance and its perturbed copy agree (LASER, SCORE)."""

    step: ClassVar[str] = "align"
    num_trained_layers: int | None = Field(
        2, ge=1, description="only so many layers, the topmost; what lies below stands still"
    )
    alignment: AlignmentConfig = AlignmentConfig()

    @model_validator(mode="after")
    def _has_a_partner(self) -> Self:
        if self.alignment.partner == "frozen" and self.num_trained_layers is None:
            raise ValueError(
                "alignment.partner frozen needs num_trained_layers, found null: set how many layers are trained"
            )
        return self
