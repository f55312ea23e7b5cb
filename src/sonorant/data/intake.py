"""What every row passes before it is kept: read, checked, brought to 16 kHz mono, written as 16-bit FLAC.

Rows are taken in shards, each by one process into one folder that appears at once and whole, so that a killed
run goes on where it was; what is in a shard depends on its rows alone and not on who made it.
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import struct
import tempfile
import threading
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray

from sonorant.data.audio import resample
from sonorant.data.corpus import REGIONS, Row, Segment
from sonorant.data.frames import SAMPLE_RATE
from sonorant.data.progress import Report

SHARD_ROWS = 32
OUTCOMES = "outcomes.jsonl"
PARTIAL = ".partial-"
# What Pillow decodes on its own; for some of its other formats it starts programs.
PICTURES = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")  # of 8 bits a channel at most
IMAGE_BYTES = 1 << 26  # of a file, and of the arrays in it; of a picture also what its pixels may take
BOX_TOLERANCE = 1e-5  # detectors count pixels, and boxes are scaled in float32
TIME_TOLERANCE = 0.01  # s: manifests round their times, to hundredths at worst
LOUDEST = 4.0  # full scales: beyond it, samples were not meant to lie in [-1, 1]
LONGEST_STREAM = 0x7FFF0000  # bytes: from here on a WAV header means that its writer did not know
SHORT_CHUNK = re.compile(r"^\s*(?:data|SSND|Data Size|riff)\s*: (\d+) \(should be (\d+)\)", re.MULTILINE)
SHORT_RF64 = re.compile(r"Calculated frame count (\d+) does not match value from 'ds64' chunk of (\d+)")
NIST_COUNT = re.compile(rb"sample_count -i (\d+)")


class RefusalError(Exception):
    """Why a row is not kept: one of a few words that are counted, and what was found."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Outcome:
    """What became of a row: either files and what is in them, or a reason."""

    digest: str = ""
    num_samples: int = 0
    audio: str = ""
    image: str | None = None
    reason: str = ""
    detail: str = ""

    @property
    def seconds(self) -> float:
        """Duration in seconds."""
        return self.num_samples / SAMPLE_RATE


@dataclass(frozen=True)
class Limits:
    """What a row must lie within: its duration in seconds, and the pixels of its image."""

    min_seconds: float
    max_seconds: float
    max_pixels: int


@dataclass(frozen=True)
class Shard:
    """Rows that one process takes, what they must lie within, and the folder it fills."""

    folder: Path
    rows: tuple[Row, ...]
    limits: Limits

    def outcomes(self) -> list[Outcome]:
        """What became of each row, once the folder is there."""
        return [Outcome(**json.loads(line)) for line in (self.folder / OUTCOMES).read_text("utf-8").splitlines()]


