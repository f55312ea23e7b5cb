"""An utterance and its perturbed copy brought together, frame by frame (LASER, SCORE; alignment.md §2)."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from sonorant.config.section import Section

Speed = Annotated[float, Field(ge=0.3, le=3, multiple_of=0.01)]


class AlignmentConfig(Section):
    """How the copy is made, how it is compared, and what keeps frames apart. A term of weight zero is not computed."""

    speeds: tuple[Speed, ...] = Field((0.9, 1.0, 1.1), min_length=1, description="the copy's, one drawn for each")
    semitones: float = Field(2.0, ge=0, le=12, description="the copy is as much higher or lower")
    partner: Literal["student", "frozen"] = Field(
        "student", description="of an utterance: its copy; frozen (SCORE): the copy, heard by the encoder as it was"
    )
    dim: int = Field(256, ge=1, description="of the head, which is dropped in the end")
    gamma: float = Field(0.1, gt=0, description="γ: soft-DTW's temperature")
    radius: int | None = Field(None, ge=2, description="frames that a path may lie off the diagonal; None: any")
    divergence: float = Field(0.0, ge=0, description="weight of the soft-DTW divergence (LASER's form)")
    divergence_per_frame: float = Field(
        1.0, ge=0, description="of the same, divided by both lengths (SCORE's form): whatever the length"
    )
    repulsion: float = Field(0.0, ge=0, description="α: of the temporal regulariser, times in frames (LASER's form)")
    repulsion_relative: float = Field(
        0.4, ge=0, description="of the same with distances in utterances and a mean over pairs: whatever the length"
    )
    margin: float = Field(1.0, gt=0, description="λ: frames of an utterance farther apart than this are left alone")
    window: int = Field(0, ge=0, description="σ: frames nearer in time than this are drawn together; 0: none")

    @model_validator(mode="after")
    def _compares_something(self) -> Self:
        if not self.divergence + self.divergence_per_frame:
            raise ValueError("divergence and divergence_per_frame are both 0, wanted one above 0: raise one")
        return self
