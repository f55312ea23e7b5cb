"""The built-in corpus: spoken scene descriptions with a picture each and sample-exact phone and word times.

The same section gives the same bytes, whatever the number of workers and whatever was interrupted: utterances
are made in shards, each by a fresh process with its own seed, since espeak-ng keeps state from one utterance
to the next and is corrupted by threads. Speakers are never shared between splits, and only test speakers
describe scenes of held-out attributes.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np

from sonorant.config import Part, Split, SyntheticSource
from sonorant.data.corpus import Row, Segment
from sonorant.data.frames import SAMPLE_RATE
from sonorant.data.synthesis.recording import Speaker, record
from sonorant.data.synthesis.scenes import Scene, draw_image, draw_scenes
from sonorant.data.synthesis.voices import NUM_VOICES, EngineName, Spoken, is_espeak_installed, open_engine

SHARD_UTTERANCES = 32
WHOLE = Part()
RECORD = "shard.json"
PARTIAL = ".partial-"
# What a random generator is for; a scene's own purposes are 1 and 2.
SPEAKERS, SPEECH, IMAGE, ENGINE = 3, 4, 5, 6


@dataclass(frozen=True)
class Planned:
    """One utterance to be made."""

    id: str
    number: int
    speaker: Speaker
    scene: Scene


@dataclass(frozen=True)
class Shard:
    """What one process makes: the folder it fills, and all that its content follows from."""

    folder: Path
    number: int
    seed: int
    engine: EngineName
    made_from: dict[str, Any]
    utterances: tuple[Planned, ...]


def engine_name(source: SyntheticSource) -> EngineName:
    """The engine that speaks for `source`; ValueError where espeak is asked for and missing."""
    if source.voice == "tones":
        return "tones"
    if is_espeak_installed():
        return "espeak"
    if source.voice == "espeak":
        raise ValueError(
            f"source {source.name!r}: found no espeakng-loader, wanted it for voice espeak: "
            "pip install 'sonorant[synthesis]' or set voice: tones"
        )
    return "tones"


def synthesise(
    source: SyntheticSource,
    folder: Path,
    num_workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
    part: Part = WHOLE,
) -> list[Row]:
    """Make a part of the corpus below `folder` as 16 kHz mono 16-bit FLAC and 96 x 96 PNG, and return its rows.

    A part is every `part.count`-th shard from `part.index` on; the whole by default. Finished shards of the same
    section that lie there are kept, others removed; `num_workers` 0 is one process per core; `progress(done, total)`
    is called as utterances are finished. Raises ValueError where the engine is missing, the section keeps no
    utterance, or a file cannot be written.
    """
    shards = plan_shards(source, folder)[part.index :: part.count]
    folder.mkdir(parents=True, exist_ok=True)
    remove_partial(folder)
    missing = [shard for shard in shards if read_shard(shard) is None]
    for path in set(folder.glob("shard-*")) - {shard.folder for shard in shards if shard not in missing}:
        shutil.rmtree(path)
    total = sum(len(shard.utterances) for shard in shards)
    done = total - sum(len(shard.utterances) for shard in missing)
    report = progress or (lambda _done, _total: None)
    report(done, total)
    try:
        for _ in run_shards(missing, num_workers or len(os.sched_getaffinity(0))):
            done += 1
            report(done, total)
    finally:
        remove_partial(folder)
    rows = [read_shard(shard) for shard in shards]
    return [row for of_shard in rows if of_shard is not None for row in of_shard]


# ------------------------------------------------------------------------------------------------------ plan


def plan_shards(source: SyntheticSource, folder: Path) -> list[Shard]:
    """All that will be made, in order; it depends on nothing but the section and the engine."""
    engine, seed = engine_name(source), source.seed % 2**32
    planned = [u for u in plan_utterances(source) if u.speaker.split in source.splits]
    if not planned:
        raise ValueError(
            f"source {source.name!r}: found no speaker for {list(source.splits)}, wanted at least one: "
            "raise dev_share, test_share or num_utterances"
        )
    made_from = {"source": source.model_dump(mode="json"), "engine": engine}
    return [
        Shard(
            folder / f"shard-{number:05d}",
            number,
            seed,
            engine,
            made_from,
            tuple(planned[number * SHARD_UTTERANCES : (number + 1) * SHARD_UTTERANCES]),
        )
        for number in range(-(-len(planned) // SHARD_UTTERANCES))
    ]


def plan_utterances(source: SyntheticSource) -> list[Planned]:
    """Who says what, for all splits: speakers take turns."""
    seed, speakers = source.seed % 2**32, draw_speakers(source)
    turns = [speakers[i % len(speakers)] for i in range(source.num_utterances)]
    num_test = sum(speaker.split == "test" for speaker in turns)
    scenes = {
        True: iter(draw_scenes(num_test, True, seed)),
        False: iter(draw_scenes(len(turns) - num_test, False, seed)),
    }
    return [
        Planned(f"{source.name}-{i:06d}", i, speaker, next(scenes[speaker.split == "test"]))
        for i, speaker in enumerate(turns)
    ]


def draw_speakers(source: SyntheticSource) -> list[Speaker]:
    """The speakers, no more than utterances, each in one split."""
    rng = np.random.default_rng((source.seed % 2**32, SPEAKERS))
    num = min(source.num_speakers, source.num_utterances)
    num_test, num_dev = num_held_out(num, source.test_share), num_held_out(num, source.dev_share)
    while num_test + num_dev >= num:
        num_test, num_dev = (num_test, num_dev - 1) if num_dev >= num_test else (num_test - 1, num_dev)
    counts: dict[Split, int] = {"test": num_test, "dev": num_dev, "train": num - num_test - num_dev}
    splits = [split for split, count in counts.items() for _ in range(count)]
    voices = rng.permutation(NUM_VOICES)
    return [
        Speaker(
            name=f"{source.name}-speaker{i:02d}",
            split=split,
            voice=int(voices[i]),
            speed=rng.uniform(0.85, 1.2),
            pitch=rng.uniform(-0.7, 0.7),
            # 65 to 82 move formants and pitch by 1.12 to 0.88: 100 · 16,000 / 22,050 is 72.6.
            warp=int(rng.integers(65, 83)),
            tilt=rng.uniform(-0.5, 0.5),
            noise_colour=rng.uniform(0, 0.9),
            decay=rng.uniform(0.08, 0.3),
            distance_db=rng.uniform(3, 14),
            room=int(rng.integers(2**32)),
        )
        for i, split in enumerate(splits)
    ]


def num_held_out(num_speakers: int, share: float) -> int:
    """Speakers that a share of them is: at least one where the share is above 0."""
    return max(1, round(share * num_speakers)) if share > 0 else 0


# ----------------------------------------------------------------------------------------------------- shards


def run_shards(shards: Sequence[Shard], num_workers: int) -> Iterator[None]:
    """Make every shard in a process of its own, `num_workers` at a time; yields once per utterance."""
    context = multiprocessing.get_context("forkserver")
    # Forked from a server that holds these, a process starts in milliseconds and has no thread and no engine.
    context.set_forkserver_preload(
        ["__main__", __name__, "numpy", "scipy.signal", "scipy.ndimage", "soundfile", "PIL.ImageDraw"]
    )
    waiting = list(reversed(shards))
    running: dict[Connection, tuple[ForkServerProcess, Shard]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < num_workers:
                shard = waiting.pop()
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=make_shard, args=(shard, sender), daemon=True)
                process.start()
                sender.close()
                running[receiver] = process, shard
            for receiver in [r for r in wait(running) if isinstance(r, Connection)]:
                process, shard = running[receiver]
                try:
                    fault = receiver.recv()
                except EOFError:
                    del running[receiver]
                    process.join()
                    fault = f"a worker that ended with code {process.exitcode}" if process.exitcode else None
                else:
                    if fault is None:
                        yield
                if fault is not None:
                    raise ValueError(
                        f"{shard.folder}: found {fault}, wanted {len(shard.utterances)} utterances: "
                        "mend it and run again, finished shards are kept"
                    )
    finally:
        for process, _ in running.values():
            process.terminate()
            process.join()


def make_shard(shard: Shard, sender: Connection) -> None:
    """Fill the shard's folder, which appears whole or not; sends None per utterance, or what went wrong."""
    # The one who asked may be gone: then nobody wants to know.
    with contextlib.suppress(BrokenPipeError):
        try:
            with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=shard.folder.parent) as partial:
                folder = Path(partial) / "shard"
                folder.mkdir()
                seed = np.random.SeedSequence((shard.seed, ENGINE, shard.number)).generate_state(1)[0]
                with open_engine(shard.engine, int(seed)) as engine:
                    rows = []
                    for planned in shard.utterances:
                        rng = np.random.default_rng((shard.seed, SPEECH, planned.number))
                        speaker = planned.speaker
                        spoken = engine.say(
                            planned.scene.caption.split(),
                            speaker.voice,
                            speaker.speed * rng.uniform(0.95, 1.05),
                            speaker.pitch + rng.uniform(-0.15, 0.15),
                        )
                        rows.append(write_utterance(folder, planned, record(spoken, speaker, rng), shard.seed))
                        sender.send(None)
                about = {"made_from": shard.made_from, "rows": rows}
                (folder / RECORD).write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n")
                # A worker whose parent was killed may have finished it in the meantime, with the same bytes.
                if not shard.folder.exists():
                    folder.rename(shard.folder)
        except BrokenPipeError:
            raise
        except OSError as error:
            sender.send(str(error))


