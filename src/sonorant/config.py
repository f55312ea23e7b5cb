"""Every choice a user can make, one frozen section per step; params.yaml mirrors this file.

A section refuses unknown keys and impossible values, so a typing error is found before any work is done.
`num_workers` says how the work is done, not what is made: it is left out of a section's dump and so never changes
an artifact or its provenance.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Split = Literal["train", "dev", "test"]
Share = Annotated[float, Field(ge=0, le=1)]
Workers = Annotated[int, Field(ge=0, exclude=True, description="processes or threads; 0 means one per core")]


class Section(BaseModel):
    """A frozen set of choices that refuses what it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


# ---------------------------------------------------------------------------------------------------- prepare


class SourceSection(Section):
    """What every source of speech has in common."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", description="written into every cut as its corpus")
    splits: tuple[Split, ...] = Field(
        ("train", "dev", "test"), min_length=1, description="the splits to keep"
    )
    dev_share: Share = 0.1
    test_share: Share = 0.1

    @model_validator(mode="after")
    def _leaves_training_speech(self) -> Self:
        if self.dev_share + self.test_share >= 1:
            raise ValueError(
                f"dev_share + test_share is {self.dev_share + self.test_share:g}, wanted below 1: lower one of them"
            )
        return self


class SyntheticSource(SourceSection):
    """The built-in corpus: spoken scene descriptions, an image each, exact phone and word times."""

    kind: Literal["synthetic"] = "synthetic"
    name: str = Field("synthetic", pattern=r"^[a-z0-9][a-z0-9_-]*$")
    num_utterances: int = Field(400, ge=1)
    num_speakers: int = Field(20, ge=3, le=60)
    voice: Literal["auto", "espeak", "tones"] = Field(
        "auto", description="auto: espeak where espeakng-loader is installed, else tones"
    )
    seed: int = 0


class ManifestSource(SourceSection):
    """A JSONL manifest: id, path (relative to the manifest), speaker, split, text, words, phones, image."""

    kind: Literal["manifest"] = "manifest"
    path: Path


class LibrispeechSource(SourceSection):
    """LibriSpeech's folder layout: subset/speaker/chapter/*.flac and *.trans.txt; dev-* and test-* keep their split."""

    kind: Literal["librispeech"] = "librispeech"
    path: Path


class FolderSource(SourceSection):
    """Any tree of audio files; a file's parent folder is its speaker."""

    kind: Literal["folder"] = "folder"
    path: Path


class LhotseSource(SourceSection):
    """Existing lhotse cuts: a manifest (.jsonl, .jsonl.gz) or a Shar folder."""

    kind: Literal["lhotse"] = "lhotse"
    path: Path


Source = Annotated[
    SyntheticSource | ManifestSource | LibrispeechSource | FolderSource | LhotseSource,
    Field(discriminator="kind"),
]


class PrepareConfig(Section):
    """Which speech, and what is refused."""

    sources: tuple[Source, ...] = Field(min_length=1)
    min_seconds: float = Field(0.4, ge=0.1)
    max_seconds: float = Field(30.0, gt=0)
    max_refused_share: Share = Field(0.1, description="more refused rows than this and the step fails")
    seed: int = 0
    num_workers: Workers = 0

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        if self.min_seconds >= self.max_seconds:
            raise ValueError(
                f"min_seconds {self.min_seconds:g} must be below max_seconds {self.max_seconds:g}: change one"
            )
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            raise ValueError(f"source names {names} must differ: give each source its own name")
        return self


# ---------------------------------------------------------------------------------------------------- cluster


class ClusterConfig(Section):
    """Which frames are clustered, and into how many units."""

    layer: int | None = Field(
        None, ge=0, description="None: 39-dim MFCC; else that layer of the given encoder"
    )
    num_units: int = Field(100, ge=2, le=32_767)
    normalise: Literal["none", "corpus", "utterance", "utterance_mean"] = Field(
        "none",
        description="per dimension: not at all, over the training frames, within each utterance, or its mean alone",
    )
    context_frames: int = Field(0, ge=0, le=10, description="neighbours on each side that a frame is clustered with")
    max_frames: int = Field(
        2_000_000, ge=1, description="training frames k-means is fitted on, drawn by utterance"
    )
    num_restarts: int = Field(3, ge=1)
    seed: int = 0
    num_workers: Workers = 0


