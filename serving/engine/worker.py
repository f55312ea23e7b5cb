"""A process that runs models: one core, one thread, one batch at a time.

`python -m serving.engine.worker FD` speaks over the socket it inherits. The first letter says what to load; the answer
tells what was loaded, or why it could not be; then comes one answer for every batch until the socket closes.
"""

from __future__ import annotations

import base64
import json
import os
import resource
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from serving.engine.wire import Array, Letter, receive, send
from sonorant.inference import SAMPLE_RATE, Moments, Speech, load, num_operations

Models = Mapping[str, Speech]
WARM_UP_SECONDS = 3.0


def main() -> None:
    """Load, warm up, serve."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the server says when it is over, by closing the socket
        signal.signal(number, signal.SIG_IGN)
    connection = socket.socket(fileno=int(sys.argv[1]))
    try:
        order = receive(connection).fields
        try:
            models, paces = start(order)
        except (ValueError, OSError) as error:
            send(connection, Letter({"error": " ".join(str(error).split())}))
            return
        send(connection, introduce(models, paces))
        while True:
            send(connection, perform(models, receive(connection)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def start(order: Mapping[str, Any]) -> tuple[Models, list[float]]:
    """Take a core, load what `order` names and run it: the models, and the operations each does in a second."""
    import torch

    if order["core"] is not None:
        # The other threads that a lone request may take begin here, where they may run on any core.
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        torch.zeros(1 << 20).exp_()
        os.sched_setaffinity(0, {order["core"]})
    torch.set_num_threads(1)
    models = {
        name: load(Path(folder), precision=order["precision"], device=order["device"])
        for name, folder in order["models"].items()
    }
    return models, [warm_up(speech) for speech in models.values()]


def warm_up(speech: Speech) -> float:
    """Run all of the model on noise, twice: how many operations it does in a second.

    ValueError where what it makes is not finite.
    """
    wave = np.random.default_rng(0).normal(0, 0.1, int(WARM_UP_SECONDS * SAMPLE_RATE)).astype(np.float32)
    for layer in (speech.layer, speech.num_layers):
        started = time.perf_counter()
        [frames] = speech.embed([wave], layer)
        seconds = time.perf_counter() - started
    if not np.isfinite(frames).all():
        raise ValueError("model: found frames of noise that are not finite, wanted finite ones: publish it again")
    if speech.codebook is not None:
        speech.codebook.assign(speech.embed([wave])[0])
    if speech.gallery is not None:
        find(speech, [wave], [{"top": 1, "thumbnails": False}])
    return operations(speech, len(frames)) / max(seconds, 1e-6)


def operations(speech: Speech, num_frames: int) -> float:
    """What it costs to take so many frames through all layers."""
    config = speech.config
    return 1e6 * num_frames if config is None else num_operations(config, num_frames, speech.num_layers)


def introduce(models: Models, paces: Sequence[float]) -> Letter:
    """What the server has to know of the models: the fields of their cards, and their codebooks' arrays."""
    cards, arrays = [], list[Array]()
    for name, speech in models.items():
        config, codebook = speech.config, speech.codebook
        cards.append(
            {
                "name": name,
                "digest": speech.digest or "",
                "precision": speech.precision,
                "device": speech.device,
                "layer": speech.layer,
                "num_layers": speech.num_layers,
                "dim": speech.dim,
                "num_units": speech.num_units,
                "grounded_layer": None if speech.grounder is None else speech.grounder.layer,
                "num_images": 0 if speech.gallery is None else len(speech.gallery),
                "centred": None if codebook is None else codebook.centred,
                "poolings": list(speech.poolings),
                "encoder": None if config is None else config.model_dump(mode="json"),
                "about": speech.about,
            }
        )
        if codebook is not None:
            arrays += [codebook.centroids, codebook.shift, codebook.scale]
    return Letter({"models": cards, "pace": min(paces)}, arrays)


def pack_moments(moments: Moments | None) -> Array | None:
    """Moments as one array, for the wire."""
    if moments is None:
        return None
    first = (
        []
        if moments.first_mean is None or moments.first_covariance is None
        else [
            moments.first_mean,
            moments.first_covariance.ravel(),
        ]
    )
    return np.concatenate([[moments.mean, moments.scale], *first])


