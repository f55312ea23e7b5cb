"""The WebSocket /v1/stream: PCM in while somebody speaks, unit tokens out as soon as they are final.

The client's first message is JSON, see `Begin`; {} takes every default. The server answers {"type": "ready", …}. Then
come binary messages of samples, cut anywhere, and {"type": "end"} in JSON; the server sends {"type": "units",
"start_ms", "units", "final": true} for each window of the recording in order, and {"type": "done", "num_frames",
"seconds"} at the end. What went wrong is {"type": "error", "error": {"code", "message", "request_id"}}. The units are
those of `Speech.stream_units` with the same windows, however the samples are cut into messages.

A client that sends faster than the model works is not read from meanwhile. A stream keeps the model that it began
with, over a reload too, for its units must come from one codebook. Where the server stops, what was heard is answered
first.

Closed with: 1000 done · 1003 a message of the wrong kind · 1007 samples that are none · 1008 what is not allowed, or
nothing sent for too long · 1009 too large · 1011 a fault of the server · 1012 the server stops · 1013 too much work.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal

import numpy as np
from anyio import to_thread
from fastapi import APIRouter, WebSocket
from numpy.typing import NDArray
from pydantic import Field, ValidationError
from pydantic_core import from_json
from starlette.websockets import WebSocketDisconnect

from serving.edge.gate import Visit
from serving.engine.batcher import ClosedError, FullError
from serving.engine.engine import Wanted
from serving.engine.service import Service
from serving.errors import ApiError, describe_all, draining, fault_of, overloaded, shorten
from serving.routes.intake import Clip
from serving.routes.requests import find_card
from serving.schemas import Message
from sonorant.inference import FRAME_MS, SAMPLE_RATE, STREAM, Cut, Listener, Speller, Window

MAX_MESSAGE_BYTES = 1 << 18
"""Of one message: 8 s of 16-bit samples. They are held while the windows that they complete are worked on."""
MAX_BEGIN_BYTES = 1 << 12
MAX_WINDOW_MS = 25_000
MAX_FACTOR = 32
"""How many times each second of audio may go through the model: a window's length over its step."""
POLL_SECONDS = 0.2
"""How soon an idle stream finds that the server stops."""
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 1.0
"""How long a window that the queue has no room for waits before it asks again; each time twice as long."""
CLOSE_CODES = {
    "idle": 1008,
    "bad_message": 1003,
    "bad_audio": 1007,
    "too_large": 1009,
    "internal": 1011,
    "draining": 1012,
}
BUSY = (408, 429, 503)
PATH = "/v1/stream"
Samples = NDArray[np.float32]
routes = APIRouter()


