"""Where speech comes from: every kind of source as rows."""

from __future__ import annotations

import gzip
import json
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sonorant.artifacts import ELSEWHERE
from sonorant.config import (
    FolderSource,
    LhotseSource,
    LibrispeechSource,
    ManifestSource,
    Part,
    Source,
    Split,
    SyntheticSource,
)
from sonorant.data.corpus import CUTS, Refused, Row, Segment
from sonorant.data.intake import digest_bytes
from sonorant.data.progress import Report

Entry = Row | Refused
SILENCES = {"", "#h", "_", "_:", "<sil>", "epi", "h#", "pau", "sil", "silence", "sp"}
SILENCE = "SIL"
# Also what libsndfile cannot read: such a file is refused, not overlooked.
AUDIO_SUFFIXES = frozenset(
    f".{suffix}"
    for suffix in (
        *(
            "aac",
            "aif",
            "aifc",
            "aiff",
            "amr",
            "au",
            "caf",
            "flac",
            "m4a",
            "mp3",
            "mp4",
            "nist",
            "oga",
            "ogg",
        ),
        *("opus", "rf64", "snd", "sph", "w64", "wav", "webm", "wma"),
    )
)


def read_source(source: Source, folder: Path, num_workers: int, report: Report, part: Part) -> list[Entry]:
    """All rows that a source offers, in its order, and those that cannot even be rows.

    Of a synthetic source only the rows of a part are made. `folder` is for audio of sources that has no file yet.
    Raises ValueError where there is nothing to read.
    """
    if isinstance(source, SyntheticSource):
        from sonorant.data.synthesis import synthesise

        return [*synthesise(source, folder, num_workers, report, part)]
    if not source.path.exists():
        raise ValueError(
            f"source {source.name}: found nothing at {source.path}, wanted {wanted(source)}: correct its path"
        )
    if source.path.is_dir() and isinstance(source, ManifestSource):
        raise ValueError(
            f"source {source.name}: found a folder at {source.path}, wanted {wanted(source)}: name the file"
        )
    if source.path.is_file() and isinstance(source, LibrispeechSource | FolderSource):
        raise ValueError(
            f"source {source.name}: found a file at {source.path}, wanted {wanted(source)}: give the folder"
        )
    match source:
        case ManifestSource():
            entries = list(read_manifest(source))
        case LibrispeechSource():
            entries = list(read_librispeech(source))
        case FolderSource():
            entries = list(read_folder(source))
        case LhotseSource():
            entries = list(read_lhotse(source, folder))
    if not entries:
        raise ValueError(
            f"source {source.name}: found no utterance in {source.path}, wanted {wanted(source)}: check it"
        )
    return entries


def wanted(source: Source) -> str:
    """What a source of this kind should find at its path."""
    return {
        "synthetic": "nothing",
        "manifest": "a JSONL manifest",
        "librispeech": "a folder as LibriSpeech's, subset/speaker/chapter/*.flac",
        "folder": "a folder of audio files",
        "lhotse": "a lhotse cut manifest (.jsonl, .jsonl.gz) or Shar folder",
    }[source.kind]


def describe_source(source: Source) -> dict[str, str]:
    """What a corpus says of this source."""
    if isinstance(source, SyntheticSource):
        from sonorant.data.synthesis import engine_name

        return {"kind": source.kind, "voice": engine_name(source)}
    return {"kind": source.kind}


def name_silences(phones: tuple[Segment, ...] | None) -> tuple[Segment, ...] | None:
    """Phones with one name for all that is silence."""
    if phones is None:
        return None
    return tuple(
        (SILENCE if label.lower() in SILENCES else label, start, end) for label, start, end in phones
    )


# -------------------------------------------------------------------------------------------------- manifest

Text = Annotated[str, Field(min_length=1)]


class ManifestRow(BaseModel):
    """One line of a manifest. Times are seconds; start and end are where the utterance lies in its file."""

    model_config = ConfigDict(coerce_numbers_to_str=True, allow_inf_nan=False)

    id: Text
    path: Text
    speaker: Text
    split: Split | None = None
    start: float = 0.0
    end: float | None = None
    text: str | None = None
    words: tuple[Segment, ...] | None = None
    phones: tuple[Segment, ...] | None = None
    phones39: tuple[Segment, ...] | None = Field(None, description="taken instead of phones where present")
    image: Text | None = None
    distractors: tuple[str, ...] = ()