# --------------------------------------------------------------------------------------------------- pretrain


class EncoderConfig(Section):
    """The shared speech encoder. The defaults are data2vec-audio base (pretraining.md §0)."""

    stem_channels: Annotated[int, Field(ge=1)] | tuple[Annotated[int, Field(ge=1)], ...] = Field(
        512, description="of all seven convolutions, or of each"
    )
    stem_norm: Literal["layer", "group"] = Field(
        "layer", description="group: GroupNorm after the first convolution only"
    )
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
        if self.dim % self.num_heads:
            raise ValueError(
                f"dim {self.dim} is not divisible by num_heads {self.num_heads}: change one of them"
            )
        if self.dim % self.position_groups:
            raise ValueError(
                f"dim {self.dim} is not divisible by position_groups {self.position_groups}: change one"
            )
        if self.position_depth > 1 and self.pre_norm:
            raise ValueError(
                "pre_norm true needs position_depth 1: transformers has no model with both: change one"
            )
        if self.position_depth > 1 and self.position_kernel % 2 == 0:
            raise ValueError(
                f"position_kernel {self.position_kernel} must be odd where position_depth is above 1"
            )
        return self


class MaskingConfig(Section):
    """Span masks over frames (pretraining.md §0)."""

    share: Share = Field(0.65, description="p: ⌊p·T/length + u⌋ spans start in T frames")
    length: int = Field(10, ge=1)
    equalise: bool = Field(False, description="un-mask down to the batch's smallest count, as fairseq does")


class PerturbationConfig(Section):
    """How far training speech is changed while its units stay; zeros leave it as it is."""

    max_warp: float = Field(0.0, ge=0, le=0.5, description="0.15: played 1/1.15 to 1.15 times as fast, pitch included")
    max_tilt: float = Field(0.0, ge=0, lt=1, description="range of the coefficient of a one-tap filter")
    noise_share: Share = Field(0.0, description="of the crops; half of these get white noise, half other speech")
    min_snr_db: float = 0.0
    max_snr_db: float = 30.0

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if self.min_snr_db > self.max_snr_db:
            raise ValueError(f"min_snr_db {self.min_snr_db:g} exceeds max_snr_db {self.max_snr_db:g}: swap them")
        return self


class TeacherConfig(Section):
    """The EMA copy of the encoder that makes online targets."""

    num_layers: int = Field(8, ge=1, description="K: the targets are read from the last K layers")
    start_decay: Share = 0.999
    end_decay: Share = 0.9999
    ramp_updates: int = Field(30_000, ge=0)


class UnitsConfig(Section):
    """The classification of frames into offline units."""

    unmasked_weight: float = Field(0.0, ge=0, description="weight of the frames that were not masked")


class Phase(Section):
    """A share of the updates with one set of task weights. A weight of zero turns a task off."""

    share: float = Field(1.0, gt=0, le=1)
    weights: dict[Literal["units", "teacher"], Annotated[float, Field(ge=0)]]

    @model_validator(mode="after")
    def _trains_something(self) -> Self:
        if not any(self.weights.values()):
            raise ValueError(f"weights {self.weights} are all zero: give at least one task a weight above 0")
        return self


