"""Every choice a user can make, one frozen section per step; params.yaml mirrors this folder.

A section refuses unknown keys and impossible values, so a typing error is found before any work is done.
What says how the work is done, not what is made (`num_workers`, `micro_batches`, `checkpointing`, `sharding`,
`launch`) is left out of a section's dump and so never changes an artifact or its provenance, and a run goes on with
other values of it.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from sonorant.config.alignment import AlignmentConfig
from sonorant.config.encoder import EncoderConfig
from sonorant.config.grounding import GroundingConfig, ImageConfig
from sonorant.config.measure import ClusterConfig, EvaluateConfig, ProbeConfig, PublishConfig
from sonorant.config.prepare import (
    CaptionFile,
    ConvertConfig,
    FolderSource,
    LhotseSource,
    LibrispeechSource,
    ManifestSource,
    Part,
    PrepareConfig,
    Source,
    SpokenCaptionsSource,
    SyntheticSource,
)
from sonorant.config.pretrain import AlignConfig, GroundConfig, PretrainConfig
from sonorant.config.section import Section, Split
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
from sonorant.config.training import (
    BatchingConfig,
    GuardConfig,
    LaunchConfig,
    MaskingConfig,
    OptimConfig,
    PerturbationConfig,
    StemConfig,
    TrainConfig,
)
from sonorant.config.weights import BalanceConfig, LinearWeight, Phase, StepWeight, TaskName

__all__ = [
    "SECTIONS",
    "AlignConfig",
    "AlignmentConfig",
    "BalanceConfig",
    "BatchingConfig",
    "CaptionFile",
    "ClusterConfig",
    "CodebooksConfig",
    "ContrastConfig",
    "ConvertConfig",
    "EncoderConfig",
    "EvaluateConfig",
    "FolderSource",
    "GroundConfig",
    "GroundingConfig",
    "GuardConfig",
    "ImageConfig",
    "LaunchConfig",
    "LhotseSource",
    "LibrispeechSource",
    "LinearWeight",
    "ManifestSource",
    "MaskingConfig",
    "OptimConfig",
    "Part",
    "PerturbationConfig",
    "Phase",
    "PrepareConfig",
    "PretrainConfig",
    "ProbeConfig",
    "PublishConfig",
    "QuantiserConfig",
    "Rounds",
    "Second",
    "Section",
    "Source",
    "SpectrumConfig",
    "Split",
    "SpokenCaptionsSource",
    "StemConfig",
    "StepWeight",
    "SyntheticSource",
    "Takes",
    "TaskName",
    "TeacherConfig",
    "TrainConfig",
    "UnitsConfig",
    "UtteranceConfig",
    "WaveformConfig",
]

SECTIONS: dict[str, type[Section]] = {
    "prepare": PrepareConfig,
    "cluster": ClusterConfig,
    "pretrain": PretrainConfig,
    "ground": GroundConfig,
    "align": AlignConfig,
    "publish": PublishConfig,
    "evaluate": EvaluateConfig,
}


class Second(Section):
    """What the second round changes in the sections `cluster` and `pretrain`: laid over them, key by key."""

    cluster: dict[str, Any] = Field({}, description="must choose a layer of the first round's encoder")
    pretrain: dict[str, Any] = Field({})


class Rounds(Section):
    """How often the corpus is clustered and an encoder pretrained on the units; one model comes of the last round."""

    rounds: int = Field(1, ge=1, le=2, strict=True)
    second: Second = Second()


class Takes(Section):
    """Whose encoder a step takes; a step that none takes from is not run."""

    align: Literal["encoder", "grounded"] = Field("encoder", description="as pretrained, or grounded in images too")
    publish: Literal["encoder", "grounded", "aligned"] = "encoder"

    @property
    def steps(self) -> tuple[str, ...]:
        """The steps between pretraining and publishing, in order."""
        is_aligned = self.publish == "aligned"
        is_grounded = "grounded" in (self.publish, self.align if is_aligned else "")
        return (("ground",) if is_grounded else ()) + (("align",) if is_aligned else ())
