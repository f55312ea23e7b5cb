"""The shapes of the shared speech encoder."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from sonorant.config.section import Section, Share


class EncoderConfig(Section):
    """The shared speech encoder. The defaults are data2vec-audio base (pretraining.md §0)."""

    stem_channels: Annotated[int, Field(ge=1)] | tuple[Annotated[int, Field(ge=1)], ...] = Field(
        512, description="of all seven convolutions, or of each"
    )
    stem_norm: Literal["layer", "group"] = Field(
        "layer", description="group: GroupNorm after the first convolution only"
    )
    stem_bias: bool = Field(False, description="convolutions with a bias, as in the large HuBERT and wav2vec 2.0")
    standardised: bool = Field(
        True, description="waves are brought to mean 0 and variance 1; false: heard as recorded (some opened models)"
    )
    projection_norm: bool = Field(True, description="LayerNorm before the projection; false: DistilHuBERT")
    dim: int = Field(768, ge=1)
    num_layers: int = Field(12, ge=1)
    num_heads: int = Field(12, ge=1)
    ffn_dim: int = Field(3072, ge=1)
    pre_norm: bool = False
    position_depth: int = Field(
        5, ge=1, description="1: one weight-normalised convolution; more: stacked, each with a norm"
    )
    position_kernel: int = Field(19, ge=1)
    position_groups: int = Field(16, ge=1)
    relative_buckets: int = Field(
        0, ge=0, description="of distances, for WavLM's gated attention bias: 320 there; 0: no such bias"
    )
    relative_max_distance: int = Field(800, ge=1, description="frames: all that is farther shares the last bucket")
    dropout: Share = 0.1
    attention_dropout: Share = 0.1
    ffn_dropout: Share = 0.0
    layer_drop: Share = 0.05

    @property
    def stem_widths(self) -> tuple[int, ...]:
        """Channels of each of the stem's seven convolutions."""
        return (self.stem_channels,) * 7 if isinstance(self.stem_channels, int) else self.stem_channels

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        if len(self.stem_widths) != 7:
            raise ValueError(f"stem_channels has {len(self.stem_widths)} entries, wanted 7, one a convolution")
        if self.position_depth > 1 and self.stem_norm == "group":
            raise ValueError("stem_norm group needs position_depth 1: transformers has no model with both: change one")
        if self.position_depth > 1 and self.relative_buckets:
            raise ValueError("relative_buckets above 0 needs position_depth 1, as WavLM has: change one")
        if not self.projection_norm and (self.position_depth > 1 or self.relative_buckets):
            raise ValueError(
                "projection_norm false needs position_depth 1 and relative_buckets 0: only HubertModel goes without it"
            )
        if self.relative_buckets and not 4 <= self.relative_buckets < 4 * self.relative_max_distance:
            raise ValueError(
                f"relative_buckets {self.relative_buckets} must be 0, or from 4 to below 4 · relative_max_distance "
                f"{self.relative_max_distance}: change one"
            )
        if self.dim % self.num_heads:
            raise ValueError(f"dim {self.dim} is not divisible by num_heads {self.num_heads}: change one of them")
        if self.dim % self.position_groups:
            raise ValueError(f"dim {self.dim} is not divisible by position_groups {self.position_groups}: change one")
        if self.position_depth > 1 and self.pre_norm:
            raise ValueError("pre_norm true needs position_depth 1: transformers has no model with both: change one")
        if self.position_depth > 1 and self.position_kernel % 2 == 0:
            raise ValueError(f"position_kernel {self.position_kernel} must be odd where position_depth is above 1")
        return self
