"""What goes over the wire: options in, answers and errors out."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Message(BaseModel):
    """A JSON object with exactly these fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class EncodedAudio(Message):
    """One audio file inside JSON."""

    audio: Annotated[str, Field(description="the bytes of a WAV, FLAC, Ogg or MP3 file in base64")]


class EmbeddingOptions(Message):
    """What to make of the audio; query parameters of /v1/embeddings."""

    layer: Annotated[
        int | None, Field(description="0 to num_layers of /v1/models; default: the published layer", ge=0)
    ] = None
    pooling: Annotated[Literal["none", "mean"], Field(description="none: one vector per frame; mean: one per file")] = (
        "none"
    )


class UnitOptions(Message):
    """What to make of the audio; query parameters of /v1/units."""

    deduplicate: Annotated[
        bool, Field(description="write a unit that repeats once, with its duration in milliseconds")
    ] = False


class Result(Message):
    """What one file gave; files keep the order of the request."""

    name: Annotated[str | None, Field(description="the file's name, where the request gave one")]
    seconds: Annotated[float, Field(description="duration of the audio")]
    num_frames: int


class Embedding(Result):
    """The embedding of one file."""

    embedding: Annotated[
        list[list[float]] | list[float],
        Field(description="num_frames vectors of dim values; with pooling=mean one vector"),
    ]


class Embeddings(Message):
    """The answer of /v1/embeddings."""

    model: str
    layer: int
    pooling: Literal["none", "mean"]
    dim: int
    frame_ms: Annotated[int, Field(description="milliseconds from one frame to the next")]
    results: list[Embedding]


class UnitSequence(Result):
    """The unit tokens of one file."""

    units: Annotated[list[int], Field(description="from 0 to num_units - 1; one per frame unless deduplicated")]
    durations_ms: Annotated[list[int] | None, Field(description="with deduplicate=true: how long each unit lasts")] = (
        None
    )


class Units(Message):
    """The answer of /v1/units."""

    model: str
    num_units: int
    frame_ms: Annotated[int, Field(description="milliseconds from one frame to the next")]
    results: list[UnitSequence]


class Model(Message):
    """A model that is loaded."""

    id: str
    layer: Annotated[int, Field(description="the published layer, from which units are made")]
    num_layers: int
    dim: int
    num_units: int
    frame_ms: int
    about: Annotated[dict[str, Any], Field(description="its provenance, as published")]


class Models(Message):
    """The answer of /v1/models."""

    models: list[Model]


class Health(Message):
    """The answer of /health/live and /health/ready."""

    status: Literal["live", "ready"]


class Fault(Message):
    """What went wrong."""

    code: str
    message: Annotated[str, Field(description="one line: the thing, the found value, the wanted value")]
    request_id: Annotated[str, Field(description="also in the header X-Request-ID and in the server's log")]


class ErrorEnvelope(Message):
    """The body of every answer that is not 200."""

    error: Fault
