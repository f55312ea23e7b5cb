"""Which audio files are meant: what was typed, with folders and lists spelt out."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

# Also what the server cannot read: such a file is refused, not overlooked.
AUDIO_SUFFIXES = (
    "aac", "aif", "aifc", "aiff", "amr", "au", "caf", "flac", "m4a", "mp3", "mp4", "nist", "oga", "ogg", "opus",
    "rf64", "snd", "sph", "w64", "wav", "webm", "wma",
)


def find_files(given: Sequence[str]) -> list[str]:
    """Every file, each once, in the order given; a folder's by name.

    A folder stands for the audio files in it and below, @list for the paths in that file, one a line. Raises
    ValueError on one line where there is nothing.
    """
    typed = [path for entry in given for path in (read_list(entry[1:]) if entry.startswith("@") else [entry])]
    missing = [path for path in typed if not os.path.exists(path)]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"{missing[0]}{more}: found nothing there, wanted audio files or folders: correct the path")
    files = list(dict.fromkeys(file for path in typed for file in files_in(path)))
    if not files:
        raise ValueError(f"{' '.join(given)}: found no audio file, wanted at least one: name another folder or list")
    return files


def read_list(path: str) -> list[str]:
    """The paths in a list, as if each had been typed."""
    if not os.path.isfile(path):
        raise ValueError(f"@{path}: found no such file, wanted a list of paths, one a line: correct it")
    # Paths are bytes; those that are not UTF-8 come through all the same.
    text = Path(path).read_text(encoding="utf-8", errors="surrogateescape")
    return [line for line in text.splitlines() if line.strip()]


def files_in(path: str) -> Iterator[str]:
    """The file itself, or the audio files in and below a folder; what is hidden is left out."""
    if not os.path.isdir(path):
        if not os.path.isfile(path):
            raise ValueError(f"{path}: found something that is no file, wanted audio: name a file or a folder")
        yield path
        return
    for folder, folders, names in os.walk(path, onerror=complain):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if os.path.splitext(name)[1].lower()[1:] in AUDIO_SUFFIXES and not name.startswith("."):
                yield os.path.join(folder, name)


def complain(error: OSError) -> None:
    """A folder that cannot be read holds files that would be overlooked."""
    raise error