def write_utterance(folder: Path, planned: Planned, recorded: Spoken, seed: int) -> dict[str, Any]:
    """Write the utterance's audio and picture, and return its row with paths relative to `folder`."""
    import soundfile

    # Encoded in memory: on a full disk soundfile loses the reason.
    audio = io.BytesIO()
    soundfile.write(
        audio, np.round(recorded.wave * 32767).astype(np.int16), SAMPLE_RATE, format="FLAC", subtype="PCM_16"
    )
    path, image = f"{planned.id}.flac", f"{planned.id}.png"
    (folder / path).write_bytes(audio.getvalue())
    (folder / image).write_bytes(draw_image(planned.scene, np.random.default_rng((seed, IMAGE, planned.number))))
    return {
        "id": planned.id,
        "speaker": planned.speaker.name,
        "split": planned.speaker.split,
        "path": path,
        "image": image,
        "text": planned.scene.caption,
        "words": [(label, start / SAMPLE_RATE, end / SAMPLE_RATE) for label, start, end in recorded.words],
        "phones": [(label, start / SAMPLE_RATE, end / SAMPLE_RATE) for label, start, end in recorded.phones],
        "distractors": planned.scene.distractors,
    }


def read_shard(shard: Shard) -> list[Row] | None:
    """The rows of a finished shard; None where there is none, or one of another section."""
    path = shard.folder / RECORD
    if not path.is_file():
        return None
    about = json.loads(path.read_text())
    if about["made_from"] != shard.made_from:
        return None

    def segments(items: Sequence[Sequence[Any]]) -> tuple[Segment, ...]:
        return tuple((str(label), float(start), float(end)) for label, start, end in items)

    return [
        Row(
            id=row["id"],
            source=about["made_from"]["source"]["name"],
            speaker=row["speaker"],
            path=shard.folder / row["path"],
            split=row["split"],
            text=row["text"],
            words=segments(row["words"]),
            phones=segments(row["phones"]),
            image=shard.folder / row["image"],
            distractors=tuple(row["distractors"]),
        )
        for row in about["rows"]
    ]


def remove_partial(folder: Path) -> None:
    """Remove what killed workers left behind."""
    for path in folder.glob(PARTIAL + "*"):
        shutil.rmtree(path, ignore_errors=True)
