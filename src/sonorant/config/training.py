"""What every training step has: tasks, their weights, and how they are trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

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

OWNERS = {"grounding": "ground", "alignment": "align"}
"""Tasks that one step alone brings the data for."""
TAUGHT = frozenset({"teacher", "codebooks"})
"""Tasks that read a teacher."""


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
    min_effective_rank: float = Field(1.5, ge=0, description="of alignment's frames: 1 where all lie on one line")


class LaunchConfig(Section):
    """Where a run's processes are and how many: one that does all, torchrun's on this machine, a TrainJob's pods."""

    launcher: Literal["process", "torchrun", "trainjob"] = Field(
        "process", description="trainjob: Kubeflow Trainer, from a pod or wherever kubectl works"
    )
    num_processes: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto", description="of a machine; auto: one a GPU, and one where there is none"
    )
    num_nodes: int = Field(1, ge=1, description="machines of a TrainJob")
    num_gpus: int = Field(1, ge=0, description="that the cluster gives a machine; 0: CPUs alone")
    cpu: str = Field("12", description="that the cluster gives a machine of a TrainJob, as Kubernetes counts")
    memory: str = Field("64Gi", description="likewise")
    hours: float = Field(240.0, gt=0, description="after which torchrun or the TrainJob is ended, its checkpoints kept")
    namespace: str | None = Field(None, description="of the TrainJob; None: the pod's own, or the kubeconfig's")
    runtime: str = Field("sonorant-torch", description="the (Cluster)TrainingRuntime that describes a TrainJob's pods")
    image: str | None = Field(None, description="None: the runtime's")

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if self.launcher == "process" and self.num_processes not in ("auto", 1):
            raise ValueError(
                f"launcher process does not go with num_processes {self.num_processes}: "
                "set launcher torchrun, or num_processes auto"
            )
        if self.launcher != "trainjob" and self.num_nodes > 1:
            raise ValueError(
                f"launcher {self.launcher} does not go with num_nodes {self.num_nodes}: "
                "set launcher trainjob, or num_nodes 1"
            )
        if self.launcher == "trainjob" and 0 < self.num_gpus < self.processes_per_node:
            raise ValueError(
                f"num_processes {self.num_processes} exceeds num_gpus {self.num_gpus}, wanted a GPU each: change one"
            )
        return self

    @property
    def processes_per_node(self) -> int:
        """Of a TrainJob's machine."""
        return max(self.num_gpus, 1) if self.num_processes == "auto" else self.num_processes

    @property
    def num_own_gpus(self) -> int:
        """GPUs that the step's own pod needs: none where a TrainJob's pods do the work."""
        return 0 if self.launcher == "trainjob" else self.num_gpus


class TrainConfig(Section):
    """A recipe: a row of task weights per phase, and everything around it but the encoder."""

    step: ClassVar[str]
    """Whose section this is."""

    num_updates: int = Field(400_000, ge=1)
    phases: tuple[Phase, ...] = Field(min_length=1)
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
    num_trained_layers: int | None = Field(
        None, ge=0, description="only so many layers, the topmost, and what the tasks own; None: the whole encoder"
    )
    launch: LaunchConfig = Field(LaunchConfig(), exclude=True, description="who does the work; never what is made")
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
        for name, step in OWNERS.items():
            if name in self.tasks and step != self.step:
                raise ValueError(f"phases give {name} a weight, which the step {step} alone can train: set it there")
        if "diversity" in self.tasks and self.contrast.targets != "quantised":
            raise ValueError('diversity needs codes: found contrast.targets "projected", wanted "quantised": set that')
        if self.sharding == "full" and (self.log_gradients or self.balance.at):
            raise ValueError(
                "sharding full cannot compare tasks' gradients, of which each rank has a part: "
                "unset log_gradients and balance.at, or sharding"
            )
        return self

    def check_encoder(self, encoder: EncoderConfig) -> None:
        """ValueError where the recipe wants layers that an encoder of this shape has not."""
        layers = encoder.num_layers
        for name, found in self.layers.items():
            if found > layers:
                raise ValueError(f"{name} {found} exceeds encoder.num_layers {layers}: lower it")

    @property
    def layers(self) -> Mapping[str, int]:
        """The deepest layers, and numbers of layers, that the recipe names."""
        return {
            "teacher.num_layers": self.teacher.num_layers if self.tasks & TAUGHT else 0,
            "teacher.layers": max(self.teacher.layers or (0,)),
            "spectrum.layer": self.spectrum.layer or 0,
            "num_trained_layers": self.num_trained_layers or 0,
        }

    @property
    def tasks(self) -> frozenset[str]:
        """Those with a weight above zero at some time."""
        return frozenset[str]().union(*(phase.tasks for phase in self.phases))
