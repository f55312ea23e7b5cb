"""The ways an answer is written: JSON, NDJSON, NumPy's .npy or safetensors, as Accept asks, piece by piece."""

from __future__ import annotations

import io
import json
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors.numpy
from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from pydantic_core import to_json

from serving.engine.wire import Array
from serving.errors import ApiError, shorten

JSON, NDJSON, NPY, SAFETENSORS = (
    "application/json",
    "application/x-ndjson",
    "application/x-npy",
    "application/safetensors",
)
MEDIA = (JSON, NDJSON, NPY, SAFETENSORS)
PIECE_BYTES = 1 << 18
ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class Part:
    """What one file gave: what is said of it, and its arrays by name, the first being the one .npy holds."""

    about: Mapping[str, Any]
    arrays: Mapping[str, Array | None]


def choose_media(request: Request, offered: Sequence[str] = MEDIA) -> str:
    """Of the ways an answer can be written the one that Accept likes best; ApiError 406 where it likes none."""
    given = request.headers.get("accept", "*/*")
    liked: list[tuple[float, int, str]] = []
    for place, entry in enumerate(given.split(",")):
        media, *parameters = (part.strip().lower() for part in entry.split(";"))
        quality = 1.0
        for parameter in parameters:
            name, _, value = parameter.partition("=")
            if name.strip() == "q":
                try:
                    quality = float(value)
                except ValueError:
                    quality = 0.0
        found = media if media in offered else JSON if media in ("*/*", "application/*", "") else None
        if found is not None and quality > 0:
            liked.append((-quality, place, found))
    if not liked:
        raise ApiError(406, "not_acceptable", f"Accept: found {shorten(given)}, wanted one of {', '.join(offered)}")
    return min(liked)[2]


def answer(media: str, head: Mapping[str, Any], parts: Sequence[Part]) -> Response:
    """All parts in one body. `head` is what they have in common; ApiError 406 for several files as .npy."""
    if media == NPY:
        if len(parts) != 1:
            raise ApiError(
                406, "not_acceptable", f"Accept: found {NPY} for {len(parts)} files, wanted one: ask for {SAFETENSORS}"
            )
        return StreamingResponse(npy(next(iter(parts[0].arrays.values()))), media_type=media)
    if media == SAFETENSORS:
        return StreamingResponse(pieces_of(safetensor_bytes(head, parts)), media_type=media)
    return StreamingResponse(merged(json_object({**head, "results": parts})), media_type=media)


def answer_by_line(head: Mapping[str, Any], parts: AsyncIterator[Part]) -> Response:
    """One JSON object a line, each part as soon as it is there."""

    async def lines() -> AsyncIterator[bytes]:
        async for part in parts:
            for piece in merged(json_object({**head, **part.about, **part.arrays})):
                yield piece
            yield b"\n"

    return StreamingResponse(lines(), media_type=NDJSON)


def json_object(content: Mapping[str, Any]) -> Iterator[bytes]:
    """A JSON object in pieces, so that a long array is never there as text as a whole."""
    for place, (name, value) in enumerate(content.items()):
        yield (b"{" if place == 0 else b",") + to_json(name) + b":"
        if isinstance(value, np.ndarray):
            yield from json_array(value)
        elif isinstance(value, list) and value and isinstance(value[0], Part):
            for index, part in enumerate(value):
                yield b"," if index else b"["
                yield from json_object({**part.about, **part.arrays})
            yield b"]"
        else:
            yield to_json(value)
    yield b"}" if content else b"{}"


def json_array(array: Array) -> Iterator[bytes]:
    """An array as nested lists, some rows a piece. Floats are written with all their digits."""
    yield b"["
    rows = ROWS_AT_ONCE if array.ndim > 1 else 64 * ROWS_AT_ONCE
    for start in range(0, len(array), rows):
        yield (b"," if start else b"") + to_json(array[start : start + rows].tolist())[1:-1]
    yield b"]"


def merged(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The same bytes in pieces that are worth sending."""
    held = bytearray()
    for piece in pieces:
        held += piece
        if len(held) >= PIECE_BYTES:
            yield bytes(held)
            held.clear()
    yield bytes(held)


def pieces_of(data: bytes | memoryview) -> Iterator[bytes]:
    """The same bytes in pieces."""
    for start in range(0, len(data), PIECE_BYTES):
        yield bytes(data[start : start + PIECE_BYTES])


def npy(array: Array | None) -> Iterator[bytes]:
    """An array as the bytes of a .npy file."""
    assert array is not None
    array = np.ascontiguousarray(array)
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, np.lib.format.header_data_from_array_1_0(array))
    yield head.getvalue()
    if array.size:
        yield from pieces_of(memoryview(array.reshape(-1).view(np.uint8)))


def safetensor_bytes(head: Mapping[str, Any], parts: Sequence[Part]) -> bytes:
    """All arrays, each named with its file's place (units.0, units.1, …), and all that is said of them as metadata."""
    arrays = {
        f"{name}.{index}": np.ascontiguousarray(array)
        for index, part in enumerate(parts)
        for name, array in part.arrays.items()
        if array is not None
    }
    about = {"head": json.dumps(head), "files": json.dumps([dict(part.about) for part in parts])}
    return safetensors.numpy.save(arrays, metadata=about)
