"""Units, the published model and what is measured of it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sonorant.config.section import Section, Split, Workers


class ClusterConfig(Section):
    """Which frames are clustered, and into how many units."""

    layer: int | None = Field(None, ge=0, description="None: 39-dim MFCC; else that layer of the given encoder")
    num_units: int = Field(100, ge=2, le=32_767)
    normalise: Literal["none", "corpus", "utterance", "utterance_mean"] = Field(
        "none",
        description="per dimension: not at all, over the training frames, within each utterance, or its mean alone",
    )
    context_frames: int = Field(0, ge=0, le=10, description="neighbours on each side that a frame is clustered with")
    max_frames: int = Field(2_000_000, ge=1, description="training frames k-means is fitted on, drawn by utterance")
    num_restarts: int = Field(3, ge=1)
    seed: int = 0
    num_workers: Workers = 0


class PublishConfig(Section):
    """Which layer becomes embeddings, and its final codebook."""

    layer: int | None = Field(None, ge=0, description="None: the layer whose units tell most about dev phones")
    network: Literal["student", "teacher"] = "student"
    num_units: int = Field(100, ge=2, le=32_767)
    normalise: Literal["none", "corpus", "utterance_mean"] = Field(
        "utterance_mean",
        description="per dimension: not at all, over the training frames, or each utterance's mean taken away",
    )
    max_frames: int = Field(1_000_000, ge=1)
    num_restarts: int = Field(3, ge=1)
    thumbnail_side: int = Field(
        64, ge=0, le=512, description="pixels of the small pictures kept of a grounded model's images; 0: none are"
    )
    licence: str = Field("unknown: set publish.licence to that of your data", description="written into the model card")
    seed: int = 0


ProbeName = Literal["phones", "text", "speaker", "word", "emotion"]
BaselineName = Literal["mfcc", "mfcc_centred", "untrained"]


class ProbeConfig(Section):
    """How a probe's head is fitted on frozen layers; defaults are for an hour of speech, SUPERB's are in brackets."""

    num_updates: int = Field(2_000, ge=1, description="[100,000; text 200,000]")
    learning_rate: float = Field(1e-3, gt=0, description="of Adam [tuned for each encoder]")
    batch_seconds: float = Field(60.0, gt=0, description="of speech at once, or one utterance")
    hidden_dim: int | None = Field(None, ge=1, description="None: 256, of text 1024, which are SUPERB's")
    evaluate_every: int = Field(100, ge=1, description="updates between looks at dev; the best one is kept")
    standardised: bool = Field(True, description="every dimension to mean 0, variance 1 [as it is]")


class EvaluateConfig(Section):
    """What is measured, on whom."""

    label: str = Field("", description="what the report is called beside others: in a study, its arm and seed")
    split: Split = "test"
    source: str | None = Field(None, description="only this source's utterances; None: all")
    items: str | None = Field(
        None,
        min_length=1,
        description="path of an .item file, relative to where the command runs, whose file names are utterance ids: "
        "ABX is scored on its items; None: on those of the corpus' phones",
    )
    abx_max_items: int = Field(10, ge=2, description="items drawn per phone, context and speaker")
    abx_max_speakers: int = Field(5, ge=1, description="other speakers drawn per cell in across-speaker ABX")
    max_changed: int = Field(
        100, ge=0, description="utterances drawn of which units are compared with those of changed copies; 0: none"
    )
    probes: dict[ProbeName, ProbeConfig] = Field(
        {},
        description="phones: linear CTC (PER); text: recurrent CTC (WER, CER); speaker, word (the whole text as one "
        "name) and emotion: named by the frames' mean. Heads learn on the train split, are chosen on dev",
    )
    baselines: tuple[BaselineName, ...] = Field(
        ("mfcc", "mfcc_centred", "untrained"), description="what the model is measured beside, probes included"
    )
    num_examples: int = Field(4, ge=0, description="utterances drawn in the report")
    seed: int = 0
    num_workers: Workers = 0