class Begin(Message):
    """The first message of a stream."""

    model: Annotated[str | None, Field(max_length=100)] = None
    format: Literal["s16le", "f32le"] = "s16le"
    rate: Literal[16_000] = SAMPLE_RATE
    step_ms: Annotated[int, Field(ge=FRAME_MS, le=10_000, multiple_of=FRAME_MS)] = FRAME_MS * STREAM.step
    look_ahead_ms: Annotated[int, Field(ge=0, le=5_000, multiple_of=FRAME_MS)] = FRAME_MS * STREAM.after
    history_ms: Annotated[int, Field(ge=0, le=20_000, multiple_of=FRAME_MS)] = FRAME_MS * STREAM.before

    def cut(self) -> Cut:
        """The windows; ApiError where they are too long, or too long for their step."""
        window = self.step_ms + self.look_ahead_ms + self.history_ms
        limit = min(MAX_WINDOW_MS, MAX_FACTOR * self.step_ms)
        if window > limit:
            raise ApiError(
                422,
                "invalid_option",
                f"begin: found windows of {window} ms every {self.step_ms} ms, wanted at most {limit} ms: "
                "choose a longer step_ms, or less of look_ahead_ms and history_ms",
            )
        return Cut(self.step_ms // FRAME_MS, self.history_ms // FRAME_MS, self.look_ahead_ms // FRAME_MS)


@routes.websocket(PATH)
async def stream(websocket: WebSocket) -> None:
    """Hear a stream to its end. ApiError, before it is accepted, where there is no room for it."""
    service: Service = websocket.app.state.service
    _ = service.engine
    async with place_for(websocket, service):
        await websocket.accept()
        try:
            await converse(websocket, service)
        except ApiError as error:
            fault = fault_of(websocket.scope, error).model_dump()
            await websocket.send_json({"type": "error", "error": fault})
            await websocket.close(CLOSE_CODES.get(error.code, 1013 if error.status in BUSY else 1008), error.code)


@asynccontextmanager
async def place_for(websocket: WebSocket, service: Service) -> AsyncIterator[None]:
    """One of the app's places for streams while it lasts; ApiError 429 where all are taken."""
    state = websocket.app.state
    taken, limit = getattr(state, "num_streams", 0), service.settings.max_streams
    if taken >= limit:
        raise overloaded(f"server: found {taken} streams, wanted at most {limit}: retry in 5 s", 5)
    state.num_streams = taken + 1
    try:
        yield
    finally:
        state.num_streams -= 1


async def converse(websocket: WebSocket, service: Service) -> None:
    """All that is said after the handshake; ApiError where it ends badly."""
    reader = Reader(websocket, service)
    begin = begin_of(await reader.read())
    cut, card = begin.cut(), find_card(websocket.state.visit, service, begin.model)
    if card.codebook is None:
        raise ApiError(422, "invalid_option", f"model {card.name}: found no codebook, wanted one to make units")
    about = begin.model_dump(exclude={"model"})
    about |= {"model": card.name, "digest": card.digest, "num_units": card.num_units, "frame_ms": FRAME_MS}
    about |= {"latency_ms": begin.step_ms + begin.look_ahead_ms, "request_id": websocket.state.request_id}
    hearing = Hearing(websocket, service, Wanted(card, card.layer), cut)
    samples = Samples16() if begin.format == "s16le" else Samples32()
    with hearing.engine.batcher.hold():
        await websocket.send_json({"type": "ready", **about})
        while (message := await reader.read()) is not None:
            if isinstance(message, str):
                check_end(message)
                break
            await hearing.hear(samples.read(message))
        if message is not None:
            samples.finish()
        await hearing.finish()
    await websocket.close(1012 if message is None else 1000, "draining" if message is None else "done")


# ------------------------------------------------------------------------------------------------------- messages


class Reader:
    """The client's messages."""

    def __init__(self, websocket: WebSocket, service: Service) -> None:
        self.websocket, self.service = websocket, service
        self.started = time.monotonic()

    async def read(self) -> str | bytes | None:
        """The next one, None where the server is to stop.

        Raises ApiError where it is too large or does not come, WebSocketDisconnect where the client is gone.
        """
        settings = self.service.settings
        limit = settings.max_stream_seconds + settings.stream_idle_seconds
        receiving = asyncio.ensure_future(self.websocket.receive())
        waited = time.monotonic()
        try:
            while not receiving.done():
                if self.service.draining:
                    return None
                await asyncio.wait([receiving], timeout=POLL_SECONDS)
                if time.monotonic() - waited > settings.stream_idle_seconds and not receiving.done():
                    message = (
                        f"stream: found nothing sent for {settings.stream_idle_seconds:g} s, wanted samples or end"
                    )
                    raise ApiError(408, "idle", message)
                if time.monotonic() - self.started > limit:
                    raise ApiError(
                        413, "too_long", f"stream: found it open for {limit:g} s, wanted less: begin another"
                    )
        finally:
            receiving.cancel()
        message = receiving.result()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1005))
        found: str | bytes = message.get("bytes") or message.get("text") or b""
        if len(found) > MAX_MESSAGE_BYTES:
            message = f"message: found {len(found)} bytes, wanted at most {MAX_MESSAGE_BYTES}: send smaller ones"
            raise ApiError(413, "too_large", message)
        return found


def begin_of(message: str | bytes | None) -> Begin:
    """The first message; ApiError where it is another."""
    if message is None:
        raise draining()
    found = object_of(message, "begin")
    try:
        return Begin.model_validate(found, strict=True)
    except ValidationError as error:
        faults = [{**fault, "loc": ("begin", *fault["loc"])} for fault in error.errors(include_url=False)]
        raise ApiError(422, "invalid_option", describe_all(faults)) from None


def check_end(message: str) -> None:
    """ApiError where it does not say that the recording has ended."""
    found = object_of(message, "message")
    if found != {"type": "end"}:
        raise ApiError(400, "bad_message", f'message: found {shorten(found)}, wanted samples or {{"type": "end"}}')


def object_of(message: str | bytes, label: str) -> dict[str, Any]:
    """The JSON object in a message of text."""
    if isinstance(message, bytes):
        raise ApiError(400, "bad_message", f"{label}: found {len(message)} bytes, wanted a JSON object as text")
    if len(message) > MAX_BEGIN_BYTES:
        raise ApiError(413, "too_large", f"{label}: found more than {MAX_BEGIN_BYTES} characters, wanted at most that")
    try:
        found = from_json(message, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, "bad_message", f"{label}: found no JSON ({error}), wanted an object") from None
    if not isinstance(found, dict):
        raise ApiError(400, "bad_message", f"{label}: found {shorten(found)}, wanted a JSON object")
    return found


