"""The body of a request in the Open Inference Protocol: a JSON object, and after it the bytes of its tensors.

Binary tensor data extension: the header Inference-Header-Content-Length tells the JSON's length, and the parameter
binary_data_size of an input that it has so many of the bytes that follow, in the order of the inputs. Elements are
little-endian; one of BYTES is four bytes with its length, then itself. In JSON one of BYTES is a string in base64.
"""

from __future__ import annotations

import base64
import binascii
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Annotated, Any

import numpy as np
from pydantic import Field, ValidationError
from pydantic_core import from_json

from serving.engine.wire import Array
from serving.errors import ApiError, describe_all, shorten
from serving.schemas import Message

MAX_JSON_BYTES = 8 * 2**20
"""Numbers in JSON take several times their text's size in memory."""
DTYPES = {"FP16": "<f2", "FP32": "<f4", "FP64": "<f8", "INT32": "<i4", "INT64": "<i8"}
LENGTH = struct.Struct("<I")
ENCODINGS = {"gzip": 31, "deflate": 15}  # zlib's wbits
OTHER_EXTENSIONS = ("shared_memory_region", "classification")
Parameters = dict[str, Any]


class TensorInput(Message):
    """A tensor that is sent: its data here, or behind the JSON."""

    name: Annotated[str, Field(max_length=100)]
    shape: Annotated[list[int], Field(min_length=1, max_length=8)]
    datatype: Annotated[str, Field(max_length=20)]
    parameters: Annotated[Parameters | None, Field(description="binary_data_size: bytes behind the JSON")] = None
    data: Annotated[Any, Field(description="row-major: one flat list, or nested as the shape is")] = None


class WantedOutput(Message):
    """A tensor that is asked for."""

    name: Annotated[str, Field(max_length=100)]
    parameters: Annotated[Parameters | None, Field(description="binary_data: whether to send it behind the JSON")] = (
        None
    )


class InferenceRequest(Message):
    """The JSON of a request."""

    id: Annotated[str | None, Field(max_length=1000, description="comes back in the answer")] = None
    parameters: Parameters | None = None
    inputs: Annotated[list[TensorInput], Field(min_length=1, max_length=16)]
    outputs: Annotated[list[WantedOutput] | None, Field(max_length=16, description="default: all there are")] = None


@dataclass(frozen=True)
class Tensor:
    """A tensor that came. values: an array of its shape, or the elements of one of BYTES."""

    name: str
    shape: tuple[int, ...]
    values: Array | list[bytes]


def bad(message: str, code: str = "bad_tensor") -> ApiError:
    """400: a request that does not fit together."""
    return ApiError(400, code, message)


# --------------------------------------------------------------------------------------------------------- bodies


def decompress(body: bytes, encoding: str, max_bytes: int) -> bytes:
    """The body as it was before its Content-Encoding; ApiError 415 for an unknown one, 413 beyond `max_bytes`."""
    if encoding == "identity":
        return body
    if encoding not in ENCODINGS:
        message = f"Content-Encoding: found {shorten(encoding)}, wanted {' or '.join(ENCODINGS)}, or none"
        raise ApiError(415, "unsupported_media_type", message)
    unpacking = zlib.decompressobj(ENCODINGS[encoding])
    try:
        found = unpacking.decompress(body, max_bytes + 1)
    except zlib.error as error:
        raise bad(f"body: found no {encoding} ({error}), wanted what Content-Encoding says", "bad_encoding") from None
    if len(found) > max_bytes:
        raise ApiError(413, "too_large", f"body: found more than {max_bytes} bytes unpacked, wanted at most that")
    if not unpacking.eof or unpacking.unused_data:
        state = "cut off" if not unpacking.eof else f"followed by {len(unpacking.unused_data)} bytes"
        raise bad(f"body: found its {encoding} {state}, wanted it whole and alone", "bad_encoding")
    return found


