"""From a request's body to waves: raw audio, multipart or JSON."""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import Any

import numpy as np
from anyio import CapacityLimiter, to_thread
from fastapi import Request
from numpy.typing import NDArray
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from serving.errors import ApiError, describe_all, overloaded, shorten
from serving.schemas import EXAMPLE_AUDIO, EncodedAudio
from serving.settings import Settings
from sonorant.inference import SAMPLE_RATE, TooLongError, check_wave, read_wave

Wave = NDArray[np.float32]
HELD_QUEUES = 2
"""Audio that may be decoded at once, the waiting of the queue included, in queues full."""
ACCEPTED = "audio/*, application/octet-stream, multipart/form-data or application/json"
REQUEST_BODY: Mapping[str, Any] = {
    "required": True,
    "description": "The audio itself, one or many files, or base64 in JSON: WAV, FLAC, Ogg or MP3.",
    "content": {
        "audio/*": {"schema": {"type": "string", "format": "binary"}},
        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "properties": {"file": {"type": "array", "items": {"type": "string", "format": "binary"}}},
                "required": ["file"],
            }
        },
        "application/json": {"schema": EncodedAudio.model_json_schema(), "example": {"audio": EXAMPLE_AUDIO}},
    },
}


@dataclass(frozen=True)
class Upload:
    """One file of a request as it came. `label` names it in errors."""

    label: str
    name: str | None
    data: bytes


@dataclass(frozen=True)
class Clip:
    """One file of a request, decoded. `label` names it in errors; moments: a long one's, see `Card.moments`."""

    name: str | None
    label: str
    wave: Wave
    moments: NDArray[np.float64] | None = None

    @property
    def seconds(self) -> float:
        """Its duration."""
        return len(self.wave) / SAMPLE_RATE


class Decoder:
    """Turns files into waves, a few at a time, each in a thread; all that requests hold of them is bounded."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._limiter = CapacityLimiter(settings.num_decoders)
        self._held = 0  # samples decoded for requests that are still in hand

    async def decode(
        self, uploads: Sequence[Upload], exit: ExitStack, max_seconds: float = math.inf
    ) -> list[Clip | ApiError]:
        """Every file, decoded, or why it could not be: one is longer than `max_seconds`, say. All together may last as
        long as the queue takes.

        The audio counts as held until `exit` closes. ApiError 429 where other requests hold too much of it.
        """
        clips: list[Clip | ApiError] = []
        room = self.settings.max_queue_seconds
        for upload in uploads:
            held = self._held / SAMPLE_RATE
            if held > HELD_QUEUES * self.settings.max_queue_seconds:
                raise overloaded(
                    f"server: found {held:.0f} s of audio decoded and in hand, wanted less: retry in 1 s", 1
                )
            limit = min(room, self.settings.max_file_seconds, max_seconds)
            try:
                clip = await to_thread.run_sync(partial(decode, upload, limit), limiter=self._limiter)
            except ApiError as error:
                clips.append(error)
            else:
                self._hold(len(clip.wave), exit)
                room -= clip.seconds
                clips.append(clip)
        return clips

    def _hold(self, samples: int, exit: ExitStack) -> None:
        def release() -> None:
            self._held -= samples

        self._held += samples
        exit.callback(release)


def decode(upload: Upload, max_seconds: float) -> Clip:
    """The audio in it; ApiError 400 where there is none, 413 where it is longer than `max_seconds`."""
    try:
        wave = read_wave(BytesIO(upload.data), max_seconds)
        check_wave(wave)
        return Clip(upload.name, upload.label, wave)
    except TooLongError as error:
        raise ApiError(413, "too_long", relabel(error, upload.label)) from None
    except ValueError as error:
        raise ApiError(400, "bad_audio", relabel(error, upload.label)) from None


def relabel(error: Exception, label: str) -> str:
    """The message of `error`, which speaks of "audio" or a "wave", with the file's own name in front."""
    return label + str(error).removeprefix("audio").removeprefix("wave")


async def read_uploads(request: Request, settings: Settings) -> list[Upload]:
    """Each file in the request."""
    encoding = request.headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise ApiError(
            415,
            "unsupported_media_type",
            f"Content-Encoding: found {shorten(encoding)}, wanted none: send FLAC to save bytes",
        )
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media.startswith("audio/") or media == "application/octet-stream":
        return [Upload("audio", None, await request.body())]
    if media == "application/json":
        return [Upload("audio", None, read_json(await request.body()))]
    if media == "multipart/form-data":
        return await read_multipart(request, settings)
    raise ApiError(415, "unsupported_media_type", f"Content-Type: found {shorten(media)}, wanted {ACCEPTED}")


def read_json(body: bytes) -> bytes:
    """The audio in a JSON body."""
    try:
        text = EncodedAudio.model_validate_json(body).audio
    except ValidationError as error:
        faults = error.errors(include_url=False)
        if faults[0]["type"] == "json_invalid":
            raise ApiError(400, "bad_json", f"body: found no JSON ({faults[0]['msg']}), wanted an object") from None
        raise ApiError(422, "invalid_body", describe_all([{**f, "loc": ("body", *f["loc"])} for f in faults])) from None
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(
            400, "bad_base64", f"body audio: found no base64 ({error}), wanted the file's bytes in base64"
        ) from None


async def read_multipart(request: Request, settings: Settings) -> list[Upload]:
    """The files of a form, kept in memory: the body's size is bounded already."""
    parser = MultiPartParser(
        request.headers, request.stream(), max_files=settings.max_files, max_fields=settings.max_files
    )
    parser.spool_max_size = settings.max_body_bytes
    try:
        form = await parser.parse()
    except (MultiPartException, ValueError) as error:
        raise ApiError(400, "bad_multipart", f"form: found it broken ({error}), wanted multipart files") from None
    files: list[Upload] = []
    try:
        for field, part in form.multi_items():
            if not isinstance(part, UploadFile):
                raise ApiError(422, "invalid_body", f"form field {shorten(field)}: found text, wanted a file")
            name = part.filename or None
            files.append(Upload(f"file {len(files)} {shorten(name)}", name, await part.read()))
    finally:
        await form.close()
    if not files:
        raise ApiError(422, "invalid_body", "form: found no file, wanted at least one: add a file part")
    return files