def read_manifest(source: ManifestSource) -> Iterator[Entry]:
    """The rows of a JSONL manifest; paths in it are relative to its folder."""
    folder = source.path.parent
    for number, line in read_lines(source.path):
        try:
            row = ManifestRow.model_validate_json(line)
        except ValidationError as error:
            yield refuse_line(source, number, describe_faults(error))
            continue
        yield Row(
            id=row.id,
            source=source.name,
            speaker=row.speaker,
            path=folder / row.path,
            split=row.split,
            start=row.start,
            end=row.end,
            text=row.text,
            words=row.words,
            phones=name_silences(row.phones39 if row.phones39 is not None else row.phones),
            image=folder / row.image if row.image else None,
            distractors=row.distractors,
        )


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number and content of each line that is not blank, of a file that may be compressed."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if line.strip():
                    yield number, line
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(
            f"{path}: found no whole gzip file ({error}), wanted one: write or fetch it again"
        ) from None


def refuse_line(source: ManifestSource | LhotseSource, number: int, detail: str) -> Refused:
    """A line that is no row."""
    return Refused(source.name, None, f"{source.path.name}:{number}", "broken row", detail)


def describe_faults(error: ValidationError) -> str:
    """What is wrong with a row, on one line."""
    faults = error.errors(include_url=False, include_input=False)
    return "; ".join(f"{'.'.join(map(str, f['loc'])) or 'row'}: {f['msg']}" for f in faults)


# ----------------------------------------------------------------------------------------------- librispeech


def read_librispeech(source: LibrispeechSource) -> Iterator[Entry]:
    """The rows of LibriSpeech's layout, of the whole or of one subset."""
    root = source.path.resolve()
    chapters = sorted({path.parent for pattern in ("*.flac", "*.trans.txt") for path in root.rglob(pattern)})
    for chapter in chapters:
        subset = chapter.parent.parent.name
        split = next((s for s in get_args(Split) if subset.startswith(f"{s}-")), None)
        texts = dict(read_transcripts(chapter))
        for name in sorted({path.stem for path in chapter.glob("*.flac")} | set(texts)):
            yield Row(
                id=name,
                source=source.name,
                speaker=chapter.parent.name,
                path=source.path / (chapter / f"{name}.flac").relative_to(root),
                split=split,
                text=texts.get(name),
            )


def read_transcripts(chapter: Path) -> Iterator[tuple[str, str]]:
    """Utterance and text, of each line of a chapter's *.trans.txt."""
    for path in sorted(chapter.glob("*.trans.txt")):
        for line in path.read_text("utf-8", errors="replace").splitlines():
            name, _, text = line.strip().partition(" ")
            if name:
                yield name, text.strip()


# ---------------------------------------------------------------------------------------------------- folder


def read_folder(source: FolderSource) -> Iterator[Entry]:
    """One row per audio file below a folder."""
    files = sorted(
        path.relative_to(source.path)
        for path in source.path.rglob("*")
        if path.suffix.lower() in AUDIO_SUFFIXES and not path.name.startswith(".")
    )
    stems = Counter(path.with_suffix("") for path in files)
    for path in files:
        stem = path.with_suffix("")
        yield Row(
            id=(stem if stems[stem] == 1 else path).as_posix(),
            source=source.name,
            speaker=path.parent.name or source.path.resolve().name,
            path=source.path / path,
        )


# ---------------------------------------------------------------------------------------------------- lhotse


def read_lhotse(source: LhotseSource, folder: Path) -> Iterator[Entry]:
    """The rows of a cut manifest, of another corpus's folder or of a Shar folder."""
    path = source.path / CUTS if (source.path / CUTS).is_file() else source.path
    if (source.path / ELSEWHERE).is_file():
        raise ValueError(
            f"source {source.name}: found a corpus {source.path} whose audio lies in a store, wanted audio here: "
            "run `sonorant store unshard` and give what it wrote"
        )
    if path.is_dir():
        for number, cut in enumerate(read_shar(source), 1):
            yield read_cut(source, cut, number, path, folder)
        return
    from lhotse.serialization import deserialize_item

    for number, line in read_lines(path):
        try:
            cut = deserialize_item(json.loads(line))
        # lhotse trusts what it reads: a line of another shape fails in any of these ways.
        except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
            yield refuse_line(source, number, f"{type(error).__name__}: {error}")
            continue
        yield read_cut(source, cut, number, path.parent, folder)


