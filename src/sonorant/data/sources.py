"""Where speech comes from: every kind of source as rows."""

from __future__ import annotations

import gzip
import json
import tarfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

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
from sonorant.config.prepare import CaptionFile, SpokenCaptionsSource
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
    if source.path.is_file() and isinstance(source, LibrispeechSource | FolderSource | SpokenCaptionsSource):
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
        case SpokenCaptionsSource():
            entries = [entry for file in source.files for entry in read_captions(source, file)]
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
        "spoken_captions": "the folder of its JSON files",
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
    return tuple((SILENCE if label.lower() in SILENCES else label, start, end) for label, start, end in phones)


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
    emotion: Text | None = None


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
            emotion=row.emotion,
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
        raise ValueError(f"{path}: found no whole gzip file ({error}), wanted one: write or fetch it again") from None


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
        return refuse("unsupported cut", f"a {type(cut).__name__}, wanted a MonoCut or MultiCut: save its audio first")
    if cut.recording is None:
        return refuse("missing file", "a cut without a recording")
    recording, supervisions = cut.recording, sorted(cut.supervisions, key=lambda s: s.start)
    kinds = [audio.type for audio in recording.sources]
    if kinds not in (["file"], ["memory"]) or recording.transforms:
        found = "transforms" if recording.transforms else f"sources {kinds}"
        return refuse("unsupported cut", f"a recording with {found}, wanted one file: save its audio first")
    speakers = {s.speaker for s in supervisions if s.speaker is not None}
    if len(speakers) > 1:
        return refuse("several speakers", f"{sorted(map(str, speakers))}, wanted one: trim cuts to supervisions")
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


# ------------------------------------------------------------------------------------------- spoken captions

LAYOUTS = (
    'wanted {"data": [{"image", "captions": [{"uttid", "speaker", "wav", "text"}]}]} (SpokenCOCO), {"data": [{"image", '
    '"uttid", "speaker", "wav", "asr_text"}]} (Places Audio, Flickr8k) or {"images": [{"filename", "split", '
    '"sentences": [{"raw"}]}]} (Karpathy\'s Flickr8k)'
)
Named = Literal["train", "restval", "dev", "val", "test"]
SPLITS: dict[Named, Split] = {"train": "train", "restval": "train", "dev": "dev", "val": "dev", "test": "test"}
CAPTIONS, SPEAKERS, WAVES = "wav2capt.txt", "wav2spk.txt", "wavs"
"""What Flickr8k's recordings come with: lines of wave, image and #caption; lines of wave and speaker; the waves."""


class Caption(BaseModel):
    """One recording of a caption. `wav` and `image` begin at the folders of theirs."""

    model_config = ConfigDict(coerce_numbers_to_str=True)

    uttid: Text
    speaker: Text
    wav: Text
    image: Text
    text: str | None = Field(None, validation_alias=AliasChoices("text", "asr_text"))
    split: Named | None = None


class Sentence(BaseModel):
    """A caption as it was written."""

    raw: str


class CaptionedImage(BaseModel):
    """An image in Karpathy's files; its sentences are numbered from 0."""

    filename: Text
    split: Named
    sentences: tuple[Sentence, ...]


def read_captions(source: SpokenCaptionsSource, file: CaptionFile) -> Iterator[Entry]:
    """The rows of one JSON file, and as refused ones its captions that are none.

    Raises ValueError where the file has none of the known layouts, or its folders are not there.
    """
    path = source.path / file.name
    if not path.is_file():
        raise ValueError(f"source {source.name}: found no file {path}, wanted one of its files: correct its name")
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(
            f"source {source.name}: found no JSON in {path} ({error}), wanted it whole: fetch it again"
        ) from None
    keys = content if isinstance(content, dict) else {}
    is_karpathy = "data" not in keys
    items = keys.get("images" if is_karpathy else "data")
    if not isinstance(items, list):
        found = f"the keys {sorted(keys)[:5]}" if keys else f"a {type(content).__name__}"
        raise ValueError(f"source {source.name}: found {found} in {path}, {LAYOUTS}: give a file of these")
    audio = find_base(source, path, content, "audio")
    images = find_base(source, path, content, "image")
    for place, caption in read_karpathy(source, items, audio) if is_karpathy else unroll(items):
        name = f"{file.name.as_posix()}:{place}"
        uttid = caption.get("uttid") if isinstance(caption, dict) else None
        try:
            if isinstance(caption, ValidationError):
                raise caption
            one = Caption.model_validate(caption)
        except ValidationError as error:
            yield Refused(source.name, str(uttid) if uttid else None, name, "broken row", describe_faults(error))
            continue
        split = None if one.split is None else SPLITS[one.split]
        if split and file.split and split != file.split:
            detail = f"split: {one.split!r}, wanted {file.split} as the source says of its file"
            yield Refused(source.name, one.uttid, name, "broken row", detail)
            continue
        yield Row(
            id=one.uttid,
            source=source.name,
            speaker=one.speaker,
            path=audio / one.wav,
            split=file.split or split,
            text=one.text,
            image=images / one.image,
        )