def split(body: bytes, header_length: str | None) -> tuple[memoryview, memoryview]:
    """The JSON, and what comes behind it."""
    whole = memoryview(body)
    count = len(body)
    if header_length is not None:
        if not (header_length.isascii() and header_length.isdecimal() and len(header_length) < 16):
            raise bad(f"Inference-Header-Content-Length: found {shorten(header_length)}, wanted a number of bytes")
        count = int(header_length)
        if not 0 < count <= len(body):
            raise bad(f"Inference-Header-Content-Length: found {count}, wanted 1 to the body's {len(body)} bytes")
    if count > MAX_JSON_BYTES:
        message = f"body: found {count} bytes of JSON, wanted at most {MAX_JSON_BYTES}: send tensors as binary data"
        raise ApiError(413, "too_large", message)
    return whole[:count], whole[count:]


def parse(
    body: bytes, encoding: str, header_length: str | None, max_bytes: int, accepted: Mapping[str, Sequence[str]]
) -> tuple[InferenceRequest, dict[str, Tensor]]:
    """The request in a body, and its tensors by name; `accepted` names the datatypes that each input may have.

    Raises ApiError 400 where anything in it does not fit together, 413 where it is too large, 415 for an encoding.
    """
    text, rest = split(decompress(body, encoding, max_bytes), header_length)
    try:
        found = from_json(bytes(text), allow_inf_nan=False)
        request = InferenceRequest.model_validate(found, strict=True)
    except ValidationError as error:
        faults = error.errors(include_url=False)
        raise bad(describe_all([{**f, "loc": ("body", *f["loc"])} for f in faults]), "invalid_body") from None
    except ValueError as error:
        raise bad(f"body: found no JSON ({error}), wanted an object", "bad_json") from None
    tensors: dict[str, Tensor] = {}
    for sent in request.inputs:
        if sent.name in tensors:
            raise bad(f"inputs: found {shorten(sent.name)} twice, wanted every input once")
        size = check(sent, accepted)
        if size is None:
            tensors[sent.name] = read_data(sent)
        elif size > len(rest):
            raise bad(f"input {sent.name}: found {len(rest)} bytes left for it, wanted binary_data_size, {size}")
        else:
            tensors[sent.name] = read_binary(sent, rest[:size])
            rest = rest[size:]
    if len(rest):
        raise bad(f"body: found {len(rest)} bytes behind the inputs, wanted none: see their binary_data_size")
    return request, tensors


# -------------------------------------------------------------------------------------------------------- tensors


def check(sent: TensorInput, accepted: Mapping[str, Sequence[str]]) -> int | None:
    """The number of bytes that it has behind the JSON, None where its data is in it."""
    if sent.name not in accepted:
        raise bad(f"inputs: found {shorten(sent.name)}, wanted one of {', '.join(accepted)}")
    if sent.datatype not in accepted[sent.name]:
        wanted = " or ".join(accepted[sent.name])
        raise bad(f"input {sent.name}: found datatype {shorten(sent.datatype)}, wanted {wanted}")
    if any(size < 1 for size in sent.shape):
        raise bad(f"input {sent.name}: found shape {shorten(sent.shape)}, wanted every size at least 1")
    given = sent.parameters or {}
    refuse_extensions(f"input {sent.name}", given)
    size = given.get("binary_data_size")
    if size is None and sent.data is None:
        raise bad(f"input {sent.name}: found no data, wanted it in data or behind the JSON with binary_data_size")
    if size is not None:
        if type(size) is not int or size < 0:
            raise bad(f"input {sent.name}: found binary_data_size {shorten(size)}, wanted a number of bytes")
        if sent.data is not None:
            raise bad(f"input {sent.name}: found data and binary_data_size, wanted one of them")
    return size


