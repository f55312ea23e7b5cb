"""What pulls on the encoder: settings of every task and of the targets it reads."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from sonorant.config.section import Section, Share


class TeacherConfig(Section):
    """The EMA copy of the encoder that makes online targets."""

    num_layers: int = Field(8, ge=1, description="K: the targets are read from the last K layers")
    layers: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        None, min_length=1, description="read from these layers instead, counted from 1"
    )
    start_decay: Share = 0.999
    end_decay: Share = 0.9999
    ramp_updates: int = Field(30_000, ge=0)
    freeze_at: int | None = Field(None, ge=0, description="updates after which the teacher stands still")

    def targets(self, num_layers: int) -> tuple[int, ...]:
        """The layers that targets are read from, of an encoder with so many."""
        return self.layers or tuple(range(num_layers - self.num_layers + 1, num_layers + 1))


class UnitsConfig(Section):
    """The classification of frames into offline units."""

    unmasked_weight: float = Field(0.0, ge=0, description="weight of the frames that were not masked")
    cosine_dim: int | None = Field(
        None, ge=1, description="None: a linear head; else HuBERT's: cosine to a unit's embedding in so many dimensions"
    )
    temperature: float = Field(0.1, gt=0, description="of the cosine head")


class CodebooksConfig(Section):
    """Online codebooks, one per target layer of the teacher (pretraining.md §1)."""

    num_codes: int = Field(256, ge=2)
    decay: Share = Field(0.9, description="τ: what a code that is hit keeps of its past")
    freeze_at: int | None = Field(None, ge=0, description="updates after which the codebooks stand still (τ = 1)")
    init: Literal["normalised", "small"] = Field(
        "normalised", description="normalised: codewords as long as target frames; small: N(0, 1/√V)"
    )
    reads: Literal["last", "own"] = Field(
        "last", description="heads read the student's last layer, or (SpidR) each the layer its targets come from"
    )


class ContrastConfig(Section):
    """Tell the true target of a masked frame from those of other masked frames of the same utterance."""

    targets: Literal["quantised", "projected"] = Field(
        "quantised", description="of the un-masked frame: its Gumbel quantisation, or a projection without gradient"
    )
    dim: int = Field(256, ge=1)
    num_negatives: int = Field(100, ge=1)
    min_distance: int = Field(1, ge=1, description="frames nearer than this are no negatives")
    temperature: float = Field(0.1, gt=0)


class QuantiserConfig(Section):
    """The Gumbel product quantiser of wav2vec 2.0, its temperature annealed at every update."""

    num_groups: int = Field(2, ge=1)
    num_codes: int = Field(320, ge=2, description="in each group")
    dim: int = Field(256, ge=1, description="of all groups together")
    start_temperature: float = Field(2.0, gt=0)
    end_temperature: float = Field(0.5, gt=0)
    temperature_decay: float = Field(0.999995, gt=0, le=1, description="a factor per update")

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        if self.dim % self.num_groups:
            raise ValueError(f"dim {self.dim} is not divisible by num_groups {self.num_groups}: change one of them")
        return self


class WaveformConfig(Section):
    """The waveform rebuilt from the stem's frames by its mirror image."""

    channels: int | None = Field(None, ge=1, description="of the decoder; None: the stem's own, mirrored")


class SpectrumConfig(Section):
    """Log-power spectrum and MFCC predicted from a middle layer of the clean view."""

    layer: int | None = Field(None, ge=1, description="None: the middle one")
    hidden_dim: int = Field(256, ge=1)


class UtteranceConfig(Section):
    """Two disjoint halves of an utterance know one another among those of the whole update."""

    dim: int = Field(256, ge=1)
    temperature: float = Field(0.1, gt=0)
    same_speaker_negatives: bool = Field(False, description="whether a speaker's other utterances are negatives")
    other_source_negatives: bool = Field(
        False, description="whether utterances of another source are: their channel alone would tell them apart"
    )
    max_gain_db: float = Field(6.0, ge=0, description="each half is made louder or quieter by up to this")
    min_snr_db: float = Field(10.0, description="least signal-to-noise ratio of the noise added to each half")
    max_snr_db: float = 40.0

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if self.min_snr_db > self.max_snr_db:
            raise ValueError(f"min_snr_db {self.min_snr_db:g} exceeds max_snr_db {self.max_snr_db:g}: swap them")
        return self
