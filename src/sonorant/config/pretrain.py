"""A recipe: the encoder, its tasks, their weights, and how they are trained."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from sonorant.config.encoder import EncoderConfig
from sonorant.config.section import Section, Share
from sonorant.config.tasks import (
    CodebooksConfig,
    ContrastConfig,
    QuantiserConfig,
    SpectrumConfig,
    TeacherConfig,
    UnitsConfig,
    UtteranceConfig,
    WaveformConfig,
)
from sonorant.config.weights import BalanceConfig, Phase


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


class StemConfig(Section):
    """How the stem is trained. A frozen stem takes its projection with it."""

    gradient: float = Field(1.0, ge=0, le=1, description="the gradient that enters it is multiplied by this")
    freeze_at: int | None = Field(None, ge=0, description="updates after which `freeze` holds")
    freeze: Literal["none", "freeze", "copy"] = Field(
        "none", description="freeze: it stands still; copy: the teacher goes on with a copy that does"
    )

    @model_validator(mode="after")
    def _is_told_when(self) -> Self:
        if (self.freeze == "none") != (self.freeze_at is None):
            raise ValueError(
                f"stem.freeze {self.freeze} does not go with stem.freeze_at {self.freeze_at}: set both or neither"
            )
        return self


class OptimConfig(Section):
    """AdamW with a tri-stage learning rate: warm-up, hold, decay."""

    learning_rate: float = Field(5e-4, gt=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.98, ge=0, lt=1)
    eps: float = Field(1e-6, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    warmup_share: Share = 0.03
    decay_share: Share = 0.07
    start_scale: Share = 0.01
    decay: Literal["exponential", "linear"] = "exponential"
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

    batch_seconds: float = Field(3800.0, gt=0, description="audio per update, over all ranks and micro-batches")
    crop_seconds: float = Field(20.0, ge=0.1, description="longer utterances are cropped on the frame grid")
    start_crops: bool = Field(False, description="crop from the start, as MT4SSL's code does, instead of at random")
    micro_batches: int = Field(
        1, ge=1, exclude=True, description="gradient accumulation: parts an update's audio is computed in"
    )
    length_buckets: int = Field(
        1, ge=1, description="1: any utterances together; more: an update's are of like length, of so many classes"
    )


class GuardConfig(Section):
    """When training is stopped because it has collapsed (pretraining.md §1.4 and §2.3)."""

    after_updates: int = Field(5_000, ge=0)
    min_target_std: float = Field(0.1, ge=0)
    min_prediction_std: float = Field(0.01, ge=0)
    min_perplexity: float = Field(2.0, ge=0, description="of online codes: codebooks and quantiser")


class PretrainConfig(Section):
    """A recipe: a row of task weights per phase, and everything around it."""

    num_updates: int = Field(400_000, ge=1)
    phases: tuple[Phase, ...] = Field(min_length=1)
    encoder: EncoderConfig = EncoderConfig()
    masking: MaskingConfig = MaskingConfig()
    perturbation: PerturbationConfig = PerturbationConfig()
    units: UnitsConfig = UnitsConfig()
    teacher: TeacherConfig = TeacherConfig()
    codebooks: CodebooksConfig = CodebooksConfig()
    contrast: ContrastConfig = ContrastConfig()
    quantiser: QuantiserConfig = QuantiserConfig()
    waveform: WaveformConfig = WaveformConfig()
    spectrum: SpectrumConfig = SpectrumConfig()
    utterance: UtteranceConfig = UtteranceConfig()
    stem: StemConfig = StemConfig()
    balance: BalanceConfig = BalanceConfig()
    optim: OptimConfig = OptimConfig()
    batching: BatchingConfig = BatchingConfig()
    guard: GuardConfig = GuardConfig()
    precision: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="autocast; float32 where the device is a CPU"
    )
    checkpointing: bool = Field(
        False, exclude=True, description="activations are made again for the backward pass: more work, less memory"
    )
    sharding: Literal["none", "full"] = Field(
        "none", exclude=True, description="none: DDP, a copy a rank; full: FSDP2, where one device is too small"
    )
    seed: int = 0
    log_every: int = Field(50, ge=1)
    log_gradients: bool = Field(
        False, description="with every entry: each task's gradient norm on the encoder, and their cosines"
    )
    checkpoint_every: int = Field(5_000, ge=1)
    keep_checkpoints: int = Field(2, ge=1)

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        total = sum(phase.share for phase in self.phases)
        if abs(total - 1) > 1e-6:
            raise ValueError(f"phases' shares sum to {total:g}, wanted 1: change the shares")
        if not self.encoder.standardised:
            raise ValueError("encoder.standardised false: pretraining standardises its waves: leave it true")
        layers = self.encoder.num_layers
        for name, found in (
            ("teacher.num_layers", self.teacher.num_layers),
            ("teacher.layers", max(self.teacher.layers or (0,))),
            ("spectrum.layer", self.spectrum.layer or 0),
        ):
            if found > layers:
                raise ValueError(f"{name} {found} exceeds encoder.num_layers {layers}: lower it")
        if "diversity" in self.tasks and self.contrast.targets != "quantised":
            raise ValueError('diversity needs codes: found contrast.targets "projected", wanted "quantised": set that')
        if self.sharding == "full" and (self.log_gradients or self.balance.at):
            raise ValueError(
                "sharding full cannot compare tasks' gradients, of which each rank has a part: "
                "unset log_gradients and balance.at, or sharding"
            )
        return self

    @property
    def tasks(self) -> frozenset[str]:
        """Those with a weight above zero at some time."""
        return frozenset[str]().union(*(phase.tasks for phase in self.phases))

    @property
    def target_layers(self) -> tuple[int, ...]:
        """The teacher's layers that online targets are read from, counted from 1."""
        return self.teacher.targets(self.encoder.num_layers)
