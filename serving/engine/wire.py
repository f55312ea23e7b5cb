"""Messages between the server and its workers: one JSON object and some arrays. Nothing is pickled.

Eight bytes tell the length of the JSON, which tells the arrays' types and shapes; their bytes follow.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import Generator, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

LENGTH = struct.Struct("<Q")
Array = NDArray[Any]


class LostError(Exception):
    """The other side is gone."""


class Letter(NamedTuple):
    """What is said, and the arrays that go with it."""

    fields: dict[str, Any]
    arrays: Sequence[Array] = ()


def write(letter: Letter) -> list[memoryview]:
    """The letter as buffers, the arrays' own memory among them."""
    arrays = [np.ascontiguousarray(array) for array in letter.arrays]
    kinds = [[array.dtype.str, list(array.shape)] for array in arrays]
    head = json.dumps([letter.fields, kinds]).encode()
    bodies = [memoryview(array.reshape(-1).view(np.uint8)) for array in arrays if array.size]
    return [memoryview(LENGTH.pack(len(head)) + head), *bodies]


def read() -> Generator[memoryview, None, Letter]:
    """Asks for one buffer after the other to be filled, and returns the letter."""
    length, head = bytearray(LENGTH.size), bytearray()
    yield memoryview(length)
    head = bytearray(LENGTH.unpack(length)[0])
    yield memoryview(head)
    fields, kinds = json.loads(head)
    arrays = [np.empty(shape, dtype) for dtype, shape in kinds]
    for array in arrays:
        if prod(array.shape):
            yield memoryview(array.reshape(-1).view(np.uint8))
    return Letter(fields, arrays)


def send(connection: socket.socket, letter: Letter) -> None:
    """Send, blocking."""
    for buffer in write(letter):
        connection.sendall(buffer)


def receive(connection: socket.socket) -> Letter:
    """Receive, blocking; EOFError where the other side is gone."""
    reading = read()
    try:
        while True:
            buffer = next(reading)
            while buffer:
                if not (count := connection.recv_into(buffer)):
                    raise EOFError
                buffer = buffer[count:]
    except StopIteration as end:
        letter: Letter = end.value
        return letter


async def send_soon(connection: socket.socket, letter: Letter) -> None:
    """Send over a socket that does not block."""
    loop = asyncio.get_running_loop()
    for buffer in write(letter):
        await loop.sock_sendall(connection, buffer)


async def receive_soon(connection: socket.socket) -> Letter:
    """Receive from a socket that does not block; EOFError where the other side is gone."""
    loop, reading = asyncio.get_running_loop(), read()
    while True:
        try:
            buffer = next(reading)
        except StopIteration as end:
            letter: Letter = end.value
            return letter
        while buffer:
            if not (count := await loop.sock_recv_into(connection, buffer)):
                raise EOFError
            buffer = buffer[count:]
