"""Every choice a user can make, one frozen section per step; params.yaml mirrors this file.

A section refuses unknown keys and impossible values, so a typing error is found before any work is done.
What says how the work is done, not what is made (`num_workers`, `micro_batches`, `checkpointing`, `sharding`) is left
out of a section's dump and so never changes an artifact or its provenance, and a run goes on with other values of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

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


TaskName = Literal[
    "units", "teacher", "codebooks", "contrast", "diversity", "magnitude", "waveform", "spectrum", "utterance"
]
NonNegative = Annotated[float, Field(ge=0)]


class LinearWeight(Section):
    """A weight that goes from `start` to `end` over its phase."""

    start: NonNegative
    end: NonNegative

    def weight(self, done: float) -> float:
        """The weight when this share of the phase is done."""
        return self.start + done * (self.end - self.start)


class StepWeight(Section):
    """A weight that jumps: values[i + 1] holds from share `at[i]` of its phase on."""

    values: tuple[NonNegative, ...] = Field(min_length=2)
    at: tuple[Share, ...]

    @model_validator(mode="after")
    def _is_a_staircase(self) -> Self:
        if len(self.values) != len(self.at) + 1 or list(self.at) != sorted(self.at):
            raise ValueError(
                f"weight has values {self.values} at {self.at}, wanted rising shares and one value more: change one"
            )
        return self

    def weight(self, done: float) -> float:
        """The weight when this share of the phase is done."""
        return self.values[sum(done >= share for share in self.at)]


class Phase(Section):
    """A share of the updates with one row of task weights. A weight of zero turns a task off."""

    share: float = Field(1.0, gt=0, le=1)
    weights: dict[TaskName, NonNegative | LinearWeight | StepWeight]

    @model_validator(mode="after")
    def _trains_something(self) -> Self:
        if not self.tasks:
            raise ValueError(f"weights {self.weights} are all zero: give at least one task a weight above 0")
        # Between its start and its jumps a weight is zero throughout or nowhere, but for where a line ends.
        jumps = {at for weight in self.weights.values() if isinstance(weight, StepWeight) for at in weight.at}
        if not all(any(self.weights_at(done).values()) for done in {0.0, *jumps} - {1.0}):
            raise ValueError("weights are all zero for a part of the phase: end the phase there or raise one")
        return self

    @property
    def tasks(self) -> frozenset[str]:
        """Those with a weight above zero at some time."""
        peaks = {
            name: max(weight.start, weight.end)
            if isinstance(weight, LinearWeight)
            else max(weight.values)
            if isinstance(weight, StepWeight)
            else weight
            for name, weight in self.weights.items()
        }
        return frozenset(name for name, peak in peaks.items() if peak)

    def weights_at(self, done: float) -> dict[str, float]:
        """Every task's weight when this share of the phase is done."""
        return {
            name: weight if isinstance(weight, float | int) else weight.weight(done)
            for name, weight in self.weights.items()
        }


class BalanceConfig(Section):
    """Weights rescaled so that each says how hard its task pulls on the shared encoder: norm of weight · gradient."""

    at: int | None = Field(None, ge=1, description="once after so many updates; None: never")
    every: int = Field(0, ge=0, description="and again after every so many; 0: only once")


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

    batch_seconds: float = Field(
        3800.0, gt=0, description="audio per update, over all ranks and micro-batches"
    )
    crop_seconds: float = Field(20.0, ge=0.1, description="longer utterances are cropped on the frame grid")
    start_crops: bool = Field(
        False, description="crop from the start, as MT4SSL's code does, instead of at random"
    )
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


# ---------------------------------------------------------------------------------------------------- rounds


class Second(Section):
    """What the second round changes in the sections `cluster` and `pretrain`: laid over them, key by key."""

    cluster: dict[str, Any] = Field({}, description="must choose a layer of the first round's encoder")
    pretrain: dict[str, Any] = {}


class Rounds(Section):
    """How often the corpus is clustered and an encoder pretrained on the units; one model comes of the last round."""

    rounds: int = Field(1, ge=1, le=2, strict=True)
    second: Second = Second()