def unpack_moments(packed: Array) -> Moments:
    """The moments that were packed."""
    if len(packed) == 2:
        return Moments(*packed.tolist())
    width = round((len(packed) - 2 + 0.25) ** 0.5 - 0.5)  # w + w² numbers
    return Moments(*packed[:2].tolist(), packed[2 : 2 + width], packed[2 + width :].reshape(width, width))


def perform(models: Models, order: Letter) -> Letter:
    """Run one batch: {model, layer, num_threads, items: [{spell, moments, search}]}, a wave for each item, the moments
    of some. All items of a batch search, or none.

    The answer has for each item an array, or [] and what was wrong with it.
    """
    speech, layer, items = models[order.fields["model"]], order.fields["layer"], order.fields["items"]
    arrays = iter(order.arrays)
    waves = [next(arrays) for _ in items]
    moments = [unpack_moments(next(arrays)) if item["moments"] else None for item in items]
    use_threads(order.fields["num_threads"])
    searches, spell = ([item[name] for item in items] for name in ("search", "spell"))
    started = time.perf_counter()
    if searches[0] is not None:
        outcomes = run(lambda *batch: find(speech, *batch), waves, searches)
    else:
        outcomes = run(lambda *batch: hear(speech, layer, *batch), waves, moments, spell)
    fields = {
        "errors": [outcome if isinstance(outcome, dict) else None for outcome in outcomes],
        "seconds": time.perf_counter() - started,
        "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "device_bytes": speech.device_bytes(),
    }
    return Letter(fields, [np.zeros(0) if isinstance(outcome, dict) else outcome for outcome in outcomes])


def use_threads(count: int) -> None:
    """Divide what can be divided among so many threads."""
    import torch

    if torch.get_num_threads() != count:
        torch.set_num_threads(count)


def run(make: Callable[..., list[Array]], *columns: Sequence[Any]) -> list[Array | dict[str, str]]:
    """What `make` makes of a batch, given what it needs of each wave. Where it fails, each wave is tried alone."""
    try:
        return [*make(*columns)]
    except Exception as error:  # whatever it is, it is this batch's alone
        if len(columns[0]) == 1:
            return [describe(error)]
    return [run(make, *([one] for one in row))[0] for row in zip(*columns, strict=True)]


def hear(
    speech: Speech,
    layer: int | Sequence[float],
    waves: Sequence[Array],
    moments: Sequence[Moments | None],
    spell: Sequence[bool],
) -> list[Array]:
    """Frames, or units where `spell` says so, of each wave."""
    outcomes: list[Array] = []
    for part, spelled in zip(speech.embed(waves, layer, moments), spell, strict=True):
        check_finite(part)
        outcomes.append(speech.codebook.assign(part) if spelled and speech.codebook else part)
    return outcomes


def find(speech: Speech, waves: Sequence[Array], searches: Sequence[Mapping[str, Any]]) -> list[Array]:
    """The images that each wave speaks of, as the bytes of a JSON list."""
    gallery, outcomes = speech.gallery, list[Array]()
    assert gallery is not None, "only a model with images is searched"
    for vector, wanted in zip(speech.query(waves), searches, strict=True):
        check_finite(vector)
        [found] = gallery.find(vector[None], wanted["top"])
        images = []
        for image in found:
            small = gallery.thumbnail(image.row) if wanted["thumbnails"] else None
            address = None if small is None else f"data:image/jpeg;base64,{base64.b64encode(small).decode()}"
            about = {"id": image.picture.id, "rank": image.rank, "score": image.score, "texts": image.picture.texts}
            images.append({**about, "thumbnail": address})
        outcomes.append(np.frombuffer(json.dumps(images).encode(), np.uint8))
    return outcomes


def check_finite(made: Array) -> None:
    """ValueError where not all of it is."""
    if not np.isfinite(made).all():
        raise ValueError("audio: found frames that are not finite, wanted finite ones: scale it to -1 … 1")


def describe(error: Exception) -> dict[str, str]:
    """What was wrong with a wave: the message of what a client can cause, of anything else the kind and the place."""
    if isinstance(error, ValueError):
        return {"kind": "bad_audio", "message": str(error)}
    place = traceback.extract_tb(error.__traceback__)[-1]
    return {"kind": "internal", "message": f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}"}


if __name__ == "__main__":
    main()
