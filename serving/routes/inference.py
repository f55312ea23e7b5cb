"""An inference of the Open Inference Protocol: from its tensors to clips, from the model's frames to tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
from anyio import CapacityLimiter, to_thread
from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from pydantic import ValidationError

from serving import schemas
from serving.engine.engine import Wanted
from serving.engine.service import Service
from serving.engine.wire import Array
from serving.errors import ApiError, describe_all, shorten
from serving.routes.answers import Part, json_object, merged, pieces_of
from serving.routes.intake import Clip, Upload, relabel
from serving.routes.requests import admit, check_time
from serving.routes.speech import Card, layer_of, shape
from serving.routes.tensors import InferenceRequest, Parameters, Tensor, bad, parse, refuse_extensions
from serving.settings import Settings
from sonorant.inference import SAMPLE_RATE, check_wave

VERSION = "1"
"""A model that is loaded has one version; its digest, in /v1/models, tells one publication from another."""
ACCEPTED = {"audio": ("FP32", "FP16", "FP64"), "num_samples": ("INT64", "INT32"), "file": ("BYTES",)}
OPTIONS = ("layer", "layer_weights", "pooling", "normalise")
OTHER_PARAMETERS = ("binary_data_output", "timeout", "priority", "content_type")
"""The last two are for servers with priorities and codecs, and change nothing here."""
SMALL_BODY = 1 << 14
"""Bytes that are parsed at once rather than in a thread."""


@dataclass(frozen=True)
class Order:
    """What a request wants: the outputs by name, whether each is binary, and how the frames are made."""

    outputs: Mapping[str, bool]
    options: schemas.EmbeddingOptions
    layer: int | tuple[float, ...]
    deadline: float | None


async def infer(request: Request, service: Service, card: Card, limiter: CapacityLimiter) -> tuple[Response, int]:
    """The answer to an inference request, and its number of rows. ApiError where there is none."""
    check_time(request.state.visit)
    headers, body = request.headers, await request.body()
    encoding, length = headers.get("content-encoding", "identity"), headers.get("inference-header-content-length")
    reading = partial(parse, body, encoding, length, service.settings.max_body_bytes, ACCEPTED)
    if len(body) <= SMALL_BODY and encoding == "identity":
        asked, tensors = reading()
    else:
        asked, tensors = await to_thread.run_sync(reading, limiter=limiter)
    order = order_of(asked, card)
    if order.deadline is not None:
        visit = request.state.visit
        visit.deadline = min(visit.deadline, visit.started + order.deadline)
    clips = await clips_of(service, tensors, request.state.visit.exit)
    longest = max(len(clip.wave) for clip in clips) / SAMPLE_RATE
    pooled = order.options.pooling != "none"
    if ("units" in order.outputs or not pooled) and longest * len(clips) > service.settings.max_queue_seconds:
        raise ApiError(
            413,
            "too_long",
            f"rows: found {len(clips)} filled up to {longest:.1f} s, wanted at most "
            f"{service.settings.max_queue_seconds:g} s together: send rows of like length",
        )
    spell = "units" in order.outputs and "embeddings" not in order.outputs
    works = await admit(request, service, Wanted(card, order.layer, spell), clips)
    found = [await work.result() for work in works]
    tensors_out = await to_thread.run_sync(partial(outputs_of, card, order, found))
    head = {"model_name": card.name, "model_version": VERSION, **({} if asked.id is None else {"id": asked.id})}
    return await answer(head, order, tensors_out), len(clips)


# ---------------------------------------------------------------------------------------------------------- wants


def order_of(asked: InferenceRequest, card: Card) -> Order:
    """What is wanted of the model; ApiError 400 where it cannot be had."""
    given = asked.parameters or {}
    for name in given:
        if name not in (*OPTIONS, *OTHER_PARAMETERS):
            wanted = ", ".join((*OPTIONS, *OTHER_PARAMETERS[:2]))
            raise bad(f"parameter {shorten(name)}: found it, wanted one of {wanted}", "invalid_option")
    options = options_of(given)
    if options.pooling not in card.poolings:
        wanted = " or ".join(card.poolings)
        raise bad(f"parameter pooling: found {options.pooling}, wanted {wanted}: model's own", "invalid_option")
    if options.normalise == "utterance" and options.pooling != "none":
        raise bad("parameter normalise: found utterance with a pooling, wanted none or l2", "invalid_option")
    try:
        layer = layer_of(card, options)
    except ApiError as error:
        raise bad(error.message.replace("query ", "parameter ", 1), error.code) from None
    outputs = wanted_outputs(asked, card, spelled=layer == card.layer)
    if "units" in outputs and layer != card.layer:
        raise bad(f"output units: found layer {shorten(layer)}, wanted {card.layer}, the published one", "bad_output")
    timeout = given.get("timeout", 0)
    if type(timeout) is not int or not 0 <= timeout < 1 << 63:
        raise bad(f"parameter timeout: found {shorten(timeout)}, wanted microseconds", "invalid_option")
    return Order(outputs, options, layer, timeout / 1e6 if timeout else None)


def options_of(given: Parameters) -> schemas.EmbeddingOptions:
    """The options as /v1 has them: a layer may be a number here, weights a list."""
    options = {name: given[name] for name in OPTIONS if name in given}
    if type(options.get("layer")) is int:
        options["layer"] = str(options["layer"])
    weights = options.get("layer_weights")
    if isinstance(weights, list) and all(type(weight) in (int, float) for weight in weights):
        options["layer_weights"] = ",".join(map(repr, weights))
    try:
        return schemas.EmbeddingOptions.model_validate(options)
    except ValidationError as error:
        faults = [{**fault, "loc": ("parameter", *fault["loc"])} for fault in error.errors(include_url=False)]
        raise bad(describe_all(faults), "invalid_option") from None


def wanted_outputs(asked: InferenceRequest, card: Card, spelled: bool) -> dict[str, bool]:
    """The outputs in their order, and whether each is binary; by default all that the layer asked for gives."""
    binary = (asked.parameters or {}).get("binary_data_output", False)
    if type(binary) is not bool:
        raise bad(f"parameter binary_data_output: found {shorten(binary)}, wanted true or false", "invalid_option")
    if not asked.outputs:
        units = {"units": binary} if card.num_units and spelled else {}
        return {"embeddings": binary, **units, "num_frames": binary}
    names = ("embeddings", "units", "num_frames") if card.num_units else ("embeddings", "num_frames")
    outputs: dict[str, bool] = {}
    for output in asked.outputs:
        if output.name not in names:
            raise bad(f"outputs: found {shorten(output.name)}, wanted one of {', '.join(names)}", "bad_output")
        if output.name in outputs:
            raise bad(f"outputs: found {output.name} twice, wanted every output once", "bad_output")
        given = output.parameters or {}
        refuse_extensions(f"output {output.name}", given)
        chosen = given.get("binary_data", binary)
        if type(chosen) is not bool:
            raise bad(f"output {output.name}: found binary_data {shorten(chosen)}, wanted true or false", "bad_output")
        outputs[output.name] = chosen
    return outputs


# ---------------------------------------------------------------------------------------------------------- audio


async def clips_of(service: Service, tensors: Mapping[str, Tensor], exit: ExitStack) -> list[Clip]:
    """A clip for every row of audio or file; ApiError where there is none or it is too much."""
    names = [name for name in ("audio", "file") if name in tensors]
    if len(names) != 1:
        raise bad(f"inputs: found {' and '.join(names) or 'neither audio nor file'}, wanted one of them")
    if names == ["audio"]:
        rows = tensors["audio"].values
        assert isinstance(rows, np.ndarray), "audio has numbers"
        return await to_thread.run_sync(clips_of_rows, rows, tensors.get("num_samples"), service.settings)
    if "num_samples" in tensors:
        raise bad("inputs: found num_samples with file, wanted it with audio alone")
    files = tensors["file"].values
    assert isinstance(files, list), "file has elements"
    if len(tensors["file"].shape) != 1:
        raise bad(f"input file: found shape {shorten(tensors['file'].shape)}, wanted (files,)")
    check_count("file", len(files), service.settings)
    uploads = [Upload(f"file {index}", None, data) for index, data in enumerate(files)]
    found = await service.decoder.decode(uploads, exit)
    for clip in found:
        if isinstance(clip, ApiError):
            raise clip
    return [clip for clip in found if isinstance(clip, Clip)]


def check_count(name: str, count: int, settings: Settings) -> None:
    """ApiError 400 where there are more rows than files that a form may have."""
    if count > settings.max_files:
        raise bad(f"input {name}: found {count} rows, wanted at most {settings.max_files}: send several requests")


def clips_of_rows(rows: Array, num_samples: Tensor | None, settings: Settings) -> list[Clip]:
    """A clip of each row's first `num_samples`."""
    if rows.ndim > 2:
        raise bad(f"input audio: found shape {shorten(rows.shape)}, wanted (rows, samples) or (samples,)")
    rows = rows.reshape(-1, rows.shape[-1])
    check_count("audio", len(rows), settings)
    counts = np.full(len(rows), rows.shape[1])
    if num_samples is not None:
        assert isinstance(num_samples.values, np.ndarray), "num_samples has numbers"
        counts = num_samples.values
        if counts.shape != (len(rows),):
            raise bad(f"input num_samples: found shape {shorten(counts.shape)}, wanted ({len(rows)},), one a row")
    clips, room = [], settings.max_queue_seconds
    for index, (row, count) in enumerate(zip(rows, counts.tolist(), strict=True)):
        label = f"audio row {index}"
        if not 0 <= count <= len(row):
            raise bad(f"input num_samples: found {count} for row {index}, wanted 0 to its {len(row)} samples")
        limit = min(room, settings.max_file_seconds)
        if count > limit * SAMPLE_RATE:
            message = f"{label}: found {count / SAMPLE_RATE:.1f} s, wanted at most {limit:g} s"
            raise ApiError(413, "too_long", message)
        room -= count / SAMPLE_RATE
        with np.errstate(over="ignore"):  # what overflows is found below
            wave = row[:count].astype(np.float32)
        try:
            check_wave(wave)
        except ValueError as error:
            raise bad(relabel(error, label), "bad_audio") from None
        if not np.isfinite(wave).all():
            raise bad(f"{label}: found NaN or infinite samples, wanted finite ones in FP32", "bad_audio")
        clips.append(Clip(None, label, wave))
    return clips