def take_rows(
    rows: Sequence[Row],
    limits: Limits,
    folder: Path,
    num_workers: int,
    report: Report,
) -> Iterator[tuple[Row, Outcome, Path]]:
    """Check and convert all rows; yields each, in order, with what became of it and the folder of its files.

    Finished shards in `folder` are kept where neither row nor file has changed; 0 workers are one a core.
    Raises OSError where a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_partial(folder)
    shards = [
        plan_shard(folder, tuple(rows[first : first + SHARD_ROWS]), limits) for first in range(0, len(rows), SHARD_ROWS)
    ]
    missing = [shard for shard in shards if not shard.folder.is_dir()]
    done = len(rows) - sum(len(shard.rows) for shard in missing)
    report(done, len(rows))
    try:
        for num_rows in fill_shards(missing, num_workers or len(os.sched_getaffinity(0))):
            done += num_rows
            report(done, len(rows))
    finally:
        remove_partial(folder)
    for shard in shards:
        for row, outcome in zip(shard.rows, shard.outcomes(), strict=True):
            yield row, outcome, shard.folder


def remove_partial(folder: Path) -> None:
    """Remove what killed workers left behind."""
    for path in folder.glob(PARTIAL + "*"):
        shutil.rmtree(path, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------- shards


def plan_shard(folder: Path, rows: tuple[Row, ...], limits: Limits) -> Shard:
    """The shard of these rows, its folder named after all that its content follows from."""
    made_from: list[object] = [*astuple(limits), soundfile.__libsndfile_version__]
    made_from += [[vars(row), file_state(row.path), row.image and file_state(row.image)] for row in rows]
    digest = hashlib.sha256(json.dumps(made_from, default=str).encode()).hexdigest()
    return Shard(folder / digest[:32], rows, limits)


def file_state(path: Path) -> tuple[int, int] | None:
    """Size and time of change; None where there is no file."""
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_size, state.st_mtime_ns


def fill_shards(shards: Sequence[Shard], num_workers: int) -> Iterator[int]:
    """Fill all shards, each in one of so many processes; yields the number of rows as each is done."""
    num_workers = min(num_workers, len(shards))
    if num_workers <= 1:
        yield from map(fill_shard, shards)
        return
    # Not forked: the parent may have threads (torch, a progress bar) whose locks would be copied as they are.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, mp_context=context, initializer=start_worker) as pool:
        try:
            for future in as_completed([pool.submit(fill_shard, shard) for shard in shards]):
                yield future.result()
        except BrokenProcessPool:
            raise ValueError(
                f"num_workers: found a worker of {num_workers} that was killed, wanted all to live: "
                "memory may have run out, lower it and run again; finished work is kept"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def start_worker() -> None:
    """Leave Ctrl-C to the parent, and end with it even when it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """Wait for the parent's end; a pool's worker would wait for ever for work that no one sends."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def fill_shard(shard: Shard) -> int:
    """Take a shard's rows into its folder; returns how many there were."""
    partial = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=shard.folder.parent))
    try:
        images = ImageIntake(partial, shard.limits.max_pixels)
        outcomes = [take_row(row, partial, shard.limits, images) for row in shard.rows]
        lines = [json.dumps(vars(outcome), ensure_ascii=False) + "\n" for outcome in outcomes]
        (partial / OUTCOMES).write_text("".join(lines), encoding="utf-8")
        partial.rename(shard.folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return len(shard.rows)


# ------------------------------------------------------------------------------------------------------ rows


class ImageIntake:
    """The images of a shard in its folder, named after their content; one that many rows speak of is read once."""

    def __init__(self, folder: Path, max_pixels: int) -> None:
        self._folder, self._max_pixels = folder, max_pixels
        self._taken: dict[Path, str | RefusalError] = {}

    def take(self, path: Path) -> str:
        """Check an image and write it; returns its name. RefusalError as `read_image` has it."""
        if path not in self._taken:
            try:
                content = read_image(path, self._max_pixels)
            except RefusalError as refusal:
                self._taken[path] = refusal
            else:
                name = f"{digest_bytes(content)}{path.suffix.lower()}"
                (self._folder / name).write_bytes(content)
                self._taken[path] = name
        taken = self._taken[path]
        if isinstance(taken, RefusalError):
            raise taken
        return taken


def take_row(row: Row, folder: Path, limits: Limits, images: ImageIntake) -> Outcome:
    """Read and check a row and write its audio to `folder`, named after its content, and its image."""
    try:
        samples = read_row(row, limits.min_seconds, limits.max_seconds)
        image = images.take(row.image) if row.image else None
    except RefusalError as refusal:
        return Outcome(reason=refusal.reason, detail=refusal.detail)
    digest = digest_bytes(samples.astype("<i2").tobytes())
    # Encoded in memory: on a full disk soundfile loses the reason.
    flac = io.BytesIO()
    soundfile.write(flac, samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    audio = f"{digest}.flac"
    (folder / audio).write_bytes(flac.getvalue())
    return Outcome(digest, len(samples), audio, image)


def digest_bytes(content: bytes) -> str:
    """32 hexadecimal digits that no other content has."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def read_row(row: Row, min_seconds: float, max_seconds: float) -> NDArray[np.int16]:
    """A row's samples at 16 kHz, (S,).

    Raises RefusalError where they are not there, not whole, not finite, all equal, too few or too many.
    """
    if not row.path.is_file():
        raise RefusalError("missing file", "no such file")
    if row.path.stat().st_size == 0:
        raise RefusalError("zero-length", "an empty file")
    try:
        with soundfile.SoundFile(row.path) as file:
            check_whole(row.path, file)
            first, num = find_segment(row, file.frames, file.samplerate)
            seconds = num / file.samplerate
            if not min_seconds <= seconds <= max_seconds:
                bound, word = (min_seconds, "least") if seconds < min_seconds else (max_seconds, "most")
                reason = "too short" if seconds < min_seconds else "too long"
                raise RefusalError(reason, f"{seconds:.3f} s, wanted at {word} {bound:g} s")
            file.seek(first)
            channels = file.read(num, dtype="float32", always_2d=True)
            rate = file.samplerate
    except soundfile.LibsndfileError as error:
        raise RefusalError("unreadable", error.error_string.removeprefix("Error : ")) from None
    except (soundfile.SoundFileRuntimeError, TypeError) as error:
        raise RefusalError("unreadable", str(error)) from None
    if len(channels) < num:
        raise RefusalError("truncated", f"{len(channels)} of {num} samples")
    if row.channel is not None and row.channel >= channels.shape[1]:
        raise RefusalError("missing channel", f"channel {row.channel} of {channels.shape[1]}")
    wave = channels.mean(axis=1, dtype=np.float32) if row.channel is None else channels[:, row.channel]
    if not np.isfinite(wave).all():
        raise RefusalError("not finite", f"NaN or infinity in {np.count_nonzero(~np.isfinite(wave))} samples")
    if (peak := float(np.abs(wave).max())) > LOUDEST:
        raise RefusalError("beyond full scale", f"peak {peak:g}, wanted samples in [-1, 1]")
    samples = to_int16(resample_alone(wave, rate))
    if (samples == samples[0]).all():
        raise RefusalError("silence", f"all samples are {samples[0]}")
    return samples


def check_whole(path: Path, file: soundfile.SoundFile) -> None:
    """RefusalError where a file is shorter than its header promises: libsndfile trims most without a word."""
    if file.frames >= 2**62:
        raise RefusalError("unreadable", "a header that gives no length: write the file again")
    if file.format == "NIST" and (count := NIST_COUNT.search(path.open("rb").read(1024))):
        promised, found = int(count[1]), file.frames
    elif file.format == "OGG":
        promised, found = 1, int(is_ogg_ended(path))
    elif match := SHORT_CHUNK.search(file.extra_info):
        promised, found = int(match[1]), int(match[2])
        promised = 0 if promised >= LONGEST_STREAM else promised
    elif match := SHORT_RF64.search(file.extra_info):
        promised, found = int(match[2]), int(match[1])
    else:
        return
    if promised > found:
        detail = "no last page" if file.format == "OGG" else f"a header that promises {promised}, and {found} found"
        raise RefusalError("truncated", detail)


def is_ogg_ended(path: Path) -> bool:
    """Whether an Ogg file's last page is whole and says that it is the last (RFC 3533 §6)."""
    with path.open("rb") as file:
        file.seek(-min(path.stat().st_size, 2**17), os.SEEK_END)
        tail = file.read()
    page = tail[tail.rfind(b"OggS") :]
    if len(page) < 27 or len(page) < 27 + page[26]:
        return False
    # header type, bit 4; number of segments, the length of each, the segments
    return bool(page[5] & 4) and len(page) >= 27 + page[26] + sum(page[27 : 27 + page[26]])


def find_segment(row: Row, num_samples: int, rate: int) -> tuple[int, int]:
    """First sample and number of samples of a row in its file; RefusalError where they lie outside."""
    if num_samples == 0:
        raise RefusalError("zero-length", "no samples")
    seconds = num_samples / rate
    end = seconds if row.end is None else row.end
    if not -TIME_TOLERANCE <= row.start < end <= seconds + TIME_TOLERANCE:
        raise RefusalError("times outside the file", f"{row.start:g} to {end:g} s of {seconds:.3f} s")
    first, last = max(0, round(row.start * rate)), min(num_samples, round(end * rate))
    if first >= last:
        raise RefusalError("zero-length", f"{row.start:g} to {end:g} s")
    return first, last - first


def resample_alone(wave: NDArray[np.float32], rate: int) -> NDArray[np.float32]:
    """`wave` (S,) at 16 kHz, computed on one thread, so that neither cores nor workers can change a bit."""
    if rate == SAMPLE_RATE:
        return wave
    import torch

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return resample(np.ascontiguousarray(wave), rate)
    finally:
        torch.set_num_threads(num_threads)


def to_int16(wave: NDArray[np.float32]) -> NDArray[np.int16]:
    """16-bit samples of a wave in [-1, 1]; what lies beyond is clipped."""
    return np.clip(np.rint(wave * 32768), -32768, 32767).astype(np.int16)


def read_image(path: Path, max_pixels: int) -> bytes:
    """The file, as it is, of a picture, or of the regions that a detector found in one (`.npz`).

    Raises RefusalError where it is missing, cannot be decoded or is too large.
    """
    if not path.is_file():
        raise RefusalError("missing image", f"no file {path.name}")
    is_regions = path.suffix.lower() == REGIONS
    max_bytes = IMAGE_BYTES if is_regions else max(IMAGE_BYTES, 4 * max_pixels)
    if (size := path.stat().st_size) > max_bytes:
        raise RefusalError("oversized image", f"{path.name}: {size} bytes, wanted at most {max_bytes}")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RefusalError("unreadable image", f"{path.name}: {error.strerror}") from None
    if is_regions:
        check_regions(path.name, content)
    else:
        check_picture(path.name, content, max_pixels)
    return content


def check_picture(name: str, content: bytes, max_pixels: int) -> None:
    """RefusalError where no picture can be decoded, or its header, read before any of it is, gives too many pixels.

    Of one that moves, the first frame is what is seen later, and what is checked.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            # What Pillow would warn of is refused below.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content), formats=PICTURES)
        with image:
            if image.width * image.height > max_pixels:
                detail = f"{name}: {image.width} × {image.height} pixels, wanted at most {max_pixels}"
                raise RefusalError("oversized image", detail)
            if image.mode not in MODES:
                detail = f"{name}: mode {image.mode}, wanted one of at most 8 bits a channel"
                raise RefusalError("unreadable image", detail)
            image.load()
    except Image.DecompressionBombError:
        raise RefusalError("oversized image", f"{name}: far more than {max_pixels} pixels") from None
    except UnidentifiedImageError:
        raise RefusalError("unreadable image", f"{name}: none of {', '.join(PICTURES)}") from None
    # Pillow's decoders fail in any of these ways.
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error, zlib.error) as error:
        raise RefusalError("unreadable image", f"{name}: {error or type(error).__name__}") from None


def check_regions(name: str, content: bytes) -> None:
    """RefusalError where a file does not hold `features` (R, D) and `boxes` (R, 4), these scaled to [0, 1]."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if (size := sum(member.file_size for member in archive.infolist())) > IMAGE_BYTES:
                raise RefusalError("oversized image", f"{name}: {size} bytes, wanted at most {IMAGE_BYTES}")
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            features, boxes = arrays["features"], arrays["boxes"]
    # What zipfile and numpy say of a file that is not whole, lacks an array, or must not be unpickled.
    except (OSError, ValueError, LookupError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        detail = str(error).partition("\n")[0] or type(error).__name__
        raise RefusalError("unreadable image", f"{name}: {detail}") from None
    except MemoryError:
        # numpy makes room for what an array's header says before it reads it.
        raise RefusalError("oversized image", f"{name}: an array that no memory holds") from None
    found = f"features {features.shape} {features.dtype} and boxes {boxes.shape} {boxes.dtype}"
    is_floats = features.dtype.kind == boxes.dtype.kind == "f"
    if not is_floats or features.ndim != 2 or not features.size or boxes.shape != (len(features), 4):
        raise RefusalError("unreadable image", f"{name}: {found}, wanted floats (R, D) and (R, 4)")
    if not np.isfinite(features).all():
        raise RefusalError("unreadable image", f"{name}: NaN or infinity in its features")
    if not ((boxes >= -BOX_TOLERANCE) & (boxes <= 1 + BOX_TOLERANCE)).all():
        raise RefusalError("unreadable image", f"{name}: boxes that are not scaled to [0, 1]")


def fit_times(segments: tuple[Segment, ...] | None, seconds: float, kind: str) -> tuple[Segment, ...] | None:
    """Segments within an utterance of so many seconds, without those of no length.

    Raises RefusalError where one is outside.
    """
    if segments is None:
        return None
    for label, start, end in segments:
        if not -TIME_TOLERANCE <= start <= end <= seconds + TIME_TOLERANCE:
            detail = f"{kind} {label!r} from {start:g} to {end:g} s of {seconds:.3f} s"
            raise RefusalError("times outside the file", detail)
    fitted = ((label, max(0.0, start), min(end, seconds)) for label, start, end in segments)
    return tuple((label, start, end) for label, start, end in fitted if start < end)