def read_shar(source: LhotseSource) -> Iterator[Any]:
    """The cuts of a Shar folder, their audio in memory."""
    from lhotse import CutSet

    if not list(source.path.glob("cuts.*.jsonl*")):
        raise ValueError(
            f"source {source.name}: found no cuts in {source.path}, wanted {wanted(source)}: correct its path"
        )
    try:
        yield from CutSet.from_shar(in_dir=source.path)
    except (OSError, EOFError, zlib.error, tarfile.TarError, ValueError, AssertionError) as error:
        raise ValueError(
            f"source {source.name}: found a Shar folder {source.path} that cannot be read to its end "
            f"({type(error).__name__}: {error}), wanted whole shards: write or fetch it again"
        ) from None


def read_cut(source: LhotseSource, cut: Any, number: int, beside: Path, folder: Path) -> Entry:
    """A cut as a row; where no speaker is named its recording is one. Audio in memory goes to `folder`."""
    from lhotse import MonoCut, MultiCut

    def refuse(reason: str, detail: str) -> Refused:
        return Refused(source.name, getattr(cut, "id", None), f"{source.path.name}:{number}", reason, detail)

    if not isinstance(cut, MonoCut | MultiCut):
        return refuse(
            "unsupported cut", f"a {type(cut).__name__}, wanted a MonoCut or MultiCut: save its audio first"
        )
    if cut.recording is None:
        return refuse("missing file", "a cut without a recording")
    recording, supervisions = cut.recording, sorted(cut.supervisions, key=lambda s: s.start)
    kinds = [audio.type for audio in recording.sources]
    if kinds not in (["file"], ["memory"]) or recording.transforms:
        found = "transforms" if recording.transforms else f"sources {kinds}"
        return refuse("unsupported cut", f"a recording with {found}, wanted one file: save its audio first")
    speakers = {s.speaker for s in supervisions if s.speaker is not None}
    if len(speakers) > 1:
        return refuse(
            "several speakers", f"{sorted(map(str, speakers))}, wanted one: trim cuts to supervisions"
        )
    audio, custom = recording.sources[0], cut.custom or {}
    if kinds == ["file"]:
        path = Path(audio.source)
        # lhotse means the working directory; a corpus of ours, its own folder.
        path = beside / path if (beside / path).exists() else path
    else:
        path = keep_bytes(audio.source, folder)
    is_one_of_many = isinstance(cut, MonoCut) and len(audio.channels) > 1
    image = custom.get("image")
    return Row(
        id=cut.id,
        source=source.name,
        speaker=str(speakers.pop()) if speakers else recording.id,
        path=path,
        split=custom["split"] if custom.get("split") in get_args(Split) else None,
        start=float(cut.start),
        end=float(cut.end),
        text=" ".join(s.text for s in supervisions if s.text) or None,
        words=read_alignment(supervisions, "word"),
        phones=name_silences(read_alignment(supervisions, "phone")),
        image=beside / image if isinstance(image, str) else None,
        distractors=tuple(custom.get("distractors") or ()),
        channel=audio.channels.index(cut.channel) if is_one_of_many else None,
    )


def read_alignment(supervisions: list[Any], kind: str) -> tuple[Segment, ...] | None:
    """The segments of one kind, relative to the cut; None where no supervision has any."""
    aligned = [s.alignment[kind] for s in supervisions if s.alignment and kind in s.alignment]
    if not aligned:
        return None
    return tuple((i.symbol, float(i.start), float(i.start + i.duration)) for items in aligned for i in items)


def keep_bytes(content: bytes, folder: Path) -> Path:
    """Audio that has no file as one, named after its content."""
    path = folder / f"{digest_bytes(content)}.audio"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_bytes(content)
        partial.rename(path)
    return path
