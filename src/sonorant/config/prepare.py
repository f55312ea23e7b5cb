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


class ImagedSource(SourceSection):
    """A source whose speech may speak of images."""

    split_by: Literal["speaker", "image"] = Field(
        "speaker",
        description="speaker: none is in two splits; image: none is, but speakers may be, as the field's sets have it",
    )


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


class ManifestSource(ImagedSource):
    """A JSONL manifest: id, path (relative to the manifest), speaker, split, text, words, phones, image, emotion."""

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


class LhotseSource(ImagedSource):
    """Existing lhotse cuts: a manifest (.jsonl, .jsonl.gz) or a Shar folder."""

    kind: Literal["lhotse"] = "lhotse"
    path: Path


class CaptionFile(Section):
    """One JSON file of spoken captions."""

    name: Path = Field(description="relative to the source's path")
    split: Split | None = Field(None, description="of all its captions; None: as each says, else drawn")


class SpokenCaptionsSource(ImagedSource):
    """Images with spoken captions, in the JSON files of SpokenCOCO, of Places Audio or of Flickr8k.

    Karpathy's file of Flickr8k's images names no audio: its captions are those of `wav2capt.txt` and `wav2spk.txt` in
    the folder `audio`, and their recordings lie in `wavs/` there.
    """

    kind: Literal["spoken_captions"] = "spoken_captions"
    path: Path = Field(description="the folder that all other paths begin at")
    files: tuple[CaptionFile, ...] = Field(min_length=1)
    audio: Path | None = Field(None, description="where recordings lie; None: the file's audio_base_path, else path")
    images: Path | None = Field(None, description="where images lie; None: the file's image_base_path, else path")


Source = Annotated[
    SyntheticSource | ManifestSource | LibrispeechSource | FolderSource | LhotseSource | SpokenCaptionsSource,
    Field(discriminator="kind"),
]


class PrepareConfig(Section):
    """Which speech, and what is refused."""

    sources: tuple[Source, ...] = Field(min_length=1)
    min_seconds: float = Field(0.4, ge=0.1)
    max_seconds: float = Field(30.0, gt=0)
    # Above this, what reads an image later (Pillow) would take it for an attack.
    max_pixels: int = Field(50_000_000, ge=1, le=89_000_000, description="of an image; larger ones are refused")
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