def find_base(
    source: SpokenCaptionsSource, path: Path, content: dict[str, Any], kind: Literal["audio", "image"]
) -> Path:
    """The folder of a file's recordings or images: as the source says, else as the file, else the source's path."""
    setting = "audio" if kind == "audio" else "images"
    given = getattr(source, setting)
    base = given if given is not None else content.get(f"{kind}_base_path") or ""
    if not isinstance(base, str | Path):
        raise ValueError(f"source {source.name}: found {kind}_base_path {base!r} in {path}, wanted a path: correct it")
    folder = source.path / base
    if not folder.is_dir():
        whence = "as its section says" if given is not None else f"as {kind}_base_path of {path.name} says"
        raise ValueError(
            f"source {source.name}: found no folder {folder}, {whence}, wanted the one of its {setting}: set "
            f"`{setting}` of the source"
        )
    return folder


def unroll(items: list[Any]) -> Iterator[tuple[str, Any]]:
    """Place and fields of each caption: an item is one, or an image with several."""
    for i, item in enumerate(items):
        if not isinstance(item, dict) or not ("captions" in item or "caption" in item):
            yield f"data[{i}]", item
            continue
        image = {key: item[key] for key in ("image", "split") if key in item}
        # One caption an item: SpokenCOCO unrolled, as FaST-VGS reads it.
        captions = item.get("captions", [item.get("caption")])
        if not isinstance(captions, list):
            yield f"data[{i}].captions", captions
            continue
        for j, caption in enumerate(captions):
            yield f"data[{i}].captions[{j}]", {**image, **caption} if isinstance(caption, dict) else caption


def read_karpathy(source: SpokenCaptionsSource, items: list[Any], audio: Path) -> Iterator[tuple[str, Any]]:
    """Place and fields of each recorded caption of Karpathy's images of Flickr8k, or what is wrong with an image."""
    recorded: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for wav, image, number in read_columns(source, audio / CAPTIONS, 3):
        recorded[image].append((wav, number))
    speakers = dict(read_columns(source, audio / SPEAKERS, 2))
    for i, item in enumerate(items):
        try:
            one = CaptionedImage.model_validate(item)
        except ValidationError as error:
            yield f"images[{i}]", error
            continue
        sentences = {f"#{number}": sentence.raw for number, sentence in enumerate(one.sentences)}
        for wav, number in recorded[one.filename]:
            caption = {
                "uttid": Path(wav).stem,
                "speaker": speakers.get(wav),
                "wav": f"{WAVES}/{wav}",
                "image": one.filename,
                "text": sentences.get(number),
                "split": one.split,
            }
            yield f"images[{i}] {wav}", {key: value for key, value in caption.items() if value is not None}


def read_columns(source: SpokenCaptionsSource, path: Path, num: int) -> Iterator[list[str]]:
    """The words of each line. Raises ValueError where there is no such file or a line has more or fewer."""
    if not path.is_file():
        raise ValueError(
            f"source {source.name}: found no {path}, wanted it beside the recordings that Karpathy's file has no word "
            "of: set `audio` of the source to Flickr8k's flickr_audio"
        )
    for line_number, line in enumerate(path.read_text("utf-8", errors="replace").splitlines(), 1):
        words = line.split()
        if words and len(words) != num:
            raise ValueError(f"{path}:{line_number}: found {len(words)} words, wanted {num}: correct the line")
        if words:
            yield words