# --------------------------------------------------------------------------------------------------------- answer


def outputs_of(card: Card, order: Order, found: Sequence[Array]) -> dict[str, Array]:
    """The outputs asked for, of each row's frames (T, D), or units (T,)."""
    longest = max(map(len, found))
    outputs: dict[str, Array] = {}
    for name in order.outputs:
        if name == "num_frames":
            outputs[name] = np.array([len(row) for row in found], np.int64)
        elif name == "units":
            outputs[name] = np.full((len(found), longest), -1, np.int64)
            for units, row in zip(outputs[name], found, strict=True):
                assert card.codebook is not None, "only a model with a codebook has units"
                units[: len(row)] = row if row.ndim == 1 else card.codebook.assign(row)
        elif order.options.pooling != "none":
            outputs[name] = np.stack([shape(row, order.options.pooling, order.options.normalise) for row in found])
        else:
            outputs[name] = np.zeros((len(found), longest, card.dim), np.float32)
            for frames, row in zip(outputs[name], found, strict=True):
                frames[: len(row)] = shape(row, "none", order.options.normalise)
    return outputs


async def answer(head: Mapping[str, Any], order: Order, outputs: Mapping[str, Array]) -> Response:
    """The outputs in JSON, or behind it."""
    parts, behind = [], list[memoryview]()
    for name, array in outputs.items():
        datatype = "FP32" if array.dtype == np.float32 else "INT64"
        about: dict[str, Any] = {"name": name, "datatype": datatype, "shape": list(array.shape)}
        if order.outputs[name]:
            behind.append(memoryview(array.reshape(-1).view(np.uint8)))
            parts.append(Part({**about, "parameters": {"binary_data_size": array.nbytes}}, {}))
        else:
            parts.append(Part(about, {"data": array.reshape(-1)}))
    content = {**head, "outputs": parts}
    if not behind:
        return StreamingResponse(merged(json_object(content)), media_type="application/json")
    size = await to_thread.run_sync(lambda: sum(map(len, json_object(content))))
    pieces: Iterator[bytes] = chain(merged(json_object(content)), *map(pieces_of, behind))
    headers = {
        "Inference-Header-Content-Length": str(size),
        "Content-Length": str(size + sum(map(len, behind))),
    }
    return StreamingResponse(pieces, media_type="application/octet-stream", headers=headers)
