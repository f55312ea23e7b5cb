"""A corpus on disk: 16 kHz mono FLAC and lhotse cuts, with splits that never share a speaker.

    corpus/
      cuts.jsonl.gz   one lhotse MonoCut a line, recordings by path relative to the corpus
      audio/…         FLAC
      images/…        as they came, where there are any
      stats.json      hours, utterances, speakers, duration histogram, refused rows by reason
      refused.jsonl   source, id, path, reason, detail

Files of audio and images are named after their content; they may lie in a store instead (sonorant.data.shards).
The cut carries all there is to know: `cut.custom` has `split`, `source`, `digest` (of the samples), `image`,
`distractors` and `emotion`; its one supervision has the speaker, the text, and the alignments `word` and `phone`.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from numpy.typing import NDArray

from sonorant.artifacts import ELSEWHERE
from sonorant.config import Split
from sonorant.data import frames

if TYPE_CHECKING:
    from sonorant.data.shards import Elsewhere

CUTS = "cuts.jsonl.gz"
STATS = "stats.json"
REFUSED = "refused.jsonl"
REGIONS = ".npz"  # an image that is features of what a detector found
READ_AHEAD = 16  # utterances from a store, where each answer takes a while
HISTOGRAM_SECONDS = (0, 1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30)
Segment = tuple[str, float, float]
"""(label, start, end) in seconds."""


@dataclass(frozen=True)
class Row:
    """One utterance as a source offers it, before it is checked, resampled and written.

    `start` and `end` are seconds in the file, end None for its end; phone and word times count from `start`.
    `channel` None is the mean of all; `split` None leaves the choice to prepare, by speaker.
    """

    id: str
    source: str
    speaker: str
    path: Path
    split: Split | None = None
    start: float = 0.0
    end: float | None = None
    text: str | None = None
    words: tuple[Segment, ...] | None = None
    phones: tuple[Segment, ...] | None = None
    image: Path | None = None
    distractors: tuple[str, ...] = ()
    channel: int | None = None
    emotion: str | None = None


@dataclass(frozen=True)
class Refused:
    """A row that was left out, and why.

    `reason` is one of a few words that are counted, `detail` what was found; `path` begins at its source.
    """

    source: str
    id: str | None
    path: str
    reason: str
    detail: str


@dataclass(frozen=True)
class Taken:
    """A row that is kept: its times fit its samples; `audio` and `image` are files for the corpus."""

    row: Row
    split: Split
    digest: str
    num_samples: int
    audio: Path
    image: Path | None

    @property
    def seconds(self) -> float:
        """Duration in seconds."""
        return self.num_samples / frames.SAMPLE_RATE


@dataclass(frozen=True)
class Utterance:
    """One cut, without lhotse: what training and evaluation read."""

    id: str
    split: Split
    source: str
    speaker: str
    num_samples: int
    path: Path
    text: str | None = None
    words: tuple[Segment, ...] | None = None
    phones: tuple[Segment, ...] | None = None
    image: Path | None = None
    emotion: str | None = None
    elsewhere: Elsewhere | None = field(default=None, repr=False, compare=False)
    """What reads `path` and `image` where they lie in a store."""

    @property
    def num_frames(self) -> int:
        """Encoder frames this utterance makes."""
        return frames.num_frames(self.num_samples)

    @property
    def seconds(self) -> float:
        """Duration in seconds."""
        return self.num_samples / frames.SAMPLE_RATE

    def wave(self) -> NDArray[np.float32]:
        """All samples in [-1, 1], (S,)."""
        from sonorant.data.audio import read_wave

        return read_wave(self.path if self.elsewhere is None else BytesIO(self.elsewhere.read(self.path)))

    def picture(self) -> bytes | None:
        """Its image's file, None where it has none."""
        if self.image is None:
            return None
        return self.image.read_bytes() if self.elsewhere is None else self.elsewhere.read(self.image)


def read_waves(utterances: Sequence[Utterance]) -> Iterator[NDArray[np.float32]]:
    """The samples of each utterance, in order; where they lie in a store, the next ones are on their way meanwhile."""
    ahead: deque[Future[NDArray[np.float32]]] = deque()
    try:
        for utterance in utterances:
            while ahead and (utterance.elsewhere is None or len(ahead) == READ_AHEAD):
                yield ahead.popleft().result()
            if utterance.elsewhere is None:
                yield utterance.wave()
            else:
                ahead.append(utterance.elsewhere.readers.submit(utterance.wave))
        while ahead:
            yield ahead.popleft().result()
    finally:
        for future in ahead:
            future.cancel()


def read_corpus(folder: Path, split: Split | None = None, source: str | None = None) -> list[Utterance]:
    """The corpus's utterances in their order on disk, optionally of one split and one source.

    Raises ValueError where the folder holds no corpus or nothing is left.
    """
    from lhotse import CutSet

    path = folder / CUTS
    if not path.is_file():
        raise ValueError(f"corpus {folder}: found no {CUTS}, wanted a corpus: run `sonorant prepare` first")
    elsewhere = None
    if (folder / ELSEWHERE).is_file():
        from sonorant.data.shards import Elsewhere

        elsewhere = Elsewhere(folder)
    utterances = [_utterance(folder, cut, elsewhere) for cut in CutSet.from_file(path)]
    chosen = [u for u in utterances if split in (None, u.split) and source in (None, u.source)]
    if not chosen:
        found = sorted({(u.source, u.split) for u in utterances})
        raise ValueError(
            f"corpus {folder}: found no utterance of split {split!r} and source {source!r}, only {found}: "
            "choose one of these or prepare more speech"
        )
    return chosen


