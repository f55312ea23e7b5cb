"""What k-means sees of a corpus: MFCC or an encoder's layer, in files that survive a kill."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray

from sonorant.clustering import MAX_PASSES, fit_kmeans
from sonorant.config import ClusterConfig
from sonorant.data.corpus import Utterance, read_waves
from sonorant.data.mfcc import mfcc
from sonorant.data.progress import Report, shown_progress
from sonorant.models.codebook import Codebook, centre_frames

SHARD_FRAMES = 15_000  # five minutes: what a kill can cost
Frames = NDArray[np.float32]
FrameFeatures = Callable[[Sequence[Utterance]], Iterator[Frames]]
"""The frames (T, D) of each utterance, in their order."""


class Embeds(Protocol):
    """What is needed of sonorant.inference.Speech."""

    num_layers: int
    dim: int

    def embed(self, waves: Sequence[Frames], layer: int | None = None) -> list[Frames]:
        """Frames (T, D) of one layer of each wave (S,)."""


def frame_features(config: ClusterConfig, encoder: Embeds | None) -> FrameFeatures:
    """What clusters are made of: MFCC where config.layer is None, else that layer of `encoder`.

    With config.normalise `utterance`, every utterance's dimensions have mean 0 and variance 1, with `utterance_mean`
    mean 0. Then every frame is joined by its `context_frames` neighbours on each side.
    Raises ValueError where there is a layer without an encoder or the other way round, and, when run, where
    an utterance's audio has not the frames that its cut promises, or they are not finite.
    """
    layer = config.layer
    if encoder is None and layer is not None:
        raise ValueError(
            f"cluster.layer: found {layer} without an encoder, wanted one: add --encoder or set layer to null"
        )
    if encoder is not None and (layer is None or layer > encoder.num_layers):
        raise ValueError(
            f"cluster.layer: found {'null' if layer is None else layer} with an encoder, wanted 0 to "
            f"{encoder.num_layers}: choose one of its layers or leave out --encoder"
        )
    num_threads = config.num_workers or len(os.sched_getaffinity(0))

    def features(utterances: Sequence[Utterance]) -> Iterator[Frames]:
        raw = mfcc_of(utterances, num_threads) if encoder is None else layer_of(utterances, encoder, layer)
        for utterance, frames in zip(utterances, raw, strict=True):
            if len(frames) != utterance.num_frames:
                raise ValueError(
                    f"utterance {utterance.id}: found audio of {len(frames)} frames, wanted "
                    f"{utterance.num_frames} as its cut says: prepare the corpus again"
                )
            if not np.isfinite(frames).all():
                raise ValueError(
                    f"utterance {utterance.id}: found features that are not finite, wanted finite numbers: "
                    "check its audio and the encoder"
                )
            yield join_neighbours(NORMALISATIONS[config.normalise](frames), config.context_frames)

    return features


def join_neighbours(frames: Frames, count: int) -> Frames:
    """(T, D) to (T, (2 count + 1) D): each frame between its neighbours, the ends repeated."""
    if not count or not len(frames):
        return frames
    padded = np.pad(frames, ((count, count), (0, 0)), "edge")
    return np.concatenate([padded[shift : shift + len(frames)] for shift in range(2 * count + 1)], axis=1)


def mfcc_of(utterances: Sequence[Utterance], num_threads: int) -> Iterator[Frames]:
    """MFCC of each utterance, in threads: decoding and torch release the interpreter's lock."""

    def frames(utterance: Utterance) -> Frames:
        return mfcc(utterance.wave())

    threads_before = torch.get_num_threads()
    try:
        # One torch thread each: the values do not depend on the machine, and threads do not outnumber cores.
        with ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield from pool.map(frames, utterances)
    finally:
        torch.set_num_threads(threads_before)


def layer_of(utterances: Sequence[Utterance], encoder: Embeds, layer: int | None) -> Iterator[Frames]:
    """One layer's frames of each utterance."""
    yield from encoder.embed(list(read_waves(utterances)), layer)


def standardise_frames(frames: Frames) -> Frames:
    """(T, D) with mean 0 and (biased) variance 1 in every dimension, eps 1e-5."""
    if not len(frames):
        return frames
    centred = frames - frames.mean(0, dtype=np.float64)
    standardised: Frames = (centred / np.sqrt(np.square(centred).mean(0) + 1e-5)).astype(np.float32)
    return standardised


