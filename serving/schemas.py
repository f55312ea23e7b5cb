"""What goes over the wire: options in, answers and errors out."""

from __future__ import annotations

import base64
import io
import wave
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Seconds = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]


class Message(BaseModel):
    """A JSON object with exactly these fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def example_audio() -> str:
    """A tenth of a second of a tone as a WAV file in base64: 8 bits, 8 kHz."""
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(1)
        sound.setframerate(8_000)
        sound.writeframes(bytes(128 + 50 * (-1) ** (place // 8) for place in range(800)))
    return base64.b64encode(file.getvalue()).decode()


EXAMPLE_AUDIO = example_audio()


class EncodedAudio(Message):
    """One audio file inside JSON."""

    audio: Annotated[
        str, Field(description="the bytes of a WAV, FLAC, Ogg or MP3 file in base64", examples=[EXAMPLE_AUDIO])
    ]


class ModelOption(Message):
    """Which model is asked; a query parameter of all routes for speech."""

    model: Annotated[str | None, Field(description="one of /v1/models; default: the first", max_length=100)] = None


class Options(ModelOption):
    """What all routes that answer frame by frame take as query parameters."""

    start: Annotated[
        Seconds | None,
        Field(description="answer for frames centred from here on, seconds of each file", examples=[0.0]),
    ] = None
    end: Annotated[Seconds | None, Field(description="answer for frames centred before this", examples=[0.1])] = None


class EmbeddingOptions(Options):
    """What to make of the audio; query parameters of /v1/embeddings."""

    layer: Annotated[
        str,
        Field(
            description="0 to num_layers of /v1/models, or a name; weighted: the sum by layer_weights",
            max_length=100,
            json_schema_extra={"pattern": "^(0|[1-9][0-9]{0,2}|published|last|weighted)$"},
            examples=["published"],
        ),
    ] = "published"
    layer_weights: Annotated[
        str | None,
        Field(
            description="with layer=weighted: num_layers + 1 numbers with commas between; default: equal shares",
            max_length=4000,
        ),
    ] = None
    pooling: Annotated[
        Literal["none", "mean", "attentive"],
        Field(
            description="none: one vector a frame; mean: one a file; attentive: one a file, where the model has it",
            examples=["mean"],
        ),
    ] = "none"
    normalise: Annotated[
        Literal["none", "l2", "utterance"],
        Field(
            description="l2: every vector has length 1; utterance: every dimension has mean 0 and variance 1 over "
            "the frames that are answered",
            examples=["l2"],
        ),
    ] = "none"


class UnitOptions(Options):
    """What to make of the audio; query parameters of /v1/units."""

    deduplicate: Annotated[
        bool, Field(description="write a unit that repeats once, with its duration in milliseconds", examples=[True])
    ] = False


class SearchOptions(ModelOption):
    """How images are wanted; query parameters of /v1/images/search."""

    top: Annotated[
        int, Field(ge=1, le=100, description="images a file, the best first; all where there are fewer", examples=[3])
    ] = 10
    thumbnails: Annotated[
        bool, Field(description="with a small JPEG of each as a data URI, where the model has it", examples=[True])
    ] = False


class Result(Message):
    """What one file gave; files keep the order of the request."""

    name: Annotated[str | None, Field(description="the file's name, where the request gave one")]
    seconds: Annotated[float, Field(description="duration of the audio")]
    start_ms: Annotated[int, Field(description="where in the audio the first frame answered begins")]
    num_frames: Annotated[int, Field(description="frames answered, 20 ms each")]


class Embedding(Result):
    """The embedding of one file."""

    embedding: Annotated[
        list[list[float]] | list[float],
        Field(description="num_frames vectors of dim values; with pooling one vector"),
    ]


class Embeddings(Message):
    """The answer of /v1/embeddings."""

    model: str
    digest: Annotated[str, Field(description="of the model's published folder")]
    layer: Annotated[int | list[float], Field(description="the layer, or every layer's weight")]
    pooling: Literal["none", "mean", "attentive"]
    normalise: Literal["none", "l2", "utterance"]
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
    digest: Annotated[str, Field(description="of the model's published folder")]
    num_units: int
    frame_ms: Annotated[int, Field(description="milliseconds from one frame to the next")]
    results: list[UnitSequence]


class Image(Message):
    """An image that was found."""

    id: Annotated[str, Field(description="its file's name in the corpus that the model was published with")]
    rank: Annotated[int, Field(description="1 is the best")]
    score: Annotated[float, Field(description="inner product of its vector and the speech's: with cosine at most 1")]
    texts: Annotated[list[str], Field(description="what is said of it in that corpus")]
    thumbnail: Annotated[str | None, Field(description="data:image/jpeg;base64,… where it was asked for and kept")]


class Search(Message):
    """The images of one file; files keep the order of the request."""

    name: Annotated[str | None, Field(description="the file's name, where the request gave one")]
    seconds: Annotated[float, Field(description="duration of the audio")]
    images: list[Image]


class Searches(Message):
    """The answer of /v1/images/search."""

    model: str
    digest: Annotated[str, Field(description="of the model's published folder")]
    num_images: Annotated[int, Field(description="that were searched")]
    results: list[Search]


class Model(Message):
    """A model that is loaded."""

    id: str
    digest: Annotated[str, Field(description="of the published folder's content")]
    precision: str
    device: str
    layer: Annotated[int, Field(description="the published layer, from which units are made")]
    num_layers: int
    dim: int
    num_units: int
    grounded: Annotated[bool, Field(description="speech and images are in one space")]
    num_images: Annotated[int, Field(description="that /v1/images/search finds; 0: the model has none")]
    centred: Annotated[bool, Field(description="units are made of frames less the recording's mean")]
    poolings: list[str]
    frame_ms: int
    stream: Annotated[dict[str, float], Field(description="seconds: the default step, look-ahead and history")]
    encoder: Annotated[dict[str, Any], Field(description="the encoder's configuration")]
    provenance: Annotated[dict[str, Any], Field(description="where it comes from, as published")]


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


class Refusal(Message):
    """The same for the routes /v2, whose clients read an error as a string."""

    error: Annotated[str, Field(description="one line: the thing, the found value, the wanted value")]
    code: str
    request_id: str