class OptimConfig(Section):
    """AdamW with a tri-stage learning rate: warm-up, hold, exponential decay."""

    learning_rate: float = Field(5e-4, gt=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.98, ge=0, lt=1)
    eps: float = Field(1e-6, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    warmup_share: Share = 0.03
    decay_share: Share = 0.07
    start_scale: Share = 0.01
    final_scale: Share = 0.01
    max_grad_norm: float | None = Field(None, gt=0, description="None: no clipping")

    @model_validator(mode="after")
    def _stages_fit(self) -> Self:
        if self.warmup_share + self.decay_share > 1:
            raise ValueError(
                f"warmup_share + decay_share is {self.warmup_share + self.decay_share:g}, wanted at most 1: lower one"
            )
        return self


class BatchingConfig(Section):
    """How much audio an update sees."""

    batch_seconds: float = Field(
        3800.0, gt=0, description="audio per update, over all ranks and micro-batches"
    )
    crop_seconds: float = Field(20.0, ge=0.1, description="longer utterances are cropped on the frame grid")
    start_crops: bool = Field(
        False, description="crop from the start, as MT4SSL's code does, instead of at random"
    )
    micro_batches: int = Field(
        1, ge=1, description="gradient accumulation: parts an update's audio is computed in"
    )


class GuardConfig(Section):
    """When training is stopped because it has failed (pretraining.md §2.3). Spreads are those of one micro-batch."""

    after_updates: int = Field(5_000, ge=0)
    min_target_std: float = Field(0.1, ge=0)
    min_prediction_std: float = Field(0.01, ge=0)


class PretrainConfig(Section):
    """A recipe: a row of task weights per phase, and everything around it."""

    num_updates: int = Field(400_000, ge=1)
    phases: tuple[Phase, ...] = Field(min_length=1)
    encoder: EncoderConfig = EncoderConfig()
    masking: MaskingConfig = MaskingConfig()
    perturbation: PerturbationConfig = PerturbationConfig()
    units: UnitsConfig = UnitsConfig()
    teacher: TeacherConfig = TeacherConfig()
    optim: OptimConfig = OptimConfig()
    batching: BatchingConfig = BatchingConfig()
    guard: GuardConfig = GuardConfig()
    precision: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="autocast; float32 where the device is a CPU"
    )
    seed: int = 0
    log_every: int = Field(50, ge=1)
    checkpoint_every: int = Field(5_000, ge=1)
    keep_checkpoints: int = Field(2, ge=1)

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        total = sum(phase.share for phase in self.phases)
        if abs(total - 1) > 1e-6:
            raise ValueError(f"phases' shares sum to {total:g}, wanted 1: change the shares")
        if self.teacher.num_layers > self.encoder.num_layers:
            raise ValueError(
                f"teacher.num_layers {self.teacher.num_layers} exceeds encoder.num_layers "
                f"{self.encoder.num_layers}: lower it"
            )
        return self


# ---------------------------------------------------------------------------------------------------- publish


class PublishConfig(Section):
    """Which layer becomes embeddings, and its final codebook."""

    layer: int | None = Field(
        None, ge=0, description="None: the layer whose units tell most about dev phones"
    )
    network: Literal["student", "teacher"] = "student"
    num_units: int = Field(100, ge=2, le=32_767)
    normalise: Literal["none", "corpus", "utterance_mean"] = Field(
        "utterance_mean",
        description="per dimension: not at all, over the training frames, or each utterance's mean taken away",
    )
    max_frames: int = Field(1_000_000, ge=1)
    num_restarts: int = Field(3, ge=1)
    licence: str = Field(
        "unknown: set publish.licence to that of your data", description="written into the model card"
    )
    seed: int = 0


# --------------------------------------------------------------------------------------------------- evaluate


class EvaluateConfig(Section):
    """What is measured, on whom."""

    split: Split = "test"
    source: str | None = Field(None, description="only this source's utterances; None: all")
    abx_max_items: int = Field(10, ge=2, description="items drawn per phone, context and speaker")
    abx_max_speakers: int = Field(5, ge=1, description="other speakers drawn per cell in across-speaker ABX")
    num_examples: int = Field(4, ge=0, description="utterances drawn in the report")
    seed: int = 0
    num_workers: Workers = 0


SECTIONS: dict[str, type[Section]] = {
    "prepare": PrepareConfig,
    "cluster": ClusterConfig,
    "pretrain": PretrainConfig,
    "publish": PublishConfig,
    "evaluate": EvaluateConfig,
}
