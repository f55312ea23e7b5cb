"""Every layer's frames of a corpus, made once for each encoder and kept in one memory-mapped file.

What probes read is as large as layers, dimensions and frames make it: 13 layers of 768 in float32 are 2 MB for a second
of speech. In a file it takes no memory that something else needs, and whoever asks again for the same encoder on the
same utterances pays nothing. Files lie below $SONORANT_RUNS/states; whoever wants the room back deletes them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sonorant.data.corpus import Utterance, read_waves
from sonorant.data.mfcc import NUM_DIMS
from sonorant.data.progress import shown_progress
from sonorant.inference import Speech
from sonorant.models.codebook import centre_frames
from sonorant.steps.features import grow_rows, mfcc_of, slices_of, split_shards
from sonorant.steps.step import scratch_root

States = NDArray[np.float32]
"""(L, T, D) of an utterance."""
BATCH_UTTERANCES = 16


@dataclass(frozen=True)
class Layers:
    """What makes states of utterances: how many layers of which width, and a digest that names it."""

    digest: str
    num_layers: int
    dim: int
    make: Callable[[Sequence[Utterance]], Iterator[States]]


def layers_of(speech: Speech) -> Layers:
    """An encoder's states from what enters its first layer on."""
    hashed = hashlib.sha256(json.dumps(speech.config.model_dump(mode="json"), sort_keys=True).encode())
    for name, tensor in sorted(speech.encoder.state_dict().items()):
        hashed.update(name.encode())
        hashed.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    layers = range(speech.num_layers + 1)

    def make(utterances: Sequence[Utterance]) -> Iterator[States]:
        for start in range(0, len(utterances), BATCH_UTTERANCES):
            for frames in speech.states(list(read_waves(utterances[start : start + BATCH_UTTERANCES])), layers):
                yield np.stack(frames)

    return Layers(hashed.hexdigest(), len(layers), speech.dim, make)


def layers_of_mfcc(num_threads: int, *, centred: bool) -> Layers:
    """MFCC as the one layer there is, as they are or without each utterance's mean."""

    def make(utterances: Sequence[Utterance]) -> Iterator[States]:
        for frames in mfcc_of(utterances, num_threads):
            yield (centre_frames(frames) if centred else frames)[None]

    return Layers("mfcc, centred" if centred else "mfcc", 1, NUM_DIMS, make)


def keep_states(layers: Layers, utterances: Sequence[Utterance], corpus: str, label: str) -> dict[str, States]:
    """By id, the states of each utterance, as views of a file; `corpus` is the digest of what they are part of.

    Raises ValueError where the disk has no room for the file.
    """
    about = {"encoder": layers.digest, "corpus": corpus, "utterances": [u.id for u in utterances]}
    key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
    folder = scratch_root() / "states" / key
    folder.mkdir(parents=True, exist_ok=True)
    path, width = folder / "states.float32", layers.num_layers * layers.dim
    places = slices_of(utterances)
    with held(folder / "lock"):
        check_room(path, 4 * width * sum(u.num_frames for u in utterances))
        with shown_progress(label, "seconds") as report:
            shards = split_shards(utterances)
            rows = grow_rows(path, shards, lambda shard: flat(layers, shard), width, np.float32, report)
    states: NDArray[np.float32] = rows.reshape(-1, layers.num_layers, layers.dim)
    return {name: states[place].transpose(1, 0, 2) for name, place in places.items()}


def flat(layers: Layers, utterances: Sequence[Utterance]) -> Iterator[NDArray[np.float32]]:
    """Each utterance's states, a row a frame, (T, L · D); ValueError where its audio is not as its cut says."""
    for utterance, states in zip(utterances, layers.make(utterances), strict=True):
        if states.shape[1] != utterance.num_frames:
            raise ValueError(
                f"utterance {utterance.id}: found audio of {states.shape[1]} frames, wanted {utterance.num_frames} as "
                "its cut says: prepare the corpus again"
            )
        yield states.transpose(1, 0, 2).reshape(states.shape[1], -1)


def check_room(path: Path, num_bytes: int) -> None:
    """ValueError where the disk cannot hold a file of this size, of which some may be there already."""
    missing = num_bytes - (path.stat().st_size if path.is_file() else 0)
    free = shutil.disk_usage(path.parent).free
    if missing > free:
        raise ValueError(
            f"{path}: found {free / 2**30:.1f} GiB free, wanted {missing / 2**30:.1f} for the states of every layer: "
            "make room, point SONORANT_RUNS at another disk, or leave out evaluate.probes"
        )


@contextmanager
def held(path: Path) -> Iterator[None]:
    """No other process is inside at the same time."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