NORMALISATIONS: dict[str, Callable[[Frames], Frames]] = {
    "none": lambda frames: frames,
    "corpus": lambda frames: frames,  # the codebook scales them
    "utterance": standardise_frames,
    "utterance_mean": centre_frames,
}


def draw_utterances(utterances: Sequence[Utterance], max_frames: int, seed: int) -> list[Utterance]:
    """Utterances drawn at random, of at most `max_frames` together but at least one, in their old order.

    Raises ValueError where there is none to draw from.
    """
    if not utterances:
        raise ValueError("corpus: found no utterance of split 'train', wanted some to fit units on: prepare it again")
    order = np.random.default_rng(seed).permutation(len(utterances))
    within = np.cumsum([utterances[row].num_frames for row in order]) <= max_frames
    drawn = sorted(order[: max(1, int(within.sum()))].tolist())
    return [utterances[row] for row in drawn]


def slices_of(utterances: Sequence[Utterance]) -> dict[str, slice]:
    """By id, where each utterance's frames lie when they are laid end to end."""
    ends = np.cumsum([utterance.num_frames for utterance in utterances]).tolist()
    return {u.id: slice(end - u.num_frames, end) for u, end in zip(utterances, ends, strict=True)}


def fit_once(frames: Frames, config: ClusterConfig, scratch: Path) -> tuple[Codebook, float]:
    """The codebook of `frames` and its inertia; kept in `scratch`, so that a resumed run has the same."""
    path, note = scratch / "codebook.safetensors", scratch / "fit.json"
    if not path.is_file():
        passes = itertools.count(1)
        with shown_progress("cluster: k-means", "passes at most") as report:
            fit = fit_kmeans(
                frames,
                config.num_units,
                num_restarts=config.num_restarts,
                seed=config.seed,
                normalise=config.normalise == "corpus",
                progress=lambda _: report(next(passes), (config.num_restarts + 2) * MAX_PASSES),
            )
        note.write_text(json.dumps({"inertia": fit.inertia}))
        partial = path.with_suffix(".partial")
        fit.codebook.save(partial)
        partial.rename(path)
    return Codebook.load(path), float(json.loads(note.read_text())["inertia"])


def split_shards(utterances: Sequence[Utterance]) -> list[list[Utterance]]:
    """Runs of utterances of about SHARD_FRAMES each."""
    shards: list[list[Utterance]] = []
    size = SHARD_FRAMES
    for utterance in utterances:
        if size >= SHARD_FRAMES:
            shards.append([])
            size = 0
        shards[-1].append(utterance)
        size += utterance.num_frames
    return shards


def grow_rows(
    path: Path,
    shards: Sequence[Sequence[Utterance]],
    make: Callable[[Sequence[Utterance]], Iterable[NDArray[Any]]],
    width: int,
    dtype: DTypeLike,
    report: Report,
) -> NDArray[Any]:
    """All frames' rows (F, width) in one memory-mapped file, made shard by shard.

    How many rows a shard has is known beforehand, so the file's size says which shards are whole: what a
    killed run leaves of the next one is cut off and made again. `report` is told the seconds of audio done.
    """
    row_bytes = width * np.dtype(dtype).itemsize
    total = sum(utterance.seconds for shard in shards for utterance in shard)
    done, end = 0.0, 0
    with path.open("ab") as file:
        size = file.tell()
        for shard in shards:
            whole = end + row_bytes * sum(utterance.num_frames for utterance in shard)
            if whole > size:
                file.truncate(end)
                for utterance, part in zip(shard, make(shard), strict=True):
                    report(int(done), int(total))
                    file.write(np.ascontiguousarray(part, dtype).tobytes())
                    done += utterance.seconds
                file.flush()
                size = whole
            else:
                done += sum(utterance.seconds for utterance in shard)
            end = whole
        file.truncate(end)
    report(int(total), int(total))
    shape = (end // row_bytes, width)
    rows: NDArray[Any] = np.memmap(path, dtype, "r", shape=shape) if end else np.zeros(shape, dtype)
    return rows