def _utterance(folder: Path, cut: Any, elsewhere: Elsewhere | None) -> Utterance:
    supervision = cut.supervisions[0]
    alignment = supervision.alignment or {}
    custom = cut.custom or {}

    def segments(kind: str) -> tuple[Segment, ...] | None:
        items = alignment.get(kind)
        return (
            None
            if items is None
            else tuple((i.symbol, float(i.start), float(i.start + i.duration)) for i in items)
        )

    return Utterance(
        id=cut.id,
        split=custom["split"],
        source=custom["source"],
        speaker=supervision.speaker,
        num_samples=cut.num_samples,
        path=folder / cut.recording.sources[0].source,
        text=supervision.text,
        words=segments("word"),
        phones=segments("phone"),
        image=folder / custom["image"] if custom.get("image") else None,
        emotion=custom.get("emotion"),
        elsewhere=elsewhere,
    )


# --------------------------------------------------------------------------------------------------- writing


def write_corpus(
    folder: Path, taken: Sequence[Taken], refused: Sequence[Refused], kinds: Mapping[str, Mapping[str, str]]
) -> dict[str, Any]:
    """Write a whole corpus into the empty `folder` and return what its stats.json says.

    `kinds` tells of each source what it is. The same arguments give the same bytes.
    """
    with (
        (folder / CUTS).open("wb") as raw,
        # Neither name nor time in the header: they would differ from run to run.
        gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as file,
    ):
        for one in taken:
            audio = place(one.audio, folder, "audio")
            image = place(one.image, folder, "images") if one.image else None
            file.write(to_line(make_cut(one, audio, image).to_dict()).encode())
    write_refused(folder / REFUSED, refused)
    stats = summarise(taken, refused, kinds)
    (folder / STATS).write_text(json.dumps(stats, indent=1) + "\n")
    return stats


def write_refused(path: Path, refused: Iterable[Refused]) -> None:
    """Write one refused row a line."""
    path.write_text("".join(to_line(vars(one)) for one in refused), encoding="utf-8")


def to_line(value: Any) -> str:
    """One line of JSON."""
    return json.dumps(value, ensure_ascii=False) + "\n"


def place(file: Path, folder: Path, kind: str) -> str:
    """Bring `file` into the corpus, without a copy where the disk allows; returns its path relative to it."""
    path = f"{kind}/{file.name[:2]}/{file.name}"
    target = folder / path
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file, target)
        except OSError:
            shutil.copyfile(file, target)
    return path


def make_cut(taken: Taken, audio: str, image: str | None) -> Any:
    """The lhotse MonoCut of an utterance; `audio` and `image` are paths relative to the corpus."""
    from lhotse import MonoCut, Recording, SupervisionSegment
    from lhotse.audio import AudioSource
    from lhotse.supervision import AlignmentItem

    row, duration = taken.row, taken.seconds

    def items(segments: Iterable[Segment]) -> list[Any]:
        return [AlignmentItem(label, start, round(end - start, 9)) for label, start, end in segments]

    alignment = {kind: items(s) for kind, s in (("word", row.words), ("phone", row.phones)) if s is not None}
    custom: dict[str, Any] = {"split": taken.split, "source": row.source, "digest": taken.digest, "image": image}
    if row.distractors:
        custom["distractors"] = list(row.distractors)
    if row.emotion:
        custom["emotion"] = row.emotion
    return MonoCut(
        id=row.id,
        start=0,
        duration=duration,
        channel=0,
        recording=Recording(
            id=row.id,
            sources=[AudioSource(type="file", channels=[0], source=audio)],
            sampling_rate=frames.SAMPLE_RATE,
            num_samples=taken.num_samples,
            duration=duration,
        ),
        supervisions=[
            SupervisionSegment(
                id=row.id,
                recording_id=row.id,
                start=0,
                duration=duration,
                text=row.text,
                speaker=row.speaker,
                alignment=alignment or None,
            )
        ],
        custom=custom,
    )


def summarise(
    taken: Sequence[Taken], refused: Sequence[Refused], kinds: Mapping[str, Mapping[str, str]]
) -> dict[str, Any]:
    """Hours, utterances and speakers in all, by split and by source; durations; refused rows by reason."""
    histogram = [0] * len(HISTOGRAM_SECONDS)
    for one in taken:
        histogram[sum(one.seconds >= edge for edge in HISTOGRAM_SECONDS) - 1] += 1
    sources = {}
    for name, kind in kinds.items():
        own = [one for one in taken if one.row.source == name]
        reasons = Counter(one.reason for one in refused if one.source == name)
        sources[name] = {
            **kind,
            **tally(own),
            "splits": by_split(own),
            "refused": dict(sorted(reasons.items())),
        }
    return {
        **tally(taken),
        "splits": by_split(taken),
        "sources": sources,
        "durations": {"from_seconds": list(HISTOGRAM_SECONDS), "utterances": histogram},
        "refused": {
            "rows": len(refused),
            "share": round(len(refused) / max(1, len(taken) + len(refused)), 6),
            "reasons": dict(sorted(Counter(one.reason for one in refused).items())),
        },
    }


def by_split(taken: Sequence[Taken]) -> dict[str, dict[str, float]]:
    """Hours, utterances and speakers of each split that has any."""
    splits = {split: [one for one in taken if one.split == split] for split in get_args(Split)}
    return {split: tally(own) for split, own in splits.items() if own}


def tally(taken: Sequence[Taken]) -> dict[str, float]:
    """Hours, utterances and speakers."""
    hours = sum(one.num_samples for one in taken) / frames.SAMPLE_RATE / 3600
    return {
        "hours": round(hours, 6),
        "utterances": len(taken),
        "speakers": len({one.row.speaker for one in taken}),
    }