def refuse_extensions(label: str, parameters: Parameters) -> None:
    """ApiError 400 where a tensor is to be treated in a way that this server lacks."""
    for name in OTHER_EXTENSIONS:
        if name in parameters:
            raise bad(f"{label}: found {name}, wanted data in the request and the answer: this server has no other")


def read_binary(sent: TensorInput, data: memoryview) -> Tensor:
    """A tensor from its bytes."""
    count, shape = prod(sent.shape), tuple(sent.shape)
    if sent.datatype == "BYTES":
        return Tensor(sent.name, shape, split_elements(sent.name, count, data))
    dtype = np.dtype(DTYPES[sent.datatype])
    if len(data) != count * dtype.itemsize:
        wanted = f"{count * dtype.itemsize} for shape {shorten(sent.shape)} of {sent.datatype}"
        raise bad(f"input {sent.name}: found {len(data)} bytes, wanted {wanted}")
    return Tensor(sent.name, shape, np.frombuffer(data, dtype).reshape(shape))


def split_elements(name: str, count: int, data: memoryview) -> list[bytes]:
    """The elements of a tensor of BYTES."""
    elements: list[bytes] = []
    while len(data):
        if len(elements) == count:
            raise bad(f"input {name}: found {len(data)} bytes behind its {count} elements, wanted none")
        if len(data) < LENGTH.size:
            raise bad(f"input {name}: found {len(data)} bytes for the length of an element, wanted {LENGTH.size}")
        length, data = LENGTH.unpack_from(data)[0], data[LENGTH.size :]
        if length > len(data):
            raise bad(f"input {name}: found {len(data)} bytes left for an element, wanted the {length} that it claims")
        elements.append(bytes(data[:length]))
        data = data[length:]
    if len(elements) != count:
        raise bad(f"input {name}: found {len(elements)} elements, wanted {count} by its shape")
    return elements


def read_data(sent: TensorInput) -> Tensor:
    """A tensor from its numbers or strings."""
    flat, shape = flatten(sent.name, sent.data, sent.shape), tuple(sent.shape)
    kinds: set[type] = set(map(type, flat))
    if sent.datatype == "BYTES":
        return Tensor(sent.name, shape, list(map(unbase64(sent.name, kinds), flat)))
    wanted = {int} if sent.datatype.startswith("INT") else {int, float}
    if kinds - wanted:
        found = ", ".join(sorted(kind.__name__ for kind in kinds - wanted))
        raise bad(f"input {sent.name}: found {found} in its data, wanted {sent.datatype} numbers alone")
    try:
        values = np.array(flat, np.int64 if wanted == {int} else np.float64)
    except OverflowError:
        raise bad(f"input {sent.name}: found a number beyond 64 bits, wanted {sent.datatype}") from None
    return Tensor(sent.name, shape, values.reshape(shape))


def unbase64(name: str, kinds: set[type]) -> Callable[[str], bytes]:
    """What makes an element of a string; ApiError 400 where elements are no strings."""
    if kinds - {str}:
        found = ", ".join(sorted(kind.__name__ for kind in kinds - {str}))
        raise bad(f"input {name}: found {found} in its data, wanted strings in base64")

    def decode(text: str) -> bytes:
        try:
            return base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise bad(f"input {name}: found no base64 ({error}), wanted a file's bytes in it") from None

    return decode


def flatten(name: str, data: Any, shape: Sequence[int]) -> list[Any]:
    """The elements in a list that is flat, or nested as `shape` says."""
    if not isinstance(data, list):
        raise bad(f"input {name}: found {shorten(data)} as its data, wanted a list")
    if len(shape) == 1 or not any(isinstance(part, list) for part in data):
        if len(data) != prod(shape):
            raise bad(f"input {name}: found {len(data)} elements, wanted {shorten(prod(shape))} by its shape")
        return data
    if len(data) != shape[0]:
        raise bad(f"input {name}: found {len(data)} lists, wanted {shape[0]} by its shape")
    return [element for part in data for element in flatten(name, part, shape[1:])]
