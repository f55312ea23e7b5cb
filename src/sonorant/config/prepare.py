"""Which speech, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from sonorant.config.section import Section, Share, Split, Workers


class SourceSection(Section):
    """What every source of speech has in common."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", description="written into every cut as its corpus")
    splits: tuple[Split, ...] = Field(("train", "dev", "test"), min_length=1, description="the splits to keep")
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


class Part(Section):
    """One of `count` parts of all rows, as equal as blocks of rows allow."""

    index: int = Field(0, ge=0)
    count: int = Field(1, ge=1, le=10_000)

    @model_validator(mode="after")
    def _is_one_of_them(self) -> Self:
        if self.index >= self.count:
            raise ValueError(f"index {self.index} must be below count {self.count}: parts are counted from 0")
        return self


class ConvertConfig(PrepareConfig):
    """The section `prepare`, and which part of its rows to take."""

    part: Part