class Samples32:
    """Samples from bytes that are cut anywhere: 32-bit floats, 1 is full scale."""

    dtype = np.dtype("<f4")

    def __init__(self) -> None:
        self._rest = b""

    def read(self, data: bytes) -> Samples:
        """Those that are whole by now; ApiError where one is not finite."""
        data = self._rest + data
        whole = len(data) - len(data) % self.dtype.itemsize
        self._rest = data[whole:]
        samples = self.scale(np.frombuffer(data[:whole], self.dtype))
        if not np.isfinite(samples).all():
            raise ApiError(400, "bad_audio", "samples: found NaN or infinite ones, wanted finite ones, 1 is full scale")
        return samples

    def scale(self, values: NDArray[Any]) -> Samples:
        """The numbers as samples."""
        return values.astype(np.float32)

    def finish(self) -> None:
        """There are no more; ApiError where the last one is not whole."""
        if self._rest:
            found, wanted = len(self._rest), self.dtype.itemsize
            raise ApiError(400, "bad_audio", f"samples: found {found} bytes of the last one, wanted {wanted}")


class Samples16(Samples32):
    """The same from 16-bit integers."""

    dtype = np.dtype("<i2")

    def scale(self, values: NDArray[Any]) -> Samples:
        """The numbers as samples, as a file of them is read."""
        return values.astype(np.float32) / np.float32(32_768)


# -------------------------------------------------------------------------------------------------------- hearing


class Hearing:
    """A recording on its way through the model, window by window."""

    def __init__(self, websocket: WebSocket, service: Service, wanted: Wanted, cut: Cut) -> None:
        self.websocket, self.service, self.wanted = websocket, service, wanted
        self.visit: Visit = websocket.state.visit
        assert self.visit.engine is not None, "the model is found first"
        self.engine = self.visit.engine
        self.patience = self.visit.deadline - self.visit.started
        assert wanted.card.codebook is not None, "only a model with a codebook is listened with"
        self.listener, self.speller = Listener(cut), Speller(wanted.card.codebook)
        self.num_samples = self.num_charged = self.num_frames = 0

    async def hear(self, samples: Samples) -> None:
        """Hear more of it, and send the units that are final by then."""
        self.num_samples += len(samples)
        limit = self.service.settings.max_stream_seconds
        if self.num_samples > limit * SAMPLE_RATE:
            raise ApiError(413, "too_long", f"stream: found more than {limit:g} s, wanted at most that: begin another")
        for window, wave in self.listener.feed(samples):
            await self._spell(window, wave)

    async def finish(self) -> None:
        """It has ended: send what is left, and how much it was."""
        for window, wave in self.listener.finish():
            await self._spell(window, wave)
        seconds = self.num_samples / SAMPLE_RATE
        await self.websocket.send_json({"type": "done", "num_frames": self.num_frames, "seconds": seconds})

    async def _spell(self, window: Window, wave: Samples) -> None:
        seconds = (window.samples.stop - self.num_charged) / SAMPLE_RATE
        self.visit.charge(seconds)
        self.num_charged = window.samples.stop
        self.service.metrics.audio_seconds.labels(PATH).inc(seconds)
        frames = await self._embed(Clip(None, f"window from {FRAME_MS * window.frames.start} ms", wave))
        units = await to_thread.run_sync(self.speller.spell, frames[window.kept])
        start_ms = FRAME_MS * window.frames.start
        await self.websocket.send_json({"type": "units", "start_ms": start_ms, "units": units.tolist(), "final": True})
        self.num_frames += len(units)

    async def _embed(self, clip: Clip) -> Samples:
        """The frames (T, D) of a window, which waits for room in the queue; ApiError where it gets none in time."""
        deadline, pause = time.monotonic() + self.patience, FIRST_PAUSE
        while True:
            try:
                ticket, [work] = self.engine.submit(self.wanted, [clip], deadline, held=True)
                break
            except FullError as error:
                if time.monotonic() + pause > deadline:
                    raise overloaded(str(error), error.retry_seconds) from None
            except ClosedError:
                raise draining() from None
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
        with ticket:
            frames: Samples = await work.result()
        if self.service.tracing is not None:
            self.service.tracing.record(ticket, self.service.tracing.here())
        return frames
